"""How a task vector travels: which sparsifier, which number format, how hard it is compressed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fedmerge.errors import ConfigError, did_you_mean
from fedmerge.quantize import QUANTIZERS
from fedmerge.sparsify import SPARSIFIERS, travels_dense
from fedmerge.tensors import TensorSpec

_RANGES: dict[str, tuple[float, float]] = {
    "density": (1e-6, 1.0),
    "block_size": (8, 1 << 20),
    "small_elements": (0, 1 << 31),
    "zstd_level": (1, 19),  # higher levels use windows that a reader refuses
}


@dataclass(frozen=True, slots=True)
class Codec:
    """How a task vector travels; part of a round's plan, so both ends hold the same one.

    `sparsify` names one of `SPARSIFIERS` and `density` is the fraction of elements that it keeps; tensors with at most
    one dimension and fewer than `small_elements` elements are always sent dense. `values` names one of `QUANTIZERS`,
    `block_size` is the number of values that share a scale, in the types that have scales. `zstd_level` is 1 (fast) to
    19. Raises `ConfigError` for an unknown name, a wrong type or a value out of range.
    """

    sparsify: str = "none"
    density: float = 1.0
    values: str = "int8"
    block_size: int = 1024
    small_elements: int = 4096
    zstd_level: int = 3

    def __post_init__(self) -> None:
        if type(self.density) is int:
            object.__setattr__(self, "density", float(self.density))
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value).__name__ != field.type:
                raise ConfigError(f"codec.{field.name}: {value!r} is not of type {field.type}")
        _require_known("codec.sparsify", self.sparsify, SPARSIFIERS)
        _require_known("codec.values", self.values, QUANTIZERS)
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"codec.{name}: {getattr(self, name)} is not between {low} and {high}")
        if self.sparsify == "none" and self.density != 1.0:
            raise ConfigError(
                f"codec.density: {self.density} has no effect without a sparsifier",
                hint='set sparsify = "seeded", "topk" or "layerwise_topk", or leave density out',
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the codec as a JSON object."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Codec:
        """Return the codec that `table` describes; keys left out have their defaults.

        Raises `ConfigError` for unknown keys and for everything the constructor refuses.
        """
        for key in table:
            _require_known("codec", key, [field.name for field in fields(cls)])
        return cls(**table)

    def sparsifier(self, spec: TensorSpec) -> str:
        """Return the name of the sparsifier for a tensor of this shape."""
        return "none" if travels_dense(spec.shape, self.small_elements) else self.sparsify

    def encoding(self, spec: TensorSpec) -> str:
        """Return the encoding of a tensor of this shape that is not all zero."""
        sparsifier = self.sparsifier(spec)
        return self.values if sparsifier == "none" else f"{sparsifier}+{self.values}"


def _require_known(where: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        shown = str(name)[:50]
        raise ConfigError(
            f"{where}: unknown name {shown!r}{did_you_mean(shown, known)}", hint=f"one of: {', '.join(known)}"
        )
