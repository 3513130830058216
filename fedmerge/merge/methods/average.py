"""Averages: the linear methods, sum_i c_i * delta_i, and the mean over those who sent an entry.

A linear method is a rule for the coefficients c_i and one shared fold, which takes one task vector at a time; the
engine uses the same two parts, so its memory does not grow with the number of nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fedmerge.delta.sparsify import Sparse
from fedmerge.delta.task_vector import working_dtype
from fedmerge.errors import InputError
from fedmerge.merge.parameters import Lambda, Normalize
from fedmerge.merge.stack import BLOCK_ELEMENTS, as_rows, blocks, require_floats, row_weights, shares


def fedavg(deltas: Tensor, weights: Tensor, *, base: Tensor | None = None, seed: int = 0) -> Tensor:
    """Return the mean of `deltas` (K, *shape) by `weights` (K,), whatever their sum: (*shape,) in fp32 (or fp64).

    Federated averaging, arXiv 1602.05629; with equal weights a uniform model soup, arXiv 2203.05482. Raises
    `InputError` when the weights sum to less than 1e-8 in magnitude.
    """
    return fold(deltas, lambda dtype: fedavg_coefficients(row_weights(weights, len(deltas), dtype)))


def fedavg_coefficients(weights: list[float]) -> list[float]:
    """Return the coefficient of each task vector in `fedavg`."""
    return shares(weights)


def task_arithmetic(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    lambda_: Lambda = 1.0,
    normalize: Normalize = False,
) -> Tensor:
    """Return `lambda_` times the weighted sum of `deltas` (K, *shape): (*shape,) in fp32 (or fp64 if they are).

    Task arithmetic, arXiv 2212.04089. The weights (K,) are used as they are: ones give the paper's sum (whose lambda is
    0.3 to 0.4 for eight tasks), weights that sum to 1 give the mean, negative ones unlearn. Raises `InputError` when
    `normalize` is set and the weights sum to less than 1e-8 in magnitude.
    """

    def coefficients(dtype: torch.dtype) -> list[float]:
        values = row_weights(weights, len(deltas), dtype)
        return task_arithmetic_coefficients(values, lambda_=lambda_, normalize=normalize)

    return fold(deltas, coefficients)


def task_arithmetic_coefficients(weights: list[float], *, lambda_: float, normalize: bool) -> list[float]:
    """Return the coefficient of each task vector in `task_arithmetic`."""
    return [lambda_ * weight for weight in (shares(weights) if normalize else weights)]


def contributor_mean(deltas: Tensor, weights: Tensor, *, base: Tensor | None = None, seed: int = 0) -> Tensor:
    """Return of each entry the mean by `weights` (K,) over those of `deltas` (K, *shape) in which it is not zero.

    For sparse task vectors: one that left an entry out says nothing about it, where in `fedavg` it votes for zero. That
    is how SparseLoCo's published code averages, though arXiv 2508.15706 writes 1/K; on dense task vectors it is
    `fedavg`. The result is (*shape,) in fp32 (or fp64 if they are), zero where all are. Raises `InputError` when a
    weight is negative or all are zero.
    """
    rows = as_rows(deltas)
    values = row_weights(weights, len(rows), rows.dtype)
    shares(values)
    if min(values) < 0:
        raise InputError(f"contributor_mean: weights must not be negative, as in {values}")
    merged = torch.empty_like(rows[0])
    for block in blocks(merged.numel()):
        total, divisor = torch.zeros_like(merged[block]), torch.zeros_like(merged[block])
        for row, weight in zip(rows[:, block], values, strict=True):
            total += row * weight
            divisor += (row != 0).to(row.dtype) * weight
        merged[block] = total / torch.where(divisor == 0, 1, divisor)
    return merged.view(deltas.shape[1:])


def fold(
    deltas: Iterable[Tensor | Sparse],
    coefficients: Callable[[torch.dtype], Sequence[float]],
    *,
    shape: torch.Size | None = None,
) -> Tensor:
    """Return the sum of coefficient * delta over `deltas`, in their order, holding one delta at a time.

    A sparse delta is added where it has entries, and `shape` is then needed. That gives the bits that its zeros would
    have given: a sum that begins with +0 is never -0, so that zeros of either sign leave it alone.

    The deltas have one shape and any floating dtype. `coefficients` is told the dtype that the merge runs in: fp32, or
    fp64 if the first delta is fp64; the result is fp64 if any is. Raises `InputError` when there are no deltas or one
    is not floating-point.
    """
    total: Tensor | None = None
    factors: Sequence[float] = ()
    for index, delta in enumerate(deltas):
        row = delta.values if isinstance(delta, Sparse) else delta.detach().reshape(-1)
        require_floats(row)
        dtype = working_dtype(row)
        if total is None:
            factors = coefficients(dtype)
            whole = delta.shape if isinstance(delta, Tensor) else shape
            assert whole is not None
            total = torch.zeros(whole, dtype=dtype, device=row.device)
        total = total.to(torch.promote_types(total.dtype, dtype))
        if isinstance(delta, Sparse):
            product = _scale(row, factors[index], out=torch.empty(row.shape, dtype=total.dtype))
            total.view(-1).index_add_(0, delta.indices, product)
        else:
            _add_scaled(row, factors[index], out=total.view(-1))
    if total is None:
        raise InputError("nothing to merge: no task vectors")
    return total


def _scale(row: Tensor, coefficient: float, *, out: Tensor) -> Tensor:
    """Set `out` (N,) to `coefficient * row`, multiplied and rounded in the dtype of `out`; return it."""
    if row.dtype == out.dtype:
        return torch.mul(row, coefficient, out=out)
    return out.copy_(row).mul_(coefficient)


def _add_scaled(row: Tensor, coefficient: float, *, out: Tensor) -> None:
    """Add `coefficient * row` to `out`, both (N,).

    The product is rounded before it is added: whether `add_(alpha=)` fuses the two depends on the processor.
    """
    scratch = out.new_empty(min(BLOCK_ELEMENTS, out.numel()))
    for block in blocks(out.numel()):
        part = out[block]
        part.add_(_scale(row[block], coefficient, out=scratch[: part.numel()]))
