"""Methods that say which entries of one task vector matter to whom: Consensus merging and EMR.

Both also give a site a model of its own back out of the shared one, for a bit per entry: `tall_mask`, `emr_site`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedmerge.errors import ModelMismatch
from fedmerge.merge.methods.average import task_arithmetic
from fedmerge.merge.methods.ties import ties
from fedmerge.merge.parameters import Lambda, MaskThreshold, MinNodes, Multitask
from fedmerge.merge.stack import as_rows, blocks, l1_norm, row_weights
from fedmerge.tensors import TensorMap


def consensus(
    deltas: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    seed: int = 0,
    lambda_: Lambda = 1.0,
    threshold: MaskThreshold = 0.4,
    min_nodes: MinNodes = 2,
    multitask: Multitask = "task_arithmetic",
) -> Tensor:
    """Return the weighted sum of `deltas` (K, *shape) at the entries that matter to several of them, zero elsewhere.

    Consensus merging by TALL masks, arXiv 2405.07813: (*shape,) in fp32 (or fp64 if the deltas are). The masks are the
    paper's, from the sum with all weights one; the weights (K,), used as they are, and `lambda_` scale what is left.
    The authors' prun_thre_k is `min_nodes`: 2 removes what matters to one node or to none, and so everything of a
    single node. Raises `InputError` when the weights do not fit the stack.
    """
    rows = as_rows(deltas)
    ones, merged = _multitask(rows, torch.ones(len(rows)), multitask), _multitask(rows, weights, multitask)
    for block in blocks(merged.numel()):
        masks = torch.stack([tall_mask(row[block], ones[block], threshold) for row in rows])
        merged[block] *= masks.sum(dim=0) >= min_nodes
    return merged.mul_(lambda_).view(deltas.shape[1:])


def tall_mask(delta: Tensor, multitask: Tensor, threshold: float = 0.4) -> Tensor:
    """Return where the merged task vector `multitask` serves the node of `delta`: bool, of their shape.

    arXiv 2405.07813: |delta| > `threshold` * |multitask - delta|. base + mask * multitask is close to the node's own
    model; `threshold`, 0.2 to 0.6, is best chosen on its validation data.
    """
    return delta.abs() > (multitask - delta).abs_().mul_(threshold)


def emr(deltas: Tensor, weights: Tensor, *, base: Tensor | None = None, seed: int = 0) -> Tensor:
    """Return the unified task vector of `deltas` (K, *shape): (*shape,) in fp32 (or fp64 if they are).

    EMR-Merging, arXiv 2405.17461: of each entry the sign of the sum (zero counts as negative), with the largest
    magnitude that has it. It is meant to be masked and rescaled for each site, by `emr_site`. The weights (K,) are
    checked, not used. Raises `InputError` when they do not fit the stack.
    """
    rows = as_rows(deltas)
    row_weights(weights, len(rows), rows.dtype)
    unified = torch.empty_like(rows[0])
    for block in blocks(unified.numel()):
        total, highest, lowest = (torch.zeros_like(unified[block]) for _ in range(3))
        for row in rows[:, block]:
            total += row
            torch.maximum(highest, row, out=highest)
            torch.minimum(lowest, row, out=lowest)
        unified[block] = torch.where(total > 0, highest, lowest)
    return unified.view(deltas.shape[1:])


@dataclass(frozen=True)
class EmrSite:
    """What turns the unified task vector into one site's own: masks (bool, by tensor name) and one factor."""

    masks: Mapping[str, Tensor]
    rescaler: float

    def recover(self, name: str, unified: Tensor) -> Tensor:
        """Return the site's task vector for the tensor `name` of the `unified` one, in the same shape and dtype."""
        return self.rescaler * self.masks[name] * unified


def emr_site(delta: TensorMap, unified: TensorMap, *, rescale: Literal["sum", "tensor_means"] = "sum") -> EmrSite:
    """Return the masks and the rescaler with which the site of `delta` recovers it from `unified`, arXiv 2405.17461.

    Both are task vectors of a whole model; a site that has its own and fetched the merged one needs nothing else. A
    mask is True where the two have the same sign. The rescaler is the ratio of their sums of magnitudes (0 where
    nothing is left), over the whole model as in the paper; with rescale="tensor_means", as in the authors' code for
    state dicts, each tensor counts by its mean, however small it is. Raises `ModelMismatch` when names or shapes
    differ, and `InputError` when a tensor is not floating-point.
    """
    odd = sorted(delta.keys() ^ unified.keys())
    if odd:
        where = "the site's" if odd[0] in delta else "the unified"
        raise ModelMismatch(f"only {where} task vector has {odd[0]} ({len(odd)} such names)")
    masks: dict[str, Tensor] = {}
    own, masked = 0.0, 0.0
    for name in sorted(delta):
        ours, theirs = delta[name], unified[name]
        if ours.shape != theirs.shape:
            raise ModelMismatch(f"{name} has shape {list(ours.shape)} at the site, {list(theirs.shape)} unified")
        row, other = as_rows(ours[None])[0], as_rows(theirs[None])[0]
        mask = row.sign() * other > 0
        share = 1.0 if rescale == "sum" else 1 / max(1, row.numel())
        own += l1_norm(row) * share
        masked += l1_norm(other * mask) * share
        masks[name] = mask.view(ours.shape)
    return EmrSite(masks, own / masked if masked > 0 else 0.0)


def _multitask(rows: Tensor, weights: Tensor, multitask: Multitask) -> Tensor:
    """Return what `rows` (K, N) merge to before masking, (N,)."""
    return ties(rows, weights, normalize=False) if multitask == "ties" else task_arithmetic(rows, weights)
