"""Step 9, screen: one verdict per node, with the weight of its task vector in the merge, or the reason it has none.

The checks need each delta alone and its norm beside the others': they are cheap, need one pass, and bound what one node
can do to the mean. Every number is a function of the deltas only, so that an auditor gets the same verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedmerge.delta import delta_schema
from fedmerge.errors import ConfigError, InputError, InvalidDelta, did_you_mean
from fedmerge.tensors import Schema, TensorMap

# Why a delta is not merged. They stand in verdicts, which are published.
INVALID_DELTA = "INVALID_DELTA"  # can't be decoded
SCHEMA = "SCHEMA"  # other names, shapes or dtypes than the model's
NON_FINITE = "NON_FINITE"  # NaN or infinite values
NORM = "NORM"  # far longer than the others
EXAMPLES = "EXAMPLES"  # trained on nothing

BLOCK_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class ScreenPolicy:
    """What a delta must be, and what it then weighs.

    A delta is rejected when its norm is more than `max_norm_ratio` (1 or more) times the median norm, if there are
    three or more to compare. `clip_norm_ratio` (above 0) scales longer ones down to that many times the median of the
    accepted. Weights follow the number of examples, of which at most `max_weight_ratio` (1 or more) times the median
    count, or are equal. The accepted then go through the `robust` rules (`fedmerge.robust`), one after the other, which
    hold against `max_bad` of them. Raises `ConfigError` when a value is out of range.
    """

    max_norm_ratio: float = 10.0
    clip_norm_ratio: float | None = None
    weighting: Literal["examples", "equal"] = "examples"
    max_weight_ratio: float = 3.0
    robust: tuple[str, ...] = ()
    max_bad: int = 1

    def __post_init__(self) -> None:
        for name in ("max_norm_ratio", "max_weight_ratio"):
            if not 1 <= getattr(self, name) < math.inf:
                raise ConfigError(f"screen: {name} = {getattr(self, name)} should be a number from 1 up")
        if self.clip_norm_ratio is not None and not 0 < self.clip_norm_ratio < math.inf:
            raise ConfigError(f"screen: clip_norm_ratio = {self.clip_norm_ratio} should be a number above 0")
        if self.weighting not in {"examples", "equal"}:
            raise ConfigError(f"screen: weighting = {self.weighting!r} should be 'examples' or 'equal'")
        if self.max_bad < 1:
            raise ConfigError(f"screen: max_bad = {self.max_bad} should be 1 or more")
        object.__setattr__(self, "robust", tuple(self.robust))

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as JSON types."""
        return {**asdict(self), "robust": list(self.robust)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ScreenPolicy:
        """Read what `to_dict` wrote; raise `ConfigError` when it is not a policy."""
        known = [field.name for field in fields(cls)]
        for name in data:
            if name not in known:
                raise ConfigError(f"screen: unknown key {name!r}{did_you_mean(name, known)}")
        try:
            return cls(**data)
        except TypeError as err:
            raise ConfigError(f"screen: not a policy: {dict(data)!r}") from err


@dataclass(frozen=True)
class Verdict:
    """What became of one node's delta.

    `node_id` is the key that the delta came under. `reason` is UPPER_SNAKE and `detail` one sentence, both empty for
    accepted deltas. `norm` is the L2 norm of the whole task vector before scaling, None when it has none. The
    `weight`s of accepted deltas sum to 1; `scale` multiplies the delta before the merge.
    """

    node_id: str
    accepted: bool
    reason: str
    detail: str
    num_examples: int
    norm: float | None
    weight: float
    scale: float

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON types."""
        return asdict(self)


def screen(
    deltas: Mapping[str, TensorMap], num_examples: Mapping[str, int], schema: Schema, policy: ScreenPolicy
) -> list[Verdict]:
    """Return the verdict on each of `deltas`, which are keyed by node id, sorted by node id.

    `schema` is the model's, of which deltas have the floating-point part, in any floating dtype. Each tensor of a delta
    is asked for once, one at a time. Weights and scales depend on accepted deltas only. Raises `InputError` when a node
    has no number of examples.
    """
    unknown = sorted(deltas.keys() - num_examples.keys())
    if unknown:
        raise InputError(f"no number of examples for node {unknown[0]}")
    verdicts = [_inspect(node, deltas[node], num_examples[node], schema, policy) for node in sorted(deltas)]
    return _weigh(_reject_long(verdicts, policy), policy)


def _inspect(node_id: str, delta: TensorMap, num_examples: int, schema: Schema, policy: ScreenPolicy) -> Verdict:
    """Return the verdict that the delta alone allows, its weight still zero."""
    verdict = Verdict(node_id, True, "", "", num_examples, norm=None, weight=0.0, scale=1.0)
    expected = delta_schema(schema)
    odd = sorted(expected.keys() ^ delta.keys())
    if odd:
        problem = "misses" if odd[0] in expected else "has unknown"
        return _reject(verdict, SCHEMA, f"the delta {problem} tensor {odd[0]} ({len(odd)} such names)")
    squares = 0.0
    for name, spec in expected.items():
        try:
            tensor = delta[name]
        except InvalidDelta as err:
            return _reject(verdict, INVALID_DELTA, err.message)
        if tuple(tensor.shape) != spec.shape or not tensor.is_floating_point():
            found = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            return _reject(verdict, SCHEMA, f"{name} is {found}, not floating-point {list(spec.shape)}")
        square, num_bad = _sum_of_squares(tensor)
        if num_bad:
            return _reject(verdict, NON_FINITE, f"{name} holds {num_bad} NaN or infinite values")
        squares += square
    if not math.isfinite(squares):
        return _reject(verdict, NON_FINITE, "the delta's norm is too large for a 64-bit float")
    verdict = replace(verdict, norm=math.sqrt(squares))
    if policy.weighting == "examples" and num_examples < 1:
        return _reject(verdict, EXAMPLES, f"the delta was trained on {num_examples} examples")
    return verdict


def _reject(verdict: Verdict, reason: str, detail: str) -> Verdict:
    return replace(verdict, accepted=False, reason=reason, detail=detail)


def _sum_of_squares(tensor: Tensor) -> tuple[float, int]:
    """Return the sum of squares in fp64, and the number of values whose square is not finite.

    Summed in blocks by numpy, whose order of additions depends on neither threads nor vector width.
    """
    total, num_bad = 0.0, 0
    flat = tensor.detach().cpu().reshape(-1)
    with np.errstate(over="ignore"):
        for start in range(0, flat.numel(), BLOCK_ELEMENTS):
            squares = np.square(flat[start : start + BLOCK_ELEMENTS].to(torch.float64).numpy())
            total += float(squares.sum())
            if not math.isfinite(total):
                num_bad += int(np.count_nonzero(~np.isfinite(squares)))
    return total, num_bad


def _reject_long(verdicts: list[Verdict], policy: ScreenPolicy) -> list[Verdict]:
    norms = [verdict.norm for verdict in verdicts if verdict.accepted and verdict.norm is not None]
    # Two norms can't tell which of them is odd, and a median of zero is no measure of length.
    middle = median(norms) if len(norms) >= 3 else 0.0
    if middle == 0:
        return verdicts
    return [
        _reject(
            verdict,
            NORM,
            f"the delta's norm {verdict.norm:.4g} is {verdict.norm / middle:.1f} times the median {middle:.4g}, "
            f"over the limit of {policy.max_norm_ratio:g}",
        )
        if verdict.accepted and verdict.norm is not None and verdict.norm > policy.max_norm_ratio * middle
        else verdict
        for verdict in verdicts
    ]


def _weigh(verdicts: list[Verdict], policy: ScreenPolicy) -> list[Verdict]:
    """Return `verdicts` with the weights and scales of those that are accepted."""
    accepted = [verdict for verdict in verdicts if verdict.accepted]
    if not accepted:
        return verdicts
    counts = {verdict.node_id: 1.0 for verdict in accepted}
    if policy.weighting == "examples":
        cap = policy.max_weight_ratio * median(verdict.num_examples for verdict in accepted)
        counts = {verdict.node_id: min(float(verdict.num_examples), cap) for verdict in accepted}
    total = math.fsum(counts.values())
    longest = math.inf
    middle = median(verdict.norm or 0.0 for verdict in accepted)
    if policy.clip_norm_ratio is not None and middle > 0:
        longest = policy.clip_norm_ratio * middle
    return [
        replace(
            verdict,
            weight=counts[verdict.node_id] / total,
            scale=min(1.0, longest / verdict.norm) if verdict.norm else 1.0,
        )
        if verdict.accepted
        else verdict
        for verdict in verdicts
    ]
