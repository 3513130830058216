"""Linear methods, sum_i c_i * delta_i: weighted average and task arithmetic.

Each is a rule for the coefficients c_i and one shared fold, which takes one task vector at a time; the engine uses the
same two parts, so its memory does not grow with the number of nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fedmerge.delta import working_dtype
from fedmerge.errors import InputError
from fedmerge.merge.parameters import Lambda, Normalize
from fedmerge.merge.stack import BLOCK_ELEMENTS, blocks, require_floats, row_weights, shares


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


def fold(deltas: Iterable[Tensor], coefficients: Callable[[torch.dtype], Sequence[float]]) -> Tensor:
    """Return the sum of coefficient * delta over `deltas`, in their order, holding one delta at a time.

    The deltas have one shape and any floating dtype. `coefficients` is told the dtype that the merge runs in: fp32, or
    fp64 if the first delta is fp64; the result is fp64 if any is. Raises `InputError` when there are no deltas or one
    is not floating-point.
    """
    total: Tensor | None = None
    factors: Sequence[float] = ()
    for index, delta in enumerate(deltas):
        require_floats(delta)
        dtype, row = working_dtype(delta), delta.detach().reshape(-1)
        if total is None:
            factors = coefficients(dtype)
            total = torch.empty(delta.shape, dtype=dtype, device=delta.device)
            _scale(row, factors[index], out=total.view(-1))
        else:
            total = total.to(torch.promote_types(total.dtype, dtype))
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
