"""Step 10, merge: apply a method to every parameter, streaming, so that no model is ever in memory whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedmerge.delta import working_dtype
from fedmerge.errors import InputError, ModelMismatch
from fedmerge.merge.average import fold
from fedmerge.merge.layers import Value
from fedmerge.merge.methods import LINEAR, METHODS, NEEDS_BASE
from fedmerge.merge.recipe import Plan, Recipe
from fedmerge.merge.stack import require_floats, row_weights
from fedmerge.seeds import derive_seed
from fedmerge.tensors import TensorMap


def merge_deltas(
    deltas: Sequence[TensorMap],
    weights: Sequence[Value],
    recipe: Recipe,
    *,
    base: TensorMap | None = None,
    seed: int = 0,
    scales: Sequence[float] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield `(name, merged task vector)` for every parameter, sorted by name, in fp32 (fp64 where a delta is fp64).

    `deltas` are K task vectors with the same names and shapes; each tensor is asked for once, one parameter after the
    other, and used up before the next is asked for, so maps may decode lazily and into one buffer. `weights` are K
    numbers, or values that vary over the model (`fedmerge.merge.layers`), `scales` K factors on the deltas (norm
    clipping). Linear methods hold one tensor at a time, the others a stack of K. The outcome is
    `METHODS[recipe.method]` on each stack, with the seed `derive_seed(seed, method, name)`, and depends on the order of
    the deltas: sort them first.

    Raises `InputError` when the numbers of deltas, weights and scales differ, and `ModelMismatch` when names (at once)
    or shapes (when reached) do; `ConfigError` when a value varies by a pattern that fits no name.
    """
    scales = [1.0] * len(deltas) if scales is None else scales
    if not deltas:
        raise InputError("nothing to merge: no task vectors")
    if not len(deltas) == len(weights) == len(scales):
        raise InputError(f"{len(deltas)} task vectors came with {len(weights)} weights and {len(scales)} scales")
    names = sorted(deltas[0])
    for index, delta in enumerate(deltas):
        odd = sorted(set(names) ^ set(delta))
        if odd:
            problem = "misses" if odd[0] in names else "has unknown"
            raise ModelMismatch(f"task vector {index} {problem} {odd[0]}, unlike task vector 0 ({len(odd)} such names)")
    if base is not None and not base.keys() >= set(names):
        raise ModelMismatch(f"the base model misses {min(set(names) - base.keys())}, which the task vectors have")
    stack = _Stack(len(deltas))
    plan = Plan(recipe, weights, names)

    def merge_one(name: str) -> Tensor:
        tensors, params = _read(name, deltas, scales), plan.params(name)
        weight = torch.tensor(plan.weights(name), dtype=torch.float64)

        def coefficients(dtype: torch.dtype) -> list[float]:
            return LINEAR[recipe.method](row_weights(weight, len(deltas), dtype), **params)

        if recipe.method in LINEAR:
            return fold(tensors, coefficients)
        return METHODS[recipe.method](
            stack.fill(tensors),
            weight,
            base=base[name] if base is not None and recipe.method in NEEDS_BASE else None,
            seed=derive_seed(seed, recipe.method, name),
            **params,
        )

    return ((name, merge_one(name)) for name in names)


def _read(name: str, deltas: Sequence[TensorMap], scales: Sequence[float]) -> Iterator[Tensor]:
    """Yield the tensor called `name` of each delta, checked and scaled, holding none of them."""
    shape: torch.Size | None = None
    for index, (delta, scale) in enumerate(zip(deltas, scales, strict=True)):
        tensor = delta[name]
        require_floats(tensor)
        shape = tensor.shape if shape is None else shape
        if tensor.shape != shape:
            raise ModelMismatch(f"{name} has shape {list(tensor.shape)} in task vector {index}, not {list(shape)}")
        yield tensor if scale == 1 else tensor.to(working_dtype(tensor)) * scale


class _Stack:
    """A buffer for K tensors of one parameter, used again for the next: fresh memory costs more than a copy."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.buffer = torch.empty(0)

    def fill(self, tensors: Iterator[Tensor]) -> Tensor:
        """Return the stack (K, *shape) in fp32 (or fp64) that is valid until the next call."""
        stack = torch.empty(0)
        for row, tensor in enumerate(tensors):
            if row == 0:
                stack = self._view(tensor.shape, working_dtype(tensor))
            elif working_dtype(tensor, stack) != stack.dtype:
                stack = stack.to(torch.float64)
            stack[row].copy_(tensor)
        return stack

    def _view(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        num_elements = self.num_rows * shape.numel()
        if self.buffer.numel() < num_elements or self.buffer.dtype != dtype:
            self.buffer = torch.empty(num_elements, dtype=dtype)
        return self.buffer[:num_elements].view(self.num_rows, *shape)
