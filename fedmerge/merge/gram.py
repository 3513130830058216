"""Merges whose coefficients follow from lengths and angles: sum_i c_i x_i, with c computed from the inner products.

    K  number of vectors      G  number of groups, each merged by itself (1, or rows)      N  elements of a group

Inner products and sums run in fp64 and in one order, whatever the blocks and the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Concatenate, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from fedmerge.delta.task_vector import working_dtype
from fedmerge.errors import InputError, ModelMismatch
from fedmerge.merge import kernels
from fedmerge.merge.stack import BLOCK_ELEMENTS, as_rows, blocks, row_weights, shares

Space: TypeAlias = Annotated[
    Literal["delta", "weights"],
    Field(description="Which vectors are merged: delta: the task vectors; weights: the models, base plus task vector."),
]
Axis: TypeAlias = Annotated[
    Literal["tensor", "row", "column"],
    Field(
        description="What has angles of its own: the tensor, each of its rows (vectors along the last axis), "
        "or each of its columns (along the first)."
    ),
]

# A rule for coefficients: inner products (..., K, K) of the vectors, in fp64 -> coefficients (..., K).
Rule: TypeAlias = Callable[[Tensor], Tensor]


class Angles(NamedTuple):
    """A method of this kind, told its weights and parameters: the rule, and the vectors that it is about."""

    rule: Rule
    space: Space = "delta"
    axis: Axis = "tensor"

    def coefficients(self, products: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the coefficients (G, V), fp64 rounded to `dtype`, of vectors with the inner `products` (G, V, V).

        The vectors are the task vectors and, with space="weights", the base behind them.
        """
        if self.space == "delta":
            found = self.rule(products)
        else:
            # (x_i + b) . (x_j + b) from the products of x and b, and base + merged = sum_i c_i (b + x_i).
            with_base, of_base = products[:, :-1, -1], products[:, -1:, -1:]
            found = self.rule(products[:, :-1, :-1] + with_base[:, :, None] + with_base[:, None, :] + of_base)
            found = torch.cat([found, found.sum(1, keepdim=True) - 1], dim=1)
        # Rounded: what processors compute differently, the last bits of an arc cosine, does not reach the outcome.
        return found.to(dtype).to(torch.float64)


# make(weights, **params), for K weights that are checked.
MakeAngles: TypeAlias = Callable[Concatenate[list[float], ...], Angles]


def merge_by_angles(
    deltas: Tensor, weights: Tensor, angles: Callable[[list[float]], Angles], *, base: Tensor | None
) -> Tensor:
    """Return the sum of coefficient * vector that `angles` ask for, as a task vector (*shape,) in fp32 (or fp64).

    The vectors are `deltas` (K, *shape) or, with space="weights", `base + delta`. Raises `InputError` when the stack is
    empty, not floating-point or does not fit the `weights` (K,), or a base is needed and missing, `ModelMismatch` when
    it has another shape.
    """
    rows, shape = as_rows(deltas), deltas.shape[1:]
    asked = angles(row_weights(weights, len(rows), rows.dtype))
    vectors = [_grouped(row.view(shape), asked.axis) for row in rows]
    if asked.space == "weights":
        vectors.append(_grouped(_require_base(base, shape), asked.axis))
    merged = _combine(vectors, asked.coefficients(inner_products(vectors), rows.dtype), rows.dtype)
    return _ungrouped(merged, shape, asked.axis)


def inner_products(vectors: Sequence[Tensor]) -> Tensor:
    """Return the inner products (G, K, K) in fp64 of K `vectors` (G, N) within each of the G groups."""
    num_groups, num_elements = vectors[0].shape
    dtype = working_dtype(*vectors)
    products = torch.empty(num_groups, len(vectors), len(vectors), dtype=torch.float64)
    height = min(256, max(1, BLOCK_ELEMENTS // max(1, num_elements)))
    for top in range(0, num_groups, height):
        groups = slice(top, min(top + height, num_groups))
        lanes = no_products(groups.stop - top, len(vectors))
        for columns in blocks(num_elements):
            tile = torch.stack([vector[groups, columns].to("cpu", dtype) for vector in vectors])
            kernels.add_products(tile.numpy(), lanes)
        kernels.sum_lanes(lanes, products[groups].numpy())
    return products


def no_products(num_groups: int, num_vectors: int) -> npt.NDArray[np.float64]:
    """Return what `kernels.add_products` adds to."""
    return np.zeros((num_groups, num_vectors, num_vectors, kernels.LANES))


def cosines(products: Tensor) -> tuple[Tensor, Tensor]:
    """Return lengths (..., K) and cosines (..., K, K) from inner products; a zero vector has the cosine 0 to all."""
    squares = products.diagonal(dim1=-2, dim2=-1)
    lengths = squares.sqrt()
    both = lengths[..., :, None] * lengths[..., None, :]
    found = torch.where(both > 0, products / both, 0).clamp(-1, 1)
    found.diagonal(dim1=-2, dim2=-1).copy_(lengths > 0)
    return lengths, found


def masses(weights: list[float]) -> Tensor:
    """Return `weights` divided by their sum, (K,) in fp64; raise `InputError` when one is negative or all are zero."""
    if min(weights) < 0:
        raise InputError(f"weights {weights} must not be negative", hint="task_arithmetic takes negative weights")
    return torch.tensor(shares(weights), dtype=torch.float64)


def _combine(vectors: Sequence[Tensor], coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum (G, N) of `coefficients` (G, K) * `vectors` (K of (G, N)), rounded once to `dtype`."""
    merged = torch.empty(vectors[0].shape, dtype=dtype, device=vectors[0].device)
    coefficients = coefficients.to(merged.device)
    for groups, columns in _tiles(*merged.shape):
        total = torch.zeros_like(merged[groups, columns], dtype=torch.float64)
        for vector, coefficient in zip(vectors, coefficients.T, strict=True):
            total += vector[groups, columns].to(torch.float64) * coefficient[groups, None]
        merged[groups, columns] = total
    return merged


def _tiles(num_groups: int, num_elements: int) -> list[tuple[slice, slice]]:
    """Return slices that cover (num_groups, num_elements) in tiles of about `BLOCK_ELEMENTS`."""
    height = max(1, BLOCK_ELEMENTS // max(1, num_elements))
    return [
        (slice(top, min(top + height, num_groups)), columns)
        for top in range(0, num_groups, height)
        for columns in blocks(num_elements)
    ]


def _grouped(tensor: Tensor, axis: Axis) -> Tensor:
    """Return `tensor` as (G, N), each row a vector with angles of its own."""
    if axis == "tensor" or tensor.ndim == 0:
        return tensor.reshape(1, tensor.numel())
    if axis == "row":
        return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:])).T


def _ungrouped(groups: Tensor, shape: torch.Size, axis: Axis) -> Tensor:
    """Undo `_grouped`."""
    return (groups.T if axis == "column" and shape else groups).reshape(shape)


def _require_base(base: Tensor | None, shape: torch.Size) -> Tensor:
    """Return `base` if it is there and has the `shape` of the task vectors."""
    if base is None:
        raise InputError(
            'space = "weights" merges whole models and needs the base', hint='give the base, or set space = "delta"'
        )
    if base.shape != shape:
        raise ModelMismatch(f"the base has shape {list(base.shape)}, the task vectors {list(shape)}")
    return base.detach()
