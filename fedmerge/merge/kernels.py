"""The compiled loops of the element-wise methods: each is one pass over a block of columns that lies in the cache.

They compute, operation for operation, what the torch forms of the methods do, and give the same bits. Arguments:

    stored     elements of a checkpoint: uint16 for bf16, or float32             (B,)
    before     the base's elements, stored likewise or widened, or None          (B,)
    values     one task vector's elements, float32                               (B,)
    rows       K task vectors' elements, float32                                 (K, B)
    magnitude  the bits of a number without its sign; integers in the order of the magnitudes
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedmerge.jit import bits_of, fp32_of, kernel

Array: TypeAlias = npt.NDArray[Any]

MAGNITUDE = np.uint32(0x7FFFFFFF)
INFINITE = 0x7F800000  # the magnitude of infinity; those of NaN are above it

# A magnitude is looked for by its upper 16 bits first, then by its lower 15.
LOW_BITS = 15
NUM_HIGH, NUM_LOW = 1 << 16, 1 << LOW_BITS

# Columns that the consensus works on at a time: its four scratch rows stay in the first-level cache.
TILE = 1024


# --- reading and writing


@kernel
def read(stored: Array, before: Array | None, out: Array) -> int:
    """Set `out` (B,) to the task vector's elements; return the largest magnitude among them."""
    largest = np.uint32(0)
    for j in range(out.size):
        value = fp32_of(stored[j])
        if before is not None:
            value = value - fp32_of(before[j])
        out[j] = value
        largest = max(largest, bits_of(value) & MAGNITUDE)
    return int(largest)


@kernel
def add_scaled(stored: Array, before: Array | None, coefficient: np.float32, first: bool, out: Array) -> int:
    """Add `coefficient` times the task vector to `out` (B,), or set it to that; return its largest magnitude."""
    largest = np.uint32(0)
    if first:
        for j in range(out.size):
            value = fp32_of(stored[j])
            if before is not None:
                value = value - fp32_of(before[j])
            largest = max(largest, bits_of(value) & MAGNITUDE)
            out[j] = coefficient * value
    else:
        for j in range(out.size):
            value = fp32_of(stored[j])
            if before is not None:
                value = value - fp32_of(before[j])
            largest = max(largest, bits_of(value) & MAGNITUDE)
            out[j] = out[j] + coefficient * value
    return int(largest)


@kernel
def apply_fp32(before: Array, change: Array, out: Array) -> int:
    """Set `out` (B,), float32, to `before + change`; return the largest magnitude."""
    largest = np.uint32(0)
    for j in range(out.size):
        value = fp32_of(before[j]) + change[j]
        out[j] = value
        largest = max(largest, bits_of(value) & MAGNITUDE)
    return int(largest)


@kernel
def apply_bf16(before: Array, change: Array, out: Array) -> int:
    """Set `out` (B,), uint16, to the bf16 nearest to `before + change`, ties to even; return the largest magnitude."""
    largest = np.uint32(0)
    for j in range(out.size):
        bits = bits_of(fp32_of(before[j]) + change[j])
        rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
        if (bits & MAGNITUDE) > np.uint32(INFINITE):
            rounded = np.uint32(0x7FC00000)
        out[j] = np.uint16(rounded >> np.uint32(16))
        largest = max(largest, rounded & MAGNITUDE)
    return int(largest)


# --- which entries are the largest


@kernel
def count_high(values: Array, counts: Array) -> None:
    """Add to `counts` (NUM_HIGH,) how many of `values` have each upper part of a magnitude."""
    for j in range(values.size):
        counts[(bits_of(values[j]) & MAGNITUDE) >> np.uint32(LOW_BITS)] += 1


@kernel
def count_low(values: Array, high: int, counts: Array) -> None:
    """Add to `counts` (NUM_LOW,) how many of the `values` whose upper part is `high` have each lower part."""
    for j in range(values.size):
        magnitude = bits_of(values[j]) & MAGNITUDE
        if magnitude >> np.uint32(LOW_BITS) == np.uint32(high):
            counts[magnitude & np.uint32(NUM_LOW - 1)] += 1


@kernel
def find_from_above(counts: Array, k: int) -> tuple[int, int]:
    """Return the index at which the `k`-th entry from above is counted, and how many entries are above that index."""
    above = 0
    for index in range(counts.size - 1, -1, -1):
        if above + counts[index] >= k:
            return index, above
        above += counts[index]
    return 0, above


@kernel
def find_tied(values: Array, threshold: np.float32, num_tied: int) -> tuple[int, int]:
    """Return where the `num_tied`-th of `values` of magnitude `threshold` is, or -1, and how many of them there are."""
    found = 0
    for j in range(values.size):
        if abs(values[j]) == threshold:
            found += 1
            if found == num_tied:
                return j, found
    return -1, found


@kernel
def keep_largest(values: Array, low: np.float32, high: np.float32, split: int) -> None:
    """Set to zero what a cut does not keep: magnitudes up to `low` before `split`, up to `high` from there on."""
    for j in range(min(split, values.size)):
        values[j] = np.float32(0) if -low <= values[j] <= low else values[j]
    for j in range(min(split, values.size), values.size):
        values[j] = np.float32(0) if -high <= values[j] <= high else values[j]


@kernel
def drop_largest(values: Array, low: np.float32, high: np.float32, split: int) -> None:
    """Set to zero what a cut keeps."""
    for j in range(min(split, values.size)):
        values[j] = values[j] if -low <= values[j] <= low else np.float32(0)
    for j in range(min(split, values.size), values.size):
        values[j] = values[j] if -high <= values[j] <= high else np.float32(0)


