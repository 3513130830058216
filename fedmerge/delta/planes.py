"""Sections of a frame: runs of bytes of one statistical kind, so that the entropy coder meets one distribution.

Values of several bytes are split into *byte planes*, with the sign moved below the mantissa first: the last plane is
then exactly the exponent, which is where floats compress, as ZipNN (arXiv 2411.05239) found for weights. Codes of few
levels are packed, as many to a byte as fit: Huffman codes have whole bits for a symbol, so the more codes a symbol
holds the less is lost to that. Packed and then entropy-coded, the 4 levels of a Gaussian cost 1.93 bits each; one to a
byte they cost 2.07, and their entropy is 1.91.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedmerge.errors import InvalidDelta
from fedmerge.jit import kernel

Bytes: TypeAlias = npt.NDArray[np.uint8]
Sections: TypeAlias = Mapping[str, Bytes]


# A kernel that goes over its input several times does so for this many values at a time: they stay in cache.
_CHUNK_VALUES = 1 << 13


def split_planes(bits: npt.NDArray[Any]) -> Bytes:
    """Return the byte planes (width, M) of float bit patterns (M,), uint16 or uint32, least significant byte first.

    The sign is rotated to the lowest bit.
    """
    planes = np.empty((bits.itemsize, bits.size), dtype=np.uint8)
    _split(bits, planes)
    return planes


@kernel
def _split(bits: npt.NDArray[Any], planes: Bytes) -> None:
    sign_bit = 8 * len(planes) - 1
    for start in range(0, bits.size, _CHUNK_VALUES):
        chunk = bits[start : start + _CHUNK_VALUES]
        for plane in range(len(planes)):
            column = planes[plane, start : start + _CHUNK_VALUES]
            for i in range(chunk.size):
                column[i] = (((chunk[i] << 1) | (chunk[i] >> sign_bit)) >> (8 * plane)) & 0xFF


def join_planes(planes: Sequence[Bytes]) -> npt.NDArray[Any]:
    """Return the float bit patterns (M,) that `split_planes` split: uint16 of two planes, uint32 of four."""
    bits: npt.NDArray[Any] = np.empty(planes[0].size, dtype=f"u{len(planes)}")
    if len(planes) == 2:
        _join_two(planes[0], planes[1], bits)
    else:
        _join_four(planes[0], planes[1], planes[2], planes[3], bits)
    return bits


@kernel
def _join_two(plane0: Bytes, plane1: Bytes, bits: npt.NDArray[np.uint16]) -> None:
    for i in range(bits.size):
        bits[i] = (plane0[i] >> 1) | (plane1[i] << 7) | (plane0[i] << 15)


@kernel
def _join_four(plane0: Bytes, plane1: Bytes, plane2: Bytes, plane3: Bytes, bits: npt.NDArray[np.uint32]) -> None:
    for i in range(bits.size):
        low = (plane0[i] >> 1) | (plane0[i] << 31)
        bits[i] = low | (plane1[i] << 7) | (plane2[i] << 15) | (plane3[i] << 23)


def codes_per_byte(num_levels: int) -> int:
    """Return how many codes of `num_levels` (2 to 256) levels fit into a byte, as digits of a number in that base."""
    return next(count for count in range(8, 0, -1) if num_levels**count <= 256)


def packed_bytes(num_codes: int, num_levels: int) -> int:
    """Return the number of bytes that `pack_codes` makes of `num_codes` codes."""
    return -(-num_codes // codes_per_byte(num_levels))


def pack_codes(codes: Bytes, num_levels: int) -> Bytes:
    """Return `codes` (M,), each below `num_levels`, as digits in that base, the first of a byte the least significant.

    The last byte is filled with zeros.
    """
    packed = np.empty(packed_bytes(codes.size, num_levels), dtype=np.uint8)
    _pack(codes, num_levels, codes_per_byte(num_levels), packed)
    return packed


@kernel
def _pack(codes: Bytes, num_levels: int, per_byte: int, packed: Bytes) -> None:
    for byte in range(packed.size):
        value = 0
        for i in range(min(codes.size, (byte + 1) * per_byte) - 1, byte * per_byte - 1, -1):
            value = value * num_levels + codes[i]
        packed[byte] = value


def unpack_codes(packed: Bytes, num_codes: int, num_levels: int, meaning: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return `meaning[code]` for the `num_codes` codes that `pack_codes` packed; `meaning` has one entry per level.

    Raises `InvalidDelta` for bytes that no packed codes make.
    """
    per_byte = codes_per_byte(num_levels)
    num_symbols = num_levels**per_byte
    if packed.max(initial=0) >= num_symbols:
        num_bad = int(np.count_nonzero(packed >= num_symbols))
        raise InvalidDelta(f"{num_bad} bytes are no {per_byte} codes of {num_levels} levels")
    num_last = num_codes - (packed.size - 1) * per_byte
    if packed.size and packed[-1] >= num_levels**num_last:
        raise InvalidDelta("the last byte is not filled with zeros")
    symbols = np.arange(num_symbols)[:, np.newaxis] // num_levels ** np.arange(per_byte)
    result = np.empty(num_codes, dtype=meaning.dtype)
    _look_up(packed, meaning[symbols % num_levels], result)
    return result


@kernel
def _look_up(packed: Bytes, table: npt.NDArray[Any], result: npt.NDArray[Any]) -> None:
    """Write row `table[byte]` for each byte, one after another, as far as `result` goes."""
    per_byte = table.shape[1]
    num_whole = result.size // per_byte
    for byte in range(num_whole):
        for digit in range(per_byte):
            result[byte * per_byte + digit] = table[packed[byte], digit]
    for i in range(num_whole * per_byte, result.size):
        result[i] = table[packed[num_whole], i - num_whole * per_byte]
