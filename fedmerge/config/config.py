"""A whole fedmerge.toml, and what follows from it: codecs, recipe, policies."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from fedmerge.config.coordinator import Federation, Model, Server, Store
from fedmerge.config.merging import OUTER_KEYS, Merge, Outer, Publish, Screen, Search
from fedmerge.config.rounds import Delta, Rounds, Streaming, Train
from fedmerge.config.section import Section
from fedmerge.config.simulate import Simulate, SimulatedNode
from fedmerge.config.values import (
    num_cores,
)

if TYPE_CHECKING:
    from fedmerge.aggregation.fragments import Fragments
    from fedmerge.delta.codec import Codec
    from fedmerge.delta.regime import Uplink
    from fedmerge.merge import Recipe, Workers
    from fedmerge.screening.checks import ScreenPolicy
    from fedmerge.search import SearchSettings
    from fedmerge.search.local import Evaluate
    from fedmerge.store.blobs import BlobStore
    from fedmerge.tensors import Schema

# The robust rules that go before the trimmed mean by default.
DEFAULT_RULES = ("spectral",)


class Config(Section):
    """A whole fedmerge.toml: valid, with defaults filled in and paths resolved."""

    federation: Federation
    model: Model
    server: Server
    store: Store
    rounds: Rounds
    train: Train
    delta: Delta
    merge: Merge
    screen: Screen
    search: Search
    outer: Outer
    streaming: Streaming
    publish: Publish
    simulate: Simulate
    nodes: Annotated[tuple[SimulatedNode, ...], Field(strict=False)] = ()

    @field_validator("nodes")
    @classmethod
    def _names_differ(cls, nodes: tuple[SimulatedNode, ...]) -> tuple[SimulatedNode, ...]:
        names = [node.name for node in nodes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two nodes are called {twice[0]!r}")
        return nodes

    def database_url(self) -> str:
        """Return the URL of the ledger's database."""
        return self.store.database or f"sqlite:///{self.federation.state / 'ledger.sqlite'}"

    def open_blobs(self, *, durable: bool = True) -> BlobStore:
        """Return the store of deltas, updates and steps. Raises `ResourceError` when it can't be opened.

        In a folder it is `durable` unless it is only for a simulation; a bucket always is.
        """
        from fedmerge.store.blobs import BlobStore

        directory, blobs = self.federation.state / "blobs", self.store.blobs
        if isinstance(blobs, str):
            from fedmerge.store.objects import ObjectShelf

            return BlobStore(directory, ObjectShelf(blobs, directory))
        from fedmerge.store.shelves import FolderShelf

        return BlobStore(directory, FolderShelf(blobs or directory, durable=durable))

    def train_settings(self) -> dict[str, Any]:
        """Return the trainer's name and settings, as a round's plan carries them."""
        return self.train.model_dump()

    def outer_settings(self) -> dict[str, Any]:
        """Return the outer optimizer's name and the parameters it takes, as a round's plan carries them."""
        return self.outer.model_dump(include={"name", *OUTER_KEYS[self.outer.name]})

    def fragments(self) -> Fragments | None:
        """Return in which parts the model is sent; None where rounds send all of it."""
        if self.streaming.fragments == 1:
            return None
        from fedmerge.aggregation.fragments import Fragments

        section = self.streaming
        return Fragments(section.fragments, section.pattern, section.mixing, section.overlap_steps)

    # The builders import late: they need torch, which a mistake in the file should not have to wait for.

    def uplink(self, schema: Schema) -> Uplink:
        """Return how nodes encode task vectors of this `schema`, chosen for them with "auto"."""
        from fedmerge.delta.regime import Regime, Uplink, choose
        from fedmerge.merge.methods import LINEAR

        if self.delta.codec == "custom":
            return Uplink(self._codec(schema), self.delta.error_feedback, "as configured")
        lora_rank = self.train.extras.get("lora_rank", 0)
        recipe = self.recipe()
        return choose(
            Regime(
                schema=schema,
                num_rounds=self.rounds.num_rounds,
                lora_rank=lora_rank if isinstance(lora_rank, int) else 0,
                merge="+".join(step.name for step in recipe.steps),
                is_linear=recipe.method in LINEAR and not recipe.before and not self.robust_rules(),
                # An average over rounds carries the past on as momentum does.
                has_momentum=self.outer.name != "sgd" or bool(recipe.after),
                is_local=self.server.is_local,
            )
        )

    def takes_steps(self, schema: Schema) -> bool:
        """Return whether nodes fetch steps, of a base model of this `schema`, and not updates."""
        if self.delta.downlink != "auto":
            return self.delta.downlink == "steps"
        sizes = dict.fromkeys((True, False), 0)
        for spec in schema.values():
            sizes[spec.dtype in {"BF16", "F16"}] += spec.num_elements if spec.is_float else 0
        return sizes[True] > sizes[False]

    def downlink_codec(self, schema: Schema) -> Codec:
        """Return how the published update of a base model of this `schema` is encoded: with every element.

        Where nodes fetch steps it loses nothing, as only auditors read it.
        """
        values = "fp32" if self.takes_steps(schema) else self.delta.downlink.replace("auto", "int8")
        return self._codec(schema, sparsify="none", density=1.0, rank=0, values=values)

    def _codec(self, schema: Schema, **changes: Any) -> Codec:
        from fedmerge.delta.codec import SAME, Codec
        from fedmerge.delta.regime import with_small_values

        settings = self.delta.codec_settings() | changes
        if settings["small_values"] == "auto":
            return with_small_values(Codec(**settings | {"small_values": SAME}), schema)
        return Codec(**settings)

    def recipe(self) -> Recipe:
        """Return the merge method and its parameters; the seed stays in `merge.seed`."""
        from fedmerge.merge import Recipe

        if self.merge.steps:
            recipe = Recipe.from_steps([(step.method, step.extras) for step in self.merge.steps])
            return replace(recipe, scope=self.merge.scope)
        if self._is_hardened():
            # So much that floor(trimmed * left) is max_bad for what the rules leave of the least number of nodes.
            num_left = self.rounds.min_nodes - self.max_bad()
            return Recipe("trimmed_mean", {"trimmed": round(self.max_bad() / num_left + 5e-5, 4)})
        method = "fedavg" if self.merge.method == "auto" else self.merge.method
        return Recipe(method, self.merge.extras, scope=self.merge.scope)

    def merge_workers(self) -> Workers:
        """Return on how many threads and in how much memory rounds are merged, which is not part of their plan."""
        from fedmerge.merge import Workers

        return Workers(self.merge.threads or num_cores(), self.merge.memory_budget)

    def search_settings(self) -> SearchSettings | None:
        """Return how to search for the merge; None without a search. Raises `ConfigError` when it can't be done."""
        settings = self.search.settings()
        if settings is not None:
            settings.check(self.recipe())
        return settings

    def probe(self) -> Evaluate | None:
        """Return what scores a model directory on the coordinator's data. Raises `ConfigError` for no such command."""
        if self.screen.probe is None:
            return None
        from fedmerge.search.local import evaluation_command

        timeout_s = self.screen.probe_timeout_s
        return evaluation_command(
            self.screen.probe, timeout_s=timeout_s, setting="screen.probe", more_time="screen.probe_timeout_s"
        )

    def robust_rules(self) -> tuple[str, ...]:
        """Return the robust rules before the merge, chosen for the federation with "auto"."""
        if isinstance(self.screen.robust, list):
            return tuple(self.screen.robust)
        return DEFAULT_RULES if self._is_hardened() else ()

    def max_bad(self) -> int:
        """Return how many bad nodes the robust rules are to hold against."""
        few = min(2, (self.rounds.min_nodes - 1) // 4) if self._is_hardened() else 1
        return max(self.screen.max_bad, few)

    def _is_hardened(self) -> bool:
        """Whether `DEFAULT_RULES` and the trimmed mean merge rounds: by default, where these keep their promise.

        They look at every entry, so thinned deltas would be trimmed to nothing; and a search, and control variates,
        need to know whose delta is whose.
        """
        merge = self.merge
        return (
            self.screen.robust == "auto"
            and self.rounds.min_nodes >= 5
            and (merge.method, merge.scope) == ("auto", "tensor")
            and not (merge.steps or merge.extras)
            and self.delta.codec == "custom"
            and self.delta.sparsify in {"none", "lowrank"}
            and self.search.strategy == "none"
            and not self.train.extras.get("scaffold")
        )

    def screen_policy(self, root: str | None = None) -> ScreenPolicy:
        """Return which deltas count, and for how much; `root` is the key id of the node that `screen.root` names."""
        from fedmerge.screening.checks import ScreenPolicy

        local = {"probe", "probe_metric", "probe_timeout_s"}
        settings = self.screen.model_dump(exclude={"robust", "max_bad", "root", *local})
        settings["clip_quantile"] = self.screen.clip_quantile or None
        settings["min_gain"] = None if self.screen.probe is None else self.screen.min_gain
        return ScreenPolicy(**settings, robust=self.robust_rules(), max_bad=self.max_bad(), root=root)
