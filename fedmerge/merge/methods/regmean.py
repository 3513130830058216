"""RegMean: the linear layer whose outputs are nearest, in least squares, to those of every node on its own inputs.

The solution comes from LAPACK in fp64 on one thread: its bits do not depend on the number of threads, but libraries for
different processors round differently, and so may an element's last bit.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.errors import InputError
from fedmerge.merge.gram import masses
from fedmerge.merge.methods.average import fedavg
from fedmerge.merge.singular import NULL, on_one_thread
from fedmerge.merge.stack import as_rows, row_weights

OffDiagonal: TypeAlias = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="Factor on the off-diagonal entries of the Gram matrices, the paper's alpha: 0.9 there, 0.1 for "
        "models such as T5; 1 is plain least squares, 0 a weighted mean by input.",
    ),
]
NormalizeGram: TypeAlias = Annotated[
    bool,
    Field(
        description="Divide each node's Gram matrix by its trace, so that no node counts for more by the scale of its "
        "inputs alone."
    ),
]


@on_one_thread
def regmean(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    statistics: Tensor | None = None,
    off_diagonal: OffDiagonal = 0.9,
    normalize: NormalizeGram = False,
) -> Tensor:
    """Return the D that minimises sum_i w_i |X_i (D - delta_i)'|^2 for inputs X_i: (out, in) in fp32 (or fp64).

    RegMean, arXiv 2212.09849, on `deltas` (K, out, in) with `weights` (K,). `statistics` (K, in, in) are the Gram
    matrices X_i' X_i, in sum or per input as one prefers, whose off-diagonal entries are shrunk. Without them, or for
    what is no matrix, it is the weighted mean; so it is along directions in which no node has inputs, and everywhere
    where all Gram matrices are zero. Raises `InputError` when statistics or weights can't be used.
    """
    rows = as_rows(deltas)
    mean = fedavg(deltas, weights)
    if statistics is None or deltas.ndim != 3 or not rows.numel():
        return mean
    num_nodes, _, num_inputs = deltas.shape
    if statistics.shape != (num_nodes, num_inputs, num_inputs):
        raise InputError(f"Gram matrices of shape {list(statistics.shape)} do not fit a stack of {list(deltas.shape)}")
    # Solved for what is to be added to the mean: equal task vectors come back as they are, whatever the condition.
    gram = torch.zeros(num_inputs, num_inputs, dtype=torch.float64)
    pull = torch.zeros(num_inputs, deltas.shape[1], dtype=torch.float64)
    node_weights = masses(row_weights(weights, len(rows), rows.dtype)).tolist()
    for matrix, weight, row in zip(statistics, node_weights, rows, strict=True):
        shrunk = _shrunk(matrix, off_diagonal, normalize=normalize) * weight
        gram += shrunk
        pull += shrunk @ (row.view(mean.shape).to(torch.float64) - mean).T
    return (mean + _solve(gram, pull).T).to(mean.dtype)


def _shrunk(matrix: Tensor, off_diagonal: float, *, normalize: bool) -> Tensor:
    """Return the Gram `matrix` (in, in) in fp64, shrunk towards its diagonal and, with `normalize`, of trace 1."""
    matrix = matrix.detach().to(torch.float64)
    diagonal = matrix.diagonal()
    if not torch.isfinite(matrix).all() or (diagonal < 0).any():
        raise InputError("Gram matrices must be finite and have no negative diagonal entries")
    shrunk = matrix * off_diagonal
    shrunk.diagonal().copy_(diagonal)
    trace = float(diagonal.sum())
    return shrunk / trace if normalize and trace else shrunk


def _solve(gram: Tensor, pull: Tensor) -> Tensor:
    """Return the least solution of `gram` (in, in) @ solution = `pull` (in, out), zero where the inputs are."""
    solution = torch.zeros_like(pull)
    scale = gram.diagonal().sqrt()
    used = scale > 0
    # Scaled to a unit diagonal, so that what counts as zero does not depend on the units of an input.
    scale = scale[used]
    unit = gram[used][:, used] / (scale[:, None] * scale)
    pull = pull[used] / scale[:, None]
    factor, failed = torch.linalg.cholesky_ex(unit)
    if not failed and (factor.diagonal() ** 2 > NULL).all():
        solution[used] = torch.cholesky_solve(pull, factor) / scale[:, None]
        return solution
    values, vectors = torch.linalg.eigh(unit)
    kept = values > NULL * values[-1:].clamp(min=0)
    basis = vectors[:, kept]
    solution[used] = basis @ ((basis.T @ pull) / values[kept][:, None]) / scale[:, None]
    return solution
