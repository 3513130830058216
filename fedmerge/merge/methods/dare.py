"""DARE: drop entries of each task vector at random, rescale the rest, then merge.

"Language models are super Mario: absorbing abilities from homologous models as a free lunch", arXiv 2311.03099.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fedmerge.draws import bernoulli_mask
from fedmerge.merge.methods.average import task_arithmetic
from fedmerge.merge.methods.consensus import Consensus, elect_and_merge
from fedmerge.merge.parameters import Aggregation, Density, Election, Lambda, Normalize, Normalizer, Rescale, ZeroSum
from fedmerge.merge.stack import as_rows, l1_norm, row_weights
from fedmerge.seeds import derive_seed


def dare_linear(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    density: Density = 0.5,
    lambda_: Lambda = 1.0,
    normalize: Normalize = False,
    rescale: Rescale = "paper",
) -> Tensor:
    """Return task arithmetic on randomly thinned `deltas` (K, *shape): (*shape,) in fp32 (or fp64 if they are).

    `density` is 1 minus the paper's drop rate. In expectation over `seed` and with the paper's rescaling, the result is
    that of `task_arithmetic`. mergekit's variant is rescale="l1". Raises `InputError` as `task_arithmetic` does.
    """
    rows = as_rows(deltas)
    thinned = drop(rows, _draw(rows, seed, density), density=density, rescale=rescale)
    return task_arithmetic(thinned, weights, lambda_=lambda_, normalize=normalize).view(deltas.shape[1:])


def dare_ties(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    density: Density = 0.5,
    lambda_: Lambda = 1.0,
    normalize: Normalize = True,
    rescale: Rescale = "paper",
    election: Election = "mass",
    zero_sum: ZeroSum = "positive",
    normalizer: Normalizer = "weights",
    aggregation: Aggregation = "sum",
) -> Tensor:
    """Return the sign-elected disjoint merge of randomly thinned `deltas` (K, *shape), as `ties` without its trim.

    mergekit's variant is rescale="l1", election="weighted", normalize=False; PEFT's is normalizer="count". Raises
    `InputError` when the weights (K,) do not fit the stack.
    """
    rows = as_rows(deltas)
    thinned = drop(rows, _draw(rows, seed, density), density=density, rescale=rescale)
    values = row_weights(weights, len(rows), rows.dtype)
    rules = Consensus(election, zero_sum, normalize, normalizer, aggregation)
    merged = elect_and_merge(lambda block: thinned[:, block], rows[0], values, rules)
    return merged.mul_(lambda_).view(deltas.shape[1:])


def drop(rows: Tensor, masks: Iterable[Tensor], *, density: float, rescale: Rescale = "paper") -> Tensor:
    """Return `rows` (K, N) where `masks` (K of (N,), bool) are True and zero elsewhere, rescaled as `rescale` says.

    `density` is the probability with which the masks were drawn; only the paper's rescaling uses it.
    """
    thinned = torch.empty_like(rows)
    for row, mask, kept in zip(rows, masks, thinned, strict=True):
        thin(row, mask, density=density, rescale=rescale, out=kept)
    return thinned


def thin(row: Tensor, mask: Tensor, *, density: float | Tensor, rescale: Rescale, out: Tensor) -> None:
    """Set `out` to one `row` (N,) as `drop` returns it; `density` may be a probability for each element, (N,)."""
    # The mask is read as bytes: torch converts those to floats several times faster than booleans.
    torch.mul(row, mask.view(torch.uint8).to(row.dtype), out=out)
    if rescale == "paper":
        out.mul_(1 / density)
    elif rescale == "l1":
        out.mul_(_l1_ratio(row, out))


def _draw(rows: Tensor, seed: int, density: float) -> Iterator[Tensor]:
    """Yield a mask (N,) for each of `rows` (K, N); mask i depends on `seed`, i and `density` only."""
    for index, row in enumerate(rows):
        yield bernoulli_mask(derive_seed(seed, index), row.numel(), density).to(row.device)


def _l1_ratio(row: Tensor, kept: Tensor) -> float:
    """Return the ratio of the sums of magnitudes, 1 where nothing is left to scale."""
    before, after = l1_norm(row), l1_norm(kept)
    return before / after if after > 0 else 1.0
