"""KnOTS: turn task vectors into one basis before merging them, which is what low-rank ones lack.

The basis comes from a singular value decomposition in fp64, as those of `spectral` do, with the same caveat.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.delta.task_vector import working_dtype
from fedmerge.merge.methods.average import fedavg
from fedmerge.merge.methods.dare import dare_ties
from fedmerge.merge.methods.ties import ties
from fedmerge.merge.parameters import Density, Lambda
from fedmerge.merge.singular import decompose, on_one_thread
from fedmerge.merge.stack import as_rows, row_weights

Rule: TypeAlias = Annotated[
    Literal["ties", "dare_ties", "mean"],
    Field(description="How the task vectors' parts in the common basis are merged."),
]


@on_one_thread
def knots(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    rule: Rule = "ties",
    density: Density = 0.2,
    lambda_: Lambda = 1.0,
) -> Tensor:
    """Return the merge of `deltas` (K, *shape) with `weights` (K,) in their common left singular basis: (*shape,).

    KnOTS, arXiv 2410.19735, made for the task vectors of LoRA fine-tunes, of any ranks: with the task vectors as
    matrices (out, rest) side by side, [delta_1 ... delta_K] = U S [V_1' ... V_K'], the V_i' are merged by `rule`, and
    U S times that is the outcome. Singular values that are zero but for rounding are left out. What has fewer than two
    dimensions is averaged. `density` is the rule's, unused by "mean"; the outcome is in fp32, or fp64 if the deltas
    are. Raises `InputError` when the weights do not fit the stack.
    """
    rows = as_rows(deltas)
    weights = torch.tensor(row_weights(weights, len(rows), rows.dtype), dtype=torch.float64)
    if deltas.ndim < 3 or not rows.any():
        return fedavg(deltas, weights).mul_(lambda_)
    matrices = deltas.detach().flatten(2).to(torch.float64)
    num_outputs, num_columns = matrices.shape[1:]
    found = decompose(matrices.transpose(0, 1).reshape(num_outputs, -1))
    # A singular vector's sign is arbitrary, and elections tell signs apart.
    signs = found.left.gather(0, found.left.abs().argmax(0, keepdim=True)).sign()
    parts = (found.right * signs).view(len(rows), num_columns, -1).transpose(1, 2)
    match rule:
        case "ties":
            merged = ties(parts, weights, density=density)
        case "dare_ties":
            merged = dare_ties(parts, weights, seed=seed, density=density)
        case "mean":
            merged = fedavg(parts, weights)
    outcome = (found.left * signs * found.values) @ merged
    return (outcome * lambda_).to(working_dtype(deltas)).reshape(deltas.shape[1:])
