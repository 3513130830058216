"""Step 3, quantise, and its inverse, dequantise: fewer bits for each value that travels.

A quantizer turns fp32 values (M,) into sections (`fedmerge.delta.planes`). `fp32`, `bf16` and `fp16` are here, as byte
planes; the types with a scale per block are in `fedmerge.delta.blocks`.

Shapes: M values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmerge.delta.blocks import (
    INT4,
    LLOYD2,
    LLOYD3,
    SIGN,
    Levels,
    dequantize_int8,
    quantize_int8,
    section_bytes_int8,
)
from fedmerge.delta.planes import Sections, join_planes, split_planes
from fedmerge.errors import InvalidDelta


class Quantizer(NamedTuple):
    """A pair of inverses and the sizes they imply.

    `quantize(values, block_size)` returns the sections of finite fp32 values (M,), in the order in which they travel;
    `dequantize(sections, num_values, block_size)` returns fp32 values (M,) for sections of the right lengths, and
    raises `InvalidDelta` for those that no `quantize` makes. Unless it `is_bounded` it may return NaN or Inf, which the
    type on the wire can hold: the caller looks. `section_bytes(num_values, block_size)` returns the length of each
    section.
    """

    quantize: Callable[[Tensor, int], Sections]
    dequantize: Callable[[Sections, int, int], Tensor]
    section_bytes: Callable[[int, int], dict[str, int]]
    is_bounded: bool


def _plane_names(width: int) -> list[str]:
    return [f"plane{plane}" for plane in range(width)]


def quantize_fp32(values: Tensor, block_size: int) -> Sections:
    """Return `values` as they are, in four byte planes."""
    bits = values.numpy().view(np.uint32)
    return dict(zip(_plane_names(4), split_planes(bits), strict=True))


def dequantize_fp32(sections: Sections, num_values: int, block_size: int) -> Tensor:
    """Return the values of `quantize_fp32`, bit for bit."""
    bits = join_planes([sections[name] for name in _plane_names(4)])
    return torch.from_numpy(bits.view(np.float32))


def section_bytes_fp32(num_values: int, block_size: int) -> dict[str, int]:
    """Return four planes of one byte per value."""
    return dict.fromkeys(_plane_names(4), num_values)


def quantize_bf16(values: Tensor, block_size: int) -> Sections:
    """Return `values` rounded to bf16 (nearest, ties to even; relative error at most 2^-8), in two byte planes."""
    bits = values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return dict(zip(_plane_names(2), split_planes(bits), strict=True))


def dequantize_bf16(sections: Sections, num_values: int, block_size: int) -> Tensor:
    """Return the values of `quantize_bf16`, widened to fp32."""
    bits = join_planes([sections[name] for name in _plane_names(2)])
    return torch.from_numpy((bits.astype(np.uint32) << 16).view(np.float32))


def section_bytes_bf16(num_values: int, block_size: int) -> dict[str, int]:
    """Return two planes of one byte per value."""
    return dict.fromkeys(_plane_names(2), num_values)


# fp16 holds nothing above 65504, and loses precision below 6e-5, where most task vectors are. So the values of a tensor
# are first multiplied by the power of two that puts the largest just under 2^15: exact, and no value overflows. What
# travels is the exponent of the largest, from -112, below which 2^(15 - exponent) would leave fp32, to 128.
_LEAST_EXPONENT = -112
_MOST_EXPONENT = 128


def quantize_fp16(values: Tensor, block_size: int) -> Sections:
    """Return `values` times a power of two as fp16 (nearest, ties to even), in two byte planes, and its exponent.

    The relative error is at most 2^-11 for values down to 2^-28 of the largest; below, it is 2^-39 of the largest.
    """
    largest = float(values.abs().amax()) if values.numel() else 0.0
    exponent = max(_LEAST_EXPONENT, math.frexp(largest)[1])
    bits = (values * 2.0 ** (15 - exponent)).to(torch.float16).view(torch.int16).numpy().view(np.uint16)
    section = np.array([exponent - _LEAST_EXPONENT], dtype=np.uint8)
    return {"exponent": section, **dict(zip(_plane_names(2), split_planes(bits), strict=True))}


def dequantize_fp16(sections: Sections, num_values: int, block_size: int) -> Tensor:
    """Return the values of `quantize_fp16`, widened to fp32. Raises `InvalidDelta` for an exponent out of range."""
    exponent = int(sections["exponent"][0]) + _LEAST_EXPONENT
    if exponent > _MOST_EXPONENT:
        raise InvalidDelta(f"the exponent is {exponent}, above {_MOST_EXPONENT}")
    bits = join_planes([sections[name] for name in _plane_names(2)])
    return torch.from_numpy(bits.view(np.float16)).to(torch.float32) * 2.0 ** (exponent - 15)


def section_bytes_fp16(num_values: int, block_size: int) -> dict[str, int]:
    """Return one byte for the exponent, and two planes of one byte per value."""
    return {"exponent": 1, **dict.fromkeys(_plane_names(2), num_values)}


def _levels_quantizer(levels: Levels) -> Quantizer:
    return Quantizer(levels.quantize, levels.dequantize, levels.section_bytes, is_bounded=True)


QUANTIZERS: dict[str, Quantizer] = {
    "fp32": Quantizer(quantize_fp32, dequantize_fp32, section_bytes_fp32, is_bounded=False),
    "bf16": Quantizer(quantize_bf16, dequantize_bf16, section_bytes_bf16, is_bounded=False),
    "fp16": Quantizer(quantize_fp16, dequantize_fp16, section_bytes_fp16, is_bounded=False),
    "int8": Quantizer(quantize_int8, dequantize_int8, section_bytes_int8, is_bounded=True),
    "int4": _levels_quantizer(INT4),
    "lloyd3": _levels_quantizer(LLOYD3),
    "lloyd2": _levels_quantizer(LLOYD2),
    "sign": _levels_quantizer(SIGN),
}
