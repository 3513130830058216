"""Step 3, quantise, and its inverse, dequantise: fewer bits for each value that travels.

A quantizer turns fp32 values (M,) into *sections*: named runs of bytes, each of one statistical kind, so that the
entropy coder meets symbols of one distribution. Values of several bytes are split into byte planes, with the sign moved
below the mantissa first: the last plane is then exactly the exponent, which is where floats compress, as ZipNN
(arXiv 2411.05239) found for weights.

Shapes: M values, G = ceil(M / block_size) blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmerge.errors import InvalidDelta

Bytes: TypeAlias = npt.NDArray[np.uint8]
Sections: TypeAlias = Mapping[str, Bytes]

# With scales up to here, 127 * scale is still a finite fp32.
MAX_INT8_SCALE = float(np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0)))

# int8 works through this many values at a time: they stay in cache, and temporaries do not grow with the tensor.
_CHUNK_VALUES = 1 << 17


class Quantizer(NamedTuple):
    """A pair of inverses and the sizes they imply.

    `quantize(values, block_size)` returns the sections of finite fp32 values (M,), in the order in which they travel;
    `dequantize(sections, block_size)` returns fp32 values (M,), and raises `InvalidDelta` for sections that no
    `quantize` makes. It may return NaN or Inf where the type on the wire can hold them: the caller looks.
    `section_bytes(num_values, block_size)` returns the length of each section.
    """

    quantize: Callable[[Tensor, int], Sections]
    dequantize: Callable[[Sections, int], Tensor]
    section_bytes: Callable[[int, int], dict[str, int]]


def _split_planes(bits: npt.NDArray[Any]) -> list[Bytes]:
    """Return the byte planes of float bit patterns, least significant first, the sign rotated to the lowest bit."""
    width = bits.itemsize
    rotated = (bits << 1) | (bits >> (8 * width - 1))
    return [(rotated >> (8 * plane)).astype(np.uint8) for plane in range(width)]


def _join_planes(planes: list[Bytes]) -> npt.NDArray[Any]:
    """Return the float bit patterns that `_split_planes` split, as uint16 or uint32."""
    width = len(planes)
    rotated = np.empty((planes[0].size, width), dtype=np.uint8)
    for plane, column in enumerate(planes):
        rotated[:, plane] = column
    bits = rotated.reshape(-1).view(f"<u{width}")
    return (bits >> 1) | (bits << (8 * width - 1))


def _plane_names(width: int) -> list[str]:
    return [f"plane{plane}" for plane in range(width)]


def quantize_fp32(values: Tensor, block_size: int) -> Sections:
    """Return `values` as they are, in four byte planes."""
    bits = values.numpy().view(np.uint32)
    return dict(zip(_plane_names(4), _split_planes(bits), strict=True))


def dequantize_fp32(sections: Sections, block_size: int) -> Tensor:
    """Return the values of `quantize_fp32`, bit for bit."""
    bits = _join_planes([sections[name] for name in _plane_names(4)])
    return torch.from_numpy(bits.view(np.float32))


def section_bytes_fp32(num_values: int, block_size: int) -> dict[str, int]:
    """Return four planes of one byte per value."""
    return dict.fromkeys(_plane_names(4), num_values)


def quantize_bf16(values: Tensor, block_size: int) -> Sections:
    """Return `values` rounded to bf16 (nearest, ties to even; relative error at most 2^-8), in two byte planes."""
    bits = values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return dict(zip(_plane_names(2), _split_planes(bits), strict=True))


def dequantize_bf16(sections: Sections, block_size: int) -> Tensor:
    """Return the values of `quantize_bf16`, widened to fp32."""
    bits = _join_planes([sections[name] for name in _plane_names(2)])
    return torch.from_numpy((bits.astype(np.uint32) << 16).view(np.float32))


def section_bytes_bf16(num_values: int, block_size: int) -> dict[str, int]:
    """Return two planes of one byte per value."""
    return dict.fromkeys(_plane_names(2), num_values)


def _int8_scales(absmax: Tensor) -> Tensor:
    """Return the scale of each block (G,): absmax / 127, rounded up so that no code passes 127."""
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
    num_values = values.numel()
    block_size = min(block_size, max(1, num_values))
    codes = torch.empty(num_values, dtype=torch.int8)
    scales = torch.empty(-(-num_values // block_size))
    step = block_size * max(1, _CHUNK_VALUES // block_size)
    for start in range(0, num_values, step):
        chunk = values[start : start + step]
        blocks = torch.nn.functional.pad(chunk, (0, -chunk.numel() % block_size)).view(-1, block_size)
        scale = _int8_scales(blocks.abs().amax(dim=1))
        divisor = torch.where(scale > 0, scale, 1.0).unsqueeze(1)
        codes[start : start + step] = (blocks / divisor).round_().view(-1)[: chunk.numel()]
        scales[start // block_size :][: scale.numel()] = scale
    scale_planes = _split_planes(scales.numpy().view(np.uint32))
    return {"scales": np.concatenate(scale_planes), "codes": codes.numpy().view(np.uint8)}


def dequantize_int8(sections: Sections, block_size: int) -> Tensor:
    """Return code * scale for the sections of `quantize_int8`, always finite.

    Raises `InvalidDelta` for scales that are negative, not finite or too large, and for the code -128.
    """
    codes = sections["codes"].view(np.int8)
    scales = _join_planes(list(sections["scales"].reshape(4, -1))).view(np.float32)
    num_bad = int(np.count_nonzero(~((scales >= 0) & (scales <= MAX_INT8_SCALE))))
    if num_bad:
        raise InvalidDelta(f"{num_bad} of {scales.size} scales are negative, not finite or too large")
    if codes.min(initial=0) < -127:
        raise InvalidDelta(f"{int(np.count_nonzero(codes == -128))} codes are -128, outside [-127, 127]")
    values = codes.astype(np.float32)
    num_whole = values.size // block_size
    blocks = values[: num_whole * block_size].reshape(num_whole, block_size)
    blocks *= scales[:num_whole, np.newaxis]
    if scales.size > num_whole:
        values[num_whole * block_size :] *= scales[num_whole]
    return torch.from_numpy(values)


def section_bytes_int8(num_values: int, block_size: int) -> dict[str, int]:
    """Return four bytes per block and one per value."""
    return {"scales": 4 * -(-num_values // block_size), "codes": num_values}


QUANTIZERS: dict[str, Quantizer] = {
    "fp32": Quantizer(quantize_fp32, dequantize_fp32, section_bytes_fp32),
    "bf16": Quantizer(quantize_bf16, dequantize_bf16, section_bytes_bf16),
    "int8": Quantizer(quantize_int8, dequantize_int8, section_bytes_int8),
}
