"""Sections of a frame: runs of bytes of one statistical kind, so that the entropy coder meets one distribution.

Values of several bytes are split into *byte planes*, with the sign moved below the mantissa first: the last plane is
then exactly the exponent, which is where floats compress, as ZipNN (arXiv 2411.05239) found for weights. Codes of few
levels are packed, as many to a byte as fit: Huffman codes have whole bits for a symbol, so the more codes a symbol
holds the less is lost to that. Packed and then entropy-coded, the 4 levels of a Gaussian cost 1.93 bits each; one to a
byte they cost 2.07, and their entropy is 1.91.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedmerge.errors import InvalidDelta

Bytes: TypeAlias = npt.NDArray[np.uint8]
Sections: TypeAlias = Mapping[str, Bytes]


def split_planes(bits: npt.NDArray[Any]) -> list[Bytes]:
    """Return the byte planes of float bit patterns, least significant first, the sign rotated to the lowest bit."""
    width = bits.itemsize
    rotated = (bits << 1) | (bits >> (8 * width - 1))
    return [(rotated >> (8 * plane)).astype(np.uint8) for plane in range(width)]


def join_planes(planes: list[Bytes]) -> npt.NDArray[Any]:
    """Return the float bit patterns that `split_planes` split, as uint16 or uint32."""
    width = len(planes)
    rotated = np.empty((planes[0].size, width), dtype=np.uint8)
    for plane, column in enumerate(planes):
        rotated[:, plane] = column
    bits = rotated.reshape(-1).view(f"<u{width}")
    return (bits >> 1) | (bits << (8 * width - 1))


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
    per_byte = codes_per_byte(num_levels)
    padded = np.zeros(packed_bytes(codes.size, num_levels) * per_byte, dtype=np.uint8)
    padded[: codes.size] = codes
    packed = padded[per_byte - 1 :: per_byte].copy()
    for digit in range(per_byte - 2, -1, -1):
        packed *= num_levels
        packed += padded[digit::per_byte]
    return packed


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
    result: npt.NDArray[Any] = meaning[symbols % num_levels][packed].reshape(-1)[:num_codes]
    return result
