"""Elect a sign per element, then merge the entries that agree with it: the tail that TIES and DARE-TIES share.

"TIES-Merging", arXiv 2306.01708, sections 3.2 and 3.3, with the switches by which implementations differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fedmerge.merge.parameters import Aggregation, Election, Normalizer, ZeroSum
from fedmerge.merge.stack import blocks

# A sparse stack, made a block of columns at a time where it is needed, since a second stack in memory costs more time
# than its arithmetic.
Columns: TypeAlias = Callable[[slice], Tensor]


class Consensus(NamedTuple):
    """How to elect and what to do with those that agree; `fedmerge.merge.parameters` describes each switch."""

    election: Election = "mass"
    zero_sum: ZeroSum = "positive"
    normalize: bool = True
    normalizer: Normalizer = "weights"
    aggregation: Aggregation = "sum"


def elect_and_merge(columns: Columns, like: Tensor, weights: list[float], rules: Consensus) -> Tensor:
    """Return the merged task vector, of the shape (N,) and dtype of `like`.

    `columns` returns the sparse task vectors (K, B) of a block of B columns; `weights` are K numbers.
    """
    num_elements = like.numel()
    draw = 1.0
    if rules.zero_sum == "majority":
        votes = sum(int(_ballot(columns(block), weights, rules).sign_().sum()) for block in blocks(num_elements))
        draw = -1.0 if votes < 0 else 1.0
    merged = torch.empty_like(like)
    for block in blocks(num_elements):
        rows = columns(block)
        signs = _elect(_ballot(rows, weights, rules), draw)
        merged[block] = _merge_agreeing(rows, weights, signs, rules)
    return merged


def _ballot(rows: Tensor, weights: list[float], rules: Consensus) -> Tensor:
    """Return what decides the sign of each element, (N,): added row by row, so that the order of additions is fixed."""
    total = torch.zeros_like(rows[0])
    for row, weight in zip(rows, weights, strict=True):
        match rules.election:
            case "mass":
                total += row
            case "weighted":
                total += row * weight
            case "count":
                total += row.sign()
    return total


def _elect(ballot: Tensor, draw: float) -> Tensor:
    """Return the elected signs (N,) as +1.0 and -1.0; a zero on the ballot takes the sign of `draw`."""
    if draw < 0:
        ballot = torch.where(ballot == 0, draw, ballot)
    # A sum of entries is -0.0 only where every one of them is zero, and there the sign does not matter.
    return torch.copysign(torch.ones_like(ballot), ballot)


def _merge_agreeing(rows: Tensor, weights: list[float], signs: Tensor, rules: Consensus) -> Tensor:
    """Return the disjoint merge (N,) of `rows` (K, N): of each element, the non-zero entries that have its sign."""
    total, divisor = torch.zeros_like(signs), torch.zeros_like(signs)
    entry, agrees = torch.empty_like(signs), torch.empty_like(signs)
    for row, weight in zip(rows, weights, strict=True):
        torch.mul(row, weight, out=entry)
        # Comparisons write 1.0 and 0.0 here: multiplying by those is several times faster than indexing with booleans.
        torch.mul(entry if rules.election == "weighted" else row, signs, out=agrees)
        torch.gt(agrees, 0, out=agrees)
        entry.mul_(agrees)
        if rules.aggregation == "max":
            # Which of two zeros torch.maximum returns, +0 or -0, depends on where in the row they stand.
            total = torch.where(entry.mul_(signs) > total, entry, total)
            continue
        total += entry
        # Fusing this product with the sum changes nothing, since it is the weight or zero.
        divisor.add_(agrees, alpha=weight if rules.normalizer == "weights" else 1.0)
    if rules.aggregation == "max":
        return total.mul_(signs)
    if rules.normalize:
        divisor += torch.eq(divisor, 0, out=agrees)
        total /= divisor
    return total
