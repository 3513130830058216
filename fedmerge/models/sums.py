"""The sum of a version's updates, kept beside it, so that the next version costs one update's decoding and not all.

It is a copy of what the updates say, of use to whoever wrote it alone: who can't tell whether it is still whole checks
the version that it leads to, and drops it when that is another.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from fedmerge.delta.task_vector import UpdatedModel, delta_schema
from fedmerge.errors import InputError, reporting_os_errors
from fedmerge.models.weights import WeightsWriter, writing_weights
from fedmerge.statements import UpdateRef
from fedmerge.tensors import DTYPE_NAMES, WEIGHTS, Checkpoint, TensorSpec, schema_of


class RunningSum:
    """The fp32 sum of the first updates of a version, in `folder`. There is one at most, but while another is made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, updates: Sequence[UpdateRef]) -> tuple[int, Checkpoint | None]:
        """Return of how many of the first `updates` there is a sum, and the sum; 0 and None without one."""
        present = {path.name for path in self._folder.glob("*")}
        summed = [(number, name) for number, name in enumerate(_names(updates), 1) if name in present]
        for number, name in reversed(summed):
            with suppress(InputError):  # not whole
                return number, Checkpoint(self._folder / name)
        return 0, None

    @contextmanager
    def keeping(self, updates: Sequence[UpdateRef], model: UpdatedModel) -> Iterator[UpdatedModel]:
        """Give the `model` that `updates` lead to, whose sum is written while the block reads all of it.

        When the block succeeds it takes the place of any other. Raises `ResourceError` when the disk does not take it.
        """
        *_, name = _names(updates)
        target = self._folder / name
        if target.exists():
            yield model
            return
        partial = target.with_suffix(".partial")
        with reporting_os_errors(target):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        specs = delta_schema(schema_of(model.base))
        schema = {key: TensorSpec(spec.shape, DTYPE_NAMES[torch.float32]) for key, spec in specs.items()}
        try:
            with writing_weights(partial, schema, {WEIGHTS: list(schema)}) as writer:
                yield _Written(model, writer)
            with reporting_os_errors(target):
                partial.rename(target)
                for other in self._folder.iterdir():
                    if other != target:
                        shutil.rmtree(other)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def clear(self) -> None:
        """Forget what is there."""
        with reporting_os_errors(self._folder):
            shutil.rmtree(self._folder, ignore_errors=True)


class _Written(UpdatedModel):
    """A model, each of whose changes is written when it is first computed."""

    def __init__(self, model: UpdatedModel, writer: WeightsWriter) -> None:
        super().__init__(model.base, model.updates)
        self._writer, self._missing = writer, set(delta_schema(schema_of(model.base)))

    def change(self, name: str) -> Tensor:
        change = super().change(name)
        if name in self._missing:
            self._missing.remove(name)
            self._writer.write(name, 0, change.reshape(-1))
        return change


def _names(updates: Sequence[UpdateRef]) -> Iterator[str]:
    """Yield what stands for the first update, the first two, and so on: how to decode each is part of it."""
    digest = hashlib.sha256()
    for update in updates:
        digest.update(update.model_dump_json().encode() + b"\n")
        yield digest.hexdigest()
