"""TIES: trim each task vector to its largest entries, elect a sign per element, merge the entries that agree.

"TIES-Merging: resolving interference when merging models", arXiv 2306.01708.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedmerge.merge.methods.consensus import Consensus, elect_and_merge
from fedmerge.merge.parameters import Aggregation, Density, Election, Lambda, Normalize, Normalizer, Trim, ZeroSum
from fedmerge.merge.ranking import Cut, count, keep, largest
from fedmerge.merge.stack import as_rows, row_weights


def ties(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    density: Density = 0.2,
    lambda_: Lambda = 1.0,
    normalize: Normalize = True,
    trim: Trim = "exact",
    election: Election = "mass",
    zero_sum: ZeroSum = "positive",
    normalizer: Normalizer = "weights",
    aggregation: Aggregation = "sum",
) -> Tensor:
    """Return the TIES merge of `deltas` (K, *shape) with `weights` (K,): (*shape,) in fp32 (or fp64 if they are).

    The paper's defaults (density 0.2, disjoint mean, lambda 1) with one tensor as the scope of trimming. Other
    implementations are these settings:

        authors    trim="authors", zero_sum="majority", normalizer="count", scope "model" in the recipe, weights 1;
                   their "sum" is normalize=False, their "max" is aggregation="max"
        mergekit   election="weighted"
        PEFT       normalizer="count"; its "frequency" method is election="count"

    Raises `InputError` when the weights do not fit the stack.
    """
    rows = as_rows(deltas)
    values = row_weights(weights, len(rows), rows.dtype)
    scratch = torch.empty_like(rows[0])
    cuts = [find_cut(row, density, trim, scratch=scratch) for row in rows]

    def trimmed(block: slice) -> Tensor:
        part = rows[:, block]
        kept = torch.empty_like(part)
        for row, cut, out in zip(part, cuts, kept, strict=True):
            keep(row, cut, block.start, out=out)
        return kept

    rules = Consensus(election, zero_sum, normalize, normalizer, aggregation)
    return elect_and_merge(trimmed, scratch, values, rules).mul_(lambda_).view(deltas.shape[1:])


def elect(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    lambda_: Lambda = 1.0,
    normalize: Normalize = True,
    election: Election = "mass",
    zero_sum: ZeroSum = "positive",
    normalizer: Normalizer = "weights",
    aggregation: Aggregation = "sum",
) -> Tensor:
    """Return the sign-elected disjoint merge of `deltas` (K, *shape): `ties` without its trim, for steps that thin.

    Result (*shape,) in fp32 (or fp64 if the deltas are). Raises `InputError` when the weights (K,) do not fit them.
    """
    rows = as_rows(deltas)
    values = row_weights(weights, len(rows), rows.dtype)
    rules = Consensus(election, zero_sum, normalize, normalizer, aggregation)
    merged = elect_and_merge(lambda block: rows[:, block], rows[0], values, rules)
    return merged.mul_(lambda_).view(deltas.shape[1:])


def find_cut(row: Tensor, density: float, trim: Trim, *, scratch: Tensor) -> Cut:
    """Return the cut that keeps as many entries of `row` (N,) as `trim` says; overwrites `scratch` (N,)."""
    if trim == "authors":
        return largest(row, math.floor(density * row.numel()) + 1, scratch=scratch, ties=True)
    return largest(row, count(density, row.numel()), scratch=scratch)
