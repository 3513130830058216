"""Block-scaled values: codes of a few bits, and for each block of values the scale that gives them their size.

`int8` has evenly spaced codes and fp32 scales. The narrower types are one mechanism, `Levels`: a code names a level,
and a value is its level times its block's scale. Their scales are bf16, which have the range of the values at half the
bytes: in blocks of 64 an fp32 scale would cost 0.4 bits per value.

- `int4`: 15 evenly spaced levels, absmax scales.
- `lloyd3`, `lloyd2`: the 8 and 4 levels with the least squared error for Gaussian values (J. Max, "Quantizing for
  minimum distortion", IRE Trans. Inf. Theory 6(1), 1960; S. Lloyd, "Least squares quantization in PCM", IEEE Trans.
  Inf. Theory 28(2), 1982), scaled by the root mean square. Task vectors of AdamW fine-tunes are close to Gaussian.
- `sign`: two levels, scaled by the mean magnitude, which is their least-squares scale.

An even number of levels has no zero: in a block that is not all zero, zeros come back as small values.

Shapes: M values, G = ceil(M / block_size) blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmerge.delta.planes import Bytes, Sections, join_planes, pack_codes, packed_bytes, split_planes, unpack_codes
from fedmerge.errors import InvalidDelta
from fedmerge.jit import kernel

# With scales up to here, 127 * scale is still a finite fp32.
MAX_INT8_SCALE = float(np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0)))

_Floats: TypeAlias = npt.NDArray[np.float32]
_MAGNITUDE = np.uint32(0x7FFFFFFF)

# Adding it to an fp32 of at most 2^22 and taking it away again rounds that to the nearest integer, half to even.
_ROUND = np.float32(3 << 22)


def num_blocks(num_values: int, block_size: int) -> int:
    """Return G, counting a shorter last block."""
    return -(-num_values // block_size)


@kernel
def _largest_magnitude(values: _Floats) -> np.float32:
    # As integers, because the order of floats that are not negative is that of their bits, and integers take no care of
    # NaN: this is one instruction for many values.
    bits = values.view(np.uint32)
    largest = np.uint32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & _MAGNITUDE)
    result: np.float32 = np.array([largest], dtype=np.uint32).view(np.float32)[0]
    return result


@kernel
def _multiply_blocks(codes: npt.NDArray[Any], scales: _Floats, block_size: int, values: _Floats) -> None:
    """Write the product of each block of `codes` (M,) and its scale (G,) to `values` (M,)."""
    for block in range(scales.size):
        for i in range(block * block_size, min((block + 1) * block_size, values.size)):
            values[i] = np.float32(codes[i]) * scales[block]


@kernel
def _scale_blocks(values: _Floats, scales: _Floats, block_size: int) -> None:
    """Multiply each block of `values` (M,) in place by its scale (G,)."""
    for block in range(scales.size):
        part = values[block * block_size : (block + 1) * block_size]
        for i in range(part.size):
            part[i] *= scales[block]


def _require_scales(scales: npt.NDArray[np.float32], largest: float) -> None:
    num_bad = int(np.count_nonzero(~((scales >= 0) & (scales <= largest))))
    if num_bad:
        raise InvalidDelta(f"{num_bad} of {scales.size} scales are negative, not finite or too large")


@kernel
def _quantize_int8(values: _Floats, block_size: int, scales: _Floats, codes: npt.NDArray[np.int8]) -> None:
    for block in range(scales.size):
        part = values[block * block_size : (block + 1) * block_size]
        absmax = _largest_magnitude(part)
        scale = np.float32(absmax / np.float32(127))
        # Among the denormals rounding down can lose half of the quotient; in fp64 the product is exact.
        if np.float64(scale) * 127 < np.float64(absmax):
            scale = np.nextafter(scale, np.float32(np.inf))
        scale = min(scale, np.float32(MAX_INT8_SCALE))
        scales[block] = scale
        divisor = scale if scale > 0 else np.float32(1)
        block_codes = codes[block * block_size : (block + 1) * block_size]
        for i in range(part.size):
            block_codes[i] = np.int8((part[i] / divisor + _ROUND) - _ROUND)


def quantize_int8(values: Tensor, block_size: int) -> Sections:
    """Return `values` as codes in [-127, 127] and one scale per block of `block_size`, absmax / 127.

    A value is code * scale to within scale / 2; codes round half to even, and an all-zero block has scale 0. Scales are
    fp32: 0.03 bit per value at block size 1024, and, unlike 16-bit ones, they have the range of the values and round
    finely enough to keep the bound.
    """
    codes = np.empty(values.numel(), dtype=np.int8)
    scales = np.empty(num_blocks(codes.size, block_size), dtype=np.float32)
    _quantize_int8(values.numpy(), block_size, scales, codes)
    return {"scales": split_planes(scales.view(np.uint32)).reshape(-1), "codes": codes.view(np.uint8)}


def dequantize_int8(sections: Sections, num_values: int, block_size: int) -> Tensor:
    """Return code * scale for the sections of `quantize_int8`, always finite.

    Raises `InvalidDelta` for scales that are negative, not finite or too large, and for the code -128.
    """
    codes = sections["codes"].view(np.int8)
    scales = join_planes(list(sections["scales"].reshape(4, -1))).view(np.float32)
    _require_scales(scales, MAX_INT8_SCALE)
    if codes.min(initial=0) < -127:
        raise InvalidDelta(f"{int(np.count_nonzero(codes == -128))} codes are -128, outside [-127, 127]")
    values = np.empty(codes.size, dtype=np.float32)
    _multiply_blocks(codes, scales, block_size, values)
    return torch.from_numpy(values)


def section_bytes_int8(num_values: int, block_size: int) -> dict[str, int]:
    """Return four bytes per block and one per value."""
    return {"scales": 4 * num_blocks(num_values, block_size), "codes": num_values}


def _round_down_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    bits: npt.NDArray[Any] = values.view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


@kernel
def absmax_scales(values: _Floats, block_size: int) -> _Floats:
    """Return of each block (G,) the least bf16 scale at which 7 * scale reaches its largest magnitude."""
    scales = np.empty(-(-values.size // block_size), dtype=np.float32)
    bits = scales.view(np.uint32)
    for block in range(scales.size):
        absmax = _largest_magnitude(values[block * block_size : (block + 1) * block_size])
        scales[block] = absmax / np.float32(7)
        bits[block] &= np.uint32(0xFFFF0000)
        if np.float64(scales[block]) * 7 < np.float64(absmax):
            bits[block] += np.uint32(0x10000)
    return scales


# Sums are of eight numbers in turn, in fp64, and then of those: the order of additions is written down here, whatever
# the width of a processor's vectors, so a replay on another machine meets the same scales.


@kernel
def rms_scales(values: _Floats, block_size: int) -> _Floats:
    """Return the root mean square of each block (G,): the standard deviation of values of mean 0."""
    scales = np.empty(-(-values.size // block_size), dtype=np.float32)
    for block in range(scales.size):
        part = values[block * block_size : (block + 1) * block_size]
        sums = np.zeros(8)
        for i in range(part.size):
            sums[i & 7] += np.float64(part[i]) * np.float64(part[i])
        scales[block] = np.sqrt(sums.sum() / part.size)
    return scales


@kernel
def mean_magnitude_scales(values: _Floats, block_size: int) -> _Floats:
    """Return the mean magnitude of each block (G,)."""
    scales = np.empty(-(-values.size // block_size), dtype=np.float32)
    for block in range(scales.size):
        part = values[block * block_size : (block + 1) * block_size]
        sums = np.zeros(8)
        for i in range(part.size):
            sums[i & 7] += abs(np.float64(part[i]))
        scales[block] = sums.sum() / part.size
    return scales


@kernel
def _nearest_levels(values: _Floats, block_size: int, scales: _Floats, thresholds: _Floats, codes: Bytes) -> None:
    """Write to `codes` (M,) how many of the `thresholds` are at most the ratio of each value to its block's scale."""
    ratios = np.empty(block_size, dtype=np.float32)
    for block in range(scales.size):
        part = values[block * block_size : (block + 1) * block_size]
        block_codes = codes[block * block_size : (block + 1) * block_size]
        divisor = scales[block] if scales[block] > 0 else np.float32(1)
        for i in range(part.size):
            ratios[i] = part[i] / divisor
            block_codes[i] = 0
        for threshold in thresholds:
            for i in range(part.size):
                block_codes[i] += np.uint8(ratios[i] >= threshold)


