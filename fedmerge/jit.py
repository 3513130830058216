"""Compiled CPU kernels: loops over numpy arrays, for work that torch would take many passes over memory for.

A kernel is an ordinary function of arrays and scalars, compiled by numba when it is first called and kept on disk. It
runs without the interpreter's lock. Arithmetic is IEEE: operations are neither reordered nor fused, so that the same
inputs give the same bits on every processor; division by zero gives an infinity or a NaN.

For use inside kernels, one instruction each:

    fp32_of(stored)           the number that a uint16 (as bf16), a uint32 or a float32 stands for
    bits_of(number)           the bits of a float32, as a uint32
    multiply_high(one, other) the upper 64 bits of the product of two uint64
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., object])


def kernel(function: Function) -> Function:
    """Return `function` compiled; a kernel may call other kernels."""
    try:
        compiled = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # no folder to keep it in is writable: compiled anew by every process
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return cast(Function, compiled)


def _fp32_of(_: Any, stored: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (bits,) = arguments
        if stored == types.uint16:
            bits = builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return bits if stored == types.float32 else builder.bitcast(bits, ir.FloatType())

    return (types.float32(stored), generate) if stored in {types.uint16, types.uint32, types.float32} else None


def _bits_of(_: Any, number: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return (types.uint32(number), generate) if number == types.float32 else None


def _multiply_high(_: Any, one: Any, other: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        product = builder.mul(*(builder.zext(argument, ir.IntType(128)) for argument in arguments))
        return builder.trunc(builder.lshr(product, ir.Constant(ir.IntType(128), 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


fp32_of: Any = intrinsic(_fp32_of)
bits_of: Any = intrinsic(_bits_of)
multiply_high: Any = intrinsic(_multiply_high)
