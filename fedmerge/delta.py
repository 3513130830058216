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


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that arithmetic on `tensors` runs in: fp32, or fp64 if any of them is fp64."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def delta_schema(schema: Schema) -> Schema:
    """Return the part of a model's schema that has a task vector: its floating-point tensors, sorted by name."""
    return {name: spec for name, spec in sorted(schema.items()) if spec.is_float}


def subtract(tuned: TensorMap, base: TensorMap) -> dict[str, Tensor]:
    """Return the task vector `tuned - base`, by name: fp32 (or fp64) tensors of the base's shapes.

    Raises `ModelMismatch` when the two are not the same architecture, and `InputError` when an integer tensor
    changed (it has no difference that could be merged) or the fine-tune holds NaN or Inf.
    """
    schema = schema_of(base)
    require_same_schema(schema, schema_of(tuned), where="fine-tuned model")
    result: dict[str, Tensor] = {}
    for name, spec in schema.items():
        after, before = tuned[name], base[name]
        if not spec.is_float:
            if not torch.equal(after, before):
                raise InputError(f"fine-tuned model: integer tensor {name} differs from the base and can't be merged")
            continue
        dtype = working_dtype(after, before)
        difference = after.to(dtype) - before.to(dtype)
        if not torch.isfinite(difference).all():
            num_bad = int((~torch.isfinite(difference)).sum())
            raise InputError(
                f"fine-tuned model: {name} holds {num_bad} NaN or infinite values",
                hint="training diverged; lower the learning rate",
            )
        result[name] = difference
    return result


def apply_one(base: Tensor, update: Tensor) -> Tensor:
    """Return `base + update` for one tensor, added in fp32 (or fp64) and rounded once to the base's dtype."""
    dtype = working_dtype(base, update)
    return (base.to(dtype) + update.to(dtype)).to(base.dtype)


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
        total = self.updates[0][name]
        for update in self.updates[1:]:
            total = total + update[name]
        return apply_one(before, total)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.base))

    def __len__(self) -> int:
        return len(self.base)
