"""Merges whose coefficients follow from lengths and angles: sum_i c_i x_i, with c computed from the inner products.

    K  number of vectors      G  number of groups, each merged by itself (1, or rows)      N  elements of a group

Inner products and sums run in fp64, block by block and in one order, whatever the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.errors import InputError, ModelMismatch
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


def merge_by_angles(
    deltas: Tensor, rule: Rule, *, base: Tensor | None = None, space: Space = "delta", axis: Axis = "tensor"
) -> Tensor:
    """Return the sum of coefficient * vector that `rule` asks for, as a task vector (*shape,) in fp32 (or fp64).

    The vectors are `deltas` (K, *shape) or, with space="weights", `base + delta`. Raises `InputError` when the stack is
    empty or not floating-point or a base is needed and missing, `ModelMismatch` when it has another shape.
    """
    rows = as_rows(deltas)
    shape = deltas.shape[1:]
    vectors = [_grouped(row.view(shape), axis) for row in rows]
    if space == "delta":
        merged = _combine(vectors, rule(inner_products(vectors)), rows.dtype)
    else:
        vectors.append(_grouped(_require_base(base, shape), axis))
        # (x_i + b) . (x_j + b) from the products of x and b, and base + merged = sum_i c_i (b + x_i).
        products = inner_products(vectors)
        with_base, of_base = products[:, :-1, -1], products[:, -1:, -1:]
        coefficients = rule(products[:, :-1, :-1] + with_base[:, :, None] + with_base[:, None, :] + of_base)
        excess = coefficients.sum(1, keepdim=True) - 1
        merged = _combine(vectors, torch.cat([coefficients, excess], dim=1), rows.dtype)
    return _ungrouped(merged, shape, axis)


def inner_products(vectors: Sequence[Tensor]) -> Tensor:
    """Return the inner products (G, K, K) in fp64 of K `vectors` (G, N) within each of the G groups."""
    num_groups, num_elements = vectors[0].shape
    products = torch.zeros(num_groups, len(vectors), len(vectors), dtype=torch.float64)
    for groups, columns in _tiles(num_groups, num_elements):
        tile = [vector[groups, columns].to(torch.float64) for vector in vectors]
        for i, left in enumerate(tile):
            for j, right in enumerate(tile[: i + 1]):
                # numpy's order of additions does not depend on the number of threads.
                products[groups, i, j] += torch.from_numpy((left * right).cpu().numpy().sum(axis=1))
    lower = products.tril(-1)
    return products.tril() + lower.mT


def cosines(products: Tensor) -> tuple[Tensor, Tensor]:
    """Return lengths (..., K) and cosines (..., K, K) from inner products; a zero vector has the cosine 0 to all."""
    squares = products.diagonal(dim1=-2, dim2=-1)
    lengths = squares.sqrt()
    both = lengths[..., :, None] * lengths[..., None, :]
    found = torch.where(both > 0, products / both, 0).clamp(-1, 1)
    found.diagonal(dim1=-2, dim2=-1).copy_(lengths > 0)
    return lengths, found


def node_weights(deltas: Tensor, weights: Tensor) -> list[float]:
    """Return `weights` (K,) as numbers; raise `InputError` unless they and `deltas` (K, *shape) can be merged."""
    rows = as_rows(deltas)
    return row_weights(weights, len(rows), rows.dtype)


def masses(deltas: Tensor, weights: Tensor) -> Tensor:
    """Return `weights` divided by their sum, (K,) in fp64; raise `InputError` when one is negative or all are zero."""
    values = node_weights(deltas, weights)
    if min(values) < 0:
        raise InputError(f"weights {values} must not be negative", hint="task_arithmetic takes negative weights")
    return torch.tensor(shares(values), dtype=torch.float64)


def _combine(vectors: Sequence[Tensor], coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum (G, N) of `coefficients` (G, K) * `vectors` (K of (G, N)), rounded once to `dtype`."""
    # Rounded first: what processors compute differently, the last bits of an arc cosine, does not reach the outcome.
    coefficients = coefficients.to(dtype).to(torch.float64)
    merged = torch.empty(vectors[0].shape, dtype=dtype)
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
