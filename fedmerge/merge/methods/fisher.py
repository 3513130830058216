"""Fisher merging: each element of a parameter weighs as much as the outputs on the node's data depend on it."""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.errors import InputError
from fedmerge.merge.gram import masses
from fedmerge.merge.methods.average import fedavg
from fedmerge.merge.stack import as_rows, blocks, row_weights

Epsilon: TypeAlias = Annotated[
    float, Field(gt=0, le=1, description="Added to the Fisher information, for elements that have none at any node.")
]
Floor: TypeAlias = Annotated[
    Literal["relative", "absolute"],
    Field(
        description="What epsilon stands for. relative: that part of the tensor's mean Fisher information; "
        "absolute: the number itself, under which small gradients make the merge a plain mean."
    ),
]
NormalizeFisher: TypeAlias = Annotated[
    bool,
    Field(
        description="Divide each node's Fisher information by its norm over the tensor, so that no node counts for "
        "more by the scale of its gradients alone."
    ),
]


def fisher(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    statistics: Tensor | None = None,
    epsilon: Epsilon = 1e-6,
    floor: Floor = "relative",
    normalize: NormalizeFisher = False,
) -> Tensor:
    """Return the mean of `deltas` (K, *shape) by `weights` (K,) times Fisher information: (*shape,) in fp32 (or fp64).

    Fisher merging, arXiv 2111.09832: sum_i w_i (F_i + epsilon) delta_i / sum_i w_i (F_i + epsilon), where `statistics`
    (K, *shape) are the F_i, the diagonals of the nodes' Fisher information, finite and not negative. Without them, and
    for elements where nothing weighs anything, it is the weighted mean. floor="absolute" is the authors' form, and on
    the whole model flattened, with normalize=True, FusionBench's; but a node whose F_i is all zero, which would get the
    largest say there, has none. Raises `InputError` when statistics or weights can't be used.
    """
    rows = as_rows(deltas)
    if statistics is None or not rows.numel():
        return fedavg(deltas, weights)
    if statistics.shape != deltas.shape:
        raise InputError(f"Fisher information has shape {list(statistics.shape)}, the stack {list(deltas.shape)}")
    information = statistics.detach().reshape(rows.shape)
    sums, norms = _sums_and_norms(information)
    guard = epsilon if floor == "absolute" else 0.0
    factors = [1 / (norm + guard) if norm else 0.0 for norm in norms] if normalize else [1.0] * len(rows)
    added = [epsilon * factor for factor in factors]
    node_weights = masses(row_weights(weights, len(rows), rows.dtype)).tolist()
    if floor == "relative":
        scaled = zip(node_weights, factors, sums, strict=True)
        added = [epsilon * math.fsum(w * factor * total for w, factor, total in scaled) / rows.shape[1]] * len(rows)
    merged = torch.empty_like(rows[0])
    for block in blocks(rows.shape[1]):
        parts = [
            weight * (information[i, block].to(torch.float64) * factors[i] + added[i])
            for i, weight in enumerate(node_weights)
        ]
        total = _add(parts)
        merged[block] = _add(
            [
                torch.where(total > 0, part / total, weight) * row
                for part, weight, row in zip(parts, node_weights, rows[:, block], strict=True)
            ]
        )
    return merged.view(deltas.shape[1:])


def _sums_and_norms(information: Tensor) -> tuple[list[float], list[float]]:
    """Return sum and L2 norm of each row (K, N); raise `InputError` unless all entries are finite and not negative.

    Added by numpy in fp64, whose order of additions does not depend on the number of threads.
    """
    sums, norms = [], []
    for row in information:
        parts = [row[block].to(torch.float64).numpy() for block in blocks(row.numel())]
        total, square = (math.fsum(part.sum() for part in parts), math.fsum((part * part).sum() for part in parts))
        if not math.isfinite(square) or min(part.min() for part in parts) < 0:
            raise InputError("Fisher information must be finite and not negative")
        sums.append(total)
        norms.append(math.sqrt(square))
    return sums, norms


def _add(parts: list[Tensor]) -> Tensor:
    """Return the sum of `parts`, in their order."""
    total = torch.zeros_like(parts[0])
    for part in parts:
        total += part
    return total
