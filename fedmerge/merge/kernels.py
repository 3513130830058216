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

# Columns that a kernel of several rows works on at a time: what it holds of them stays in the first-level cache.
TILE = 1024

# Sums that are added up side by side: entry e of a row goes to number e % LANES, whatever the blocks it comes in.
LANES = 32


# --- reading and writing


@kernel
def _magnitude(value: np.float32) -> np.uint32:
    # Every step is cut back to 32 bits: numba's integers are of 64, which halves the width of vectors.
    return np.uint32(bits_of(value) & MAGNITUDE)


@kernel
def read(stored: Array, before: Array | None, out: Array) -> int:
    """Set `out` (B,) to the task vector's elements; return the largest magnitude among them."""
    largest = np.uint32(0)
    for j in range(out.size):
        value = fp32_of(stored[j])
        if before is not None:
            value = value - fp32_of(before[j])
        out[j] = value
        largest = np.uint32(max(largest, _magnitude(value)))
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
            largest = np.uint32(max(largest, _magnitude(value)))
            out[j] = np.float32(0) + coefficient * value  # never -0, as in `average.fold`
    else:
        for j in range(out.size):
            value = fp32_of(stored[j])
            if before is not None:
                value = value - fp32_of(before[j])
            largest = np.uint32(max(largest, _magnitude(value)))
            out[j] = out[j] + coefficient * value
    return int(largest)


@kernel
def add_four_scaled(
    first_stored: Array,
    second_stored: Array,
    third_stored: Array,
    fourth_stored: Array,
    before: Array | None,
    coefficients: Array,
    first: bool,
    out: Array,
) -> int:
    """Do as four calls of `add_scaled` do, with the same base; return the largest magnitude of all four.

    Memory is waited for once and not four times, as the rows are read side by side.
    """
    largest = np.uint32(0)
    for j in range(out.size):
        one, two = fp32_of(first_stored[j]), fp32_of(second_stored[j])
        three, four = fp32_of(third_stored[j]), fp32_of(fourth_stored[j])
        if before is not None:
            base = fp32_of(before[j])
            one, two, three, four = one - base, two - base, three - base, four - base
        largest = np.uint32(max(largest, _magnitude(one)))
        largest = np.uint32(max(largest, _magnitude(two)))
        largest = np.uint32(max(largest, _magnitude(three)))
        largest = np.uint32(max(largest, _magnitude(four)))
        total = np.float32(0) if first else out[j]
        total = total + coefficients[0] * one
        total = total + coefficients[1] * two
        total = total + coefficients[2] * three
        out[j] = total + coefficients[3] * four
    return int(largest)


@kernel
def apply_fp32(before: Array, change: Array, out: Array) -> int:
    """Set `out` (B,), float32, to `before + change`; return the largest magnitude."""
    largest = np.uint32(0)
    for j in range(out.size):
        value = fp32_of(before[j]) + change[j]
        out[j] = value
        largest = np.uint32(max(largest, _magnitude(value)))
    return int(largest)


@kernel
def apply_bf16(before: Array, change: Array, out: Array) -> int:
    """Set `out` (B,), uint16, to the bf16 nearest to `before + change`, ties to even; return the largest magnitude."""
    largest = np.uint32(0)
    for j in range(out.size):
        value = fp32_of(before[j]) + change[j]
        bits = bits_of(value)
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd)
        rounded = np.uint32(0x7FC00000) if _magnitude(value) > np.uint32(INFINITE) else rounded
        out[j] = np.uint16(rounded >> np.uint32(16))
        largest = np.uint32(max(largest, np.uint32(rounded & MAGNITUDE)))
    return int(largest)


# --- which entries are the largest


@kernel
def count_high(values: Array, counts: Array) -> None:
    """Add to `counts` (NUM_HIGH,) how many of `values` have each upper part of a magnitude."""
    for j in range(values.size):
        counts[_magnitude(values[j]) >> np.uint32(LOW_BITS)] += 1


