"""How a task vector travels: which sparsifier, which number format, how hard it is compressed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from fedmerge.delta.quantize import QUANTIZERS
from fedmerge.delta.sparsify import SPARSIFIERS, travels_dense
from fedmerge.errors import ConfigError, did_you_mean
from fedmerge.tensors import TensorSpec

LOWRANK = "lowrank"
EXACT = "exact"
SAME = "same"
# Value types that are floats, narrowest first: exact factors travel in the first of these that holds them.
EXACT_VALUES = ("bf16", "fp16", "fp32")
REFUSE = "none"

_RANGES: dict[str, tuple[float, float]] = {
    "density": (1e-6, 1.0),
    "block_size": (8, 1 << 20),
    "small_elements": (0, 1 << 31),
    "zstd_level": (1, 19),  # higher levels use windows that a reader refuses
    "max_noise_ratio": (0.0, 1e6),
    "rank": (0, 4096),
}


@dataclass(frozen=True, slots=True)
class Encoding:
    """How one tensor travels: which elements, or at which `rank` as two factors, and in which type of values.

    `sparsifier` is one of `SPARSIFIERS`, or "lowrank" with a `rank` of at least 1.
    """

    sparsifier: str
    values: str
    rank: int = 0

    def __str__(self) -> str:
        if self.sparsifier == "none":
            return self.values
        return f"{self.sparsifier}{self.rank or ''}+{self.values}"

    @classmethod
    def parse(cls, name: str) -> Encoding | None:
        """Return the encoding that is called `name`, or None if there is none."""
        parts = re.fullmatch(r"(?:([a-z_]+)([1-9][0-9]{0,3})?\+)?([a-z0-9]+)", name, re.ASCII)
        if parts is None:
            return None
        found = cls(parts[1] or "none", parts[3], int(parts[2] or 0))
        known = found.rank > 0 if found.sparsifier == LOWRANK else found.sparsifier in SPARSIFIERS and not found.rank
        return found if known and found.values in QUANTIZERS and str(found) == name else None


@dataclass(frozen=True, slots=True)
class Codec:
    """How a task vector travels; part of a round's plan, so both ends hold the same one.

    `sparsify` names one of `SPARSIFIERS` and `density` is the fraction of elements that it keeps; tensors with at most
    one dimension and fewer than `small_elements` elements are always sent dense. `values` names one of `QUANTIZERS`,
    `small_values` the one for those small tensors ("fp32": they arrive exactly), or is "same"; `block_size` is the
    number of values that share a scale, in the types that have scales. `zstd_level` is 1 (fast) to 19.

    The noise of a `seeded` mask may be at most `max_noise_ratio` of a tensor's weights (`fedmerge.delta.encoding`); a
    tensor in which it would be more travels dense as `fallback` values, or is refused if that is "none".

    With `sparsify = "lowrank"` matrices travel as two factors of `rank` at most, other tensors dense. `factors` is the
    type of the factors' values, or "exact": the narrowest float that holds them as they are.

    Raises `ConfigError` for an unknown name, a wrong type, a value out of range or one that has no effect.
    """

    sparsify: str = "none"
    density: float = 1.0
    values: str = "int8"
    block_size: int = 1024
    small_elements: int = 4096
    small_values: str = SAME
    zstd_level: int = 3
    max_noise_ratio: float = 0.1
    fallback: str = "lloyd3"
    rank: int = 0
    factors: str = EXACT

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "float" and type(value) is int:
                object.__setattr__(self, field.name, float(value))
            elif type(value).__name__ != field.type:
                raise ConfigError(f"codec.{field.name}: {value!r} is not of type {field.type}")
        _require_known("codec.sparsify", self.sparsify, [*SPARSIFIERS, LOWRANK])
        _require_known("codec.values", self.values, QUANTIZERS)
        _require_known("codec.small_values", self.small_values, [SAME, *QUANTIZERS])
        _require_known("codec.fallback", self.fallback, [REFUSE, *QUANTIZERS])
        _require_known("codec.factors", self.factors, [EXACT, *QUANTIZERS])
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"codec.{name}: {getattr(self, name)} is not between {low} and {high}")
        if self.sparsify in {"none", LOWRANK} and self.density != 1.0:
            raise ConfigError(
                f"codec.density: {self.density} has no effect without a sparsifier",
                hint='set sparsify = "seeded", "topk" or "layerwise_topk", or leave density out',
            )
        if (self.sparsify == LOWRANK) != (self.rank > 0):
            raise ConfigError(
                f"codec.rank: {self.rank} does not go with sparsify = {self.sparsify!r}",
                hint='sparsify = "lowrank" takes a rank of at least 1; leave rank out with the others',
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the codec as a JSON object."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def summary(self) -> str:
        """Return the codec in a few words, such as "topk 1.56 % sign/64"."""
        blocks = "" if self.values in EXACT_VALUES else f"/{self.block_size}"
        if self.sparsify == LOWRANK:
            return f"lowrank {self.rank} {self.factors}, else {self.values}{blocks}"
        thinned = "" if self.sparsify == "none" else f"{self.sparsify} {100 * self.density:.3g} % "
        return f"{thinned}{self.values}{blocks}"

    @staticmethod
    def from_dict(table: Mapping[str, Any]) -> Codec:
        """Return the codec that `table` describes; keys left out have their defaults.

        Raises `ConfigError` for unknown keys and for everything the constructor refuses.
        """
        return _from_json(json.dumps(table, default=repr))

    def encoding(self, spec: TensorSpec) -> Encoding:
        """Return the encoding of a tensor of this shape that is not all zero, has no factors and makes no noise."""
        if travels_dense(spec.shape, self.small_elements):
            return Encoding("none", self.values if self.small_values == SAME else self.small_values)
        if self.sparsify == LOWRANK:
            return Encoding("none", self.values)
        return Encoding(self.sparsify, self.values)

    def fallback_encoding(self, spec: TensorSpec) -> Encoding | None:
        """Return how a tensor travels in which a mask would make too much noise; None if it does not travel."""
        if self.encoding(spec).sparsifier != "seeded" or self.fallback == REFUSE:
            return None
        return Encoding("none", self.fallback)

    def most_rank(self, spec: TensorSpec) -> int:
        """Return the largest rank of factors in which a tensor of this shape may travel; 0 for none at all."""
        return min(self.rank, *spec.shape) if len(spec.shape) == 2 else 0

    def factor_values(self) -> tuple[str, ...]:
        """Return the types of values that factors may have."""
        return EXACT_VALUES if self.factors == EXACT else (self.factors,)

    def allows(self, spec: TensorSpec, encoding: Encoding) -> bool:
        """Return whether a tensor of this shape that is not all zero may travel in `encoding`."""
        if encoding.sparsifier == LOWRANK:
            return encoding.rank <= self.most_rank(spec) and encoding.values in self.factor_values()
        return encoding in (self.encoding(spec), self.fallback_encoding(spec))


@lru_cache(maxsize=32)  # every delta of a round comes with the same one
def _from_json(text: str) -> Codec:
    table = json.loads(text)
    known = [field.name for field in fields(Codec)]
    for key in table:
        _require_known("codec", key, known)
    return Codec(**table)


def _require_known(where: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        shown = str(name)[:50]
        raise ConfigError(
            f"{where}: unknown name {shown!r}{did_you_mean(shown, known)}", hint=f"one of: {', '.join(known)}"
        )