@kernel
def rank_lines(values: Array, num_columns: int, scratch: Array, ranks: Array) -> None:
    """Set `ranks` (L,) to the place of each of `values` (L,) by magnitude within its line, 0 for the largest.

    Of equal magnitudes the first ranks higher. `scratch` is uint64 of (2, `num_columns`). A radix sort, least digit
    first, of the magnitudes, falling, with their positions below them.
    """
    counts = np.empty(256, dtype=np.int64)
    for start in range(0, values.size, num_columns):
        source, target = scratch[0], scratch[1]
        for j in range(num_columns):
            falling = MAGNITUDE - (bits_of(values[start + j]) & MAGNITUDE)
            source[j] = (np.uint64(falling) << np.uint64(32)) | np.uint64(j)
        for shift in (32, 40, 48, 56):
            counts[:] = 0
            for j in range(num_columns):
                counts[(source[j] >> np.uint64(shift)) & np.uint64(255)] += 1
            place = 0
            for digit in range(256):
                counts[digit], place = place, place + counts[digit]
            for j in range(num_columns):
                digit = int((source[j] >> np.uint64(shift)) & np.uint64(255))
                target[counts[digit]] = source[j]
                counts[digit] += 1
            source, target = target, source
        for place in range(num_columns):
            ranks[start + np.int64(source[place] & np.uint64(0xFFFFFFFF))] = place


# --- dropping at random


@kernel
def drop(values: Array, words: Array, threshold: np.uint32) -> None:
    """Multiply by zero the `values` whose random word is not below `threshold`."""
    for j in range(values.size):
        values[j] = values[j] * (np.float32(1) if words[j] < threshold else np.float32(0))


@kernel
def drop_by_rank(
    values: Array, words: Array, ranks: Array, lowest: float, span: float, last: int, rescale: bool
) -> None:
    """Keep each of `values` with a probability that falls with its rank; divide it by that if `rescale` is set.

    `lowest + (last - rank) * span / last` is the probability, as `della.keep_probabilities` has it.
    """
    for j in range(values.size):
        probability = lowest + np.float64(last - ranks[j]) * span / last
        kept = values[j] * (np.float32(1) if words[j] * 2.0**-32 < probability else np.float32(0))
        values[j] = np.float32(np.float64(kept) * (1 / probability)) if rescale else kept


# --- consensus

MASS, WEIGHTED, COUNT = 0, 1, 2
ELECTIONS = {"mass": MASS, "weighted": WEIGHTED, "count": COUNT}


@kernel
def vote(rows: Array, weights: Array, election: int, start: int, ballot: Array) -> None:
    """Set `ballot` (T,) to what decides the signs of the columns from `start` on, as `consensus._ballot` does."""
    num_columns = min(ballot.size, rows.shape[1] - start)
    ballot[:] = 0
    for i in range(rows.shape[0]):
        row, weight = rows[i, start : start + num_columns], weights[i]
        if election == MASS:
            for j in range(num_columns):
                ballot[j] += row[j]
        elif election == WEIGHTED:
            for j in range(num_columns):
                ballot[j] += row[j] * weight
        else:
            for j in range(num_columns):
                ballot[j] += np.float32((row[j] > 0) - (row[j] < 0))


@kernel
def count_votes(rows: Array, weights: Array, election: int) -> int:
    """Return how many more columns of `rows` elect plus than elect minus."""
    ballot, votes = np.empty(TILE, dtype=np.float32), 0
    for start in range(0, rows.shape[1], TILE):
        vote(rows, weights, election, start, ballot)
        for j in range(min(TILE, rows.shape[1] - start)):
            votes += (ballot[j] > 0) - (ballot[j] < 0)
    return votes


@kernel
def elect_and_merge(
    rows: Array,
    weights: Array,
    election: int,
    draw: np.float32,
    normalize: bool,
    by_weight: bool,
    take_max: bool,
    factor: np.float32,
    out: Array,
) -> None:
    """Set `out` (B,) to `factor` times the disjoint merge of `rows`, as `consensus.elect_and_merge` does."""
    signs, divisor = np.empty(TILE, dtype=np.float32), np.empty(TILE, dtype=np.float32)
    zero, one = np.float32(0), np.float32(1)
    for start in range(0, rows.shape[1], TILE):
        num_columns = min(TILE, rows.shape[1] - start)
        vote(rows, weights, election, start, signs)
        for j in range(num_columns):
            signs[j] = draw if signs[j] == 0 else -one if signs[j] < 0 else one
        total = out[start : start + num_columns]
        total[:] = 0
        divisor[:] = 0
        for i in range(rows.shape[0]):
            row, weight = rows[i, start : start + num_columns], weights[i]
            voice = weight if election == WEIGHTED else one
            share = weight if by_weight else one
            if take_max:
                for j in range(num_columns):
                    agrees = one if row[j] * voice * signs[j] > 0 else zero
                    entry = row[j] * weight * agrees * signs[j]
                    total[j] = entry if entry > total[j] else total[j]
            else:
                for j in range(num_columns):
                    agrees = one if row[j] * voice * signs[j] > 0 else zero
                    total[j] += row[j] * weight * agrees
                    divisor[j] += agrees * share
        if take_max:
            for j in range(num_columns):
                total[j] = total[j] * signs[j] * factor
        elif normalize:
            for j in range(num_columns):
                total[j] = total[j] / (one if divisor[j] == 0 else divisor[j]) * factor
        else:
            for j in range(num_columns):
                total[j] = total[j] * factor