@kernel
def count_low(values: Array, high: int, counts: Array) -> None:
    """Add to `counts` (NUM_LOW,) how many of the `values` whose upper part is `high` have each lower part."""
    for j in range(values.size):
        magnitude = _magnitude(values[j])
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
def sort_line(values: Array, scratch: Array, counts: Array) -> int:
    """Sort the indices of `values` (C,) by falling magnitude; return the row of `scratch` whose lower bits they are.

    Of equal magnitudes the first comes first. `scratch` is uint64 of (2, C), `counts` int64 of (4, 256). A radix sort,
    least digit first, of 31 bits that fall with the magnitude, above the index.
    """
    counts[:] = 0
    for j in range(values.size):
        falling = np.uint32(MAGNITUDE - _magnitude(values[j]))
        scratch[0, j] = (np.uint64(falling) << np.uint64(32)) | np.uint64(j)
        for digit in range(4):
            counts[digit, (falling >> np.uint32(8 * digit)) & np.uint32(255)] += 1
    row = 0
    for digit in range(4):
        place = 0
        for value in range(256):
            counts[digit, value], place = place, place + counts[digit, value]
        shift = np.uint64(32 + 8 * digit)
        for j in range(values.size):
            key = scratch[row, j]
            value = int((key >> shift) & np.uint64(255))
            scratch[1 - row, counts[digit, value]] = key
            counts[digit, value] += 1
        row = 1 - row
    return row


# --- dropping at random


@kernel
def drop(values: Array, words: Array, threshold: np.uint32) -> None:
    """Multiply by zero the `values` whose random word is not below `threshold`."""
    for j in range(values.size):
        values[j] = values[j] * (np.float32(1) if words[j] < threshold else np.float32(0))


@kernel
def drop_by_rank(
    values: Array, words: Array, probabilities: Array, factors: Array, scratch: Array, counts: Array
) -> None:
    """Keep each of `values` (B,), lines of C, with the probability (C,) of its rank in its line; multiply by a factor.

    Probabilities and factors, both float64, are by rank, the largest first; `scratch` and `counts` are of `sort_line`.
    """
    num_columns = probabilities.size
    for start in range(0, values.size, num_columns):
        line, drawn = values[start : start + num_columns], words[start : start + num_columns]
        row = sort_line(line, scratch, counts)
        for place in range(num_columns):
            j = int(scratch[row, place] & np.uint64(0xFFFFFFFF))
            kept = line[j] * (np.float32(1) if drawn[j] * 2.0**-32 < probabilities[place] else np.float32(0))
            line[j] = np.float32(np.float64(kept) * factors[place])


# --- inner products


@kernel
def add_products(rows: Array, lanes: Array) -> None:
    """Add to `lanes` (G, K, K, LANES), float64, the products of each pair of `rows` (K, G, B), its first as the later.

    B is a multiple of LANES but in the last of a row's blocks.
    """
    for group in range(rows.shape[1]):
        for start in range(0, rows.shape[2], TILE):
            stop = min(start + TILE, rows.shape[2])
            whole = start + (stop - start) // LANES * LANES
            for i in range(rows.shape[0]):
                one = rows[i, group]
                for j in range(i + 1):
                    other, sums = rows[j, group], lanes[group, i, j]
                    for first in range(start, whole, LANES):
                        for lane in range(LANES):
                            sums[lane] += np.float64(one[first + lane]) * np.float64(other[first + lane])
                    for rest in range(whole, stop):
                        sums[rest - whole] += np.float64(one[rest]) * np.float64(other[rest])


@kernel
def sum_lanes(lanes: Array, products: Array) -> None:
    """Set `products` (G, K, K), float64, to the sums that `add_products` made of `lanes`, both halves of it."""
    for group in range(lanes.shape[0]):
        for i in range(lanes.shape[1]):
            for j in range(i + 1):
                total = 0.0
                for lane in range(LANES):
                    total += lanes[group, i, j, lane]
                products[group, i, j] = total
                products[group, j, i] = total


@kernel
def combine(rows: Array, coefficients: Array, out: Array) -> None:
    """Set `out` (B,) to the sum of coefficient * row, added in float64 in the order of `rows` and rounded once."""
    total = np.empty(TILE, dtype=np.float64)
    for start in range(0, out.size, TILE):
        num_columns = min(TILE, out.size - start)
        total[:] = 0
        for i in range(rows.shape[0]):
            row, coefficient = rows[i, start : start + num_columns], coefficients[i]
            for j in range(num_columns):
                total[j] += np.float64(row[j]) * coefficient
        for j in range(num_columns):
            out[start + j] = np.float32(total[j])


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
