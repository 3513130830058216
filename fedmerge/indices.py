"""Which elements are the largest, and how their indices travel.

Elements are chosen chunk by chunk, the same share of every 4096 (SparseLoCo, arXiv 2508.15706): how many indices there
are then follows from the tensor's size and the density, an index needs 12 bits at most, and no layer is left out
altogether. The indices of a chunk are sent as *gaps*, the number of elements skipped before each one. Whatever the
gaps, they stand for strictly increasing indices, and only the end of the chunk has to be checked.

Gaps of randomly placed indices follow a geometric distribution, of which the upper bits carry all the structure; a gap
is split in two sections, each of symbols of one kind and of a length that is known beforehand. Through zstd 64 indices
of 4096 cost 7.47 bits each, where log2 C(4096, 64) / 64 = 7.36.

Shapes: N elements of the tensor, M of them kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedmerge.errors import InvalidDelta
from fedmerge.planes import Bytes, Sections, pack_codes, packed_bytes, unpack_codes

Indices: TypeAlias = npt.NDArray[np.int64]

CHUNK_BITS = 12
CHUNK_ELEMENTS = 1 << CHUNK_BITS

# Choose from this many chunks at a time: their keys stay in cache.
_CHUNKS_AT_ONCE = 32


def kept_of_chunk(num_elements: int, density: float) -> int:
    """Return how many of a chunk's `num_elements` (1 to 4096) elements are kept: their share, rounded, at least 1."""
    return max(1, int(density * num_elements + 0.5))


def _split(num_elements: int, density: float) -> Iterator[tuple[int, int, int, int]]:
    """Yield first element, number of chunks, elements and kept per chunk: of the whole chunks, then of a shorter last.

    The whole chunks come a few at a time.
    """
    num_whole, num_last = divmod(num_elements, CHUNK_ELEMENTS)
    kept_of_whole = kept_of_chunk(CHUNK_ELEMENTS, density)
    for first in range(0, num_whole, _CHUNKS_AT_ONCE):
        num_chunks = min(_CHUNKS_AT_ONCE, num_whole - first)
        yield first * CHUNK_ELEMENTS, num_chunks, CHUNK_ELEMENTS, kept_of_whole
    if num_last:
        yield num_whole * CHUNK_ELEMENTS, 1, num_last, kept_of_chunk(num_last, density)


def num_indices(num_elements: int, density: float) -> int:
    """Return M for a tensor of `num_elements`."""
    num_whole, num_last = divmod(num_elements, CHUNK_ELEMENTS)
    last = kept_of_chunk(num_last, density) if num_last else 0
    return num_whole * kept_of_chunk(CHUNK_ELEMENTS, density) + last


def largest_of_chunks(values: npt.NDArray[np.float32], density: float) -> Indices:
    """Return the indices (M,), ascending, of the largest magnitudes in each chunk of `values` (N,), which has no NaN.

    Of equal magnitudes the one with the lower index is taken, so the choice is the same on every machine.
    """
    indices = np.empty(num_indices(values.size, density), dtype=np.int64)
    done = 0
    for first, num_chunks, size, kept in _split(values.size, density):
        rows = np.abs(values[first : first + num_chunks * size]).reshape(num_chunks, size)
        # The bits of floats that are not negative are in the floats' order. With the position below them, counted from
        # the end, keys are all different, and what a partition puts at the top is no matter of how it works.
        positions_down = np.arange(size - 1, -1, -1)
        keys = (rows.view(np.int32).astype(np.int64) << CHUNK_BITS) | positions_down
        top = np.partition(keys, size - kept, axis=1)[:, size - kept :]
        positions = np.sort(size - 1 - (top & (CHUNK_ELEMENTS - 1)), axis=1)
        starts = first + size * np.arange(num_chunks)[:, np.newaxis]
        indices[done : done + positions.size] = (starts + positions).reshape(-1)
        done += positions.size
    return indices


def _low_bits(density: float) -> int:
    """Return how many bits of a gap are in the low section.

    Where gaps are long, the lowest 4 bits are noise and the upper 8 are one byte. Where most are under 256, the byte is
    at the bottom and the 4 bits above it are nearly always zero.
    """
    return 4 if density < 1 / 40 else 8


def index_bytes(num_elements: int, density: float) -> dict[str, int]:
    """Return the length of each section of `encode_indices`."""
    num_gaps, low_bits = num_indices(num_elements, density), _low_bits(density)
    return {
        "gaps_low": packed_bytes(num_gaps, 1 << low_bits),
        "gaps_high": packed_bytes(num_gaps, 1 << (CHUNK_BITS - low_bits)),
    }


def encode_indices(indices: Indices, density: float) -> Sections:
    """Return the gaps of `indices` (M,), as `largest_of_chunks` chose them at `density`."""
    positions = indices % CHUNK_ELEMENTS
    gaps = np.diff(positions, prepend=-1) - 1
    kept = kept_of_chunk(CHUNK_ELEMENTS, density)
    gaps[::kept] = positions[::kept]  # the first index of each chunk
    low_bits = _low_bits(density)
    return {
        "gaps_low": pack_codes((gaps & ((1 << low_bits) - 1)).astype(np.uint8), 1 << low_bits),
        "gaps_high": pack_codes((gaps >> low_bits).astype(np.uint8), 1 << (CHUNK_BITS - low_bits)),
    }


def decode_indices(sections: Sections, num_elements: int, density: float) -> Indices:
    """Return the indices (M,), strictly increasing and below `num_elements`, of sections of the right lengths.

    Raises `InvalidDelta` for gaps that lead past the end of their chunk, and for bytes that no packing makes.
    """
    num_gaps, low_bits = num_indices(num_elements, density), _low_bits(density)
    gaps = _unpack(sections["gaps_low"], num_gaps, low_bits, 0)
    gaps += _unpack(sections["gaps_high"], num_gaps, CHUNK_BITS - low_bits, low_bits)
    indices = np.empty(num_gaps, dtype=np.int64)
    done = num_bad = 0
    for first, num_chunks, size, kept in _split(num_elements, density):
        end = done + num_chunks * kept
        positions = np.cumsum(gaps[done:end].reshape(num_chunks, kept) + 1, axis=1) - 1
        num_bad += int(np.count_nonzero(positions[:, -1] >= size))
        starts = first + size * np.arange(num_chunks)[:, np.newaxis]
        indices[done:end] = (starts + positions).reshape(-1)
        done = end
    if num_bad:
        raise InvalidDelta(f"the indices of {num_bad} chunks go past their end")
    return indices


def _unpack(packed: Bytes, num_codes: int, num_bits: int, shift: int) -> npt.NDArray[Any]:
    return unpack_codes(packed, num_codes, 1 << num_bits, np.arange(1 << num_bits) << shift)
