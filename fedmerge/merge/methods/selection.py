"""Methods that select: MagMax the largest entry, SCE the entries that differ, CABS a share of each block per node."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedmerge.errors import ConfigError
from fedmerge.merge.parameters import BlockLength, Guard, Lambda, NumKept, Overlap, Selected, Tail
from fedmerge.merge.ranking import keep, largest, ranks
from fedmerge.merge.stack import BLOCK_ELEMENTS, as_rows, blocks, row_weights


def magmax(
    deltas: Tensor, weights: Tensor, *, base: Tensor | None = None, seed: int = 0, lambda_: Lambda = 0.5
) -> Tensor:
    """Return `lambda_` times the entry of largest magnitude over `deltas` (K, *shape), of equal ones the last.

    MagMax, arXiv 2407.06322: (*shape,) in fp32 (or fp64 if the deltas are). The paper has lambda 0.5 for independent
    fine-tunes and 1 for consecutive ones. The weights (K,) are checked, not used. Raises `InputError` when they do not
    fit the stack.
    """
    rows = as_rows(deltas)
    row_weights(weights, len(rows), rows.dtype)
    merged = torch.empty_like(rows[0])
    for block in blocks(merged.numel()):
        chosen = rows[0, block]
        for row in rows[1:, block]:
            chosen = torch.where(row.abs() >= chosen.abs(), row, chosen)
        torch.mul(chosen, lambda_, out=merged[block])
    return merged.view(deltas.shape[1:])


def sce(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    selected: Selected = 1.0,
    guard: Guard = "relative",
) -> Tensor:
    """Return the SCE merge of `deltas` (K, *shape): (*shape,) in fp32 (or fp64 if they are).

    SCE, arXiv 2408.07990. Select: keep the share `selected` of the entries whose variance over the nodes is not zero,
    those with the largest; so unless it is 1, nothing is left of one node, or of nodes that agree to the bit.
    Calculate: each node's weight is its share of the mean squares of what is left. Erase: of each entry only those with
    the sign of the sum count, and their weighted mean is the result. mergekit's variant is guard="absolute", which
    depends on the scale of the deltas. The weights (K,) are checked, not used. Raises `InputError` when they do not fit
    the stack.
    """
    rows = as_rows(deltas)
    row_weights(weights, len(rows), rows.dtype)
    mask = _most_varied(rows, selected)
    squares = [_sum_of_squares(row, mask) / max(1, row.numel()) for row in rows]
    total = math.fsum(squares)
    if total < 1e-6 if guard == "absolute" else total == 0:
        shares = [1 / len(rows)] * len(rows)
    else:
        shares = [square / total for square in squares]
    merged = torch.empty_like(rows[0])
    for block in blocks(merged.numel()):
        kept = rows[:, block] * mask[block]
        ballot = torch.zeros_like(kept[0])
        for row in kept:
            ballot += row
        sign, entries, divisor = ballot.sign_(), torch.zeros_like(ballot), torch.zeros_like(ballot)
        for row, share in zip(kept, shares, strict=True):
            agrees = (row.sign() == sign).to(row.dtype)
            entries += row * agrees * share
            divisor += agrees * share
        if guard == "absolute":
            divisor.clamp_(min=1e-6)
        merged[block] = torch.where(divisor > 0, entries / divisor, 0.0)
    return merged.view(deltas.shape[1:])


def _most_varied(rows: Tensor, share: float) -> Tensor:
    """Return as 1.0 and 0.0 which columns of `rows` (K, N) are among the `share` of largest variance, (N,)."""
    if share >= 1:
        return torch.ones_like(rows[0])
    variance = torch.empty_like(rows[0])
    for block in blocks(variance.numel()):
        mean, squares = torch.zeros_like(rows[0, block]), torch.zeros_like(rows[0, block])
        for row in rows[:, block]:
            mean += row
        mean /= len(rows)
        for row in rows[:, block]:
            squares += (row - mean).square_()
        variance[block] = squares / len(rows)
    num_kept = math.floor(share * int(torch.count_nonzero(variance)))
    mask = torch.empty_like(variance)
    cut = largest(variance, num_kept, scratch=mask)
    keep(variance, cut, 0, out=mask)
    return mask.sign_()


def _sum_of_squares(row: Tensor, mask: Tensor) -> float:
    """Return the sum of squares of `row` (N,) where `mask` (N,) is 1, in fp64, whatever the number of threads."""
    products = ((row[block] * mask[block]).to(torch.float64).square_() for block in blocks(row.numel()))
    return math.fsum(product.cpu().numpy().sum() for product in products)


def cabs(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    num_kept: NumKept = 64,
    block_length: BlockLength = 256,
    lambda_: Lambda = 1.0,
    tail: Tail = "share",
    overlap: Overlap = False,
) -> Tensor:
    """Return the weighted sum of balanced, disjoint parts of `deltas` (K, *shape): (*shape,) in fp32 (or fp64).

    CABS, arXiv 2503.01874. One node after the other, in the order of the stack, keeps the `num_kept` largest entries
    that no earlier one took of each `block_length` consecutive entries; where fewer are free, all of those. The
    weights (K,) are used as they are: ones give the paper's sum, whose lambda is about 1.2. The authors' variant is
    tail="drop". Raises `ConfigError` when `num_kept` is above `block_length`, and `InputError` when the weights do not
    fit the stack.
    """
    if num_kept > block_length:
        raise ConfigError(
            f"CABS can't keep {num_kept} entries of {block_length}", hint="choose num_kept below block_length"
        )
    rows = as_rows(deltas)
    values = row_weights(weights, len(rows), rows.dtype)
    num_elements = rows.shape[1]
    merged = torch.zeros_like(rows[0])
    end = num_elements - num_elements % block_length
    step = max(1, BLOCK_ELEMENTS // block_length) * block_length
    parts = [(slice(start, min(start + step, end)), block_length, num_kept) for start in range(0, end, step)]
    if tail == "share" and end < num_elements:
        length = num_elements - end
        parts.append((slice(end, num_elements), length, num_kept * length // block_length))
    for part, length, quota in parts:
        stack = rows[:, part].reshape(len(rows), -1, length)
        for entries, mask, value in zip(stack, disjoint_masks(stack, quota, overlap=overlap), values, strict=True):
            merged[part] += (entries * mask).mul_(value).view(-1)
    return merged.mul_(lambda_).view(deltas.shape[1:])


def disjoint_masks(stack: Tensor, quota: int, *, overlap: bool = False) -> Tensor:
    """Return which entries of `stack` (K, B, L), B blocks of L entries for each node, the nodes keep: bool.

    Each keeps the `quota` of largest magnitude of every block that no node before it kept, or all of those where they
    are fewer; with `overlap` it then fills its quota with the largest of the others.
    """
    masks = torch.zeros_like(stack, dtype=torch.bool)
    taken = torch.zeros_like(masks[0])
    for entries, mask in zip(stack, masks, strict=True):
        magnitudes = entries.abs()
        # Magnitudes are not negative, so that whatever is taken ranks behind whatever is free.
        torch.logical_and(ranks(magnitudes.masked_fill(taken, -1)) < quota, ~taken, out=mask)
        if overlap:
            missing = quota - mask.sum(dim=1, keepdim=True)
            mask.logical_or_(ranks(magnitudes.masked_fill(~taken, -1)) < missing)
        taken |= mask
    return masks
