"""PCB-Merging: weigh each entry by how large it is within its task vector and how it agrees with the others.

"Parameter competition balancing for model merging", arXiv 2410.02396.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmerge.merge.methods.consensus import Consensus, elect_and_merge
from fedmerge.merge.parameters import Lambda, PcbRatio
from fedmerge.merge.stack import as_rows, blocks, row_weights

# The share of the entries that is clipped at either end of the magnitudes.
CLIP = 1e-4


def pcb(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    lambda_: Lambda = 1.0,
    ratio: PcbRatio = 0.1,
) -> Tensor:
    """Return `lambda_` times the balanced mean of `deltas` (K, *shape): (*shape,) in fp32 (or fp64 if they are).

    PCB-Merging, arXiv 2410.02396, with one tensor as the scope of ranking (the authors' is the model: `Recipe.scope`)
    and their pcb_ratio, 0.05 to 0.2, as `ratio`; their lambda is 1.0 to 1.4. It depends on the scale of the deltas,
    through a tanh, and one node does not get its delta back. Where no task vector has two different scores, as in a
    tensor of one entry, the outcome is the TIES mean without a trim. The weights (K,) are checked, not used. Raises
    `InputError` when they do not fit the stack.
    """
    rows = as_rows(deltas)
    row_weights(weights, len(rows), rows.dtype)
    clipped = clip(rows)
    scales = compete(rows, clipped, ratio)
    if not scales.any():
        merged = elect_and_merge(lambda block: rows[:, block], rows[0], [1.0] * len(rows), Consensus())
        return merged.mul_(lambda_).view(deltas.shape[1:])
    merged = torch.empty_like(rows[0])
    for block in blocks(merged.numel()):
        total, divisor = torch.zeros_like(merged[block]), torch.zeros_like(merged[block])
        for row, scale in zip(clipped[:, block], scales[:, block], strict=True):
            total += row * scale
            divisor += scale
        merged[block] = total.div_(divisor.clamp_(min=1e-12)).mul_(lambda_)
    return merged.view(deltas.shape[1:])


def clip(rows: Tensor) -> Tensor:
    """Return `rows` (K, N) with their magnitudes clipped to all but the `CLIP` share at either end, (K, N)."""
    clipped, num_elements = rows.abs(), rows.shape[1]
    if num_elements == 0:
        return clipped
    for row, out in zip(rows, clipped, strict=True):
        low, high = int(num_elements * CLIP), max(0, int(num_elements * (1 - CLIP) - 1))
        bounds = (_order_statistic(out, place) for place in (low, high))
        # Where the two cross, in tiny tensors, the upper one holds, as it does for torch.clamp.
        torch.mul(out.clamp_(*bounds), row.sign(), out=out)
    return clipped


def compete(rows: Tensor, clipped: Tensor, ratio: float) -> Tensor:
    """Return the weight, 0 to 1, of each entry of `rows` (K, N), zero for all but about the share `ratio`: (K, N).

    The score of an entry is exp(K * its min-max scaled clipped magnitude squared) * tanh(it * the sum over the nodes);
    scores below the (1 - ratio) quantile are raised to it, and then scaled to 0 and 1 at their minimum and maximum.
    """
    scores, num_elements = torch.zeros_like(rows), rows.shape[1]
    if num_elements == 0:
        return scores
    sums = torch.zeros_like(rows[0])
    for row in rows:
        sums += row
    for row, clipped_row, out in zip(rows, clipped, scores, strict=True):
        magnitudes = clipped_row.abs()
        low, high = magnitudes.min(), magnitudes.max()
        for block in blocks(num_elements):
            size = _scale(magnitudes[block].to(torch.float64), low, high).square_()
            # exp(K * size) but for the factor exp(K), which the scaling takes out again: this one can't overflow.
            inner = 1 / (1 + _expm1((1 - size) * len(rows)))
            out[block] = inner * _tanh(row[block].to(torch.float64) * sums[block])
        cut = _order_statistic(out, min(int(num_elements * (1 - ratio)), num_elements - 1))
        out.copy_(_scale(out.clamp_(min=cut), out.min(), out.max()))
    return scores


def _scale(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return `values` scaled so that `low` is 0 and `high` 1; all 0 where the two are equal."""
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def _order_statistic(values: Tensor, place: int) -> float:
    """Return the entry of `values` (N,) that is at `place`, counted from 0, in ascending order."""
    ordered = values.cpu().numpy().copy()
    ordered.partition(place)
    return float(ordered[place])


def _tanh(x: Tensor) -> Tensor:
    """Return tanh(x) for `x` in fp64, accurate to 1e-12 relative."""
    growth = _expm1(x.abs().clamp_(max=20.0).mul_(2))
    return torch.copysign(growth / (growth + 2), x)


def _expm1(x: Tensor) -> Tensor:
    """Return exp(x) - 1 for `x` >= 0 in fp64, accurate to 1e-12 relative.

    The exponentials for a processor's vector instructions differ in their last bits; sums and products do not.
    """
    halvings, terms = 10, 16
    small = x / 2**halvings
    growth = torch.zeros_like(x)
    for term in range(terms, 0, -1):
        growth = (growth + 1) * small / term
    for _ in range(halvings):
        growth = growth * (growth + 2)
    return growth
