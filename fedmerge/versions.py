"""Model versions: the base plus each round's update, by reference, and how to open and write one.

A version is what nodes decode: its digest is computed from the published updates, never from the coordinator's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedmerge.codec import Codec
from fedmerge.delta import UpdatedModel, delta_schema
from fedmerge.errors import DigestMismatch, reporting_os_errors
from fedmerge.frame import DeltaFile
from fedmerge.statements import ModelRef, UpdateRef
from fedmerge.tensors import Checkpoint, copy_side_files, model_digest
from fedmerge.weights import writing_weights


def open_model(ref: ModelRef, base: Checkpoint, find_blob: Callable[[UpdateRef], Path]) -> UpdatedModel:
    """Return the model that `ref` describes, to be read tensor by tensor.

    `find_blob` gives the file of an update. Raises `InvalidDelta` when an update does not fit the base. The digest is
    not checked here, since that reads the whole model: see `require_digest`.
    """
    schema = delta_schema(base.schema)
    updates = [
        DeltaFile(find_blob(update), schema, Codec.from_dict(update.codec), seed=int(update.seed))
        for update in ref.updates
    ]
    return UpdatedModel(base, updates)


def require_digest(model: UpdatedModel, ref: ModelRef, *, where: str) -> None:
    """Read the whole model; raise `DigestMismatch` unless it is the version that `ref` names."""
    found = model_digest(model)
    if found != ref.digest:
        raise DigestMismatch(
            f"{where}: the model comes to version {found[:12]}, not {ref.digest[:12]}",
            hint="the base model or an update is not the one the federation uses",
        )


def write_model(model: UpdatedModel, base: Checkpoint, directory: Path) -> None:
    """Write a model version as a Hugging Face directory like the base's: same shards, config and tokenizer.

    Raises `ResourceError` when the disk does not take it.
    """
    with reporting_os_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        copy_side_files(base.directory, directory)
    with writing_weights(directory, base.schema, base.shards()) as writer:
        for name in model:
            writer.write(name, 0, model[name].reshape(-1))