class Levels(NamedTuple):
    """A quantizer whose value is `levels[code]` times a bf16 scale per block; `levels` are symmetric and ascending.

    `scales(values, block_size)` returns the scale of each block (G,) of `values` (M,), which is then rounded to bf16.
    """

    levels: tuple[float, ...]
    scales: Callable[[_Floats, int], _Floats]

    @property
    def max_scale(self) -> float:
        """The largest bf16 at which the outermost level is still a finite fp32."""
        largest = np.finfo(np.float32).max / np.float32(self.levels[-1])
        return float(_round_down_bf16(np.array([largest], dtype=np.float32))[0])

    def quantize(self, values: Tensor, block_size: int) -> Sections:
        """Return `values` (M,) as the codes of the nearest levels, packed, and one scale per block of `block_size`."""
        levels = np.array(self.levels, dtype=np.float32)
        codes = np.empty(values.numel(), dtype=np.uint8)
        exact = np.minimum(self.scales(values.numpy(), block_size), np.float32(self.max_scale))
        scales = torch.from_numpy(exact).to(torch.bfloat16)
        thresholds = (levels[1:] + levels[:-1]) / np.float32(2)
        _nearest_levels(values.numpy(), block_size, scales.float().numpy(), thresholds, codes)
        planes = split_planes(scales.view(torch.int16).numpy().view(np.uint16))
        return {"scales": planes.reshape(-1), "codes": pack_codes(codes, levels.size)}

    def dequantize(self, sections: Sections, num_values: int, block_size: int) -> Tensor:
        """Return level * scale for the sections of `quantize`, always finite.

        Raises `InvalidDelta` for scales that are negative, not finite or too large, and for bytes that are no codes.
        """
        bits = join_planes(list(sections["scales"].reshape(2, -1))).astype(np.uint32) << 16
        scales = bits.view(np.float32)
        _require_scales(scales, self.max_scale)
        levels = np.array(self.levels, dtype=np.float32)
        values: npt.NDArray[np.float32] = unpack_codes(sections["codes"], num_values, levels.size, levels)
        _scale_blocks(values, scales, block_size)
        return torch.from_numpy(values)

    def section_bytes(self, num_values: int, block_size: int) -> dict[str, int]:
        """Return two bytes per block, and of the codes as many to a byte as fit."""
        return {
            "scales": 2 * num_blocks(num_values, block_size),
            "codes": packed_bytes(num_values, len(self.levels)),
        }


def _symmetric(*positive: float) -> tuple[float, ...]:
    return (*(-level for level in reversed(positive)), *positive)


INT4 = Levels(tuple(float(level) for level in range(-7, 8)), absmax_scales)
LLOYD3 = Levels(_symmetric(0.2451, 0.7560, 1.3439, 2.1519), rms_scales)
LLOYD2 = Levels(_symmetric(0.4528, 1.5104), rms_scales)
SIGN = Levels(_symmetric(1.0), mean_magnitude_scales)
