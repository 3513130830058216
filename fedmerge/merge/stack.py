"""The stack of one parameter's task vectors as every method sees it: rows in fp32 or fp64, taken block by block.

    K  number of task vectors (rows)      N  number of elements of the parameter

Element-wise work goes through blocks of columns that fit into a core's second-level cache, and only through sums,
products and comparisons that IEEE 754 rounds in one way. A merge therefore has the same bits whatever the block size,
the number of threads or the processor, which is what lets anyone replay it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fedmerge.delta.task_vector import working_dtype
from fedmerge.errors import InputError

BLOCK_ELEMENTS = 1 << 16


def as_rows(deltas: Tensor) -> Tensor:
    """Return `deltas` (K, *shape) as rows (K, N) in fp32, or fp64 if they are fp64; a view where nothing changes.

    Raises `InputError` when there is no row or the entries are not floating-point numbers.
    """
    if deltas.ndim == 0 or deltas.shape[0] == 0:
        raise InputError("nothing to merge: the stack of task vectors is empty")
    require_floats(deltas)
    return deltas.detach().to(working_dtype(deltas)).reshape(deltas.shape[0], deltas[0].numel()).contiguous()


def require_floats(delta: Tensor) -> None:
    """Raise `InputError` unless `delta` has a floating-point dtype."""
    if not delta.is_floating_point():
        raise InputError(
            f"a task vector of dtype {delta.dtype} can't be merged",
            hint="integer buffers have no difference to merge; leave them out of the delta",
        )


def row_weights(weights: Tensor, num_rows: int, dtype: torch.dtype) -> list[float]:
    """Return `weights` (K,) as numbers, rounded to the `dtype` the merge runs in.

    Raises `InputError` unless there is one finite weight per row.
    """
    if weights.shape != (num_rows,):
        raise InputError(
            f"{num_rows} task vectors need {num_rows} weights, not a tensor of shape {list(weights.shape)}"
        )
    values: list[float] = weights.detach().to(dtype).tolist()
    if not all(math.isfinite(value) for value in values):
        raise InputError(f"weights must be finite, not {values}")
    return values


def shares(weights: list[float]) -> list[float]:
    """Return `weights` divided by their sum; raise `InputError` when that sum is below 1e-8 in magnitude."""
    total = math.fsum(weights)
    if abs(total) < 1e-8:
        raise InputError(
            f"weights {weights} sum to {total:g} and can't be normalised",
            hint="give at least one task vector a positive weight, or use a method that does not normalise",
        )
    return [weight / total for weight in weights]


def blocks(num_elements: int) -> Iterator[slice]:
    """Yield the slices that cover `num_elements` columns."""
    for start in range(0, num_elements, BLOCK_ELEMENTS):
        yield slice(start, min(start + BLOCK_ELEMENTS, num_elements))


def l1_norm(row: Tensor) -> float:
    """Return the sum of magnitudes in fp64, added by numpy, whose order does not depend on the number of threads."""
    return math.fsum(row[block].abs().to(torch.float64).cpu().numpy().sum() for block in blocks(row.numel()))
