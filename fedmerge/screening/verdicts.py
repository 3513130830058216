"""Step 9, screen: one verdict per node, with the weight of its task vector in the merge, or the reason it has none.

First each delta alone, then beside the others (`fedmerge.screening.checks`): checks that bound what one node can do to
the mean. Every number is a function of the deltas and of what is on record, so that an auditor gets the same verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge.delta.task_vector import delta_schema
from fedmerge.errors import InputError, InvalidDelta, RoundFailed
from fedmerge.screening.checks import CHECKS, GAIN, Known, Measured, ScreenPolicy
from fedmerge.screening.shares import capped_shares
from fedmerge.tensors import Schema, TensorMap

# Why a delta is not even compared with others; further reasons are the names of checks.
INVALID_DELTA = "INVALID_DELTA"  # can't be decoded
SCHEMA = "SCHEMA"  # other names, shapes or dtypes than the model's
NON_FINITE = "NON_FINITE"  # NaN or infinite values
EXAMPLES = "EXAMPLES"  # trained on nothing

BLOCK_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Verdict:
    """What became of one node's delta.

    `node_id` is the key that the delta came under. `reason` is UPPER_SNAKE and `detail` one sentence, both empty for
    accepted deltas; `value` is the number that was found and `limit` what it was held against, None where there is no
    such number. `norm` is the L2 norm of the whole task vector before scaling, None when it has none; `gain` what it
    adds to the model's score on the coordinator's data, None unless that was measured. The `weight`s of accepted deltas
    sum to 1; `scale` multiplies the delta before the merge.
    """

    node_id: str
    accepted: bool
    reason: str
    detail: str
    num_examples: int
    norm: float | None
    weight: float
    scale: float
    value: float | None = None
    limit: float | None = None
    gain: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Inspection:
    """What a delta shows by itself: its L2 norm and how many of its values are zero; or the reason it is refused for.

    `value` and `limit` are as in `Verdict`.
    """

    norm: float | None = None
    num_zero: int = 0
    reason: str = ""
    detail: str = ""
    value: float | None = None
    limit: float | None = None


def screen(
    deltas: Mapping[str, TensorMap],
    num_examples: Mapping[str, int],
    schema: Schema,
    policy: ScreenPolicy,
    known: Known | None = None,
    *,
    inspected: Mapping[str, Inspection] | None = None,
) -> list[Verdict]:
    """Return the verdict on each of `deltas`, which are keyed by node id, sorted by node id.

    `schema` is the model's, of which deltas have the floating-point part, in any floating dtype. Tensors are asked for
    one at a time, once unless the delta was `inspected` before, and once more where `max_overlap` is set; gains, of
    what passes all other checks. Weights and scales depend on accepted deltas only. Raises `InputError` when a node has
    no number of examples, and `RoundFailed` when those that are accepted are too few for the caps on weights.
    """
    known = known or Known()
    unknown = sorted(deltas.keys() - num_examples.keys())
    if unknown:
        raise InputError(f"no number of examples for node {unknown[0]}")
    verdicts: dict[str, Verdict] = {}
    left: list[Measured] = []
    num_elements = sum(spec.num_elements for spec in delta_schema(schema).values())
    for key in sorted(deltas):
        found = (inspected or {}).get(key) or inspect(deltas[key], schema)
        verdicts[key] = _alone(key, found, num_examples[key], policy)
        if verdicts[key].accepted and found.norm is not None:
            left.append(Measured(key, deltas[key], found.norm, found.num_zero / num_elements if num_elements else 0.0))
    scored: set[str] = set()
    for reason, check in CHECKS.items():
        if reason == GAIN and policy.min_gain is not None:
            scored = {each.key for each in left if known.owner(each.key).node_id != policy.root}
        failures = check(left, policy, known)
        for key, (value, limit, detail) in failures.items():
            verdicts[key] = _reject(verdicts[key], reason, detail, value=value, limit=limit)
        left = [each for each in left if each.key not in failures]
    for key in scored:
        verdicts[key] = replace(verdicts[key], gain=known.gains.get(key))
    return _weigh(list(verdicts.values()), policy, known)


def clip_norm(norms: Sequence[float], policy: ScreenPolicy, known: Known) -> float | None:
    """Return the norm to which longer deltas are clipped, from those of all that are accepted; None without clipping.

    By quantile, a round that `known` has no clipping norm for begins with the quantile of its own norms.
    """
    middle = median(norms) if norms else 0.0
    if middle == 0:
        return None  # no measure of length
    if policy.clip_norm_ratio is not None:
        return policy.clip_norm_ratio * middle
    if policy.clip_quantile is not None:
        return known.clip_norm or sorted(norms)[math.ceil(policy.clip_quantile * len(norms)) - 1]
    return None


def adapted_clip_norm(before: float, norms: Sequence[float], policy: ScreenPolicy) -> float:
    """Return the clipping norm for the round after one with `norms`, which were clipped to `before`.

    C exp(-rate (b - quantile)), where b is the share of norms up to C: it rises while too many are clipped. "Learning
    with adaptive clipping", arXiv 1905.03871, without its noise. Rounded to fp32, so that processors agree.
    """
    if policy.clip_quantile is None or not norms:
        return before
    share = sum(norm <= before for norm in norms) / len(norms)
    return float(np.float32(before * math.exp(-policy.clip_rate * (share - policy.clip_quantile))))


def inspect(delta: TensorMap, schema: Schema) -> Inspection:
    """Return what a delta for a model of this `schema` shows by itself, reading each of its tensors once."""
    expected = delta_schema(schema)
    odd = sorted(expected.keys() ^ delta.keys())
    if odd:
        problem = "misses" if odd[0] in expected else "has unknown"
        return Inspection(reason=SCHEMA, detail=f"the delta {problem} tensor {odd[0]} ({len(odd)} such names)")
    squares, num_zero = 0.0, 0
    for name, spec in expected.items():
        try:
            tensor = delta[name]
        except InvalidDelta as err:
            return Inspection(reason=INVALID_DELTA, detail=err.message)
        if tuple(tensor.shape) != spec.shape or not tensor.is_floating_point():
            found = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            return Inspection(reason=SCHEMA, detail=f"{name} is {found}, not floating-point {list(spec.shape)}")
        square, num_bad, zeros = _sums(tensor)
        if num_bad:
            detail = f"{name} holds {num_bad} NaN or infinite values"
            return Inspection(reason=NON_FINITE, detail=detail, value=num_bad, limit=0)
        squares, num_zero = squares + square, num_zero + zeros
    if not math.isfinite(squares):
        return Inspection(reason=NON_FINITE, detail="the delta's norm is too large for a 64-bit float")
    return Inspection(math.sqrt(squares), num_zero)


def _alone(key: str, found: Inspection, num_examples: int, policy: ScreenPolicy) -> Verdict:
    """Return the verdict that the delta alone allows, its weight still zero."""
    verdict = Verdict(key, True, "", "", num_examples, norm=found.norm, weight=0.0, scale=1.0)
    if found.reason:
        return _reject(verdict, found.reason, found.detail, value=found.value, limit=found.limit)
    if policy.weighting == "examples" and num_examples < 1:
        detail = f"the delta was trained on {num_examples} examples"
        return _reject(verdict, EXAMPLES, detail, value=num_examples, limit=1)
    return verdict


def _reject(
    verdict: Verdict, reason: str, detail: str, *, value: float | None = None, limit: float | None = None
) -> Verdict:
    return replace(verdict, accepted=False, reason=reason, detail=detail, value=value, limit=limit)


def _sums(tensor: Tensor) -> tuple[float, int, int]:
    """Return the sum of squares in fp64, the number of values whose square is not finite, and that of zeros.

    Summed in blocks by numpy, whose order of additions depends on neither threads nor vector width.
    """
    total, num_bad, num_zero = 0.0, 0, 0
    flat = tensor.detach().cpu().reshape(-1)
    with np.errstate(over="ignore"):
        for start in range(0, flat.numel(), BLOCK_ELEMENTS):
            values = flat[start : start + BLOCK_ELEMENTS].to(torch.float64).numpy()
            squares = np.square(values)
            total += float(squares.sum())
            num_zero += len(values) - int(np.count_nonzero(values))
            if not math.isfinite(total):
                num_bad += int(np.count_nonzero(~np.isfinite(squares)))
    return total, num_bad, num_zero


def _weigh(verdicts: list[Verdict], policy: ScreenPolicy, known: Known) -> list[Verdict]:
    """Return `verdicts` with the weights and scales of those that are accepted."""
    merged = [each for each in verdicts if each.accepted and known.owner(each.node_id).node_id != policy.root]
    if not merged:
        return verdicts
    counts = {verdict.node_id: 1.0 for verdict in merged}
    if policy.weighting == "examples":
        cap = policy.max_weight_ratio * median(verdict.num_examples for verdict in merged)
        counts = {verdict.node_id: min(float(verdict.num_examples), cap) for verdict in merged}
    weights = _capped(counts, policy, known)
    longest = clip_norm([verdict.norm or 0.0 for verdict in merged], policy, known) or math.inf
    return [
        replace(
            verdict,
            weight=weights.get(verdict.node_id, 0.0),
            scale=min(1.0, longest / verdict.norm) if verdict.norm else 1.0,
        )
        if verdict.accepted
        else verdict
        for verdict in verdicts
    ]


def _capped(counts: Mapping[str, float], policy: ScreenPolicy, known: Known) -> dict[str, float]:
    """Return the weights by key; several deltas of one node share what it may have."""
    if policy.max_weight_node == policy.max_weight_org == 1:
        total = math.fsum(counts.values())
        return {key: count / total for key, count in counts.items()}
    owners = {key: known.owner(key) for key in counts}
    by_node: dict[str, float] = {}
    for key, (node_id, _) in owners.items():
        by_node[node_id] = by_node.get(node_id, 0.0) + counts[key]
    organisations = dict(owners.values())
    shares = capped_shares(by_node, organisations, max_node=policy.max_weight_node, max_org=policy.max_weight_org)
    if shares is None:
        raise RoundFailed(
            f"{len(by_node)} nodes of {len(set(organisations.values()))} organisations passed screening, too few for "
            f"weights of at most {policy.max_weight_node:g} a node and {policy.max_weight_org:g} an organisation"
        )
    return {key: shares[node_id] * counts[key] / by_node[node_id] for key, (node_id, _) in owners.items()}
