"""Step 2, sparsify, and its inverse, scatter: which elements of a task vector travel.

A sparsifier is a pure function of one flat tensor and of what both ends know already (a seed and a density). `seeded`
is DARE ("Language models are super Mario", arXiv 2311.03099) put on the wire: both ends draw the same mask, one element
of each stratum (`fedmerge.delta.strata`), so the kept values travel without a byte of index, and multiplying them by
the size of their stratum, about 1 / density, makes the result unbiased. `topk` sends the largest elements of every 4096
and where they are (`fedmerge.delta.indices`), `layerwise_topk` those of the whole tensor (`fedmerge.delta.layerwise`),
which has a lower error; what they leave out is lost, so they are biased.

Shapes: N elements of the tensor, M of them kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedmerge.delta.indices import decode_indices, encode_indices, index_bytes, largest_of_chunks, num_indices
from fedmerge.delta.layerwise import counted_index_bytes, decode_counted, encode_counted, largest_of_tensor, num_largest
from fedmerge.delta.planes import Sections
from fedmerge.delta.strata import locate, num_strata, positions, spread


class Kept(NamedTuple):
    """What a sparsifier keeps: the sections that say where, none if both ends know, and the values (M,), in order."""

    indices: Sections
    values: Tensor


class Sparse(NamedTuple):
    """A flat tensor of which most is zero: its other `values` (M,), fp32, and their `indices` (M,), increasing."""

    indices: Tensor
    values: Tensor


class Sparsifier(NamedTuple):
    """A way to choose elements.

    `sparsify(values, seed, density)` returns what is kept of `values` (N,);
    `scatter(kept, num_elements, seed, density)` returns the dense tensor (N,) that stands for it, and
    `locate(kept, num_elements, seed, density)` what of it is not zero; both raise `InvalidDelta` for index sections
    that no `sparsify` makes;
    `num_kept(num_elements, density)` and `index_bytes(num_elements, density)` return M and the length of each
    index section, which follow from what both ends know and are never read from a file. All tensors are fp32. Values
    come out as they went in unless it `rescales` them.
    """

    sparsify: Callable[[Tensor, int, float], Kept]
    scatter: Callable[[Kept, int, int, float], Tensor]
    locate: Callable[[Kept, int, int, float], Sparse]
    num_kept: Callable[[int, float], int]
    index_bytes: Callable[[int, float], dict[str, int]]
    rescales: bool = False


def travels_dense(shape: tuple[int, ...], small_elements: int) -> bool:
    """Return whether a tensor is too small to be thinned: at most one dimension and under `small_elements` elements.

    Biases and norm scales are a thousandth of a model's bytes and each of their elements matters.
    """
    return len(shape) == 0 or (len(shape) == 1 and shape[0] < small_elements)


def no_index_bytes(num_elements: int, density: float) -> dict[str, int]:
    """Return no sections: both ends know which elements travel."""
    return {}


def keep_all(values: Tensor, seed: int, density: float) -> Kept:
    """Keep all of `values` (N,)."""
    return Kept({}, values)


def scatter_all(kept: Kept, num_elements: int, seed: int, density: float) -> Tensor:
    """Return the values of `kept` (N,), which are dense already."""
    return kept.values


def locate_all(kept: Kept, num_elements: int, seed: int, density: float) -> Sparse:
    """Return the values of `kept` (N,) at all indices."""
    return Sparse(torch.arange(num_elements), kept.values)


def count_all(num_elements: int, density: float) -> int:
    """Return N: everything is kept."""
    return num_elements


def keep_seeded(values: Tensor, seed: int, density: float) -> Kept:
    """Keep the elements of `values` (N,) under the mask of `seed`, each with probability `density`."""
    return Kept({}, values[torch.from_numpy(positions(seed, values.numel(), density))])


def scatter_seeded(kept: Kept, num_elements: int, seed: int, density: float) -> Tensor:
    """Return a tensor (N,) with the values of `kept` times their stratum's size under the mask of `seed`, else zero.

    There is one value for each element that the mask keeps. The expectation over seeds is the tensor it was drawn from.
    """
    return torch.from_numpy(spread(kept.values.numpy(), seed, num_elements, density))


def locate_seeded(kept: Kept, num_elements: int, seed: int, density: float) -> Sparse:
    """Return the values of `kept` times their stratum's size, and where the mask of `seed` has them."""
    indices, values = locate(kept.values.numpy(), seed, num_elements, density)
    return Sparse(torch.from_numpy(indices), torch.from_numpy(values))


def keep_topk(values: Tensor, seed: int, density: float) -> Kept:
    """Keep the largest magnitudes of each 4096 elements of `values` (N,), ties to the lower index."""
    indices = largest_of_chunks(values.numpy(), density)
    return Kept(encode_indices(indices, density), values[torch.from_numpy(indices)])


def scatter_topk(kept: Kept, num_elements: int, seed: int, density: float) -> Tensor:
    """Return a tensor (N,) with the values of `kept` at its indices and zero elsewhere, without rescaling.

    Raises `InvalidDelta` for indices outside of their chunk.
    """
    return _place(locate_topk(kept, num_elements, seed, density), num_elements)


def locate_topk(kept: Kept, num_elements: int, seed: int, density: float) -> Sparse:
    """Return the values of `kept` and their indices; raises as `scatter_topk` does."""
    return Sparse(torch.from_numpy(decode_indices(kept.indices, num_elements, density)), kept.values)


def keep_layerwise_topk(values: Tensor, seed: int, density: float) -> Kept:
    """Keep the largest magnitudes of `values` (N,), ties to the lower index."""
    indices = largest_of_tensor(values.numpy(), density)
    return Kept(encode_counted(indices, values.numel(), density), values[torch.from_numpy(indices)])


def scatter_layerwise_topk(kept: Kept, num_elements: int, seed: int, density: float) -> Tensor:
    """Return a tensor (N,) with the values of `kept` at its indices and zero elsewhere, without rescaling.

    Raises `InvalidDelta` for counts that do not sum to M, and for indices outside of their chunk.
    """
    return _place(locate_layerwise_topk(kept, num_elements, seed, density), num_elements)


def locate_layerwise_topk(kept: Kept, num_elements: int, seed: int, density: float) -> Sparse:
    """Return the values of `kept` and their indices; raises as `scatter_layerwise_topk` does."""
    return Sparse(torch.from_numpy(decode_counted(kept.indices, num_elements, density)), kept.values)


def _place(sparse: Sparse, num_elements: int) -> Tensor:
    return torch.zeros(num_elements).index_copy_(0, *sparse)


SPARSIFIERS: dict[str, Sparsifier] = {
    "none": Sparsifier(keep_all, scatter_all, locate_all, count_all, no_index_bytes),
    "seeded": Sparsifier(keep_seeded, scatter_seeded, locate_seeded, num_strata, no_index_bytes, rescales=True),
    "topk": Sparsifier(keep_topk, scatter_topk, locate_topk, num_indices, index_bytes),
    "layerwise_topk": Sparsifier(
        keep_layerwise_topk, scatter_layerwise_topk, locate_layerwise_topk, num_largest, counted_index_bytes
    ),
}
