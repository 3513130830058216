"""Methods that merge directions and lengths apart: SLERP and its forms for weights, for many nodes, and for means.

Averages of vectors that point different ways are shorter than the vectors; these methods are not.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.errors import InputError
from fedmerge.merge.gram import Angles, Axis, Space, cosines, masses, merge_by_angles

Position: TypeAlias = Annotated[
    float, Field(ge=0, le=1, description="Where on the arc from the first (0) to the second (1) node the result is.")
]
MaxIterations: TypeAlias = Annotated[int, Field(ge=1, description="Iterations after which the search ends.")]
Tolerance: TypeAlias = Annotated[
    float, Field(gt=0, lt=0.1, description="Angle, in radians, and relative length that count as zero.")
]

# Shorter sums of unit vectors, or sines of the angle between them, leave no direction that rounding did not make up.
NO_DIRECTION = 1e-6
# The arc between vectors of almost opposite directions and unequal lengths goes far beyond both.
ANTIPODES = -0.9995


def slerp(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    t: Position = 0.5,
    space: Space = "delta",
) -> Tensor:
    """Return the spherical interpolation at `t` between two `deltas` (2, *shape): (*shape,) in fp32 (or fp64).

    Shoemake, "Animating rotation with quaternion curves" (SIGGRAPH 1985), as model merging uses it: on tensors as they
    are, of any length, and linear where the cosine is above 0.9995 or below -0.9995. Fine-tunes of one base are that
    close nearly always, hence space="delta"; mergekit's variant is space="weights", with the base as a node of its own
    (a zero delta). The weights (2,) are not used: see `nuslerp`. One node gets its delta back. Raises `InputError` for
    more than two nodes, and when space="weights" lacks the base.
    """
    return merge_by_angles(deltas, weights, lambda values: slerp_angles(values, t=t, space=space), base=base)


def slerp_angles(weights: list[float], *, t: float, space: Space) -> Angles:
    """Return the rule of `slerp`."""
    _require_pair("slerp", weights)
    return Angles(lambda products: _on_arc(products, t, 1 - 0.9995**2), space)


def nuslerp(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    space: Space = "delta",
    axis: Axis = "tensor",
) -> Tensor:
    """Return `slerp` of two `deltas` (2, *shape) at the second one's share of `weights` (2,), per `axis`.

    mergekit's NuSLERP (no paper; the arc is Shoemake's), which takes space="weights" when it is given no base, and
    whose row_wise is axis="column". Weights that sum to less than 1e-6 in magnitude count as equal. Linear only where
    the arc is straight, and, for safety, where the cosine is below -0.9995. Raises as `slerp`.
    """
    return merge_by_angles(deltas, weights, lambda values: nuslerp_angles(values, space=space, axis=axis), base=base)


def nuslerp_angles(weights: list[float], *, space: Space, axis: Axis) -> Angles:
    """Return the rule of `nuslerp`."""
    _require_pair("nuslerp", weights)
    total = sum(weights)
    t = weights[-1] / total if abs(total) >= 1e-6 else 0.5
    # Below NO_DIRECTION the arc is straight to twelve digits.
    return Angles(lambda products: _on_arc(products, t, NO_DIRECTION**2), space, axis)


def multislerp(
    deltas: Tensor, weights: Tensor, *, base: Tensor | None = None, seed: int = 0, space: Space = "delta"
) -> Tensor:
    """Return the mean direction of `deltas` (K, *shape) by `weights` (K,), at their mean length: (*shape,) in fp32.

    mergekit's Multi-SLERP (goddard.blog; no paper), in closed form: tangents at the normalised mean sum to zero, so
    that its step along them moves nothing. Where directions cancel out there is none to take, and the result is the
    weighted mean. In fp64 if the deltas are. Raises `InputError` on negative or vanishing weights, and when
    space="weights" lacks the base.
    """
    return merge_by_angles(deltas, weights, lambda values: mean_direction(values, space=space), base=base)


def rda(deltas: Tensor, weights: Tensor, *, base: Tensor | None = None, seed: int = 0) -> Tensor:
    """Return the norm-preserving average of `deltas` (K, *shape) by `weights` (K,): (*shape,) in fp32 (or fp64).

    The mean of the unit vectors, brought to the mean of the lengths, tensor by tensor: Decoupled DiLoCo, arXiv
    2604.21428 (which takes `fedavg` for embeddings). A mean of K unrelated task vectors is sqrt(K) times shorter than
    this, so an outer learning rate needs another tuning. Where directions cancel out, the weighted mean. Raises
    `InputError` on negative or vanishing weights.
    """
    return merge_by_angles(deltas, weights, mean_direction, base=base)


def karcher(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    max_iter: MaxIterations = 10,
    tol: Tolerance = 1e-5,
    space: Space = "delta",
) -> Tensor:
    """Return the Karcher mean of the directions of `deltas` (K, *shape) by `weights` (K,), at their mean length.

    The point of the sphere with the least sum of squared angles, arXiv 2603.04972, found by steps along the mean
    tangent until one is below `tol`. Vectors shorter than `tol` times the longest have no say in the direction, but
    count for the length; antipodes of the present mean, whose tangent is undefined, wait for the next step. Where
    directions cancel out, the weighted mean. (*shape,) in fp32, or fp64 if the deltas are. Raises as `multislerp`.
    """
    return merge_by_angles(
        deltas, weights, lambda values: karcher_angles(values, max_iter=max_iter, tol=tol, space=space), base=base
    )


def karcher_angles(weights: list[float], *, max_iter: int, tol: float, space: Space) -> Angles:
    """Return the rule of `karcher`."""
    values = masses(weights)

    def rule(products: Tensor) -> Tensor:
        lengths, cosine = (part.squeeze(0) for part in cosines(products))
        heard = torch.where(lengths > tol * lengths.max(), values, 0)
        share = heard / heard.sum() if heard.any() else heard
        # The mean and every tangent are sums of the unit vectors: their coefficients are all that is computed.
        mean, length = _normalise(share, cosine)
        if length < NO_DIRECTION:
            return values[None]
        for _ in range(max_iter):
            nearness = (cosine @ mean).clamp(-1, 1)
            angle = torch.acos(nearness)
            sine = torch.sin(angle)
            pull = share * torch.where((angle >= tol) & (sine > NO_DIRECTION), angle / sine, 0)
            direction, step = _normalise(pull - (pull * nearness).sum() * mean, cosine)
            if step < tol:
                break
            mean, _ = _normalise(torch.cos(step) * mean + torch.sin(step) * direction, cosine)
        return ((values * lengths).sum() * mean / torch.where(lengths > 0, lengths, 1))[None]

    return Angles(rule, space)


def mean_direction(weights: list[float], *, space: Space = "delta") -> Angles:
    """Return the rule of `multislerp` and `rda`."""
    values = masses(weights)

    def rule(products: Tensor) -> Tensor:
        lengths, cosine = (part.squeeze(0) for part in cosines(products))
        mean, length = _normalise(values, cosine)
        if length < NO_DIRECTION:
            return values[None]
        return ((values * lengths).sum() * mean / torch.where(lengths > 0, lengths, 1))[None]

    return Angles(rule, space)


def _normalise(coefficients: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of coefficient * unit vector (K,), brought to length 1 where it has one, and its length."""
    length = (coefficients @ cosine @ coefficients).clamp(min=0).sqrt()
    return coefficients / torch.where(length > 0, length, 1), length


def _on_arc(products: Tensor, t: float, straight: float) -> Tensor:
    """Return the coefficients (G, 2) of the point at `t` on each arc, linear where the squared sine is <= `straight`
    and between antipodes.

    One vector (G, 1) is its own arc.
    """
    if products.shape[-1] == 1:
        return torch.ones_like(products[..., 0])
    cosine = cosines(products)[1][..., 0, 1, None]
    angle = torch.acos(cosine)
    ends = torch.tensor([1 - t, t], dtype=torch.float64)
    arc = torch.sin(ends * angle) / torch.sin(angle)
    return torch.where((1 - cosine**2 <= straight) | (cosine < ANTIPODES), ends, arc)


def _require_pair(method: str, weights: list[float]) -> None:
    """Raise `InputError` for more than two nodes."""
    if len(weights) > 2:
        raise InputError(
            f"{method} merges two task vectors, not {len(weights)}", hint="multislerp and karcher merge any number"
        )
