"""Model Breadcrumbs: leave out both the outliers and the smallest entries of each task vector, then merge.

"Model Breadcrumbs: scaling multi-task model merging with sparse masks", arXiv 2312.06795.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmerge.merge.methods.average import task_arithmetic
from fedmerge.merge.methods.consensus import Consensus, elect_and_merge
from fedmerge.merge.parameters import Aggregation, Density, Election, Lambda, Normalize, Normalizer, Outliers, ZeroSum
from fedmerge.merge.ranking import Cut, keep, largest, num_middle
from fedmerge.merge.stack import as_rows, blocks, row_weights


def breadcrumbs(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    density: Density = 0.85,
    outliers: Outliers = 0.01,
    lambda_: Lambda = 1.0,
    normalize: Normalize = False,
) -> Tensor:
    """Return task arithmetic on `deltas` (K, *shape) without their two tails: (*shape,) in fp32 (or fp64 if they are).

    Model Breadcrumbs, arXiv 2312.06795. Of each tensor the `outliers` share with the largest magnitudes goes, and of
    the rest the smallest, until the `density` share is left; where the two don't fit together, fewer outliers go. The
    paper keeps what is between the 85 % and 99.3 % percentiles: density=0.143, outliers=0.007, lambda_=0.3. mergekit
    calls `outliers` gamma. Raises `InputError` as `task_arithmetic` does.
    """
    rows = as_rows(deltas)
    scratch = torch.empty_like(rows[0])
    cuts = [find_cuts(row, density, outliers, scratch=scratch) for row in rows]
    kept = torch.empty_like(rows)
    for block in blocks(rows.shape[1]):
        kept[:, block] = middle(rows, cuts, block)
    return task_arithmetic(kept, weights, lambda_=lambda_, normalize=normalize).view(deltas.shape[1:])


def breadcrumbs_ties(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    density: Density = 0.85,
    outliers: Outliers = 0.01,
    lambda_: Lambda = 1.0,
    normalize: Normalize = True,
    election: Election = "mass",
    zero_sum: ZeroSum = "positive",
    normalizer: Normalizer = "weights",
    aggregation: Aggregation = "sum",
) -> Tensor:
    """Return the sign-elected disjoint merge of `deltas` (K, *shape) without their two tails: `ties` on `breadcrumbs`.

    Masks of arXiv 2312.06795, election and merge of arXiv 2306.01708. mergekit's variant is election="weighted",
    normalize=False. Result (*shape,) in fp32 (or fp64 if the deltas are). Raises `InputError` when the weights (K,) do
    not fit the stack.
    """
    rows = as_rows(deltas)
    values = row_weights(weights, len(rows), rows.dtype)
    scratch = torch.empty_like(rows[0])
    cuts = [find_cuts(row, density, outliers, scratch=scratch) for row in rows]
    rules = Consensus(election, zero_sum, normalize, normalizer, aggregation)
    merged = elect_and_merge(lambda block: middle(rows, cuts, block), scratch, values, rules)
    return merged.mul_(lambda_).view(deltas.shape[1:])


def find_cuts(row: Tensor, density: float, outliers: float, *, scratch: Tensor) -> tuple[Cut, Cut]:
    """Return two cuts through `row` (N,): what the first keeps and the second does not is the middle.

    Overwrites `scratch` (N,).
    """
    num_upper, num_outliers = num_middle(row.numel(), density, outliers)
    return largest(row, num_upper, scratch=scratch), largest(row, num_outliers, scratch=scratch)


def middle(rows: Tensor, cuts: list[tuple[Cut, Cut]], block: slice) -> Tensor:
    """Return a `block` of B columns of `rows` (K, N) with zeros outside the middle of each row: (K, B)."""
    part = rows[:, block]
    kept, outliers = torch.empty_like(part), torch.empty_like(part[0])
    for row, (upper, top), out in zip(part, cuts, kept, strict=True):
        keep(row, upper, block.start, out=out)
        keep(row, top, block.start, out=outliers)
        # An outlier is in both, so that this is exact.
        out.sub_(outliers)
    return kept
