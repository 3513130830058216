"""Packed codes against integers in another base."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.delta.planes import codes_per_byte, join_planes, pack_codes, packed_bytes, split_planes, unpack_codes
from fedmerge.errors import InvalidDelta


@st.composite
def coded(draw: st.DrawFn) -> tuple[int, list[int]]:
    num_levels = draw(st.integers(2, 256))
    return num_levels, draw(st.lists(st.integers(0, num_levels - 1), max_size=40))


@given(coded())
@settings(deadline=None)
def test_packed_codes_are_the_digits_of_numbers_in_that_base(case: tuple[int, list[int]]) -> None:
    num_levels, codes = case
    packed = pack_codes(np.array(codes, np.uint8), num_levels)
    per_byte = codes_per_byte(num_levels)
    assert num_levels**per_byte <= 256 < num_levels ** (per_byte + 1)
    groups = [codes[i : i + per_byte] for i in range(0, len(codes), per_byte)]
    assert packed.tolist() == [sum(code * num_levels**i for i, code in enumerate(group)) for group in groups]
    assert packed.size == packed_bytes(len(codes), num_levels)
    meaning = np.arange(num_levels) * 10
    assert unpack_codes(packed, len(codes), num_levels, meaning).tolist() == [10 * code for code in codes]


@given(num_levels=st.integers(2, 256), packed=st.binary(min_size=1, max_size=6), data=st.data())
@settings(deadline=None)
def test_bytes_are_refused_unless_packing_makes_them(num_levels: int, packed: bytes, data: st.DataObject) -> None:
    per_byte = codes_per_byte(num_levels)
    num_codes = data.draw(st.integers((len(packed) - 1) * per_byte + 1, len(packed) * per_byte))
    section = np.frombuffer(packed, np.uint8)
    try:
        codes = unpack_codes(section, num_codes, num_levels, np.arange(num_levels))
    except InvalidDelta:
        digits = [byte // num_levels**i for byte in packed for i in range(per_byte)]
        too_high = any(byte >= num_levels**per_byte for byte in packed)
        assert too_high or any(digit % num_levels for digit in digits[num_codes:])
    else:
        assert pack_codes(codes.astype(np.uint8), num_levels).tobytes() == packed


def test_bytes_that_are_no_codes_are_counted() -> None:
    with pytest.raises(InvalidDelta, match="2 bytes are no 2 codes of 15 levels"):
        unpack_codes(np.array([224, 225, 255], np.uint8), 6, 15, np.arange(15))
    with pytest.raises(InvalidDelta, match="the last byte is not filled with zeros"):
        unpack_codes(np.array([0, 15], np.uint8), 3, 15, np.arange(15))


@pytest.mark.parametrize("num_values", [0, 1, 8191, 8193, 30_000])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_planes_are_the_bytes_of_rotated_integers(dtype: type[np.unsignedinteger[Any]], num_values: int) -> None:
    width = np.dtype(dtype).itemsize
    bits = np.random.default_rng(0).integers(0, 1 << (8 * width), num_values).astype(dtype)
    planes = split_planes(bits)
    rotated = bits * 2 + bits // (1 << (8 * width - 1))
    np.testing.assert_array_equal(np.stack(planes, axis=-1).reshape(-1), rotated.view(np.uint8))
    np.testing.assert_array_equal(join_planes(list(planes)), bits, strict=True)
