"""Points defined by their distances: Model Stock, which is near the centre of many fine-tunes, and the median."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merge.gram import Angles, cosines, masses, merge_by_angles

Clamp: TypeAlias = Annotated[
    bool, Field(description="Keep the ratio of interpolation between 0 (the base) and 1 (the mean).")
]
FilterWise: TypeAlias = Annotated[
    bool, Field(description="Take the angle of each output unit's weights by themselves, not of the whole tensor.")
]
Angle: TypeAlias = Annotated[
    Literal["mean_cosine", "mean_angle"],
    Field(description="What stands for the pairwise angles: the mean of their cosines, or the cosine of their mean."),
]
MaxIterations: TypeAlias = Annotated[int, Field(ge=1, description="Iterations after which the search ends.")]
Smoothing: TypeAlias = Annotated[
    float,
    Field(gt=0, lt=1, description="Least distance to a task vector, relative to the longest, that is told from zero."),
]


def model_stock(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    clamp: Clamp = True,
    filter_wise: FilterWise = False,
    angle: Angle = "mean_cosine",
) -> Tensor:
    """Return the mean of `deltas` (K, *shape) times the ratio t that their angle calls for: (*shape,), fp32 or fp64.

    Model Stock, arXiv 2403.19522: t = K c / (1 + (K - 1) c), with c the cosine between task vectors. Made for
    fine-tunes on one task; those of unrelated tasks have c near 0 and give the base. The weights (K,) are not used,
    since the geometry takes nodes as equals. mergekit's variant is clamp=False; FusionBench's has also
    angle="mean_angle". One node gets its delta back. Raises `InputError` when the weights do not fit the stack.
    """
    # A vector, such as a bias or a norm's scale, is one filter.
    by_unit = filter_wise and deltas.ndim > 2

    def angles(values: list[float]) -> Angles:
        return model_stock_angles(values, clamp=clamp, filter_wise=by_unit, angle=angle)

    merged = merge_by_angles(deltas.flatten(2) if by_unit else deltas, weights, angles, base=base)
    return merged.view(deltas.shape[1:])


def model_stock_angles(weights: list[float], *, clamp: bool, filter_wise: bool, angle: Angle) -> Angles:
    """Return the rule of `model_stock`."""
    num_nodes = len(weights)

    def rule(products: Tensor) -> Tensor:
        cosine = _cosine_between_nodes(products, angle)
        divisor = 1 + (num_nodes - 1) * cosine
        ratio = torch.where(divisor.abs() < 1e-6, 0, num_nodes * cosine / divisor)
        return (ratio.clamp(0, 1) if clamp else ratio)[:, None].expand(-1, num_nodes) / num_nodes

    return Angles(rule, axis="row" if filter_wise else "tensor")


def _cosine_between_nodes(products: Tensor, angle: Angle) -> Tensor:
    """Return one cosine (G,) for all pairs of nodes; 1 where there is no pair."""
    num_nodes = products.shape[-1]
    if num_nodes == 1:
        return torch.ones_like(products[:, 0, 0])
    above = torch.triu_indices(num_nodes, num_nodes, offset=1)
    pairs = cosines(products)[1][:, above[0], above[1]]
    return pairs.acos().mean(1).cos() if angle == "mean_angle" else pairs.mean(1)


def geometric_median(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    max_iter: MaxIterations = 100,
    eps: Smoothing = 1e-6,
) -> Tensor:
    """Return the point with the least weighted sum of distances to `deltas` (K, *shape): (*shape,) in fp32 (or fp64).

    Robust aggregation, arXiv 1912.13445, by smoothed Weiszfeld iterations from the weighted mean, tensor by tensor.
    Nodes with less than half of the weight can not move it without bound. Raises `InputError` on negative or vanishing
    weights (K,).
    """
    return merge_by_angles(
        deltas, weights, lambda values: geometric_median_angles(values, max_iter=max_iter, eps=eps), base=base
    )


def geometric_median_angles(weights: list[float], *, max_iter: int, eps: float) -> Angles:
    """Return the rule of `geometric_median`."""
    values = masses(weights)

    def rule(products: Tensor) -> Tensor:
        products = products.squeeze(0)
        squares = products.diagonal()
        nearest = eps * squares.max().sqrt()
        point = values
        if nearest == 0:
            return point[None]
        for _ in range(max_iter):
            toward = products @ point
            distances = (squares - 2 * toward + point @ toward).clamp(min=0).sqrt()
            pull = values / distances.clamp(min=nearest)
            last, point = point, pull / pull.sum()
            if (point - last).abs().max() < 1e-12:
                break
        return point[None]

    return Angles(rule)
