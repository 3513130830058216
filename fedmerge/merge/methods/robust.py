"""Robust means: coordinate-wise median and trimmed mean, which a minority of wild task vectors can't move far.

"Byzantine-robust distributed learning: towards optimal statistical rates", arXiv 1803.01498.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedmerge.merge.order import mean_of_middle
from fedmerge.merge.parameters import Trimmed
from fedmerge.merge.stack import as_rows, blocks, row_weights


def median(deltas: Tensor, weights: Tensor, *, base: Tensor | None = None, seed: int = 0) -> Tensor:
    """Return the median of each entry over `deltas` (K, *shape): (*shape,) in fp32 (or fp64 if they are).

    Coordinate-wise median, arXiv 1803.01498; for even K the mean of the two middle values. It holds against fewer than
    K / 2 arbitrary task vectors. The weights (K,) are checked, not used: a node could claim any. Raises `InputError`
    when they do not fit the stack.
    """
    return _mean_of_middle(deltas, weights, (len(deltas) - 1) // 2)


def trimmed_mean(
    deltas: Tensor, weights: Tensor, *, base: Tensor | None = None, seed: int = 0, trimmed: Trimmed = 0.2
) -> Tensor:
    """Return the mean of each entry over `deltas` (K, *shape) but its extremes: (*shape,) in fp32 (fp64 if they are).

    Coordinate-wise trimmed mean, arXiv 1803.01498: floor(`trimmed` * K) values go at either end, and it holds against
    as many arbitrary task vectors; with fewer than 1 / `trimmed` nodes it is the plain mean. The weights (K,) are
    checked, not used: a node could claim any. Raises `InputError` when they do not fit the stack.
    """
    return _mean_of_middle(deltas, weights, math.floor(trimmed * len(deltas)))


def mean_around_median(
    deltas: Tensor, weights: Tensor, *, base: Tensor | None = None, seed: int = 0, trimmed: Trimmed = 0.2
) -> Tensor:
    """Return the mean of each entry's values nearest to their median: (*shape,) in fp32 (or fp64 if `deltas` are).

    Bulyan's second half, arXiv 1802.07927: of the values of `deltas` (K, *shape) the 2 floor(`trimmed` * K) farthest
    from the median go, on whichever side they are; of two as far, the larger goes. For K = n - 2 f chosen task vectors
    it is Bulyan with `trimmed` = f / K. The weights (K,) are checked, not used. Raises `InputError` when they do not
    fit the stack.
    """
    rows = as_rows(deltas)
    row_weights(weights, len(rows), rows.dtype)
    num_kept = len(rows) - 2 * math.floor(trimmed * len(rows))
    merged = torch.empty_like(rows[0])
    for block in blocks(merged.numel()):
        ordered = rows[:, block].sort(dim=0, stable=True).values
        middle = (ordered[(len(rows) - 1) // 2] + ordered[len(rows) // 2]) / 2
        nearest = (ordered - middle).abs().argsort(dim=0, stable=True)[:num_kept]
        kept = ordered.gather(0, nearest.sort(dim=0).values)
        total = kept[0].clone()
        for values in kept[1:]:
            total += values
        merged[block] = total / num_kept
    return merged.view(deltas.shape[1:])


def _mean_of_middle(deltas: Tensor, weights: Tensor, num_trimmed: int) -> Tensor:
    """Return the mean over `deltas` (K, *shape) of each entry's values but the `num_trimmed` at either end."""
    rows = as_rows(deltas)
    row_weights(weights, len(rows), rows.dtype)
    if rows.dtype == torch.float32 and rows.device.type == "cpu":
        return torch.from_numpy(mean_of_middle(rows.numpy(), num_trimmed)).view(deltas.shape[1:])
    merged = torch.empty_like(rows[0])
    for block in blocks(merged.numel()):
        # Stable, so that zeros of either sign come out in one order.
        ordered = rows[:, block].sort(dim=0, stable=True).values[num_trimmed : len(rows) - num_trimmed]
        total = ordered[0]
        for values in ordered[1:]:
            total += values
        merged[block] = total / len(ordered)
    return merged.view(deltas.shape[1:])
