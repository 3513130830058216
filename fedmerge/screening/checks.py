"""What screening holds deltas against: the policy, and each check as a function of the deltas that are left before it.

A check is a line in `CHECKS`. What it rejects it gives a number, the limit for it, and a sentence with both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any, Literal, NamedTuple, TypeAlias

from fedmerge.errors import ConfigError, did_you_mean
from fedmerge.screening.overlap import are_equal, overlaps
from fedmerge.tensors import TensorMap

# Why a delta is not merged. They stand in verdicts, which are published.
UNCHANGED = "UNCHANGED"  # leaves too much of the model as it is
NORM = "NORM"  # far longer than the others
DUPLICATE = "DUPLICATE"  # what another node sent, entry for entry
COPYCAT = "COPYCAT"  # nearly what another node sent
GAIN = "GAIN"  # makes the model worse on the coordinator's data


@dataclass(frozen=True)
class ScreenPolicy:
    """What a delta must be, and what it then weighs.

    A delta is rejected when more than `max_unchanged` of its entries are zero; when its norm is more than
    `max_norm_ratio` (1 or more) times the median norm, if there are three or more to compare; when another node sent
    the same, unless `duplicates` are accepted, or agrees with it in more than `max_overlap` of its entries
    (`fedmerge.screening.overlap`); and when it adds less than `min_gain` to the score on the coordinator's data.

    `clip_norm_ratio` (above 0) scales longer ones down to that many times the median of the accepted, `clip_quantile`
    to a norm that follows this quantile over the rounds, by `clip_rate`
    (`fedmerge.screening.verdicts.adapted_clip_norm`).

    Weights follow the number of examples, of which at most `max_weight_ratio` (1 or more) times the median count, or
    are equal; no node then has more than `max_weight_node` of the whole, and no organisation more than
    `max_weight_org`. The accepted go through the `robust` rules (`fedmerge.screening.robust`), one after the other,
    which hold against `max_bad` of them; one that needs a root of trust compares them with the delta of the node
    `root`, which itself is not merged. Raises `ConfigError` when a value is out of range.
    """

    max_norm_ratio: float = 10.0
    clip_norm_ratio: float | None = None
    clip_quantile: float | None = None
    clip_rate: float = 0.2
    max_unchanged: float | None = None
    duplicates: Literal["reject", "accept"] = "reject"
    max_overlap: float | None = None
    min_gain: float | None = None
    weighting: Literal["examples", "equal"] = "examples"
    max_weight_ratio: float = 3.0
    max_weight_node: float = 1.0
    max_weight_org: float = 1.0
    robust: tuple[str, ...] = ()
    max_bad: int = 1
    root: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_norm_ratio", "max_weight_ratio"):
            if not 1 <= getattr(self, name) < math.inf:
                raise ConfigError(f"screen: {name} = {getattr(self, name)} should be a number from 1 up")
        if self.clip_norm_ratio is not None and not 0 < self.clip_norm_ratio < math.inf:
            raise ConfigError(f"screen: clip_norm_ratio = {self.clip_norm_ratio} should be a number above 0")
        for name in ("clip_quantile", "clip_rate", "max_unchanged", "max_overlap", "max_weight_node", "max_weight_org"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ConfigError(f"screen: {name} = {share} should be a number above 0, and 1 at most")
        if self.clip_norm_ratio is not None and self.clip_quantile is not None:
            raise ConfigError("screen: clip_norm_ratio and clip_quantile are two ways to clip; set one of them")
        if self.min_gain is not None and not math.isfinite(self.min_gain):
            raise ConfigError(f"screen: min_gain = {self.min_gain} should be a finite number")
        for name, choices in (("weighting", ("examples", "equal")), ("duplicates", ("reject", "accept"))):
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(f"screen: {name} = {value!r} should be {' or '.join(map(repr, choices))}")
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


class Owner(NamedTuple):
    """Whose delta it is."""

    node_id: str
    organisation: str


@dataclass(frozen=True)
class Known:
    """What screening goes by beside the deltas. All of it is on record, so that an auditor has it, too.

    `owners` are by key; without one, a key is a node and an organisation of its own. `clip_norm` is the round's, where
    it follows from the round before. `gains` are what each delta adds to the model's score on the coordinator's data,
    None where the outcome has none.
    """

    owners: Mapping[str, Owner] = field(default_factory=dict)
    clip_norm: float | None = None
    gains: Mapping[str, float | None] = field(default_factory=dict)

    def owner(self, key: str) -> Owner:
        """Return whose delta has this key."""
        return self.owners.get(key, Owner(key, key))


class Failure(NamedTuple):
    """Why a check rejects a delta: what it found, its limit, and both in a sentence."""

    value: float | None
    limit: float | None
    detail: str


class Measured(NamedTuple):
    """A delta that is sound in itself: its key, its norm, and the share of its entries that are zero."""

    key: str
    delta: TensorMap
    norm: float
    unchanged: float


def unchanged(left: Sequence[Measured], policy: ScreenPolicy, known: Known) -> dict[str, Failure]:
    """Find deltas with more zeros than `max_unchanged`: of nodes that did not train, or not all they should."""
    if policy.max_unchanged is None:
        return {}
    limit = policy.max_unchanged
    return {
        each.key: Failure(
            each.unchanged, limit, f"the delta leaves {each.unchanged:.1%} unchanged, over the limit of {limit:.1%}"
        )
        for each in left
        if each.unchanged > limit
    }


def long(left: Sequence[Measured], policy: ScreenPolicy, known: Known) -> dict[str, Failure]:
    """Find deltas over `max_norm_ratio` times the median norm."""
    # Two norms can't tell which of them is odd, and a median of zero is no measure of length.
    middle = median(each.norm for each in left) if len(left) >= 3 else 0.0
    if middle == 0:
        return {}
    return {
        each.key: Failure(
            each.norm,
            policy.max_norm_ratio * middle,
            f"the delta's norm {each.norm:.4g} is {each.norm / middle:.1f} times the median {middle:.4g}, "
            f"over the limit of {policy.max_norm_ratio:g}",
        )
        for each in left
        if each.norm > policy.max_norm_ratio * middle
    }


def duplicates(left: Sequence[Measured], policy: ScreenPolicy, known: Known) -> dict[str, Failure]:
    """Find equal deltas of several nodes, and leave the first one by node id: who came first is not on record."""
    found: dict[str, Failure] = {}
    seen: dict[tuple[float, float], list[Measured]] = {}
    for each in left if policy.duplicates == "reject" else ():
        alike = seen.setdefault((each.norm, each.unchanged), [])
        for other in alike if each.norm else ():
            if not _same_node(each, other, known) and are_equal(each.delta, other.delta):
                found[each.key] = Failure(1.0, None, f"the delta is that of node {other.key[:12]}, entry for entry")
                break
        else:
            alike.append(each)
    return found


def copies(left: Sequence[Measured], policy: ScreenPolicy, known: Known) -> dict[str, Failure]:
    """Find deltas that agree with another node's in more than `max_overlap`, and leave the first one, as above."""
    limit = policy.max_overlap
    if limit is None or len(left) < 2:
        return {}
    agreement = overlaps([each.delta for each in left])
    found: dict[str, Failure] = {}
    kept: list[int] = []
    for index, each in enumerate(left):
        others = [other for other in kept if not _same_node(each, left[other], known)]
        nearest = max(others, key=lambda other: float(agreement[index, other]), default=None)
        if nearest is None or agreement[index, nearest] <= limit:
            kept.append(index)
            continue
        value = float(agreement[index, nearest])
        detail = (
            f"the delta agrees with that of node {left[nearest].key[:12]} in the sign of {value:.1%} of its entries, "
            f"over the limit of {limit:.1%}"
        )
        found[each.key] = Failure(value, limit, detail)
    return found


