"""Merging LoRA factors as factors: what the literature does, beside the mean of products that a federation takes.

The merge method `factor_average` takes the product of means after all, where a plan asks for it by that name.

A node's adapter is `scale * left @ right` for each matrix (`fedmerge.delta.lowrank.Factors`). With weights w that sum
to 1, the mean of products is exact; `stack` keeps it exact in factors of the sum of ranks, `refactor` cuts them down by
their singular values, and `residual` is what a mean of factors leaves out.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fedmerge.delta.lowrank import Factors, product
from fedmerge.errors import InputError
from fedmerge.merge.methods.average import fedavg
from fedmerge.merge.stack import row_weights, shares


def stack(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return the weighted sum of products as one pair of factors, of the sum of ranks: FLoRA, arXiv 2409.05976.

    Exact but for one rounding to fp32 of each element of the right factors, which carry weights and scales.
    """
    _require_alike(factors, weights)
    return Factors(
        torch.cat([one.left for one in factors], 1),
        torch.cat([(one.right.double() * (w * one.scale)).float() for one, w in zip(factors, weights, strict=True)]),
        1.0,
    )


def refactor(factors: Factors, rank: int) -> tuple[Factors, float]:
    """Return the nearest factors of `rank` at most, and their share of the energy, the sum of squares.

    By the singular values of the product, which is never formed: of (m, n) and rank r it takes O((m + n) r^2).
    """
    left_basis, left = torch.linalg.qr(factors.left.double())
    right_basis, right = torch.linalg.qr(factors.right.double().T)
    inner, values, outer = torch.linalg.svd(left @ right.T * factors.scale, full_matrices=False)
    squares = values.square()
    roots = values[:rank].sqrt()
    cut = Factors(
        (left_basis @ (inner[:, :rank] * roots)).float(), ((roots[:, None] * outer[:rank]) @ right_basis.T).float(), 1.0
    )
    total = float(squares.sum())
    return cut, float(squares[:rank].sum()) / total if total else 1.0


def by_factors(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    factors: Sequence[Factors] | None = None,
) -> Tensor:
    """Return the product of the mean `factors` of K task vectors by `weights` (K,): (*shape,) in fp32.

    The merge method `factor_average`. Without factors, as biases and norms are, it is the mean of `deltas` (K, *shape),
    in fp64 if they are. Raises `InputError` when the factors are of several ranks or scales, or the weights sum to less
    than 1e-8 in magnitude.
    """
    if factors is None:
        return fedavg(deltas, weights)
    return product(_mean_factors(factors, shares(row_weights(weights, len(factors), torch.float64))))


def factor_average(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return the product of mean factors, which is not the mean of products: FedIT, arXiv 2305.05644. Warns of that.

    Only for comparison, or where one factor is the same everywhere (FFA-LoRA, arXiv 2403.12313), and it is exact.
    Raises `InputError` unless all have one rank and scale.
    """
    mean = _mean_factors(factors, weights)
    if not _share_a_side(factors):
        warnings.warn(
            "a product of mean factors is not the mean of products: stack() is, at the sum of ranks", stacklevel=2
        )
    return mean


def fedex(factors: Sequence[Factors], weights: Sequence[float]) -> tuple[Factors, Tensor]:
    """Return mean factors and the residual (m, n) to add to the base's own matrix: FedEx-LoRA, arXiv 2410.09432.

    Together they are the weighted mean of products. Raises `InputError` unless all have one rank and scale.
    """
    mean = _mean_factors(factors, weights)
    exact = torch.stack([product(one).double() * w for one, w in zip(factors, weights, strict=True)]).sum(0)
    return mean, (exact - product(mean).double()).float()


def _mean_factors(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    _require_alike(factors, weights)
    if len({(one.rank, one.scale) for one in factors}) > 1:
        raise InputError("factors of several ranks or scales have no mean", hint="stack() takes them")
    left = torch.stack([one.left.double() * w for one, w in zip(factors, weights, strict=True)]).sum(0)
    right = torch.stack([one.right.double() * w for one, w in zip(factors, weights, strict=True)]).sum(0)
    return Factors(left.float(), right.float(), factors[0].scale)


def _require_alike(factors: Sequence[Factors], weights: Sequence[float]) -> None:
    shapes = {(one.left.shape[0], one.right.shape[1]) for one in factors}
    if len(shapes) != 1 or len(weights) != len(factors):
        raise InputError(f"{len(weights)} weights for {len(factors)} pairs of factors of matrices {sorted(shapes)}")


def _share_a_side(factors: Sequence[Factors]) -> bool:
    return all(torch.equal(one.left, factors[0].left) for one in factors) or all(
        torch.equal(one.right, factors[0].right) for one in factors
    )
