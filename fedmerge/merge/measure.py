"""How the task vectors of several fine-tunes stand to each other, before anything is merged.

All of it derives from the products a * b of two task vectors' entries: their sum is the dot product, their signs say
where the two disagree, and their magnitudes how much that matters. So one pass suffices, tensor by tensor, in fp64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, float64

from fedmerge.errors import InputError, ModelMismatch
from fedmerge.tensors import TensorMap

BLOCK_ELEMENTS = 1 << 16

ALIKE_COSINE = 0.9
UNRELATED_COSINE = 0.1
MAX_NORM_RATIO = 3.0
MAX_UNCHANGED = 0.5

Sums = npt.NDArray[np.float64]  # (4, K, K): for each pair the four sums below, taken over entries
PRODUCT, MAGNITUDE, OPPOSED, SHARED = range(4)


@dataclass(frozen=True)
class Agreement:
    """How two task vectors, or the mean pair of several, agree. None where there is nothing to compare.

    `cosine` is that of their angle. `conflict` is the share of opposite signs among the entries that both changed,
    and `weighted_conflict` the same, each entry weighing |a * b|.
    """

    cosine: float | None
    conflict: float | None
    weighted_conflict: float | None


@dataclass(frozen=True)
class ModelLength:
    """One task vector: its L2 `norm`, its `share` of the sum of all norms, and the share of `unchanged` entries."""

    name: str
    norm: float
    share: float
    unchanged: float


@dataclass(frozen=True)
class LayerAgreement:
    """One group of layers: the `agreement` of the mean pair, and the mean share of the task vectors' squared norms."""

    name: str
    num_elements: int
    agreement: Agreement
    norm_share: float


