"""Order statistics over a few task vectors, compiled: every entry's values sorted by one network of comparisons.

A network compares and swaps the same rows whatever the values are, so that a comparison is done for many columns by one
instruction. torch sorts each column for itself, and takes ten times as long for eight rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedmerge.jit import kernel
from fedmerge.merge.kernels import TILE

Array: TypeAlias = npt.NDArray[Any]

_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITE = np.int32(0x7F800000)


def mean_of_middle(rows: Array, num_trimmed: int) -> Array:
    """Return the mean over `rows` (K, N), fp32, of each column's values but the `num_trimmed` at either end: (N,).

    Values are added from the least to the greatest. Zeros are ordered by their sign, and NaN counts as the greatest, so
    that the order of the rows is of no importance to any bit.
    """
    merged = np.empty(rows.shape[1], dtype=np.float32)
    _mean_of_middle(rows.view(np.int32), _network(len(rows)), num_trimmed, merged)
    return merged


@cache
def _network(num_rows: int) -> Array:
    """Return the rows to compare, in order (C, 2): Batcher's merge exchange (Knuth, TAOCP 3, 5.2.2, algorithm M)."""
    return np.array(list(_comparisons(num_rows)), dtype=np.int64).reshape(-1, 2)


def _comparisons(num_rows: int) -> Iterator[tuple[int, int]]:
    first = 1 << max(0, (num_rows - 1).bit_length() - 1)
    step = first
    while step:
        span, offset, distance = first, 0, step
        while True:
            for low in range(num_rows - distance):
                if low & step == offset:
                    yield low, low + distance
            if span == step:
                break
            distance, span, offset = span - step, span >> 1, step
        step >>= 1


@kernel
def _flipped(bits: np.int32) -> np.int32:
    """Return an integer that is ordered as the number of these bits is; or, of that integer, the bits."""
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & _MAGNITUDE))


@kernel
def _mean_of_middle(bits: Array, network: Array, num_trimmed: int, merged: Array) -> None:
    num_rows = bits.shape[0]
    keys = np.empty((num_rows, TILE), dtype=np.int32)
    for start in range(0, merged.size, TILE):
        mean = merged[start : start + TILE]
        for k in range(num_rows):
            row, out = bits[k, start : start + TILE], keys[k]
            for j in range(mean.size):
                is_number = np.int32(row[j] & _MAGNITUDE) <= _INFINITE
                out[j] = _flipped(row[j]) if is_number else _MAGNITUDE
        for c in range(network.shape[0]):
            low, high = keys[network[c, 0]], keys[network[c, 1]]
            for j in range(mean.size):
                one, other = low[j], high[j]
                low[j] = min(one, other)
                high[j] = max(one, other)
        for k in range(num_trimmed, num_rows - num_trimmed):
            row = keys[k]
            for j in range(mean.size):
                row[j] = _flipped(row[j])
            values = row.view(np.float32)
            for j in range(mean.size):
                mean[j] = values[j] if k == num_trimmed else mean[j] + values[j]
        count = np.float32(num_rows - 2 * num_trimmed)
        for j in range(mean.size):
            mean[j] /= count
