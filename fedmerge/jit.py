"""Compiled CPU kernels: loops over numpy arrays, for work that torch would take many passes over memory for.

A kernel is an ordinary function of arrays and scalars, compiled by numba when it is first called and kept on disk. It
runs without the interpreter's lock. Arithmetic is IEEE: operations are neither reordered nor fused, so that the same
inputs give the same bits on every processor; division by zero gives an infinity or a NaN.

`multiply_high`, `fp32_of` and `bits_of` are for use inside kernels: what Python has no words for, one instruction each.
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


@intrinsic  # type: ignore[untyped-decorator]
def multiply_high(_: Any, one: Any, other: Any) -> Any:
    """Return the upper 64 bits of the product of two uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = [builder.zext(argument, ir.IntType(128)) for argument in arguments]
        product = builder.mul(*wide)
        return builder.trunc(builder.lshr(product, ir.Constant(ir.IntType(128), 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def fp32_of(_: Any, value: Any) -> Any:
    """Return the fp32 number that a stored one is: of a uint16 the bf16 with these bits, of a uint32 the fp32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if value == types.float32:
            return arguments[0]
        bits = builder.zext(arguments[0], ir.IntType(32)) if value == types.uint16 else arguments[0]
        if value == types.uint16:
            bits = builder.shl(bits, ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    if value not in (types.uint16, types.uint32, types.float32):
        return None
    return types.float32(value), generate


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(_: Any, value: Any) -> Any:
    """Return the bits of an fp32 number as a uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate
