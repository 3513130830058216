"""The few-bit types against nearest-neighbour search in fp64, and against the figures of quantization theory."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedmerge.delta.quantize import QUANTIZERS
from fedmerge.errors import InvalidDelta

# Levels of each type, and the sizes of its scale, said once more.
LEVELS: dict[str, list[float]] = {
    "int4": [*range(-7, 8)],
    "lloyd3": [-2.1519, -1.3439, -0.7560, -0.2451, 0.2451, 0.7560, 1.3439, 2.1519],
    "lloyd2": [-1.5104, -0.4528, 0.4528, 1.5104],
    "sign": [-1, 1],
}
PER_BYTE = {"int4": 2, "lloyd3": 2, "lloyd2": 4, "sign": 8}
SMALLEST_BF16 = 2.0**-133
LARGEST = float(np.finfo(np.float32).max)
each_type = pytest.mark.parametrize("name", LEVELS)

FP32 = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
EDGES = [0.0, -0.0, 2.0**-149, -(2.0**-133), 7 * 2.0**-133, LARGEST, -LARGEST, 1.0, -1.0]
VALUES = arrays(np.float32, st.integers(0, 67), elements=FP32 | st.sampled_from(EDGES))


def encode(name: str, values: npt.NDArray[np.float32], block_size: int) -> dict[str, npt.NDArray[np.uint8]]:
    sections = dict(QUANTIZERS[name].quantize(torch.from_numpy(values.copy()), block_size))
    sizes = QUANTIZERS[name].section_bytes(values.size, block_size)
    assert {kind: section.size for kind, section in sections.items()} == sizes
    assert sizes == {"scales": 2 * -(-values.size // block_size), "codes": -(-values.size // PER_BYTE[name])}
    return sections


def decode(
    name: str, sections: dict[str, npt.NDArray[np.uint8]], num_values: int, block_size: int
) -> npt.NDArray[np.float32]:
    decoded = QUANTIZERS[name].dequantize(sections, num_values, block_size)
    assert (decoded.dtype, decoded.shape) == (torch.float32, (num_values,))
    return decoded.numpy()


def reference_scales(section: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Two planes, low byte first, of bf16 bit patterns rotated left by one."""
    low, high = section.reshape(2, -1).astype(np.uint32)
    rotated = low + high * 256
    bits: npt.NDArray[np.uint32] = ((rotated // 2 + (rotated % 2) * 2**15) * 2**16).astype(np.uint32)
    return bits.view(np.float32).astype(np.float64)


def expected_scale(name: str, block: npt.NDArray[np.float64]) -> float:
    magnitude = np.abs(block)
    match name:
        case "int4":
            return float(magnitude.max() / 7)
        case "sign":
            return math.fsum(magnitude) / block.size
        case _:
            return math.sqrt(math.fsum(magnitude**2) / block.size)


@each_type
@given(values=VALUES, block_size=st.integers(8, 40))
@example(values=np.full(9, LARGEST, np.float32), block_size=8)
@example(values=np.array([2.0**-149, -(2.0**-149)], np.float32), block_size=8)
@settings(deadline=None, max_examples=200)
def test_each_value_becomes_its_nearest_level_times_the_scale(
    name: str, values: npt.NDArray[np.float32], block_size: int
) -> None:
    sections = encode(name, values, block_size)
    decoded = decode(name, sections, values.size, block_size)
    assert np.isfinite(decoded).all()
    scales = reference_scales(sections["scales"])
    levels = np.array(LEVELS[name], np.float64)
    for scale, start in zip(scales, range(0, values.size, block_size), strict=True):
        block = values[start : start + block_size].astype(np.float64)
        error = np.abs(block - decoded[start : start + block_size])
        nearest = np.abs(block[:, np.newaxis] - levels * scale).min(axis=1)
        # The ratio, the level and the product are each rounded to fp32.
        rounding = 2.0**-21 * (np.abs(block) + levels[-1] * scale) + 2.0**-149
        assert (error <= nearest + rounding).all()


@each_type
@given(values=VALUES, block_size=st.integers(8, 40))
@settings(deadline=None, max_examples=200)
def test_scales_are_what_they_are_said_to_be_to_the_precision_of_bf16(
    name: str, values: npt.NDArray[np.float32], block_size: int
) -> None:
    scales = reference_scales(encode(name, values, block_size)["scales"])
    largest = LARGEST / LEVELS[name][-1]
    for scale, start in zip(scales, range(0, values.size, block_size), strict=True):
        expected = expected_scale(name, values[start : start + block_size].astype(np.float64))
        if expected > largest * (1 - 2.0**-6):  # values no encoder of a delta file lets through
            assert largest * (1 - 2.0**-6) <= scale <= largest
        elif name == "int4":
            assert expected <= scale <= expected * (1 + 2.0**-7) + SMALLEST_BF16
        else:
            assert abs(scale - expected) <= expected * 2.0**-8 + SMALLEST_BF16


@each_type
@given(values=VALUES, block_size=st.integers(8, 40))
@settings(deadline=None, max_examples=200)
def test_codes_have_the_bits_of_a_second_implementation(
    name: str, values: npt.NDArray[np.float32], block_size: int
) -> None:
    sections = encode(name, values, block_size)
    levels = torch.tensor(LEVELS[name])
    scales = torch.from_numpy(np.repeat(reference_scales(sections["scales"]), block_size)[: values.size]).float()
    ratios = torch.from_numpy(values.copy()) / torch.where(scales > 0, scales, 1.0)
    codes = torch.bucketize(ratios, (levels[1:] + levels[:-1]) / 2, right=True)
    digits = [int(byte) // len(levels) ** i % len(levels) for byte in sections["codes"] for i in range(PER_BYTE[name])]
    assert digits[: values.size] == codes.tolist()
    assert decode(name, sections, values.size, block_size).tobytes() == (levels[codes] * scales).numpy().tobytes()


@given(values=VALUES, block_size=st.integers(8, 40))
@settings(deadline=None, max_examples=300)
def test_int4_error_is_at_most_half_a_step(values: npt.NDArray[np.float32], block_size: int) -> None:
    decoded = decode("int4", encode("int4", values, block_size), values.size, block_size)
    for start in range(0, values.size, block_size):
        block = values[start : start + block_size].astype(np.float64)
        error = np.abs(block - decoded[start : start + block_size])
        # Half of absmax / 7, its scale rounded up to bf16.
        absmax = np.abs(block).max()
        assert error.max() <= absmax / 14 * (1 + 2.0**-7) + absmax * 2.0**-21 + SMALLEST_BF16 / 2


@pytest.mark.parametrize("num_values", [1, 999, 1000, 1001, 300_007])
@each_type
def test_blocks_are_coded_alone_whatever_the_length(name: str, num_values: int) -> None:
    values = np.random.default_rng(1).standard_normal(num_values).astype(np.float32)
    decoded = decode(name, encode(name, values, 1000), num_values, 1000)
    for start in range(0, num_values, 100_000):
        part = values[start : start + 1000]
        np.testing.assert_array_equal(decode(name, encode(name, part, 1000), part.size, 1000), decoded[start:][:1000])


def cumulative(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def bell(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("name", ["lloyd3", "lloyd2"])
def test_lloyd_levels_are_the_centroids_of_their_cells(name: str) -> None:
    levels = LEVELS[name]
    edges = [-math.inf, *((low + high) / 2 for low, high in pairwise(levels)), math.inf]
    for level, low, high in zip(levels, edges[:-1], edges[1:], strict=True):
        assert math.isclose(level, (bell(low) - bell(high)) / (cumulative(high) - cumulative(low)), abs_tol=1e-4)


# Mean squared error and entropy (bits) for a unit Gaussian: Max 1960, table I; for one bit, 1 - 2 / pi.
@pytest.mark.parametrize(
    ("name", "error", "entropy"), [("lloyd3", 0.03454, 2.825), ("lloyd2", 0.1175, 1.911), ("sign", 1 - 2 / math.pi, 1)]
)
def test_error_and_entropy_for_a_gaussian_are_those_of_the_tables(name: str, error: float, entropy: float) -> None:
    values = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    decoded = decode(name, encode(name, values, 1 << 20), values.size, 1 << 20)
    assert math.isclose(float(np.mean((decoded.astype(np.float64) - values) ** 2)), error, rel_tol=0.01)
    share = np.unique(decoded, return_counts=True)[1] / values.size
    assert share.size == len(LEVELS[name])
    assert math.isclose(float(-(share * np.log2(share)).sum()), entropy, rel_tol=0.01)


@each_type
def test_an_all_zero_block_comes_back_as_zeros(name: str) -> None:
    values = np.concatenate([np.zeros(16, np.float32), np.full(16, 7.0, np.float32), np.zeros(3, np.float32)])
    decoded = decode(name, encode(name, values, 16), 35, 16)
    assert not decoded[:16].any()
    assert decoded[16:32].all()
    assert not decoded[32:].any()


@each_type
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, None])
def test_scales_that_no_encoder_makes_are_refused(name: str, scale: float | None) -> None:
    # None: the least bf16 at which the outermost level overflows.
    value = LARGEST / LEVELS[name][-1] * (1 + 2.0**-7) if scale is None and name != "sign" else scale
    bits = int(np.float32(float("inf") if value is None else value).view(np.uint32)) >> 16
    rotated = ((bits << 1) | (bits >> 15)) & 0xFFFF
    sections = encode(name, np.ones(8, np.float32), 8)
    decode(name, sections, 8, 8)
    sections["scales"] = np.array([rotated & 0xFF, rotated >> 8], np.uint8)
    with pytest.raises(InvalidDelta, match="1 of 1 scales"):
        decode(name, sections, 8, 8)


@pytest.mark.parametrize(("name", "num_symbols"), [("int4", 225), ("lloyd3", 64)])
def test_codes_that_no_encoder_makes_are_refused(name: str, num_symbols: int) -> None:
    sections = encode(name, np.ones(8, np.float32), 8)
    sections["codes"] = np.array([num_symbols - 1, num_symbols, 255, 0], np.uint8)
    with pytest.raises(InvalidDelta, match="2 bytes are no 2 codes"):
        decode(name, sections, 8, 8)


@each_type
def test_the_last_byte_holds_nothing_more(name: str) -> None:
    num_values = PER_BYTE[name] + 1
    sections = encode(name, np.ones(num_values, np.float32), 8)
    sections["codes"][-1] += len(LEVELS[name])
    with pytest.raises(InvalidDelta, match="filled with zeros"):
        decode(name, sections, num_values, 8)
