"""Streaming DiLoCo (arXiv 2501.18512): a round sends one fragment of the model, the next round another, in turn.

A node sends and fetches 1/P of the bytes in a round, and each fragment has P rounds of training between two of its
merges; its optimizer state moves with it. What a node does between them is in `fedmerge.node.streaming`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from fedmerge.errors import ConfigError
from fedmerge.merge.layers import layer_of
from fedmerge.statements import RoundSpec
from fedmerge.tensors import Schema


@dataclass(frozen=True)
class Fragments:
    """How a model is sent in parts: `num` fragments, one a round, in turn; `pattern` says which layers are together.

    Layer i of L goes to fragment i mod num ("strided") or floor(i * num / L) ("sequential"). Tensors outside all layers
    go, the largest first, to the fragment that is smallest then. `mixing` is what a node keeps of its own, and
    `overlap_steps` how many steps it trains for before it takes what was published.
    """

    num: int
    pattern: Literal["strided", "sequential"] = "strided"
    mixing: float = 0.0
    overlap_steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a round's plan carries them."""
        return asdict(self)

    @classmethod
    def of(cls, spec: RoundSpec) -> Self | None:
        """Return the settings of a plan; None where rounds send the whole model."""
        return cls(**spec.streaming) if spec.streaming else None

    def names(self, schema: Schema) -> list[list[str]]:
        """Return the floating-point tensors of each fragment, sorted. Raises `ConfigError` when one would have none."""
        floats = {name: spec.num_elements for name, spec in schema.items() if spec.is_float}
        layers = sorted({layer for name in floats if (layer := layer_of(name)) is not None})
        places = {
            layer: place % self.num if self.pattern == "strided" else place * self.num // len(layers)
            for place, layer in enumerate(layers)
        }
        found: list[list[str]] = [[] for _ in range(self.num)]
        sizes = [0] * self.num
        # The sort is stable, and those outside all layers come last: they even out what the layers make.
        for name in sorted(floats, key=lambda name: (layer_of(name) is None, -floats[name], name)):
            layer = layer_of(name)
            place = sizes.index(min(sizes)) if layer is None else places[layer]
            found[place].append(name)
            sizes[place] += floats[name]
        if not all(found):
            raise ConfigError(
                f"streaming: {len(floats)} tensors in {len(layers)} layers do not make {self.num} fragments",
                hint="ask for fewer",
            )
        return [sorted(names) for names in found]


def travelling(spec: RoundSpec, schema: Schema) -> Schema:
    """Return the part of a model's `schema` of which task vectors travel in a round."""
    fragments = Fragments.of(spec)
    if fragments is None:
        return schema
    return {name: schema[name] for name in fragments.names(schema)[(spec.round - 1) % fragments.num]}