def harmful(left: Sequence[Measured], policy: ScreenPolicy, known: Known) -> dict[str, Failure]:
    """Find deltas that alone add less than `min_gain` to the model's score, as Gauntlet looks at contributors' loss.

    "Incentivizing permissionless distributed learning of LLMs", arXiv 2505.21684.
    """
    if policy.min_gain is None:
        return {}
    found: dict[str, Failure] = {}
    for each in left:
        gain = known.gains.get(each.key)
        if known.owner(each.key).node_id == policy.root or (gain is not None and gain >= policy.min_gain):
            continue
        told = "leaves the model without a score" if gain is None else f"changes the model's score by {gain:+.4g}"
        detail = f"the delta {told} on the coordinator's data; it should be {policy.min_gain:+g} or more"
        found[each.key] = Failure(gain, policy.min_gain, detail)
    return found


def _same_node(one: Measured, other: Measured, known: Known) -> bool:
    return known.owner(one.key).node_id == known.owner(other.key).node_id


Check: TypeAlias = Callable[[Sequence[Measured], ScreenPolicy, Known], dict[str, Failure]]

# In this order; a check sees what those before it left.
CHECKS: dict[str, Check] = {
    UNCHANGED: unchanged,
    NORM: long,
    DUPLICATE: duplicates,
    COPYCAT: copies,
    GAIN: harmful,
}
