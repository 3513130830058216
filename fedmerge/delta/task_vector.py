"""Step 1, subtract, and its inverse, apply: a task vector is tuned minus base.

Differences are formed in fp32 (fp64 when an input is fp64), never in the checkpoint's own 16-bit type, and are
rounded once, when they are applied ("Editing models with task arithmetic", arXiv 2212.04089).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedmerge.errors import InputError
from fedmerge.tensors import Schema, TensorMap, require_same_schema, schema_of

BLOCK_ELEMENTS = 1 << 16


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that arithmetic on `tensors` runs in: fp32, or fp64 if any of them is fp64."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def delta_schema(schema: Schema) -> Schema:
    """Return the part of a model's schema that has a task vector: its floating-point tensors, sorted by name."""
    return {name: spec for name, spec in sorted(schema.items()) if spec.is_float}


class TaskVector(Mapping[str, Tensor]):
    """The task vector `tuned - base` as a tensor map: fp32 (or fp64) tensors, each computed when it is asked for.

    Made by `subtract` from `tuned` and `base`; `schema` is the base's, of these tensors. Reading one raises
    `InputError` when the fine-tune holds NaN or infinite values in it.
    """

    def __init__(self, tuned: TensorMap, base: TensorMap, *, where: str) -> None:
        self.tuned, self.base, self._where = tuned, base, where
        schema = schema_of(base)
        self.schema = delta_schema(schema)
        require_same_schema(self.schema, delta_schema(schema_of(tuned)), where=where)
        # Libraries differ on whether constant buffers, such as position ids, are saved: absent ones stay the base's.
        for name in schema.keys() & tuned.keys() - self.schema.keys():
            if not torch.equal(tuned[name], base[name]):
                raise InputError(f"{where}: integer tensor {name} differs from the base's and can't be merged")

    def __getitem__(self, name: str) -> Tensor:
        change = difference(self.tuned[name], self.base[name])
        # The sum is finite if all its terms are, but for sums beyond the range of the dtype: look closer only then.
        if not torch.isfinite(change.sum()) and not torch.isfinite(change).all():
            num_bad = int((~torch.isfinite(change)).sum())
            raise InputError(
                f"{self._where}: {name} holds {num_bad} NaN or infinite values",
                hint="training diverged; lower the learning rate",
            )
        return change

    def __iter__(self) -> Iterator[str]:
        return iter(self.schema)

    def __len__(self) -> int:
        return len(self.schema)


def subtract(tuned: TensorMap, base: TensorMap, *, where: str = "fine-tuned model") -> TaskVector:
    """Return the task vector `tuned - base`; `where` names the fine-tune in errors.

    Raises `ModelMismatch` when the two are not the same architecture, and `InputError` when an integer tensor changed:
    it has no difference that could be merged.
    """
    return TaskVector(tuned, base, where=where)


def apply_one(base: Tensor, update: Tensor) -> Tensor:
    """Return `base + update` for one tensor, added in fp32 (or fp64) and rounded once to the base's dtype."""
    dtype = working_dtype(base, update)
    result = torch.empty_like(base, memory_format=torch.contiguous_format)
    flat, before, change = result.view(-1), base.reshape(-1), update.reshape(-1)
    for block in _blocks(flat):
        flat[block] = before[block].to(dtype) + change[block]
    return result


def difference(after: Tensor, before: Tensor) -> Tensor:
    """Return `after - before` for one tensor, in fp32 (or fp64 if either is)."""
    dtype = working_dtype(after, before)
    change = torch.empty(after.shape, dtype=dtype, device=after.device)
    flat, tuned, base = change.view(-1), after.reshape(-1), before.reshape(-1)
    for block in _blocks(flat):
        flat[block].copy_(tuned[block]).sub_(base[block].to(dtype))
    return change


def _blocks(flat: Tensor) -> Iterator[slice]:
    """Yield slices whose upcast copies stay in the cache, instead of taking memory of a tensor's size."""
    for start in range(0, flat.numel(), BLOCK_ELEMENTS):
        yield slice(start, start + BLOCK_ELEMENTS)


class UpdatedModel(Mapping[str, Tensor]):
    """A model version as a tensor map: the base plus a sequence of updates, computed tensor by tensor when asked for.

    Updates are summed in fp32 (or fp64) in their order and rounded once to the base's dtype, so that small updates are
    not lost in a 16-bit model over many rounds, and every party that does this arrives at the same bits.
    """

    def __init__(self, base: TensorMap, updates: Sequence[TensorMap]) -> None:
        self.base = base
        self.updates = updates

    def __getitem__(self, name: str) -> Tensor:
        before = self.base[name]
        if not before.is_floating_point() or not self.updates:
            return before
        return apply_one(before, self.change(name))

    def change(self, name: str) -> Tensor:
        """Return the sum of all updates of one tensor, before it is rounded; there is at least one."""
        total = self.updates[0][name]
        for update in self.updates[1:]:
            total = total + update[name]
        return total

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.base))

    def __len__(self) -> int:
        return len(self.base)
