"""Methods on the singular vectors of weight matrices: TSV-Merge, Iso-C, Iso-CTS and Subspace Boosting.

They take tensors of two and more dimensions as matrices (out, rest), scale each task vector by its weight, and
decompose in fp64. Vectors and scalars are merged by their mean. No outcome depends on the signs of singular vectors, on
the vectors of singular values that are zero but for rounding, or on the number of threads; but the libraries that
decompose round differently on different processors, and so may an element's last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.delta.task_vector import working_dtype
from fedmerge.merge.methods.average import fedavg, task_arithmetic
from fedmerge.merge.methods.ties import ties
from fedmerge.merge.parameters import Lambda
from fedmerge.merge.singular import decompose, nearest_orthonormal, on_one_thread, side_by_side
from fedmerge.merge.stack import as_rows, row_weights

FullRank: TypeAlias = Annotated[
    bool, Field(description="Raise zero singular values too, along vectors that are arbitrary, as the authors do.")
]
CommonSpace: TypeAlias = Annotated[
    float, Field(ge=0, le=1, description="Share of the rank that belongs to the sum; the nodes divide up the rest.")
]
BoostedMerge: TypeAlias = Annotated[
    Literal["task_arithmetic", "ties"], Field(description="The merge whose spectrum is boosted.")
]
TiesDensity: TypeAlias = Annotated[
    float, Field(gt=0, le=1, description='Share of the entries that TIES keeps; unused when on = "task_arithmetic".')
]
Beta: TypeAlias = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="Share of the sum of singular values after which the rest is raised; "
        "0 raises all of them to the first.",
    ),
]


@on_one_thread
def tsv(deltas: Tensor, weights: Tensor, *, base: Tensor | None = None, seed: int = 0, lambda_: Lambda = 1.0) -> Tensor:
    """Return the TSV merge of `deltas` (K, *shape) with `weights` (K,): (*shape,) in fp32 (or fp64 if they are).

    Task Singular Vectors, arXiv 2412.00081: of each task vector the min(m, n) / K leading singular triplets, whose left
    and right vectors, stacked, are replaced by the nearest orthonormal ones. Unlike in the authors' code, task vectors
    that are zero do not count, and equal ones share a direction instead of being torn apart; on others it gives the
    same. Weights of one are the paper's. The mean takes the place of what has too few ranks for K nodes. Raises
    `InputError` when the weights do not fit the stack.
    """
    scaled = _scaled_matrices(deltas, weights)
    if scaled is None:
        return fedavg(deltas, weights).mul_(lambda_)
    moved = scaled.moved()
    rank = min(scaled.shape) // max(1, len(moved))
    if len(moved) == 1:
        return _finish(moved.total(), lambda_, deltas)
    if rank == 0 or not moved:
        return fedavg(deltas, weights).mul_(lambda_)
    parts = [decompose(matrix).first(rank) for matrix in moved]
    left, values, right = side_by_side(parts)
    return _finish(nearest_orthonormal(left) * values @ nearest_orthonormal(right).T, lambda_, deltas)


@on_one_thread
def iso_c(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    lambda_: Lambda = 1.0,
    full_rank: FullRank = False,
) -> Tensor:
    """Return the weighted sum of `deltas` (K, *shape) with a flat spectrum: (*shape,) in fp32 (or fp64 if they are).

    Iso-C, arXiv 2502.04959: every singular value becomes their mean. `lambda_` needs tuning on held-out data. The mean
    goes over values that are not zero, since the vectors of those that are were never learned; full_rank=True is the
    authors' variant. Raises `InputError` when the weights (K,) do not fit the stack.
    """
    scaled = _scaled_matrices(deltas, weights)
    if scaled is None:
        return fedavg(deltas, weights).mul_(lambda_)
    left, values, right = decompose(scaled.total(), keep_null=full_rank)
    level = values.mean() if len(values) else 0.0
    return _finish(level * (left @ right.T), lambda_, deltas)


@on_one_thread
def iso_cts(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    lambda_: Lambda = 1.0,
    common_space_fraction: CommonSpace = 0.8,
) -> Tensor:
    """Return `iso_c` with room for each node's own directions: (*shape,) in fp32 (or fp64 if `deltas` are).

    Iso-CTS, arXiv 2502.04959: a share of the ranks are the leading directions of the sum, the others, in equal numbers,
    those of what remains of each task vector; all are made orthonormal and get the mean of the singular values. Unlike
    in the authors' code, directions with no singular value are left out, zero task vectors do not count, and there are
    never more directions than ranks. Raises `InputError` when the weights (K,) do not fit the stack.
    """
    scaled = _scaled_matrices(deltas, weights)
    if scaled is None:
        return fedavg(deltas, weights).mul_(lambda_)
    moved = scaled.moved()
    if not moved:
        return _finish(scaled.total(), lambda_, deltas)
    num_ranks, num_nodes = min(scaled.shape), len(moved)
    num_specific = ranks_per_node(num_ranks, num_nodes, common_space_fraction)
    common = decompose(moved.total()).first(num_ranks - num_nodes * num_specific)
    parts = [
        decompose(matrix - common.left @ (common.left.T @ matrix), scale=_norm(matrix)).first(num_specific)
        for matrix in moved
    ]
    left, values, right = side_by_side([*parts, common])
    if not len(values):
        return _finish(scaled.total().zero_(), lambda_, deltas)
    return _finish(values.mean() * (nearest_orthonormal(left) @ nearest_orthonormal(right).T), lambda_, deltas)


@on_one_thread
def subspace_boosting(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    on: BoostedMerge = "task_arithmetic",
    density: TiesDensity = 0.2,
    lambda_: Lambda = 1.0,
    beta: Beta = 0.01,
) -> Tensor:
    """Return the merge named by `on` with its small singular values raised: (*shape,) in fp32 (or fp64).

    Subspace Boosting, arXiv 2506.16506: values after the first ones that make up a share `beta` of their sum are raised
    to the last of those. The norm grows several-fold, so `lambda_` needs tuning again. Values that are zero stay zero,
    and vectors are merged as `on` does. Fused projections should be split into their parts first. Raises `InputError`
    when the weights (K,) do not fit `deltas` (K, *shape).
    """
    merged = task_arithmetic(deltas, weights) if on == "task_arithmetic" else ties(deltas, weights, density=density)
    if merged.ndim < 2 or not merged.any():
        return merged.mul_(lambda_)
    left, values, right = decompose(_as_matrix(merged))
    place = int((values.cumsum(0) / values.sum() < beta).sum())
    floor = values[min(place, len(values) - 1)]
    return _finish(left * values.clamp(min=floor) @ right.T, lambda_, deltas)


def ranks_per_node(num_ranks: int, num_nodes: int, common_space_fraction: float) -> int:
    """Return how many of `num_ranks` each node has to itself in `iso_cts`."""
    num_left = num_ranks - math.floor(num_ranks * common_space_fraction)
    # The authors round, halves to even, which for small fractions may exceed the rank.
    rounded = round(num_left / num_nodes)
    return rounded if rounded * num_nodes <= num_ranks else num_left // num_nodes


class _Matrices:
    """Task vectors times their weights as matrices (m, n) in fp64, each made when it is its turn."""

    def __init__(self, rows: Sequence[Tensor], weights: Sequence[float]) -> None:
        self._rows, self._weights = rows, weights
        self.shape = rows[0].shape if rows else torch.Size((0, 0))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Tensor]:
        for row, weight in zip(self._rows, self._weights, strict=True):
            yield row.to(torch.float64) * weight

    def total(self) -> Tensor:
        """Return their sum, added in their order."""
        total = torch.zeros_like(self._rows[0], dtype=torch.float64)
        for matrix in self:
            total += matrix
        return total

    def moved(self) -> _Matrices:
        """Return those that are not zero."""
        kept = [
            (row, weight) for row, weight in zip(self._rows, self._weights, strict=True) if weight != 0 and row.any()
        ]
        return _Matrices([row for row, _ in kept], [weight for _, weight in kept])


def _scaled_matrices(deltas: Tensor, weights: Tensor) -> _Matrices | None:
    """Return each of `deltas` times its weight as a matrix; None for vectors and empty tensors."""
    rows = as_rows(deltas)
    values = row_weights(weights, len(rows), rows.dtype)
    if deltas.ndim < 3 or not rows.numel():
        return None
    return _Matrices([row.view(deltas.shape[1:]).flatten(1) for row in rows], values)


def _as_matrix(tensor: Tensor) -> Tensor:
    """Return `tensor` (out, ...) as a matrix (out, rest) in fp64."""
    return tensor.flatten(1).to(torch.float64)


def _norm(matrix: Tensor) -> float:
    """Return the Frobenius norm, which is at least the largest singular value."""
    return float(torch.linalg.matrix_norm(matrix))


def _finish(matrix: Tensor, lambda_: float, deltas: Tensor) -> Tensor:
    """Return `lambda_ * matrix` in the shape of one of `deltas` (K, *shape), in fp32 (or fp64 if they are)."""
    return (matrix * lambda_).to(working_dtype(deltas)).reshape(deltas.shape[1:])
