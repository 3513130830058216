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

Shapes: M values, G = ceil(M / block_size) blocks, of which B are worked on at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmerge.errors import InvalidDelta
from fedmerge.planes import Sections, join_planes, pack_codes, packed_bytes, split_planes, unpack_codes

# With scales up to here, 127 * scale is still a finite fp32.
MAX_INT8_SCALE = float(np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0)))

# Work through this many values at a time: they stay in cache, and temporaries do not grow with the tensor.
_CHUNK_VALUES = 1 << 17


def num_blocks(num_values: int, block_size: int) -> int:
    """Return G, counting a shorter last block."""
    return -(-num_values // block_size)


def _rows_of_blocks(values: Tensor, block_size: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield some elements, their blocks, and their values (B, block_size); a shorter last block comes by itself."""
    num_whole = values.numel() // block_size
    step = max(1, _CHUNK_VALUES // block_size)
    for start in range(0, num_whole, step):
        blocks = slice(start, min(start + step, num_whole))
        elements = slice(blocks.start * block_size, blocks.stop * block_size)
        yield elements, blocks, values[elements].view(-1, block_size)
    if values.numel() > num_whole * block_size:
        tail = slice(num_whole * block_size, values.numel())
        yield tail, slice(num_whole, num_whole + 1), values[tail].unsqueeze(0)


def _divide(rows: Tensor, scale: Tensor) -> Tensor:
    """Return `rows` (B, block_size) over `scale` (B,), and rows of scale 0 as they are."""
    return rows / torch.where(scale > 0, scale, 1.0).unsqueeze(1)


def _multiply_blocks(values: npt.NDArray[np.float32], scales: npt.NDArray[np.float32], block_size: int) -> None:
    """Multiply each block of `values` (M,) in place by its scale (G,)."""
    num_whole = values.size // block_size
    blocks = values[: num_whole * block_size].reshape(num_whole, block_size)
    blocks *= scales[:num_whole, np.newaxis]
    if scales.size > num_whole:
        values[num_whole * block_size :] *= scales[num_whole]


def _require_scales(scales: npt.NDArray[np.float32], largest: float) -> None:
    num_bad = int(np.count_nonzero(~((scales >= 0) & (scales <= largest))))
    if num_bad:
        raise InvalidDelta(f"{num_bad} of {scales.size} scales are negative, not finite or too large")


def _int8_scales(absmax: Tensor) -> Tensor:
    """Return the scale of each block (B,): absmax / 127, rounded up so that no code passes 127."""
    scales = absmax / 127
    # Among the denormals rounding down can lose half of the quotient; in fp64 the product is exact.
    too_small = scales.double() * 127 < absmax.double()
    scales = torch.where(too_small, torch.nextafter(scales, torch.tensor(torch.inf)), scales)
    return scales.clamp(max=MAX_INT8_SCALE)


def quantize_int8(values: Tensor, block_size: int) -> Sections:
    """Return `values` as codes in [-127, 127] and one scale per block of `block_size`, absmax / 127.

    A value is code * scale to within scale / 2; codes round half to even, and an all-zero block has scale 0. Scales are
    fp32: 0.03 bit per value at block size 1024, and, unlike 16-bit ones, they have the range of the values and round
    finely enough to keep the bound.
    """
    codes = torch.empty(values.numel(), dtype=torch.int8)
    scales = torch.empty(num_blocks(values.numel(), block_size))
    for elements, blocks, rows in _rows_of_blocks(values, block_size):
        scales[blocks] = _int8_scales(rows.abs().amax(dim=1))
        codes[elements] = _divide(rows, scales[blocks]).round_().view(-1)
    scale_planes = split_planes(scales.numpy().view(np.uint32))
    return {"scales": np.concatenate(scale_planes), "codes": codes.numpy().view(np.uint8)}


def dequantize_int8(sections: Sections, num_values: int, block_size: int) -> Tensor:
    """Return code * scale for the sections of `quantize_int8`, always finite.

    Raises `InvalidDelta` for scales that are negative, not finite or too large, and for the code -128.
    """
    codes = sections["codes"].view(np.int8)
    scales = join_planes(list(sections["scales"].reshape(4, -1))).view(np.float32)
    _require_scales(scales, MAX_INT8_SCALE)
    if codes.min(initial=0) < -127:
        raise InvalidDelta(f"{int(np.count_nonzero(codes == -128))} codes are -128, outside [-127, 127]")
    values = codes.astype(np.float32)
    _multiply_blocks(values, scales, block_size)
    return torch.from_numpy(values)


def section_bytes_int8(num_values: int, block_size: int) -> dict[str, int]:
    """Return four bytes per block and one per value."""
    return {"scales": 4 * num_blocks(num_values, block_size), "codes": num_values}


def _round_down_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    bits: npt.NDArray[Any] = values.view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def absmax_scale(rows: Tensor) -> Tensor:
    """Return the least bf16 scale of each row (B,) at which 7 * scale reaches its largest magnitude."""
    absmax = rows.abs().amax(dim=1)
    below = torch.from_numpy(_round_down_bf16((absmax / 7).numpy()))
    above = (below.view(torch.int32) + 0x10000).view(torch.float32)
    return torch.where(below.double() * 7 < absmax.double(), above, below)


# Sums by numpy: the order in which it adds depends neither on the width of vectors nor on the number of threads, so a
# replay on another machine meets the same scales.


def rms_scale(rows: Tensor) -> Tensor:
    """Return the root mean square of each row (B,): the standard deviation of values of mean 0."""
    wide = rows.numpy().astype(np.float64)
    return torch.from_numpy(np.sqrt(np.mean(wide * wide, axis=1)))


def mean_magnitude_scale(rows: Tensor) -> Tensor:
    """Return the mean magnitude of each row (B,)."""
    return torch.from_numpy(np.mean(np.abs(rows.numpy().astype(np.float64)), axis=1))


class Levels(NamedTuple):
    """A quantizer whose value is `levels[code]` times a bf16 scale per block; `levels` are symmetric and ascending.

    `scale` maps rows of values (B, block_size) to their scales (B,), which are then rounded to bf16.
    """

    levels: tuple[float, ...]
    scale: Callable[[Tensor], Tensor]

    @property
    def max_scale(self) -> float:
        """The largest bf16 at which the outermost level is still a finite fp32."""
        largest = np.finfo(np.float32).max / np.float32(self.levels[-1])
        return float(_round_down_bf16(np.array([largest], dtype=np.float32))[0])

    def quantize(self, values: Tensor, block_size: int) -> Sections:
        """Return `values` (M,) as the codes of the nearest levels, packed, and one scale per block of `block_size`."""
        levels = torch.tensor(self.levels)
        thresholds = (levels[1:] + levels[:-1]) / 2
        codes = torch.empty(values.numel(), dtype=torch.uint8)
        scales = torch.empty(num_blocks(values.numel(), block_size), dtype=torch.bfloat16)
        for elements, blocks, rows in _rows_of_blocks(values, block_size):
            scales[blocks] = self.scale(rows).clamp(max=self.max_scale)
            ratios = _divide(rows, scales[blocks].float())
            codes[elements] = torch.bucketize(ratios, thresholds, out_int32=True, right=True).view(-1)
        planes = split_planes(scales.view(torch.int16).numpy().view(np.uint16))
        return {"scales": np.concatenate(planes), "codes": pack_codes(codes.numpy(), len(levels))}

    def dequantize(self, sections: Sections, num_values: int, block_size: int) -> Tensor:
        """Return level * scale for the sections of `quantize`, always finite.

        Raises `InvalidDelta` for scales that are negative, not finite or too large, and for bytes that are no codes.
        """
        bits = join_planes(list(sections["scales"].reshape(2, -1))).astype(np.uint32) << 16
        scales = bits.view(np.float32)
        _require_scales(scales, self.max_scale)
        levels = np.array(self.levels, dtype=np.float32)
        values: npt.NDArray[np.float32] = unpack_codes(sections["codes"], num_values, levels.size, levels)
        _multiply_blocks(values, scales, block_size)
        return torch.from_numpy(values)

    def section_bytes(self, num_values: int, block_size: int) -> dict[str, int]:
        """Return two bytes per block, and of the codes as many to a byte as fit."""
        return {
            "scales": 2 * num_blocks(num_values, block_size),
            "codes": packed_bytes(num_values, len(self.levels)),
        }


def _symmetric(*positive: float) -> tuple[float, ...]:
    return (*(-level for level in reversed(positive)), *positive)


INT4 = Levels(tuple(float(level) for level in range(-7, 8)), absmax_scale)
LLOYD3 = Levels(_symmetric(0.2451, 0.7560, 1.3439, 2.1519), rms_scale)
LLOYD2 = Levels(_symmetric(0.4528, 1.5104), rms_scale)
SIGN = Levels(_symmetric(1.0), mean_magnitude_scale)