@dataclass(frozen=True)
class Interference:
    """What `measure` found: `pairs` by names, in the order of `models`, and `layers` in the order of their numbers.

    `mean_length` is the norm of the plain mean over the mean norm: 1 for equal task vectors, 1 / sqrt(K) for K
    orthogonal ones of one length; None when all are zero.
    """

    num_elements: int
    models: tuple[ModelLength, ...]
    pairs: Mapping[tuple[str, str], Agreement]
    layers: tuple[LayerAgreement, ...]
    agreement: Agreement
    mean_length: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements as JSON types."""
        return {
            "num_elements": self.num_elements,
            **asdict(self.agreement),
            "mean_length": self.mean_length,
            "models": [asdict(model) for model in self.models],
            "pairs": [{"models": list(names), **asdict(pair)} for names, pair in self.pairs.items()],
            "layers": [
                {
                    "name": layer.name,
                    "num_elements": layer.num_elements,
                    "norm_share": layer.norm_share,
                    **asdict(layer.agreement),
                }
                for layer in self.layers
            ],
        }


def measure(vectors: Mapping[str, TensorMap]) -> Interference:
    """Return how the task vectors `vectors`, one or more by the names of their models, interfere.

    Each tensor, of any shape and floating dtype, is asked for once; those of one name are in memory together. Raises
    `ModelMismatch` when the task vectors do not have the same tensors, and `InputError` when there are none or a value
    is not finite.
    """
    if not vectors:
        raise InputError("there are no task vectors to measure")
    models, maps = list(vectors), list(vectors.values())
    for model, tensors in vectors.items():
        odd = sorted(maps[0].keys() ^ tensors.keys())
        if odd:
            raise ModelMismatch(f"{model}: {odd[0]} is not in all task vectors ({len(odd)} such names)")
    groups: dict[str, Sums] = {}
    num_elements: dict[str, int] = {}
    for name in sorted(maps[0]):
        stack = [tensors[name] for tensors in maps]
        for model, tensor in zip(models, stack, strict=True):
            if tensor.shape != stack[0].shape:
                raise ModelMismatch(f"{model}: {name} has shape {list(tensor.shape)}, not {list(stack[0].shape)}")
        sums = _sums_of_products(stack)
        if not np.isfinite(sums).all():
            raise InputError(f"{name} holds NaN or infinite values")
        group = layer_group(name)
        groups[group] = groups[group] + sums if group in groups else sums
        num_elements[group] = num_elements.get(group, 0) + stack[0].numel()
    total: Sums = sum(groups.values(), start=np.zeros((4, len(models), len(models))))
    squares = total[PRODUCT].diagonal()
    norms = np.sqrt(squares)
    num_all = sum(num_elements.values())
    return Interference(
        num_elements=num_all,
        models=tuple(
            ModelLength(
                name=model,
                norm=float(norms[i]),
                share=_ratio(norms[i], norms.sum()) or 0.0,
                unchanged=1 - (_ratio(total[SHARED, i, i], num_all) or 0.0),
            )
            for i, model in enumerate(models)
        ),
        pairs={(models[i], models[j]): _agreement(total, i, j) for i, j in combinations(range(len(models)), 2)},
        layers=tuple(
            LayerAgreement(
                name=group,
                num_elements=num_elements[group],
                agreement=_mean_agreement(sums),
                norm_share=fmean(
                    _ratio(part, whole) or 0.0 for part, whole in zip(sums[PRODUCT].diagonal(), squares, strict=True)
                ),
            )
            for group, sums in sorted(groups.items(), key=lambda item: _by_number(item[0]))
        ),
        agreement=_mean_agreement(total),
        mean_length=_ratio(math.sqrt(max(0.0, total[PRODUCT].sum())), norms.sum()),
    )


def layer_group(name: str) -> str:
    """Return the name of a tensor up to the layer's number, or its module where there is no number.

    >>> layer_group("model.layers.12.mlp.up_proj.weight"), layer_group("lm_head.weight")
    ('model.layers.12', 'lm_head')
    """
    numbered = re.match(r"(?:.*?\.)??\d+(?=\.)", name)
    return numbered[0] if numbered else name.rpartition(".")[0] or name


def advice(found: Interference, *, dtype: str | None) -> list[str]:
    """Return what in `found` calls for care, in sentences.

    `dtype` is the models' own, named as safetensors does; None where there are only encoded task vectors, in which
    entries that are zero need not be unchanged.

    Thresholds follow what is known of averaging: task vectors of unrelated tasks are nearly orthogonal (arXiv
    2212.04089), and interference is in signs and lengths (arXiv 2306.01708).
    """
    notes = [f"{model.name} does not differ from the base" for model in found.models if model.norm == 0]
    if dtype == "BF16":
        notes += [
            f"{model.name} left {model.unchanged:.0%} of its entries as they were: bf16 rounds small steps away, so "
            "train with fp32 weights"
            for model in found.models
            if model.norm > 0 and model.unchanged > MAX_UNCHANGED
        ]
    moved = sorted((model for model in found.models if model.norm > 0), key=lambda model: model.norm)
    if moved and moved[-1].norm > MAX_NORM_RATIO * moved[0].norm:
        notes.append(
            f"{moved[-1].name} moved {moved[-1].norm / moved[0].norm:.1f} times as far as {moved[0].name} and "
            "dominates the merge: give it a smaller weight, or merge with rda, which averages directions"
        )
    cosine, length = found.agreement.cosine, found.mean_length
    if cosine is not None and cosine > ALIKE_COSINE:
        notes.append(
            f"nearly the same fine-tune (mean cosine {cosine:.2f}): an average loses nothing, a sum "
            f"overshoots {len(moved)} times"
        )
    elif cosine is not None and cosine < UNRELATED_COSINE and length is not None:
        notes.append(
            f"the fine-tunes hardly share a direction (mean cosine {cosine:.2f}): a plain average is only "
            f"{length:.2f} times as long as they are; use task_arithmetic with a larger lambda, ties or rda"
        )
    return notes


def _sums_of_products(stack: Sequence[Tensor]) -> Sums:
    """Return the four sums for each pair of equally shaped tensors, (4, K, K), in fp64."""
    sums = np.zeros((4, len(stack), len(stack)))
    flat = [tensor.detach().cpu().reshape(-1) for tensor in stack]
    for start in range(0, flat[0].numel(), BLOCK_ELEMENTS):
        rows = [tensor[start : start + BLOCK_ELEMENTS].to(float64).numpy() for tensor in flat]
        for i, row in enumerate(rows):
            for j in range(i, len(rows)):
                product = row * rows[j]
                opposed = product < 0
                sums[:, i, j] += (
                    product.sum(),
                    np.abs(product).sum(),
                    np.count_nonzero(opposed),
                    np.count_nonzero(product),
                )
    above = np.triu(sums, 1)
    mirrored: Sums = sums + above.transpose(0, 2, 1)
    return mirrored


def _agreement(sums: Sums, i: int, j: int) -> Agreement:
    product, magnitude, opposed, shared = (float(value) for value in sums[:, i, j])
    cosine = _ratio(product, math.sqrt(sums[PRODUCT, i, i]) * math.sqrt(sums[PRODUCT, j, j]))
    return Agreement(
        cosine=None if cosine is None else max(-1.0, min(1.0, cosine)),
        conflict=_ratio(opposed, shared),
        weighted_conflict=_ratio((magnitude - product) / 2, magnitude),
    )


def _mean_agreement(sums: Sums) -> Agreement:
    pairs = [_agreement(sums, i, j) for i, j in combinations(range(sums.shape[1]), 2)]

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    return Agreement(
        cosine=mean([pair.cosine for pair in pairs]),
        conflict=mean([pair.conflict for pair in pairs]),
        weighted_conflict=mean([pair.weighted_conflict for pair in pairs]),
    )


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None


def _by_number(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts layer 10 behind layer 9."""
    return [(0, int(part)) if re.fullmatch("[0-9]{1,18}", part) else (1, part) for part in name.split(".")]
