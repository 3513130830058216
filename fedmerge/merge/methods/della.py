"""DELLA: drop entries at random, the smaller the likelier, rescale the rest, then merge.

"DELLA-Merging: reducing interference in model merging through magnitude-based sampling", arXiv 2406.11617.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fedmerge.draws import uniform
from fedmerge.errors import ConfigError
from fedmerge.merge.methods.average import task_arithmetic
from fedmerge.merge.methods.consensus import Consensus, elect_and_merge
from fedmerge.merge.methods.dare import thin
from fedmerge.merge.parameters import (
    Aggregation,
    Density,
    Election,
    Epsilon,
    Lambda,
    Normalize,
    Normalizer,
    Rescale,
    ZeroSum,
)
from fedmerge.merge.ranking import ranks
from fedmerge.merge.stack import as_rows, row_weights
from fedmerge.seeds import derive_seed

# For each task vector its mask (N,) and the probabilities (N,) with which the mask was drawn.
Draws: TypeAlias = Iterator[tuple[Tensor, Tensor]]


def della(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    density: Density = 0.5,
    epsilon: Epsilon = 0.1,
    lambda_: Lambda = 1.0,
    normalize: Normalize = True,
    rescale: Rescale = "paper",
    election: Election = "mass",
    zero_sum: ZeroSum = "positive",
    normalizer: Normalizer = "weights",
    aggregation: Aggregation = "sum",
) -> Tensor:
    """Return the sign-elected disjoint merge of `deltas` (K, *shape) thinned by magnitude, as `ties` without its trim.

    DELLA, arXiv 2406.11617, whose window is 2 * `epsilon` and drop rate 1 - `density`. mergekit's variant is
    rescale="l1", election="weighted", epsilon=0.15. Result (*shape,) in fp32 (or fp64 if the deltas are). Raises
    `ConfigError` when density - epsilon or density + epsilon is no probability, `InputError` when the weights (K,) do
    not fit the stack.
    """
    rows = as_rows(deltas)
    values = row_weights(weights, len(rows), rows.dtype)
    thinned = sample(rows, draw(rows, deltas.shape[1:], row_seeds(seed, len(rows)), density, epsilon), rescale=rescale)
    rules = Consensus(election, zero_sum, normalize, normalizer, aggregation)
    merged = elect_and_merge(lambda block: thinned[:, block], rows[0], values, rules)
    return merged.mul_(lambda_).view(deltas.shape[1:])


def della_linear(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    density: Density = 0.5,
    epsilon: Epsilon = 0.1,
    lambda_: Lambda = 1.0,
    normalize: Normalize = False,
    rescale: Rescale = "paper",
) -> Tensor:
    """Return task arithmetic on `deltas` (K, *shape) thinned by magnitude: (*shape,) in fp32 (or fp64 if they are).

    DELLA's sampling, arXiv 2406.11617, without its election; in expectation over `seed` and with the paper's rescaling
    the result is that of `task_arithmetic`. mergekit's variant is rescale="l1", epsilon=0.15. Raises as `della` and
    `task_arithmetic` do.
    """
    rows = as_rows(deltas)
    thinned = sample(rows, draw(rows, deltas.shape[1:], row_seeds(seed, len(rows)), density, epsilon), rescale=rescale)
    return task_arithmetic(thinned, weights, lambda_=lambda_, normalize=normalize).view(deltas.shape[1:])


def row_seeds(seed: int, num_rows: int) -> list[int]:
    """Return the seeds of `num_rows` task vectors."""
    return [derive_seed(seed, index) for index in range(num_rows)]


def keep_probabilities(row: Tensor, shape: torch.Size, *, density: float, epsilon: float) -> Tensor:
    """Return the probability, (N,) in fp64, with which each entry of a task vector `row` (N,) of `shape` is kept.

    Within a line of the tensor, taken as a matrix of shape[0] lines, it grows linearly with the rank by magnitude from
    density - epsilon to density + epsilon. A vector is one line; a line of one entry keeps it with `density`.
    """
    num_lines = shape[0] if len(shape) > 1 else 1
    num_columns = row.numel() // max(1, num_lines)
    by_rank = probabilities_by_rank(num_columns, density=density, epsilon=epsilon).to(row.device)
    if density >= 1 or num_columns <= 1:
        return by_rank[:1].expand(row.numel())
    return by_rank[ranks(row.abs().view(num_lines, num_columns))].view(-1)


def probabilities_by_rank(num_columns: int, *, density: float, epsilon: float) -> Tensor:
    """Return the probability of each rank in a line of `num_columns`, the largest magnitude first: fp64."""
    if density >= 1 or num_columns <= 1:
        return torch.full((max(1, num_columns),), min(density, 1.0), dtype=torch.float64)
    steps = torch.arange(num_columns - 1, -1, -1, dtype=torch.float64)
    return (density - epsilon) + steps * (2 * epsilon) / (num_columns - 1)


def sample(rows: Tensor, draws: Draws, *, rescale: Rescale = "paper") -> Tensor:
    """Return `rows` (K, N) where the masks of `draws` are True and zero elsewhere, rescaled as `rescale` says.

    The paper divides each kept entry by its own probability.
    """
    thinned = torch.empty_like(rows)
    for row, (mask, probabilities), kept in zip(rows, draws, thinned, strict=True):
        thin(row, mask, density=probabilities, rescale=rescale, out=kept)
    return thinned


def draw(rows: Tensor, shape: torch.Size, seeds: Sequence[int], density: float, epsilon: float) -> Draws:
    """Return an iterator over the draws for `rows` (K, N) of `shape`; draw i depends on seed i and row i's magnitudes.

    Raises `ConfigError` when density - epsilon or density + epsilon is no probability.
    """
    if density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
        raise ConfigError(
            f"DELLA with density {density:g} and epsilon {epsilon:g} keeps entries with probabilities from "
            f"{density - epsilon:g} to {density + epsilon:g}",
            hint="choose an epsilon below density and below 1 - density",
        )

    def drawn(row: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        probabilities = keep_probabilities(row, shape, density=density, epsilon=epsilon)
        return uniform(seed, row.numel()).to(row.device) < probabilities, probabilities

    return map(drawn, rows, seeds)
