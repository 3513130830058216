"""Compiled CPU kernels: loops over numpy arrays, for work that torch would take many passes over memory for.

A kernel is an ordinary function of arrays and scalars, compiled by numba when it is first called and kept on disk. It
runs without the interpreter's lock. Arithmetic is IEEE: operations are neither reordered nor fused, so that the same
inputs give the same bits on every processor; division by zero gives an infinity or a NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., object])


def kernel(function: Function) -> Function:
    """Return `function` compiled; a kernel may call other kernels."""
    try:
        compiled = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # no folder to keep it in is writable: compiled anew by every process
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return cast(Function, compiled)
