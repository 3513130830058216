"""A tensor's step from one model version to the next, in units in the last place: exact, and small.

The bits of a float, read as a sign and a magnitude, are in the order of the floats: neighbours among floats are
neighbours among integers. A step is the difference of two such integers, exact for every bit pattern, -0, infinities
and NaN included, and short where training moved a weight little.

A tensor's steps are four sections, each one zstd frame, behind their lengths (uint64). `mask` has a bit per element
that says whether it changed, without its zero bytes; `groups` has a bit per byte of the mask that says whether it is
there. `tokens` has a byte per element that changed, with the step up to 64 either way, or the leading bits of a longer
one; `bits` has the other bits of those. Bits come lowest first.

Elements come ordered by *context*, how many powers of two the old value is below the tensor's largest: the smaller a
weight, the more units in the last place the same update moves it. Both ends know the old version, so the order costs
nothing, and the coder ends a block where a context ends, so that each has codes of its own. That is 17 to 25 % below
the order-0 entropy of the steps of a fine-tuned encoder in bf16 (docs/log.md).

A reader has the old values, and what a section decompresses to must have the length that follows from those and from
the sections before it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from fedmerge.delta.container import section_compressor, unzstd
from fedmerge.delta.planes import Bytes
from fedmerge.errors import InvalidDelta
from fedmerge.jit import kernel

SECTIONS = ("groups", "mask", "tokens", "bits")
ZSTD_LEVEL = 3

NUM_CONTEXTS = 16
# Fewer elements than this are not worth codes of their own: in a small tensor, and in a block.
FEWEST_ELEMENTS = 4096
FEWEST_SYMBOLS = 2048

# Tokens below this are the symbol itself.
NUM_LITERALS = 128

Bits: TypeAlias = npt.NDArray[Any]  # unsigned integers of a float type's width
Counts: TypeAlias = npt.NDArray[np.int64]


class Layout(NamedTuple):
    """A float type: its width in bits, those of its mantissa, and how many leading bits a long step's token holds."""

    width: int
    mantissa: int
    leading: int


# So many leading bits as tokens of one byte have room for.
LAYOUTS = {"F64": Layout(64, 52, 1), "F32": Layout(32, 23, 2), "F16": Layout(16, 10, 3), "BF16": Layout(16, 7, 3)}
_LENGTHS = struct.Struct(f"<{len(SECTIONS)}Q")


def most_bytes(num_elements: int, dtype: str) -> int:
    """Return more bytes than steps of so many elements can take: per element a token, all its bits and two of masks."""
    return num_elements * (LAYOUTS[dtype].width // 8 + 2) + 512


def encode(old: Bits, new: Bits, dtype: str) -> Bytes:
    """Return the byte string that takes bit patterns `old` (N,) to `new` (N,) of the float type `dtype`."""
    layout = LAYOUTS[dtype]
    highest, num_contexts = _contexts(old, layout)
    counts, changed = np.zeros(num_contexts, np.int64), np.zeros(num_contexts, np.int64)
    _count(old, new, layout.mantissa, highest, counts, changed)
    mask = np.zeros(-(-old.size // 8), np.uint8)
    symbols = np.empty(changed.sum(), old.dtype)
    _sort(old, new, layout.mantissa, highest, _starts(counts), _starts(changed), mask, symbols)
    tokens = np.empty(symbols.size, np.uint8)
    num_bits = _tokenise(symbols, layout.leading, tokens)
    bits = np.zeros(-(-int(num_bits) // 8), np.uint8)
    _put_bits(symbols, layout.leading, bits)
    present = mask != 0
    ends = counts.cumsum()
    sections = [
        _compress(np.packbits(present, bitorder="little"), ends // 64),
        _compress(mask[present], np.append(0, present.cumsum())[ends // 8]),
        _compress(tokens, changed.cumsum()),
        _compress(bits, ends[:0]),
    ]
    return np.frombuffer(b"".join([_LENGTHS.pack(*map(len, sections)), *sections]), np.uint8)


def decode(old: Bits, coded: Bytes, dtype: str) -> Bits:
    """Return the bit patterns (N,) that `encode` was given as `new`.

    Raises `InvalidDelta` for a byte string that it did not make for N elements of this `dtype`.
    """
    layout = LAYOUTS[dtype]
    sections = _split(coded)
    mask = _read_mask(sections, old.size)
    highest, num_contexts = _contexts(old, layout)
    counts, changed = np.zeros(num_contexts, np.int64), np.zeros(num_contexts, np.int64)
    _count(old, old, layout.mantissa, highest, counts, changed)
    _count_mask(mask, counts, changed)
    tokens = _decompress(sections, "tokens", int(changed.sum()))
    num_bits = int(_count_bits(tokens, layout.width, layout.leading))
    if num_bits < 0:
        raise InvalidDelta("a token stands for no step of this type")
    bits = _decompress(sections, "bits", -(-num_bits // 8))
    _require_zero_fill(bits, num_bits, "bits")
    symbols = np.empty(tokens.size, old.dtype)
    _take_bits(tokens, bits, layout.leading, symbols)
    if symbols.max(initial=0) == np.iinfo(old.dtype).max:
        raise InvalidDelta("a step is longer than its type is wide")
    new = np.empty_like(old)
    _unsort(old, layout.mantissa, highest, _starts(counts), _starts(changed), mask, symbols, new)
    return new


def _split(coded: Bytes) -> dict[str, memoryview]:
    lengths = _LENGTHS.unpack(coded[: _LENGTHS.size].data) if coded.size >= _LENGTHS.size else ()
    if sum(lengths) + _LENGTHS.size != coded.size:
        raise InvalidDelta(f"{coded.size} bytes are not sections of lengths {lengths}")
    sections, rest = {}, coded.data[_LENGTHS.size :]
    for kind, length in zip(SECTIONS, lengths, strict=True):
        sections[kind], rest = rest[:length], rest[length:]
    return sections


def _read_mask(sections: Mapping[str, memoryview], num_elements: int) -> Bytes:
    mask = np.zeros(-(-num_elements // 8), np.uint8)
    groups = _decompress(sections, "groups", -(-mask.size // 8))
    _require_zero_fill(groups, mask.size, "groups")
    present = np.unpackbits(groups, count=mask.size, bitorder="little").view(np.bool_)
    nonzero = _decompress(sections, "mask", int(np.count_nonzero(present)))
    if not nonzero.all():
        raise InvalidDelta("section mask has a zero byte")
    mask[present] = nonzero
    _require_zero_fill(mask, num_elements, "mask")
    return mask


def _require_zero_fill(section: Bytes, num_bits: int, kind: str) -> None:
    if num_bits % 8 and section[-1] >> (num_bits % 8):
        raise InvalidDelta(f"section {kind} is not filled with zeros")


def _contexts(old: Bits, layout: Layout) -> tuple[int, int]:
    """Return the largest exponent of `old`, and how many contexts below it there are."""
    if old.size < FEWEST_ELEMENTS:
        return 0, 1
    return int(_highest(old, layout.mantissa)), NUM_CONTEXTS


def _starts(counts: Counts) -> Counts:
    return counts.cumsum() - counts


def _compress(section: Bytes, ends: Counts) -> bytes:
    """Compress with a block boundary at each of `ends` that leaves a block of some size."""
    coder = section_compressor(ZSTD_LEVEL).compressobj(size=section.size)
    coded, done = [], 0
    for end in ends:
        if end - done >= FEWEST_SYMBOLS:
            coded += [coder.compress(section[done:end].data), coder.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
            done = int(end)
    coded += [coder.compress(section[done:].data), coder.flush()]
    return b"".join(coded)


def _decompress(sections: Mapping[str, memoryview], kind: str, raw_bytes: int) -> Bytes:
    try:
        return np.frombuffer(unzstd(sections[kind], raw_bytes), np.uint8)
    except InvalidDelta as err:
        raise InvalidDelta(f"section {kind} {err.message}") from err


# Compiled loops. Bit patterns are widened to uint64 first: of integers of two kinds, numba would make floats.

ONE = np.uint64(1)
LITERALS, LITERAL_BITS = np.uint64(NUM_LITERALS), np.uint64(NUM_LITERALS.bit_length() - 1)


@kernel
def _magnitude(bits: Bits) -> np.uint64:
    """Return the largest magnitude that bit patterns of this width have: all bits but the sign."""
    return (ONE << np.uint64(8 * bits.itemsize - 1)) - ONE


@kernel
def _highest(old: Bits, mantissa: int) -> np.int64:
    """Return the largest exponent."""
    magnitude, highest = _magnitude(old), np.uint64(0)
    for i in range(old.size):
        highest = max(highest, np.uint64(old[i]) & magnitude)
    return np.int64(highest >> np.uint64(mantissa))


@kernel
def _context(pattern: np.uint64, magnitude: np.uint64, mantissa: int, highest: int, num_contexts: int) -> int:
    exponent: Any = np.int64((pattern & magnitude) >> np.uint64(mantissa))
    below: int = min(highest - exponent, num_contexts - 1)
    return max(0, below)


@kernel
def _ordered(pattern: np.uint64, magnitude: np.uint64) -> np.uint64:
    """Return the integer, of two's complement, that a bit pattern is in the order of floats. It is its own inverse."""
    return pattern ^ magnitude if pattern > magnitude else pattern


@kernel
def _count(old: Bits, new: Bits, mantissa: int, highest: int, counts: Counts, changed: Counts) -> None:
    """Count the elements of each context, and those that differ."""
    magnitude = _magnitude(old)
    for i in range(old.size):
        context = _context(np.uint64(old[i]), magnitude, mantissa, highest, counts.size)
        counts[context] += 1
        changed[context] += old[i] != new[i]


@kernel
def _sort(
    old: Bits,
    new: Bits,
    mantissa: int,
    highest: int,
    starts: Counts,
    changed_starts: Counts,
    mask: Bytes,
    symbols: Bits,
) -> None:
    """Fill the mask (of zeros, before) and the symbols: 0 for a step of -1, 1 for +1, 2 for -2, and so on."""
    magnitude = _magnitude(old)
    for i in range(old.size):
        before, after = np.uint64(old[i]), np.uint64(new[i])
        context = _context(before, magnitude, mantissa, highest, starts.size)
        position = starts[context]
        starts[context] += 1
        if before != after:
            step = (_ordered(after, magnitude) - _ordered(before, magnitude)) & (magnitude + magnitude + ONE)
            # Zigzag, less one as no step is zero.
            backward = step > magnitude
            length = (magnitude + magnitude + ONE) - step if backward else step - ONE
            symbols[changed_starts[context]] = length + length + (ONE if not backward else np.uint64(0))
            changed_starts[context] += 1
            mask[position >> 3] |= np.uint8(1 << (position & 7))


@kernel
def _unsort(
    old: Bits,
    mantissa: int,
    highest: int,
    starts: Counts,
    changed_starts: Counts,
    mask: Bytes,
    symbols: Bits,
    new: Bits,
) -> None:
    """Undo `_sort`: fill `new`."""
    magnitude = _magnitude(old)
    everything = magnitude + magnitude + ONE
    for i in range(old.size):
        before = np.uint64(old[i])
        context = _context(before, magnitude, mantissa, highest, starts.size)
        position = starts[context]
        starts[context] += 1
        if mask[position >> 3] >> (position & 7) & 1:
            symbol = np.uint64(symbols[changed_starts[context]])
            changed_starts[context] += 1
            length = symbol >> ONE
            step = length + ONE if symbol & ONE else everything - length
            new[i] = _ordered((_ordered(before, magnitude) + step) & everything, magnitude)
        else:
            new[i] = old[i]


@kernel
def _count_mask(mask: Bytes, counts: Counts, changed: Counts) -> None:
    """Count the elements of each context that the mask says have changed."""
    position = 0
    for context in range(counts.size):
        for _ in range(counts[context]):
            changed[context] += mask[position >> 3] >> (position & 7) & 1
            position += 1


@kernel
def _length(symbol: np.uint64) -> np.uint64:
    """Return the number of bits after the first of a symbol that is no literal."""
    length = LITERAL_BITS
    while symbol >> length > ONE:
        length += ONE
    return length


@kernel
def _tokenise(symbols: Bits, leading: int, tokens: Bytes) -> np.int64:
    """Fill the tokens and return how many bits go beside them.

    A literal is its own token. That of a longer symbol holds its length and the `leading` bits after the first.
    """
    shift = np.uint64(leading)
    num_bits = np.int64(0)
    for i in range(symbols.size):
        symbol = np.uint64(symbols[i])
        if symbol < LITERALS:
            tokens[i] = symbol
        else:
            length = _length(symbol)
            rest = length - shift
            tokens[i] = LITERALS + ((length - LITERAL_BITS) << shift) + ((symbol >> rest) - (ONE << shift))
            num_bits += np.int64(rest)
    return num_bits


@kernel
def _put_bits(symbols: Bits, leading: int, bits: Bytes) -> None:
    """Fill what the tokens leave out, the lowest bit first, into `bits` (of zeros, before)."""
    position = 0
    for i in range(symbols.size):
        symbol = np.uint64(symbols[i])
        if symbol >= LITERALS:
            left: Any = np.int64(_length(symbol)) - leading
            symbol &= (ONE << np.uint64(left)) - ONE
            while left > 0:
                offset = position & 7
                bits[position >> 3] |= np.uint8((symbol << np.uint64(offset)) & np.uint64(255))
                num_taken = min(8 - offset, left)
                symbol >>= np.uint64(num_taken)
                position += num_taken
                left -= num_taken


@kernel
def _count_bits(tokens: Bytes, width: int, leading: int) -> np.int64:
    """Return how many bits go beside these tokens, or -1 when one of them is too long for its type."""
    num_bits = np.int64(0)
    for token in tokens:
        if token >= NUM_LITERALS:
            length = LITERAL_BITS + ((np.uint64(token) - LITERALS) >> np.uint64(leading))
            if length >= np.uint64(width):
                return np.int64(-1)
            num_bits += np.int64(length) - leading
    return num_bits


@kernel
def _take_bits(tokens: Bytes, bits: Bytes, leading: int, symbols: Bits) -> None:
    """Undo `_tokenise` and `_put_bits`: fill the symbols of tokens that `_count_bits` found sound."""
    shift, position = np.uint64(leading), 0
    for i in range(tokens.size):
        token = np.uint64(tokens[i])
        if token >= LITERALS:
            token -= LITERALS
            left: Any = np.int64(LITERAL_BITS + (token >> shift)) - leading
            token = ((ONE << shift) | (token & ((ONE << shift) - ONE))) << np.uint64(left)
            taken = 0
            while taken < left:
                offset = position & 7
                num_taken = min(8 - offset, left - taken)
                piece = (bits[position >> 3] >> offset) & ((1 << num_taken) - 1)
                token |= np.uint64(piece) << np.uint64(taken)
                position += num_taken
                taken += num_taken
        symbols[i] = token
