"""`codec = "auto"`: which codec serves a federation best, by what is known of it before the first round.

No codec is best everywhere: a random mask that keeps 1 % loses a twentieth of what one round gains, and the largest 1 %
of the same task vector lose two thirds of it; over many rounds, where what was left out arrives later, it is the other
way round. The rules below are in the order in which they are tried; docs/log.md has the figures behind them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from fedmerge.delta.codec import LOWRANK, SAME, Codec
from fedmerge.delta.sparsify import travels_dense
from fedmerge.tensors import Schema

# Up to here a delta in int8 takes a second on a 100 Mbit/s line, and smaller ones save nobody anything.
SMALL_PARAMETERS = 10_000_000

# With error feedback of 0.95 an entry that is left out in every round is forgotten after some twenty.
MANY_ROUNDS = 10
ERROR_FEEDBACK = 0.95

# Biases and norms arrive exactly as long as that makes a delta at most this much larger.
EXACT_SHARE = 0.025
_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4, "lloyd3": 3, "lloyd2": 2, "sign": 1}


@dataclass(frozen=True, slots=True)
class Regime:
    """What is known of a federation: its model's size, its rounds, and what is done with the deltas.

    `schema` is that of a task vector; `lora_rank` is 0 for nodes that tune whole models, `has_momentum` that of the
    outer optimizer; `is_linear` says whether the merge is a weighted sum that nothing but norms is screened for, and
    `is_local` whether the nodes are on the coordinator's own network.
    """

    schema: Schema
    num_rounds: int
    lora_rank: int
    merge: str
    is_linear: bool
    has_momentum: bool
    is_local: bool

    @property
    def num_parameters(self) -> int:
        """The number of elements of a task vector."""
        return sum(spec.num_elements for spec in self.schema.values())


class Uplink(NamedTuple):
    """How task vectors travel to the coordinator, and in a few words why."""

    codec: Codec
    error_feedback: float
    reason: str

    def __str__(self) -> str:
        feedback = f", error feedback {self.error_feedback:g}" if self.error_feedback else ""
        small = "" if self.codec.small_values == SAME else f", vectors {self.codec.small_values}"
        return f"{self.codec.summary()}{small}{feedback} ({self.reason})"


class _Rule(NamedTuple):
    applies: Callable[[Regime], bool]
    codec: Callable[[Regime], Codec]
    reason: str
    error_feedback: float = 0.0


_LLOYD3 = Codec(values="lloyd3", block_size=256)

_RULES: tuple[_Rule, ...] = (
    _Rule(
        lambda regime: regime.lora_rank > 0,
        lambda regime: Codec(sparsify="lowrank", rank=regime.lora_rank),
        "nodes train adapters of rank {lora_rank}, which travel exactly as their factors",
    ),
    _Rule(
        lambda regime: regime.is_local,
        lambda regime: Codec(),
        "nodes are on the coordinator's own network, where bytes are cheap: next to no loss",
    ),
    _Rule(
        lambda regime: regime.num_parameters <= SMALL_PARAMETERS,
        lambda regime: Codec(),
        "the model is small, {num_parameters:,} parameters: next to no loss",
    ),
    _Rule(
        lambda regime: regime.num_rounds == 1 and regime.is_linear,
        lambda regime: Codec(sparsify="seeded", density=0.01, values="lloyd2", block_size=64),
        "one round, merged by {merge}, which keeps the mean of random masks; a tensor too noisy for one travels dense",
    ),
    _Rule(
        lambda regime: regime.num_rounds == 1,
        lambda regime: _LLOYD3,
        "one round, and {merge} or a robust rule looks at every entry: random masks would mislead it",
    ),
    _Rule(
        lambda regime: regime.has_momentum,
        lambda regime: Codec(values="int4", block_size=64),
        "{num_rounds} rounds with outer momentum, which does not go with residuals: every entry in 4 bits",
    ),
    _Rule(
        lambda regime: regime.num_rounds >= MANY_ROUNDS,
        lambda regime: Codec(sparsify="topk", density=64 / 4096, values="sign", block_size=64),
        "{num_rounds} rounds without outer momentum: what is left out waits for a later one",
        ERROR_FEEDBACK,
    ),
    _Rule(
        lambda regime: True,
        lambda regime: _LLOYD3,
        "{num_rounds} rounds, too few for what top-k leaves out to arrive: every entry in 3 bits",
    ),
)


def choose(regime: Regime) -> Uplink:
    """Return how task vectors should travel in this regime."""
    rule = next(rule for rule in _RULES if rule.applies(regime))
    codec = with_small_values(rule.codec(regime), regime.schema)
    known = {name: getattr(regime, name) for name in ("lora_rank", "num_parameters", "merge", "num_rounds")}
    return Uplink(codec, rule.error_feedback, rule.reason.format_map(known))


def with_small_values(codec: Codec, schema: Schema) -> Codec:
    """Return `codec` with small vectors of a task vector of this `schema` exact, or as the others if that costs much.

    They are exact where their 32 bits an element make at most `EXACT_SHARE` of what the other tensors take, by the
    nominal bits of their values and the least bits of their indices. It follows from shapes alone.
    """
    small = sum(spec.num_elements for spec in schema.values() if travels_dense(spec.shape, codec.small_elements))
    others = [spec for spec in schema.values() if not travels_dense(spec.shape, codec.small_elements)]
    if codec.sparsify == LOWRANK:
        kept = sum(codec.most_rank(spec) * sum(spec.shape) or spec.num_elements for spec in others)
        bits = _BITS.get(codec.factors, 32) * float(kept)
    else:
        # ln C(n, dn) is about dn ln(e / d) for small d: the entropy of a choice of dn elements among n.
        chosen = codec.sparsify in {"topk", "layerwise_topk"} and codec.density < 1
        index_bits = math.log2(math.e / codec.density) if chosen else 0.0
        bits = codec.density * sum(spec.num_elements for spec in others) * (_BITS[codec.values] + index_bits)
    exact = small * _BITS["fp32"] <= EXACT_SHARE * bits
    return replace(codec, small_values="fp32" if exact else SAME)
