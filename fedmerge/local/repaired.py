"""A merge of aligned checkpoints with REPAIR: merged, measured on data layer after layer, and written corrected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from fedmerge.delta.adapter import is_adapter
from fedmerge.errors import ConfigError
from fedmerge.local.assemble import Assembly
from fedmerge.merge import Workers, Write
from fedmerge.models.weights import writing_weights
from fedmerge.rebasin import Moments, goal_moments, repair, repaired_layers
from fedmerge.tensors import Checkpoint


def merge_repaired(
    assembly: Assembly,
    measure: Callable[[Path], Moments],
    write: Write,
    *,
    seed: int,
    workers: Workers,
    scratch: Path,
) -> int:
    """Merge, `write` each tensor of the repaired model, and return how many layers were repaired.

    The goal is the mean of the models' moments by their weights. `measure` returns the moments of a model directory;
    those of the merged model and its stages lie below `scratch`. Raises `ConfigError` for models that can't be
    measured and for weights that vary over the model, and what `repaired_layers` and `goal_moments` raise.
    """
    sources = assembly.job.slices[0].sources
    for source in sources:
        if is_adapter(source.model):
            raise ConfigError(f"{source.model}: an adapter can't be measured by itself: REPAIR needs whole models")
        if not isinstance(source.weight, int | float):
            raise ConfigError("weights that vary over the model do not go with REPAIR")
    stages = repaired_layers(assembly.schema, assembly.groups)
    goals = goal_moments(
        [measure(source.model) for source in sources],
        [source.weight for source in sources],
        [assembly.alignments[source.model] for source in sources],
        assembly.groups,
    )
    with TemporaryDirectory(prefix=".fedmerge-repair-", dir=scratch) as folder:
        directory, stage = Path(folder) / "merged", Path(folder) / "stage"
        assembly.write(directory, seed=seed, workers=workers)
        merged = Checkpoint(directory)

        def measure_changed(changed: Mapping[str, Tensor]) -> Moments:
            if not changed:
                return measure(directory)
            stage.mkdir(exist_ok=True)
            with writing_weights(stage, merged.schema, merged.shards()) as writer:
                for name in merged:
                    writer.write(name, 0, changed.get(name, merged[name]).reshape(-1))
            assembly.write_side_files(stage)
            return measure(stage)

        changed = repair(merged, goals, stages, measure_changed)
        for name in merged:
            write(name, 0, changed.get(name, merged[name]).reshape(-1))
    return len(changed) // 2
