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

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedmerge.delta.planes import Bytes, Sections, pack_codes, packed_bytes, unpack_codes
from fedmerge.errors import InvalidDelta
from fedmerge.jit import kernel

Indices: TypeAlias = npt.NDArray[np.int64]

CHUNK_BITS = 12
CHUNK_ELEMENTS = 1 << CHUNK_BITS

_MAGNITUDE = np.uint32(0x7FFFFFFF)


def kept_of_chunk(num_elements: int, density: float) -> int:
    """Return how many of a chunk's `num_elements` (1 to 4096) elements are kept: their share, rounded, at least 1."""
    return max(1, int(density * num_elements + 0.5))


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
    _choose(values.view(np.uint32), *_kept_of_whole_and_last(values.size, density), indices)
    return indices


def _kept_of_whole_and_last(num_elements: int, density: float) -> tuple[int, int]:
    return kept_of_chunk(CHUNK_ELEMENTS, density), kept_of_chunk(num_elements % CHUNK_ELEMENTS, density)


@kernel
def _choose(bits: npt.NDArray[np.uint32], kept_of_whole: int, kept_of_last: int, indices: Indices) -> None:
    """Write the indices of the largest magnitudes of each chunk, of floats with these bits, to `indices` (M,).

    The bits of floats that are not negative are in the floats' order. Each chunk is folded, up to 16 to 1, by taking
    maxima of elements that are a stride apart. The magnitude that as many of the maxima reach as are to be kept is at
    most the one that is sought, and most of the chunk is below it, left out without being looked at one by one.
    """
    maxima, candidates, work = np.empty((3, CHUNK_ELEMENTS), dtype=np.uint32)
    columns, positions = np.empty((2, CHUNK_ELEMENTS), dtype=np.int64)
    counts = np.empty(1 << 11, dtype=np.int64)
    done = 0
    for first in range(0, bits.size, CHUNK_ELEMENTS):
        chunk = bits[first : first + CHUNK_ELEMENTS]
        kept = kept_of_whole if chunk.size == CHUNK_ELEMENTS else kept_of_last
        fold = 16
        while fold > 1 and chunk.size < 2 * kept * fold:
            fold //= 2
        stride = -(-chunk.size // fold)
        maxima[:stride] = 0
        for start in range(0, chunk.size, stride):
            row = chunk[start : start + stride]
            for i in range(row.size):
                maxima[i] = max(maxima[i], row[i] & _MAGNITUDE)
        bound, _ = _at_rank(maxima[:stride], kept, counts, work)
        num_columns = num_candidates = 0
        for i in range(stride):
            columns[num_columns] = i
            num_columns += maxima[i] >= bound
        for start in range(0, chunk.size, stride):
            for column in columns[:num_columns]:
                if start + column < chunk.size:
                    magnitude = chunk[start + column] & _MAGNITUDE
                    candidates[num_candidates] = magnitude
                    positions[num_candidates] = start + column
                    num_candidates += magnitude >= bound
        least, num_ties = _at_rank(candidates[:num_candidates], kept, counts, work)
        for i in range(num_candidates):
            if candidates[i] > least or (candidates[i] == least and num_ties > 0):
                num_ties -= candidates[i] == least
                indices[done] = first + positions[i]
                done += 1


@kernel
def _at_rank(
    keys: npt.NDArray[np.uint32], rank: int, counts: npt.NDArray[np.int64], work: npt.NDArray[np.uint32]
) -> tuple[np.uint32, int]:
    """Return the key (of 31 bits) that `rank` (at least 1) of `keys` reach, and how many of those are equal to it.

    Digit by digit from the top: keys are counted by digit, and those of the digit in which the rank falls go on.
    """
    num_keys = keys.size
    work[:num_keys] = keys
    for shift in (20, 10, 0):
        counts[:] = 0
        digit = 0
        for i in range(num_keys):
            own = (work[i] >> shift) & (0x7FF if shift == 20 else 0x3FF)
            counts[own] += 1
            digit = max(digit, own)
        while counts[digit] < rank:
            rank -= counts[digit]
            digit -= 1
        num_left = 0
        for i in range(num_keys):
            key = work[i]
            work[num_left] = key
            num_left += ((key >> shift) & (0x7FF if shift == 20 else 0x3FF)) == digit
        num_keys = num_left
    return work[0], rank


def _low_bits(density: float) -> int:
    """Return how many bits of a gap are in the low section.

    Where gaps are long, the lowest 4 bits are noise and the upper 8 are one byte. Where most are under 256, the byte is
    at the bottom and the 4 bits above it are nearly always zero.
    """
    return 4 if density < 1 / 40 else 8


def index_bytes(num_elements: int, density: float) -> dict[str, int]:
    """Return the length of each section of `encode_indices`."""
    return gap_bytes(num_indices(num_elements, density), density)


def encode_indices(indices: Indices, density: float) -> Sections:
    """Return the gaps of `indices` (M,), as `largest_of_chunks` chose them at `density`."""
    positions = indices % CHUNK_ELEMENTS
    gaps = np.diff(positions, prepend=-1) - 1
    kept = kept_of_chunk(CHUNK_ELEMENTS, density)
    gaps[::kept] = positions[::kept]  # the first index of each chunk
    return pack_gaps(gaps, density)


def pack_gaps(gaps: Indices, density: float) -> Sections:
    """Return the two sections of `gaps` (M,), each below 4096."""
    low_bits = _low_bits(density)
    return {
        "gaps_low": pack_codes((gaps & ((1 << low_bits) - 1)).astype(np.uint8), 1 << low_bits),
        "gaps_high": pack_codes((gaps >> low_bits).astype(np.uint8), 1 << (CHUNK_BITS - low_bits)),
    }


def unpack_gaps(sections: Sections, num_gaps: int, density: float) -> npt.NDArray[Any]:
    """Return the gaps (M,) of `pack_gaps`; raise `InvalidDelta` for bytes that no packing makes."""
    low_bits = _low_bits(density)
    gaps = _unpack(sections["gaps_low"], num_gaps, low_bits, 0)
    gaps += _unpack(sections["gaps_high"], num_gaps, CHUNK_BITS - low_bits, low_bits)
    return gaps


def gap_bytes(num_gaps: int, density: float) -> dict[str, int]:
    """Return the length of each section of `pack_gaps`."""
    low_bits = _low_bits(density)
    return {
        "gaps_low": packed_bytes(num_gaps, 1 << low_bits),
        "gaps_high": packed_bytes(num_gaps, 1 << (CHUNK_BITS - low_bits)),
    }


def decode_indices(sections: Sections, num_elements: int, density: float) -> Indices:
    """Return the indices (M,), strictly increasing and below `num_elements`, of sections of the right lengths.

    Raises `InvalidDelta` for gaps that lead past the end of their chunk, and for bytes that no packing makes.
    """
    gaps = unpack_gaps(sections, num_indices(num_elements, density), density)
    indices = np.empty(gaps.size, dtype=np.int64)
    num_bad = _add_gaps(gaps, num_elements, *_kept_of_whole_and_last(num_elements, density), indices)
    if num_bad:
        raise InvalidDelta(f"the indices of {num_bad} chunks go past their end")
    return indices


@kernel
def _add_gaps(gaps: Indices, num_elements: int, kept_of_whole: int, kept_of_last: int, indices: Indices) -> int:
    """Write the index that each gap leads to, and return the number of chunks in which the last is past the end."""
    done = num_bad = 0
    for first in range(0, num_elements, CHUNK_ELEMENTS):
        num_chunk = min(CHUNK_ELEMENTS, num_elements - first)
        position = -1
        for _ in range(kept_of_whole if num_chunk == CHUNK_ELEMENTS else kept_of_last):
            position += 1 + gaps[done]
            indices[done] = first + position
            done += 1
        num_bad += position >= num_chunk
    return num_bad


def _unpack(packed: Bytes, num_codes: int, num_bits: int, shift: int) -> npt.NDArray[Any]:
    return unpack_codes(packed, num_codes, 1 << num_bits, np.arange(1 << num_bits) << shift)
