"""Quantizers against integer arithmetic on bit patterns, written out in numpy."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedmerge.delta.quantize import QUANTIZERS
from fedmerge.errors import InvalidDelta

SMALLEST = 2.0**-149
LARGEST = float(np.finfo(np.float32).max)
FP32 = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
EDGES = [0.0, -0.0, SMALLEST, -SMALLEST, 127 * SMALLEST, 128 * SMALLEST, 190 * SMALLEST, LARGEST, -LARGEST, 1.0]
VALUES = arrays(np.float32, st.integers(0, 67), elements=FP32 | st.sampled_from(EDGES))
BLOCK_SIZES = st.integers(8, 40)


def roundtrip(name: str, values: npt.NDArray[np.float32], block_size: int) -> npt.NDArray[np.float32]:
    quantizer = QUANTIZERS[name]
    sections = quantizer.quantize(torch.from_numpy(values.copy()), block_size)
    assert {kind: section.size for kind, section in sections.items()} == quantizer.section_bytes(
        values.size, block_size
    )
    decoded = quantizer.dequantize(sections, values.size, block_size)
    assert decoded.dtype == torch.float32
    return decoded.numpy()


@given(values=VALUES, block_size=BLOCK_SIZES)
@settings(deadline=None)
def test_fp32_is_exact_to_the_bit(values: npt.NDArray[np.float32], block_size: int) -> None:
    assert roundtrip("fp32", values, block_size).tobytes() == values.tobytes()


@given(values=VALUES, block_size=BLOCK_SIZES)
@settings(deadline=None)
def test_bf16_rounds_to_nearest_even(values: npt.NDArray[np.float32], block_size: int) -> None:
    bits = values.view(np.uint32).astype(np.uint64)
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    expected = (upper << 16).astype(np.uint32).view(np.float32)
    assert roundtrip("bf16", values, block_size).tobytes() == expected.tobytes()


def fp16_of(value: float, least: int) -> Fraction:
    """`value` rounded to the 11 bits of an fp16, or to a multiple of 2^least, whichever is coarser; ties to even."""
    exact = Fraction(value)
    unit = Fraction(2) ** max(least, math.frexp(value)[1] - 11)
    return round(exact / unit) * unit


@given(values=VALUES, block_size=BLOCK_SIZES)
@example(values=np.array([65504.0, 2.0**-30, 3e-8], np.float32), block_size=8)
@example(values=np.array([1e-6, -3.1e-7, SMALLEST], np.float32), block_size=8)
@settings(deadline=None)
def test_fp16_rounds_to_nearest_even_under_the_tensors_own_power_of_two(
    values: npt.NDArray[np.float32], block_size: int
) -> None:
    values = values / np.float32(2)  # the largest fp32 rounds up to a power of two that is none
    decoded = roundtrip("fp16", values, block_size)
    exponent = max(-112, math.frexp(float(np.abs(values).max(initial=0)))[1])
    # With the largest under 2^15, the least fp16 is 2^-24.
    expected = [np.float32(float(fp16_of(float(value), exponent - 39))) for value in values]
    np.testing.assert_array_equal(decoded, np.array(expected, np.float32))


@pytest.mark.parametrize("exponent", [241, 255])
def test_an_fp16_exponent_out_of_range_is_refused(exponent: int) -> None:
    sections = dict(QUANTIZERS["fp16"].quantize(torch.ones(3), 8))
    sections["exponent"] = np.array([exponent], np.uint8)
    with pytest.raises(InvalidDelta, match=f"the exponent is {exponent - 112}, above 128"):
        QUANTIZERS["fp16"].dequantize(sections, 3, 8)


@given(values=VALUES, block_size=BLOCK_SIZES)
@example(values=np.array([128 * SMALLEST, SMALLEST], np.float32), block_size=8)
@example(values=np.array([LARGEST, -LARGEST, 1.0], np.float32), block_size=8)
@settings(deadline=None, max_examples=300)
def test_int8_error_is_at_most_half_a_step(values: npt.NDArray[np.float32], block_size: int) -> None:
    decoded = roundtrip("int8", values, block_size)
    assert np.isfinite(decoded).all()
    for start in range(0, values.size, block_size):
        block = values[start : start + block_size].astype(np.float64)
        error = np.abs(block - decoded[start : start + block_size])
        # Half of absmax / 127, computed exactly; then the rounding of the scale and of code * scale to fp32.
        absmax = np.abs(block).max()
        assert error.max() <= absmax / 254 + absmax * 2.0**-22 + SMALLEST


def test_int8_error_is_at_most_half_the_scale_that_travels() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    sections = QUANTIZERS["int8"].quantize(values, 1000)
    error = (values - QUANTIZERS["int8"].dequantize(sections, 100_000, 1000)).abs().view(100, 1000).amax(dim=1).numpy()
    scales = reference_scales(sections["scales"])
    assert (error <= scales / 2 * (1 + 1e-5)).all()
    assert error.max() > 0.98 * scales.max() / 2  # and the bound is met, so no precision is left unused


def reference_scales(section: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Four planes, lowest first, of fp32 bit patterns rotated left by one."""
    planes = section.reshape(4, -1).astype(np.uint64)
    rotated = planes[0] + planes[1] * 2**8 + planes[2] * 2**16 + planes[3] * 2**24
    bits: npt.NDArray[np.uint32] = (rotated // 2 + (rotated % 2) * 2**31).astype(np.uint32)
    return bits.view(np.float32)


@pytest.mark.parametrize("num_values", [1, 999, 1000, 1001, 300_007])
def test_int8_is_the_formula_whatever_the_length(num_values: int) -> None:
    values = np.random.default_rng(1).standard_normal(num_values).astype(np.float32)
    sections = QUANTIZERS["int8"].quantize(torch.from_numpy(values), 1000)
    scales = reference_scales(sections["scales"])
    codes = sections["codes"].view(np.int8)
    for block, start in enumerate(range(0, num_values, 1000)):
        part = values[start : start + 1000]
        assert np.isclose(scales[block], np.abs(part).max() / 127, rtol=3e-7)
        np.testing.assert_array_equal(codes[start : start + 1000], np.rint(part / scales[block]))
    expected = codes.astype(np.float32) * np.repeat(scales, 1000)[:num_values]
    np.testing.assert_array_equal(QUANTIZERS["int8"].dequantize(sections, num_values, 1000).numpy(), expected)


def int8_by_torch(values: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and codes by whole-tensor operations."""
    rows = torch.zeros(-(-values.numel() // block_size) * block_size)
    rows[: values.numel()] = values
    rows = rows.view(-1, block_size)
    absmax = rows.abs().amax(dim=1)
    scales = absmax / 127
    scales = torch.where(scales.double() * 127 < absmax.double(), scales.nextafter(torch.tensor(torch.inf)), scales)
    scales = scales.clamp(max=float(np.nextafter(np.float32(LARGEST) / np.float32(127), np.float32(0))))
    ratios = rows / torch.where(scales > 0, scales, 1.0).unsqueeze(1)
    return scales, ratios.round().to(torch.int8).view(-1)[: values.numel()]


@given(values=VALUES, block_size=BLOCK_SIZES)
@example(values=np.array([128 * SMALLEST, SMALLEST], np.float32), block_size=8)
@example(values=np.array([LARGEST, -LARGEST, 1.0], np.float32), block_size=8)
@settings(deadline=None, max_examples=300)
def test_int8_has_the_bits_of_a_second_implementation(values: npt.NDArray[np.float32], block_size: int) -> None:
    scales, codes = int8_by_torch(torch.from_numpy(values.copy()), block_size)
    sections = QUANTIZERS["int8"].quantize(torch.from_numpy(values.copy()), block_size)
    assert reference_scales(sections["scales"]).tobytes() == scales.numpy().tobytes()
    assert sections["codes"].tobytes() == codes.numpy().tobytes()


def test_int8_rounds_half_to_even() -> None:
    values = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    sections = QUANTIZERS["int8"].quantize(values, 8)
    assert sections["codes"].view(np.int8).tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


def test_an_all_zero_block_has_scale_zero() -> None:
    values = torch.cat([torch.zeros(16), torch.full((16,), 127.0)])
    sections = QUANTIZERS["int8"].quantize(values, 16)
    assert reference_scales(sections["scales"])[0] == 0
    assert torch.equal(QUANTIZERS["int8"].dequantize(sections, 32, 16), values)


@pytest.mark.parametrize(("name", "shift"), [("fp32", 23), ("bf16", 23)])
def test_the_last_plane_is_the_exponent(name: str, shift: int) -> None:
    values = torch.tensor([1.0, -1.0, 0.5, -3.0, 2.0**-130, 0.0])
    last = list(QUANTIZERS[name].quantize(values, 8).values())[-1]
    np.testing.assert_array_equal(last, (values.numpy().view(np.uint32) >> shift) & 0xFF)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, LARGEST])
def test_int8_refuses_scales_that_no_encoder_makes(scale: float) -> None:
    bits = int(np.float32(scale).view(np.uint32))
    rotated = ((bits << 1) | (bits >> 31)) & 0xFFFFFFFF
    hostile = {
        "scales": np.frombuffer(rotated.to_bytes(4, "little"), np.uint8),
        "codes": np.ones(8, np.uint8),
    }
    with pytest.raises(InvalidDelta, match="1 of 1 scales"):
        QUANTIZERS["int8"].dequantize(hostile, 8, 8)


def test_int8_refuses_the_code_that_no_encoder_makes() -> None:
    codes = np.array([1, -128, -127, -128], np.int8).view(np.uint8)
    with pytest.raises(InvalidDelta, match="2 codes are -128"):
        QUANTIZERS["int8"].dequantize({"scales": np.zeros(4, np.uint8), "codes": codes}, 4, 8)


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_the_input_is_left_alone(name: str) -> None:
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    before = values.clone()
    QUANTIZERS[name].quantize(values, 64)
    assert torch.equal(values, before)
