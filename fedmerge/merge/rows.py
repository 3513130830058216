"""The task vectors of one parameter as the compiled methods see them: read a block of columns at a time, in fp32.

What a checkpoint holds is read where it lies, in the file's pages: tuned and base are widened and subtracted in the
cache, and no task vector is ever in memory whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmerge.merge.kernels import INFINITE, TILE, add_four_scaled, add_scaled, apply_bf16, apply_fp32, read

Array: TypeAlias = npt.NDArray[Any]

# Columns of a block: with K rows of them and as much again in scratch, it should fit a core's second-level cache.
MOST_COLUMNS, MOST_ENTRIES = 1 << 16, 1 << 18

# What a kernel can read: the stored form of each dtype. fp16 has no arithmetic in compiled code and is widened first.
STORED: dict[torch.dtype, torch.dtype] = {
    torch.bfloat16: torch.uint16,
    torch.float16: torch.float16,
    torch.float32: torch.float32,
}


def fp32(value: float) -> np.float32:
    """Return `value` in fp32: infinite if it is too large, which what is computed from it will show."""
    with np.errstate(over="ignore"):
        return np.float32(value)


class Operand(NamedTuple):
    """One task vector: `tuned` minus `base`, or `tuned` itself without one; contiguous CPU tensors. `scale` is on top.

    `must_be_finite` says that NaN and infinite values are an error, not the caller's wish.
    """

    tuned: Tensor
    base: Tensor | None = None
    scale: float = 1.0
    must_be_finite: bool = False

    @property
    def compiled(self) -> bool:
        """Whether the kernels can read it: they know CPU tensors of 16 and 32 bits."""
        parts = [self.tuned] if self.base is None else [self.tuned, self.base]
        return all(part.dtype in STORED and part.device.type == "cpu" and part.is_contiguous() for part in parts)


class NotFinite(Exception):
    """The task vector at `index` holds NaN or infinite values."""

    def __init__(self, index: int) -> None:
        self.index = index


class Rows:
    """K operands of N elements each, and the buffers to read them through; for one thread.

    Blocks are whole lines of `line_elements` where that is given, and one line at least.
    """

    def __init__(self, operands: Sequence[Operand], *, line_elements: int = 1) -> None:
        self.operands = operands
        self.num_rows, self.num_elements = len(operands), operands[0].tuned.numel()
        self.shape = operands[0].tuned.shape
        most = min(MOST_COLUMNS, max(1 << 12, MOST_ENTRIES // self.num_rows // TILE * TILE), self.num_elements)
        self.num_columns = num_columns = max(1, line_elements, most // max(1, line_elements) * line_elements)
        self._stored = [_stored(operand.tuned) for operand in operands]
        self._bases = [None if operand.base is None else _stored(operand.base) for operand in operands]
        # Whether all rows are read in the same way, as the fine-tunes of one checkpoint are.
        self._are_alike = len({_kind(operand) for operand in operands}) == 1 and operands[0].scale == 1
        self._widened = np.empty(num_columns, dtype=np.float32)
        self._scratch = np.empty(num_columns, dtype=np.float32)
        self._stack: Array | None = None

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield start and end of each block of columns."""
        for start in range(0, self.num_elements, self.num_columns):
            yield start, min(start + self.num_columns, self.num_elements)

    def read_row(self, index: int, start: int, stop: int, *, out: Array | None = None) -> Array:
        """Return the columns `start` to `stop` of one row, in `out` or a buffer that is valid until the next call."""
        out = self._scratch[: stop - start] if out is None else out
        before = self._before(index, start, stop)
        self._check(index, read(self._block(index, start, stop, out), before, out))
        if self.operands[index].scale != 1:
            out *= fp32(self.operands[index].scale)
        return out

    def read(self, start: int, stop: int) -> Array:
        """Return the columns `start` to `stop` of all rows, (K, B), in a buffer that is valid until the next call."""
        if self._stack is None:
            self._stack = np.empty(self.num_rows * self.num_columns, dtype=np.float32)
        stack: Array = self._stack[: self.num_rows * (stop - start)].reshape(self.num_rows, stop - start)
        for index in range(self.num_rows):
            self.read_row(index, start, stop, out=stack[index])
        return stack

    def fold(self, coefficients: Sequence[np.float32], start: int, stop: int, *, out: Array) -> None:
        """Set `out` to the sum of coefficient * row over the columns `start` to `stop`, added in the rows' order."""
        num_together = len(coefficients) // 4 * 4 if self._are_alike else 0
        for index in range(0, num_together, 4):
            one, two, three, four = (stored[start:stop] for stored in self._stored[index : index + 4])
            before, factors = self._before(index, start, stop), np.array(coefficients[index : index + 4])
            if add_four_scaled(one, two, three, four, before, factors, index == 0, out) >= INFINITE:
                for row in range(index, index + 4):
                    self.read_row(row, start, stop)  # which checks each by itself
        for index in range(num_together, len(coefficients)):
            if self.operands[index].scale != 1:
                stored, before = self.read_row(index, start, stop), None
            else:
                stored, before = self._block(index, start, stop, self._scratch), self._before(index, start, stop)
            self._check(index, add_scaled(stored, before, coefficients[index], index == 0, out))

    def _before(self, index: int, start: int, stop: int) -> Array | None:
        base = self._bases[index]
        if base is None or base.dtype != np.float16:
            return None if base is None else base[start:stop]
        return _widen(base[start:stop], self._widened[: stop - start])

    def _block(self, index: int, start: int, stop: int, scratch: Array) -> Array:
        stored = self._stored[index][start:stop]
        return _widen(stored, scratch[: stop - start]) if stored.dtype == np.float16 else stored

    def _check(self, index: int, magnitude: int) -> None:
        if magnitude >= INFINITE and self.operands[index].must_be_finite:
            raise NotFinite(index)


class Update:
    """A base tensor's elements, a block of `change` to add to them, and what comes out, in the base's dtype."""

    def __init__(self, before: Tensor, num_columns: int) -> None:
        self.change = np.empty(num_columns, dtype=np.float32)
        self.after = torch.empty(num_columns, dtype=before.dtype)
        self._before, self._after = _stored(before), _stored(self.after)
        self._widened = np.empty(num_columns, dtype=np.float32)

    def apply(self, start: int, stop: int) -> bool:
        """Set `after` to base plus `change`, added in fp32 and rounded once; return whether all of it is finite."""
        before, change, after = self._before[start:stop], self.change[: stop - start], self._after[: stop - start]
        if after.dtype == np.uint16:
            return bool(apply_bf16(before, change, after) < INFINITE)
        if after.dtype == np.float32:
            return bool(apply_fp32(before, change, after) < INFINITE)
        np.add(before, change, out=change, dtype=np.float32)
        with np.errstate(over="ignore"):
            np.copyto(after, change, casting="same_kind")
        return bool(np.isfinite(after).all())


def _kind(operand: Operand) -> tuple[object, ...]:
    """Return what two operands have in common if one kernel can read both: dtypes, base, scale."""
    base = None if operand.base is None else (operand.base.dtype, operand.base.data_ptr())
    is_half = operand.tuned.dtype == torch.float16
    return operand.tuned.dtype, id(operand) if is_half else None, base, operand.scale


def _stored(tensor: Tensor) -> Array:
    flat = tensor.detach().reshape(-1)
    array: Array = flat.view(STORED[tensor.dtype]).numpy()
    return array


def _widen(stored: Array, out: Array) -> Array:
    np.copyto(out, stored)
    return out
