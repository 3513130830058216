"""Which elements a seeded mask keeps: one, drawn at random, of each stratum of 1 / density consecutive elements.

A stratified sample (W. G. Cochran, "Sampling Techniques", chapter 5): each element is kept with the same probability as
under a Bernoulli mask, so a kept value times the size of its stratum is unbiased with the same variance, and what
follows is better. How many elements travel is known without drawing, and there is one draw for each of them instead of
one for each element of the tensor, a hundred times fewer at a density of 1 %.

With T = round(density * 2^32) stratum i begins at floor(i * 2^32 / T) and ends where the next one begins, or with the
tensor; a 32-bit draw d (`fedmerge.philox`, number i of the seed's stream) keeps its element floor(d * size / 2^32).

Shapes: N elements of the tensor, M strata.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedmerge.jit import kernel
from fedmerge.philox import draws

_WORD = 1 << 32


def num_strata(num_elements: int, density: float) -> int:
    """Return M, the number of elements of `num_elements` that a mask of `density` keeps."""
    return -(-num_elements * _threshold(density) // _WORD)


def positions(seed: int, num_elements: int, density: float) -> npt.NDArray[np.int64]:
    """Return the indices (M,), ascending, of the elements that the mask of `seed` keeps."""
    indices = np.empty(num_strata(num_elements, density), dtype=np.int64)
    _choose(draws(seed, 0, indices.size), np.uint64(_threshold(density)), num_elements, indices)
    return indices


def spread(values: npt.NDArray[np.float32], seed: int, num_elements: int, density: float) -> npt.NDArray[np.float32]:
    """Return a tensor (N,) with each of `values` (M,) times its stratum's size where the mask of `seed` has it."""
    dense = np.zeros(num_elements, dtype=np.float32)
    _spread(values, draws(seed, 0, values.size), np.uint64(_threshold(density)), dense)
    return dense


def locate(
    values: npt.NDArray[np.float32], seed: int, num_elements: int, density: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the indices (M,), ascending, to which `spread` brings `values` (M,), and what it writes there (M,)."""
    indices, scaled = np.empty(values.size, dtype=np.int64), values.copy()
    _locate(scaled, draws(seed, 0, values.size), np.uint64(_threshold(density)), num_elements, indices)
    return indices, scaled


def _threshold(density: float) -> int:
    return min(max(1, round(density * _WORD)), _WORD)


@kernel
def _stratum(i: int, threshold: np.uint64, num_elements: int) -> tuple[int, int]:
    """Return where stratum `i` begins and its size."""
    start: Any = np.int64((np.uint64(i) << np.uint64(32)) // threshold)
    end: Any = np.int64((np.uint64(i + 1) << np.uint64(32)) // threshold)
    return start, min(end, num_elements) - start


@kernel
def _within(draw: Any, size: int) -> int:
    offset: Any = np.int64((np.uint64(draw) * np.uint64(size)) >> np.uint64(32))
    return int(offset)


@kernel
def _choose(
    drawn: npt.NDArray[np.uint32], threshold: np.uint64, num_elements: int, indices: npt.NDArray[np.int64]
) -> None:
    for i in range(indices.size):
        start, size = _stratum(i, threshold, num_elements)
        indices[i] = start + _within(drawn[i], size)


@kernel
def _locate(
    values: npt.NDArray[np.float32],
    drawn: npt.NDArray[np.uint32],
    threshold: np.uint64,
    num_elements: int,
    indices: npt.NDArray[np.int64],
) -> None:
    for i in range(values.size):
        start, size = _stratum(i, threshold, num_elements)
        indices[i] = start + _within(drawn[i], size)
        values[i] *= np.float32(size)


@kernel
def _spread(
    values: npt.NDArray[np.float32],
    drawn: npt.NDArray[np.uint32],
    threshold: np.uint64,
    dense: npt.NDArray[np.float32],
) -> None:
    for i in range(values.size):
        start, size = _stratum(i, threshold, dense.size)
        dense[start + _within(drawn[i], size)] = values[i] * np.float32(size)
