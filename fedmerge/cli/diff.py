"""`fedmerge diff`: show how fine-tunes of one base differ, and what that means for merging them.

A fine-tune is a model, an adapter, or a delta file as nodes keep and send them. What a delta file says of itself is
believed here: nothing is merged, and an encoding that is not what it claims does not decode.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.markup import escape
from rich.table import Table

from fedmerge.cli.output import JsonFlag, print_json, print_problem, print_table, printable, stderr, stdout
from fedmerge.errors import ConfigError

if TYPE_CHECKING:
    from fedmerge.merge.measure import Agreement, Interference
    from fedmerge.tensors import Checkpoint, Schema, TensorMap


def diff(
    models: Annotated[
        tuple[Path, ...],
        Parameter(name="MODEL", help="Fine-tunes of the base: directories of models or adapters, or delta files."),
    ],
    /,
    *,
    base: Annotated[Path, Parameter(help="The directory of the model they were tuned from.")],
    plot: Annotated[
        Path | None, Parameter(help="Write heat maps of cosines and sign conflicts here: FILE.svg or FILE.png.")
    ] = None,
    seed: Annotated[int, Parameter(help="The plan's [merge] seed, for seeded masks.", validator=Number(gte=0))] = 0,
    json: JsonFlag = False,
) -> None:
    """Show how fine-tunes of one base model interfere: angles, sign conflicts and lengths. Nothing is merged."""
    names = _names(models)
    if plot is not None and plot.suffix not in {".svg", ".png"}:
        raise ConfigError(f"--plot {plot}: expected a name that ends in .svg or .png")
    from fedmerge.files import write_new
    from fedmerge.merge.measure import advice, measure
    from fedmerge.tensors import Checkpoint

    origin = Checkpoint(base)
    found = measure({name: _open(path, origin, name, seed) for name, path in zip(names, models, strict=True)})
    sent = any(path.is_file() for path in models)
    notes = advice(found, dtype=None if sent else main_dtype(origin.schema))
    if plot is not None:
        write_new(plot, _drawn(found, plot.suffix), if_exists="choose another --plot")
    if json:
        print_json({**found.to_dict(), "warnings": notes})
        return
    _show(found)
    for note in notes:
        print_problem("warning", note, style="yellow")
    if plot is not None:
        stderr.print(f"wrote {printable(str(plot))}", markup=False)


def _names(models: tuple[Path, ...]) -> list[str]:
    """Return what to call the models: directory names, or paths where names are the same."""
    paths = Counter(str(path) for path in models)
    twice = next((path for path, count in paths.items() if count > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice}: given twice")
    names = [path.name for path in models]
    return names if len({*names, ""}) > len(names) else [str(path) for path in models]


def _open(path: Path, base: Checkpoint, name: str, seed: int) -> TensorMap:
    """Return the task vector of a fine-tune or of a delta file, without the statistics that came with it."""
    from fedmerge.cli.inspect import mask_seed
    from fedmerge.delta.adapter import open_tuned
    from fedmerge.delta.frame import DeltaFile, open_header
    from fedmerge.merge.statistics import SEPARATOR, STATISTICS, statistics_schema, task_vector_of

    if not path.is_file():
        return open_tuned(path, base, where=name)[1]
    _, header = open_header(path, max_frame_bytes=1 << 62)
    codec = header.codec
    prefixes = {tensor.partition(SEPARATOR)[0] for tensor in header.tensors.keys() - base.schema.keys()}
    kind = next((kind for kind in STATISTICS if kind in prefixes), None)
    side = statistics_schema(kind, base.schema)
    drawn_from = mask_seed(path, seed) if codec.sparsify == "seeded" else 0
    return task_vector_of(DeltaFile(path, base.schema, codec, seed=drawn_from, side=side), kind)


def main_dtype(schema: Schema) -> str:
    """Return the floating dtype that most entries have, as safetensors names it."""
    counts: Counter[str] = Counter()
    for spec in schema.values():
        if spec.is_float:
            counts[spec.dtype] += spec.num_elements
    return counts.most_common(1)[0][0] if counts else "F32"


MEASURES = {
    "Cosine of task vectors": "cosine",
    "Sign conflict": "conflict",
    "Sign conflict by magnitude": "weighted_conflict",
}


def _drawn(found: Interference, suffix: str) -> bytes:
    from fedmerge.cli.heatmap import Panel, png_map, svg_map

    names = [model.name for model in found.models]
    layers = [layer.name for layer in found.layers]
    agreements = {frozenset(pair): agreement for pair, agreement in found.pairs.items()}

    def of_pair(value: str, a: str, b: str) -> float | None:
        alone = 1.0 if value == "cosine" else 0.0
        return alone if a == b else getattr(agreements[frozenset((a, b))], value)

    panels = [
        Panel(caption, names, names, [[of_pair(value, a, b) for b in names] for a in names])
        for caption, value in MEASURES.items()
    ]
    if found.pairs:
        by_layer = [[getattr(layer.agreement, value) for value in MEASURES.values()] for layer in found.layers]
        panels.append(Panel("Mean pair, by layer", layers, ["cosine", "conflict", "by magnitude"], by_layer))
    draw = svg_map if suffix == ".svg" else png_map
    return draw("How the task vectors of the fine-tunes agree", panels)


def _show(found: Interference) -> None:
    models = _table("model", "norm", "share of norms", "unchanged")
    for model in found.models:
        models.add_row(_cell(model.name), f"{model.norm:.4g}", f"{model.share:.1%}", f"{model.unchanged:.1%}")
    agreement = ("cosine", "sign conflict", "weighted")
    pairs = _table("pair", *agreement)
    for names, pair in found.pairs.items():
        pairs.add_row(_cell(", ".join(names)), *_agreement(pair))
    pairs.add_row("mean", *_agreement(found.agreement))
    layers = _table("layers", "share of squared norm", *agreement)
    for layer in found.layers:
        layers.add_row(_cell(layer.name), f"{layer.norm_share:.1%}", *_agreement(layer.agreement))
    for table in (models, pairs, layers) if found.pairs else (models, layers):
        print_table(table)
    if found.mean_length is not None:
        stdout.print(f"the plain mean is {found.mean_length:.2f} times as long as the task vectors are")


def _table(first: str, *rest: str) -> Table:
    table = Table(first)
    for heading in rest:
        table.add_column(heading, justify="right")
    return table


def _cell(text: str) -> str:
    return escape(printable(text))


def _agreement(agreement: Agreement) -> list[str]:
    cosine = "-" if agreement.cosine is None else f"{agreement.cosine:z.3f}"
    shares = (agreement.conflict, agreement.weighted_conflict)
    return [cosine, *("-" if share is None else f"{share:.1%}" for share in shares)]
