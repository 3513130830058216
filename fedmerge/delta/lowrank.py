"""Task vectors of low rank: a matrix as the product of two thin ones, exact for LoRA, or the nearest by its spectrum.

LoRA (arXiv 2106.09685) trains `scale * B @ A` instead of a matrix: sent as A and B it costs a hundredth and loses
nothing. Averaging factors over nodes is wrong, since a mean of products is no product of means, so a receiver
multiplies first. The product has the same bits on every machine: BLAS promises no order of additions, `product` has
one.

Shapes: matrices (m, n) of rank r.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmerge.delta.task_vector import delta_schema
from fedmerge.jit import kernel
from fedmerge.tensors import Schema, TensorMap

# The randomised range finder of Halko, Martinsson and Tropp (arXiv 0909.4061): columns beyond the rank, and how often
# the matrix is applied to sharpen the spectrum. Task vectors have flat ones, for which fewer are not enough.
_OVERSAMPLING = 16
_POWER_ITERATIONS = 3

# Singular values below this share of the largest are rounding errors of fp32.
_NULL = 1e-6


class Factors(NamedTuple):
    """A matrix (m, n) as `scale * left @ right`: fp32 of shapes (m, r) and (r, n)."""

    left: Tensor
    right: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """The number of columns of `left`, r."""
        return self.left.shape[1]


@kernel
def _product(
    left: npt.NDArray[np.float32], right: npt.NDArray[np.float64], scale: float, result: npt.NDArray[np.float32]
) -> None:
    row = np.empty(right.shape[1])
    for i in range(left.shape[0]):
        row[:] = 0.0
        for k in range(left.shape[1]):
            factor = np.float64(left[i, k])
            for j in range(row.size):
                row[j] += factor * right[k, j]
        for j in range(row.size):
            result[i, j] = np.float32(row[j] * scale)


def product(factors: Factors) -> Tensor:
    """Return `scale * left @ right` (m, n) in fp32, the same bits on every machine.

    Products of fp32 are exact in fp64, so it makes no difference whether a processor fuses them; they are added in the
    order of the rank, and rounded once, after the scale.
    """
    result = torch.empty(factors.left.shape[0], factors.right.shape[1])
    right = factors.right.to(torch.float64).contiguous().numpy()
    _product(factors.left.contiguous().numpy(), right, factors.scale, result.numpy())
    return result


def truncate(matrix: Tensor, rank: int, seed: int) -> tuple[Factors, float]:
    """Return factors of `rank` at most whose product is about the nearest to `matrix` (m, n), and its share of energy.

    The energy is the sum of squares. Where rank and oversampling cover the smaller side the factors are the truncated
    singular value decomposition, and no others of that rank are nearer; else they come from a random range, drawn from
    `seed`. `matrix` is fp32, finite and not all zero.
    """
    largest = matrix.abs().amax()
    scaled = matrix / largest  # so that squares stay in range
    num_columns = rank + _OVERSAMPLING
    if num_columns < min(matrix.shape):
        generator = torch.Generator().manual_seed(seed & (2**63 - 1))
        basis = torch.linalg.qr(scaled @ torch.randn(matrix.shape[1], num_columns, generator=generator)).Q
        for _ in range(_POWER_ITERATIONS):
            basis = torch.linalg.qr(scaled @ torch.linalg.qr(scaled.T @ basis).Q).Q
        inner, values, right = torch.linalg.svd(basis.T @ scaled, full_matrices=False)
        left = basis @ inner
    else:
        left, values, right = torch.linalg.svd(scaled, full_matrices=False)
    kept = max(1, int((values[:rank] > _NULL * values[0]).sum()))
    energy = float(values[:kept].double().square().sum() / scaled.double().square().sum())
    # Shared between the factors: then both are of one size, whatever type their values travel in.
    roots = (values[:kept] * largest).sqrt()
    return Factors(left[:, :kept] * roots, roots.unsqueeze(1) * right[:kept], 1.0), min(1.0, energy)


class LowRankDelta(Mapping[str, Tensor]):
    """A task vector known by factors: a tensor map in fp32 whose matrices are multiplied when they are asked for.

    `factors` has those of some matrices of `schema`, `rest` the differences of some other tensors; the remaining ones
    are zero. Made from a LoRA adapter by `fedmerge.delta.adapter`.
    """

    def __init__(self, schema: Schema, factors: Mapping[str, Factors], rest: TensorMap) -> None:
        self.schema = delta_schema(schema)
        self.factors = dict(factors)
        self._rest = rest

    def __getitem__(self, name: str) -> Tensor:
        if name in self.factors:
            return product(self.factors[name])
        return self._rest[name] if name in self._rest else torch.zeros(self.schema[name].shape)

    def factors_of(self, name: str) -> Factors | None:
        """Return the factors that a matrix is known by, None if it is not."""
        return self.factors.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.schema)

    def __len__(self) -> int:
        return len(self.schema)
