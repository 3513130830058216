"""Model versions: the base plus each round's update, by reference; how to open and write one, and how to get to one.

A version is what nodes decode: its digest is computed from the published updates, never from the coordinator's memory.
Between versions there are also step files (`fedmerge.models.steps`), one from each to the next and one from the base
every so many rounds. All ways end at the same digest, and who wants a version takes the one that is fewest bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path

from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import DeltaFile
from fedmerge.delta.task_vector import UpdatedModel, delta_schema
from fedmerge.errors import DigestMismatch, InputError, reporting_os_errors
from fedmerge.models.steps import SteppedModel
from fedmerge.models.sums import RunningSum
from fedmerge.models.weights import writing_weights
from fedmerge.statements import FILE_NAME, FileRef, ModelRef, StepRef, UpdateRef
from fedmerge.tensors import PICKLED, Checkpoint, TensorMap, copy_side_files, model_digest
from fedmerge.transparency.merkle import leaves_of, merkle_root


def open_model(
    ref: ModelRef, base: Checkpoint, find_blob: Callable[[UpdateRef], Path], running: RunningSum | None = None
) -> UpdatedModel:
    """Return the model that `ref` describes, to be read tensor by tensor.

    `find_blob` gives the file of an update, of those that the `running` sum does not hold yet. Raises `InvalidDelta`
    when an update does not fit the base. The digest is not checked here, since that reads the whole model: see
    `require_digest`.
    """
    schema = delta_schema(base.schema)
    num_summed, summed = running.open(ref.updates) if running is not None else (0, None)
    updates: list[TensorMap] = [summed] if summed is not None else []
    for update in ref.updates[num_summed:]:
        updates.append(DeltaFile(find_blob(update), schema, Codec.from_dict(update.codec), seed=int(update.seed)))
    return UpdatedModel(base, updates)


def cheapest_route(ref: ModelRef, versions: Collection[str], files: Collection[str]) -> list[StepRef]:
    """Return the steps, in order, that lead to `ref` for the fewest bytes to fetch.

    `versions` are the digests of the versions that are here, beside the base, and `files` the roots of the files. The
    list is empty where the updates cost no more than any steps, and where the version itself is here.
    """

    def cost(file: UpdateRef | StepRef) -> int:
        return 0 if file.root in files else file.num_bytes

    routes: dict[str, tuple[int, list[StepRef]]] = {digest: (0, []) for digest in (ref.base_digest, *versions)}
    # Steps are published in the order of their rounds, so the ways to a version are known before those that go on.
    for step in ref.steps:
        if step.before in routes:
            num_bytes, so_far = routes[step.before]
            num_bytes += cost(step)
            if step.after not in routes or num_bytes < routes[step.after][0]:
                routes[step.after] = num_bytes, [*so_far, step]
    num_bytes, steps = routes.get(ref.digest, (0, []))
    return steps if num_bytes < sum(map(cost, ref.updates)) else []


def follow(steps: list[StepRef], start: Checkpoint, find_blob: Callable[[StepRef], Path]) -> TensorMap:
    """Return the model that `steps` lead to from `start`, to be read tensor by tensor.

    `find_blob` gives the file of a step. Raises `InvalidDelta` when one does not fit the model. The digest is not
    checked here.
    """
    model: TensorMap = start
    for step in steps:
        model = SteppedModel(model, find_blob(step), start.schema)
    return model


def require_digest(model: TensorMap, digest: str, *, where: str) -> None:
    """Read the whole model; raise `DigestMismatch` unless it is version `digest`."""
    found = model_digest(model)
    if found != digest:
        raise DigestMismatch(
            f"{where}: the model comes to version {found[:12]}, not {digest[:12]}",
            hint="the base model or an update is not the one the federation uses",
        )


def write_model(model: TensorMap, base: Checkpoint, directory: Path) -> None:
    """Write a model version as a Hugging Face directory like the base's: same shards, config and tokenizer.

    Raises `ResourceError` when the disk does not take it.
    """
    with reporting_os_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        copy_side_files(base.directory, directory)
    with writing_weights(directory, base.schema, base.shards()) as writer:
        for name in model:
            writer.write(name, 0, model[name].reshape(-1))


def model_files(directory: Path) -> list[FileRef]:
    """Return the plain files of a model directory that a newcomer needs; raise `InputError` for an unusual name."""
    paths = [path for path in sorted(directory.iterdir()) if path.is_file() and not path.name.startswith(".")]
    return [
        FileRef(name=_plain_name(path), root=merkle_root(leaves_of(path)).hex(), num_bytes=path.stat().st_size)
        for path in paths
        if path.suffix not in PICKLED
    ]


def _plain_name(path: Path) -> str:
    if not re.fullmatch(FILE_NAME, path.name):
        raise InputError(
            f"{path}: has a name that can't be sent to nodes",
            hint="rename the file to letters, digits, '.', '-' and '_'",
        )
    return path.name
