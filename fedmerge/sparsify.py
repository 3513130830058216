"""Step 2, sparsify, and its inverse, scatter: which elements of a task vector travel.

A sparsifier is a pure function of one flat tensor and of what both ends know already (a seed and a density). `seeded`
is DARE ("Language models are super Mario", arXiv 2311.03099) put on the wire: both ends draw the same Bernoulli mask,
so the kept values travel without a byte of index, and dividing them by the density makes the result unbiased.

Shapes: N elements of the tensor, M of them kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmerge.seeds import bernoulli_mask


class Sparsifier(NamedTuple):
    """A way to choose elements.

    `sparsify(values, seed, density)` returns the kept values (M,) of `values` (N,), in order;
    `scatter(kept, num_elements, seed, density)` returns the dense tensor (N,) that stands for them;
    `num_kept(num_elements, seed, density)` returns M, which follows from what both ends know and is never read from
    a file. All tensors are fp32.
    """

    sparsify: Callable[[Tensor, int, float], Tensor]
    scatter: Callable[[Tensor, int, int, float], Tensor]
    num_kept: Callable[[int, int, float], int]


def travels_dense(shape: tuple[int, ...], small_elements: int) -> bool:
    """Return whether a tensor is too small to be thinned: at most one dimension and under `small_elements` elements.

    Biases and norm scales are a thousandth of a model's bytes and each of their elements matters.
    """
    return len(shape) == 0 or (len(shape) == 1 and shape[0] < small_elements)


def keep_all(values: Tensor, seed: int, density: float) -> Tensor:
    """Return all of `values` (N,)."""
    return values


def scatter_all(kept: Tensor, num_elements: int, seed: int, density: float) -> Tensor:
    """Return `kept` (N,), which is dense already."""
    return kept


def count_all(num_elements: int, seed: int, density: float) -> int:
    """Return N: everything is kept."""
    return num_elements


def keep_seeded(values: Tensor, seed: int, density: float) -> Tensor:
    """Return the elements of `values` (N,) under the mask of `seed`, each kept with probability `density`."""
    return values[bernoulli_mask(seed, values.numel(), density)]


def scatter_seeded(kept: Tensor, num_elements: int, seed: int, density: float) -> Tensor:
    """Return a tensor (N,) with `kept` / `density` under the mask of `seed` and zero elsewhere.

    `kept` has one element for each that the mask keeps. The expectation over seeds is the tensor it was drawn from.
    """
    mask = bernoulli_mask(seed, num_elements, density)
    # Multiplying by the rounded reciprocal gives the same bits on every device; scalar division does not.
    return torch.zeros(num_elements).masked_scatter_(mask, kept * (1.0 / density))


def count_seeded(num_elements: int, seed: int, density: float) -> int:
    """Return the number of elements that the mask of `seed` keeps."""
    return int(np.count_nonzero(bernoulli_mask(seed, num_elements, density).numpy()))


SPARSIFIERS: dict[str, Sparsifier] = {
    "none": Sparsifier(keep_all, scatter_all, count_all),
    "seeded": Sparsifier(keep_seeded, scatter_seeded, count_seeded),
}
