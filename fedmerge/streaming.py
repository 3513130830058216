"""Streaming DiLoCo (arXiv 2501.18512): a round sends one fragment of the model, the next round another, in turn.

Nodes train all parameters all the time, and from round to round each goes on from its own: of the parameters that
travel in a round, a *fragment*, it sends the difference to the published ones, and once those moved takes
`mixing * own + (1 - mixing) * published` for them. The other fragments stay as they are until it is their turn. So a
node sends and fetches 1/P of the bytes in a round, and each fragment has P rounds of training between two of its
merges; its optimizer state moves with it.

The paper has nodes train on while a fragment is under way (tau steps of overlap), and mixing makes up for that. A
round's plan names the version that it starts from, so here a node has what the others did before it goes on: tau is 0.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

from torch import Tensor

from fedmerge.delta import UpdatedModel, delta_schema, working_dtype
from fedmerge.errors import ConfigError, InputError, reporting_os_errors
from fedmerge.merge.layers import layer_of
from fedmerge.outbox import STATEMENT, previous_folder, round_of, write_folder
from fedmerge.sign import PublicKey
from fedmerge.statements import RoundSpec
from fedmerge.tensors import Checkpoint, Computed, Schema, TensorMap
from fedmerge.versions import write_model

LOCAL: Final = "local"
START: Final = "start"


@dataclass(frozen=True)
class Fragments:
    """How a model is sent in parts: `num` fragments, one a round, in turn; `pattern` says which layers are together.

    Layer i of L goes to fragment i mod num ("strided") or floor(i * num / L) ("sequential"). Tensors outside all layers
    go, the largest first, to the fragment that is smallest then. `mixing` is what a node keeps of its own.
    """

    num: int
    pattern: Literal["strided", "sequential"] = "strided"
    mixing: float = 0.0

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


def own_start(
    spec: RoundSpec, published: Checkpoint, base: Checkpoint, outbox: Path, own: Mapping[str, PublicKey]
) -> Path:
    """Return a model directory for a node to go on from: that of the `published` model, or `outbox / "start"`.

    That is the node's own model of its last round, with what was published since mixed in. `outbox` is the folder of
    the round of `spec` among those of the others, `own` the key that signed what they hold. A node begins with the
    published model in its first round, and after a rollback of what it was in. Raises as `previous_folder` does.
    """
    fragments = Fragments.of(spec)
    folder = None if fragments is None else previous_folder(outbox, LOCAL, spec, own)
    if fragments is None or folder is None:
        return published.directory
    since = range(round_of(folder.with_name(STATEMENT), spec, own), spec.round)
    if not {update.round for update in spec.model.updates}.issuperset(since):
        return published.directory
    names = fragments.names(published.schema)
    moved = {name for number in since for name in names[(number - 1) % fragments.num]}
    local, start = Checkpoint(folder), outbox / START

    def compute(name: str) -> Tensor:
        theirs = published[name]
        if name not in local:
            return theirs
        mine = local[name]
        dtype = working_dtype(mine, theirs)
        share = fragments.mixing if name in moved else 1.0
        return (mine.to(dtype) * share + theirs.to(dtype) * (1 - share)).to(theirs.dtype)

    with reporting_os_errors(start):
        shutil.rmtree(start, ignore_errors=True)
    write_model(Computed(published, compute), base, start)
    return start


def keep_own(spec: RoundSpec, tuned: TensorMap, base: Checkpoint, outbox: Path) -> None:
    """Keep a node's `tuned` model in `outbox` for its next round, where the plan sends fragments.

    Raises `InputError` for an adapter, which can't be sent in parts, and `ResourceError`.
    """
    if not spec.streaming:
        return
    if isinstance(tuned, UpdatedModel):
        raise InputError("an adapter can't be sent in fragments", hint="train whole models, or change the plan")
    write_folder(outbox / LOCAL, Computed(delta_schema(base.schema), tuned.__getitem__), base.shards())
