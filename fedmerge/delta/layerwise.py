"""Layer-wise top-k: the largest elements of a whole tensor, and how their indices travel.

The choice with the least error at its size, since rows and columns of a tensor differ in scale: one threshold for the
tensor keeps more where there is more. (Alistarh et al., "The convergence of sparsified gradient methods", arXiv
1809.10505, call top-k of a tensor at a time layer-wise.) How many elements there are still follows from the tensor's
size and the density, but not how many of each chunk of 4096: those counts travel beside the gaps of
`fedmerge.delta.indices`, two bytes each before they are coded.

Shapes: N elements of the tensor, M of them kept, C = ceil(N / 4096) chunks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedmerge.delta.indices import CHUNK_ELEMENTS, Indices, gap_bytes, kept_of_chunk, pack_gaps, unpack_gaps
from fedmerge.delta.planes import Sections
from fedmerge.errors import InvalidDelta
from fedmerge.jit import kernel

# The bits of a magnitude are counted by their upper 16, and those that share them with the threshold by the lower 15.
_LOW_BITS = 15
_MAGNITUDE = (1 << 31) - 1


def num_largest(num_elements: int, density: float) -> int:
    """Return M for a tensor of `num_elements`: its share, rounded, at least 1 if there are any."""
    return kept_of_chunk(num_elements, density) if num_elements else 0


@kernel
def _rank(counts: npt.NDArray[np.int64], rank: int) -> tuple[int, int]:
    """Return the bin of the element of `rank` (0 the topmost) and its rank within the bin."""
    position = counts.size - 1
    while counts[position] <= rank:
        rank -= counts[position]
        position -= 1
    return position, rank


@kernel
def _select(bits: npt.NDArray[np.uint32], indices: Indices) -> None:
    """Write into `indices` (M,), ascending, where the M largest magnitudes of `bits` (N,) are; of equals the first."""
    high = np.zeros(1 << (31 - _LOW_BITS), dtype=np.int64)
    for value in bits:
        high[(value & _MAGNITUDE) >> _LOW_BITS] += 1
    top, rank = _rank(high, indices.size - 1)
    low = np.zeros(1 << _LOW_BITS, dtype=np.int64)
    for value in bits:
        magnitude = value & _MAGNITUDE
        if magnitude >> _LOW_BITS == top:
            low[magnitude & ((1 << _LOW_BITS) - 1)] += 1
    bottom, rank = _rank(low, rank)
    threshold = (top << _LOW_BITS) | bottom
    num_equal = rank + 1
    done = 0
    for index in range(bits.size):
        magnitude = bits[index] & _MAGNITUDE
        if magnitude > threshold or (magnitude == threshold and num_equal > 0):
            indices[done] = index
            done += 1
            if magnitude == threshold:
                num_equal -= 1


def largest_of_tensor(values: npt.NDArray[np.float32], density: float) -> Indices:
    """Return the indices (M,), ascending, of the largest magnitudes of `values` (N,), which has no NaN.

    Of equal magnitudes the one with the lower index is taken, so the choice is the same on every machine.
    """
    indices = np.empty(num_largest(values.size, density), dtype=np.int64)
    if indices.size:
        # The bits of floats that are not negative are in the floats' order.
        _select(values.view(np.uint32), indices)
    return indices


def counted_index_bytes(num_elements: int, density: float) -> dict[str, int]:
    """Return the length of each section of `encode_counted`."""
    num_chunks = -(-num_elements // CHUNK_ELEMENTS)
    counts = {"counts_low": num_chunks, "counts_high": num_chunks}
    return counts | gap_bytes(num_largest(num_elements, density), density)


def encode_counted(indices: Indices, num_elements: int, density: float) -> Sections:
    """Return, for ascending `indices` (M,), how many are in each chunk, and the gaps between those of a chunk."""
    chunks = indices // CHUNK_ELEMENTS
    counts = np.bincount(chunks, minlength=-(-num_elements // CHUNK_ELEMENTS))
    gaps = np.diff(indices, prepend=0) - 1
    first = np.diff(chunks, prepend=-1) > 0
    gaps[first] = indices[first] % CHUNK_ELEMENTS
    low, high = (counts & 0xFF).astype(np.uint8), (counts >> 8).astype(np.uint8)
    return {"counts_low": low, "counts_high": high, **pack_gaps(gaps, density)}


@kernel
def _place(
    gaps: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], num_elements: int, indices: npt.NDArray[np.int64]
) -> int:
    """Turn the gaps of each chunk into `indices` (M,); return how many chunks they leave."""
    done = num_bad = 0
    for chunk in range(counts.size):
        start = chunk * CHUNK_ELEMENTS
        index = start - 1
        for _ in range(counts[chunk]):
            index += 1 + gaps[done]
            indices[done] = index
            done += 1
        if index >= min(start + CHUNK_ELEMENTS, num_elements):
            num_bad += 1
    return num_bad


def decode_counted(sections: Sections, num_elements: int, density: float) -> Indices:
    """Return the indices (M,), strictly increasing and below `num_elements`, of sections of the right lengths.

    Raises `InvalidDelta` for counts that do not sum to M, for gaps that lead past the end of their chunk, and for bytes
    that no packing makes.
    """
    num_kept = num_largest(num_elements, density)
    counts = sections["counts_low"].astype(np.int64) + (sections["counts_high"].astype(np.int64) << 8)
    # Checked before they are followed: they say how many gaps are read.
    if counts.sum() != num_kept:
        raise InvalidDelta(f"the counts of its chunks sum to {counts.sum()}, not {num_kept}")
    gaps = unpack_gaps(sections, num_kept, density)
    indices = np.empty(num_kept, dtype=np.int64)
    num_bad = _place(gaps, counts, num_elements, indices)
    if num_bad:
        raise InvalidDelta(f"the indices of {num_bad} chunks go past their end")
    return indices
