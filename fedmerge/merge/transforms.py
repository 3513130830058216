"""What a step of a recipe does to each task vector before they are merged: thin it out, one after the other.

A transform is a pure function of one task vector, (*shape,) in any floating dtype, to one in fp32 (or fp64). Its seed
is the task vector's own. Followed by `elect` or `task_arithmetic`, each is a method that has a name too:

    trim               elect: ties
    dare               elect: dare_ties            task_arithmetic: dare_linear
    magprune           elect: della                task_arithmetic: della_linear
    breadcrumbs_mask   elect: breadcrumbs_ties     task_arithmetic: breadcrumbs
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Concatenate, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.draws import bernoulli_mask
from fedmerge.merge.methods.breadcrumbs import find_cuts, middle
from fedmerge.merge.methods.dare import drop
from fedmerge.merge.methods.della import draw, sample
from fedmerge.merge.methods.ties import find_cut
from fedmerge.merge.parameters import Density, Epsilon, Outliers, Rescale, Trim
from fedmerge.merge.ranking import keep
from fedmerge.merge.stack import as_rows, blocks

# TRANSFORMS[name](delta, *, seed=0, **params)
Transform: TypeAlias = Callable[Concatenate[Tensor, ...], Tensor]

MaxNorm: TypeAlias = Annotated[
    float, Field(gt=0, allow_inf_nan=False, description="The longest that a tensor of a task vector may be (L2).")
]


def trim(delta: Tensor, *, seed: int = 0, density: Density = 0.2, trim: Trim = "exact") -> Tensor:
    """Return the largest entries of `delta`, zeros elsewhere: the trim of TIES, arXiv 2306.01708."""
    row = _row(delta)
    kept = torch.empty_like(row)
    cut = find_cut(row[0], density, trim, scratch=kept[0])
    keep(row[0], cut, 0, out=kept[0])
    return kept.view(delta.shape)


def dare(delta: Tensor, *, seed: int = 0, density: Density = 0.5, rescale: Rescale = "paper") -> Tensor:
    """Return `delta` with entries dropped at random, the others rescaled: DARE, arXiv 2311.03099."""
    row = _row(delta)
    masks = [bernoulli_mask(seed, row.shape[1], density)]
    return drop(row, masks, density=density, rescale=rescale).view(delta.shape)


def magprune(
    delta: Tensor, *, seed: int = 0, density: Density = 0.5, epsilon: Epsilon = 0.1, rescale: Rescale = "paper"
) -> Tensor:
    """Return `delta` with entries dropped at random, the smaller the likelier, the others rescaled: arXiv 2406.11617.

    Raises `ConfigError` when density - epsilon or density + epsilon is no probability.
    """
    row = _row(delta)
    draws = draw(row, delta.shape, [seed], density, epsilon)
    return sample(row, draws, rescale=rescale).view(delta.shape)


def breadcrumbs_mask(delta: Tensor, *, seed: int = 0, density: Density = 0.85, outliers: Outliers = 0.01) -> Tensor:
    """Return `delta` without its largest and its smallest entries: the mask of Model Breadcrumbs, arXiv 2312.06795."""
    row = _row(delta)
    kept = torch.empty_like(row)
    cuts = [find_cuts(row[0], density, outliers, scratch=kept[0])]
    for block in blocks(row.shape[1]):
        kept[:, block] = middle(row, cuts, block)
    return kept.view(delta.shape)


def clip(delta: Tensor, *, seed: int = 0, max_norm: MaxNorm = 1.0) -> Tensor:
    """Return `delta`, shortened to the L2 norm `max_norm` where it is longer, so that it does not drown the others."""
    row = _row(delta)
    squares = (row[0, block].to(torch.float64).square().numpy().sum() for block in blocks(row.shape[1]))
    norm = math.sqrt(math.fsum(squares))
    return (row * (max_norm / norm) if norm > max_norm else row.clone()).view(delta.shape)


TRANSFORMS: dict[str, Transform] = {
    "trim": trim,
    "dare": dare,
    "magprune": magprune,
    "breadcrumbs_mask": breadcrumbs_mask,
    "clip": clip,
}


def _row(delta: Tensor) -> Tensor:
    """Return `delta` as a stack of one row (1, N)."""
    return as_rows(delta.unsqueeze(0))
