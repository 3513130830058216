"""The models of simulated nodes that are too many to have copies of their own."""

from __future__ import annotations

from pathlib import Path

from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.models.sums import RunningSum
from fedmerge.models.versions import cheapest_route, open_model, require_digest
from fedmerge.node.chain import Announce, ModelChain
from fedmerge.sim.sites import TimedLink
from fedmerge.statements import ModelRef, RoundSpec, StepRef, UpdateRef
from fedmerge.tensors import Checkpoint


class PublishedModels:
    """What a coordinator published, to be read by all nodes, each version checked once as a node would check it."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self._checked: set[str] = set()
        self._sum = RunningSum(coordinator.config.federation.state / "sum-of-nodes")

    def directory(self, ref: ModelRef) -> Path:
        """Return the directory of a version with updates; raise `DigestMismatch` when they do not lead to it."""
        found = self.coordinator.published_dir(ref.updates[-1].round)
        if ref.digest not in self._checked:
            coordinator = self.coordinator
            updated = open_model(ref, coordinator.base, lambda update: coordinator.artifact(update.root), self._sum)
            with self._sum.keeping(ref.updates, updated) as updated:
                require_digest(updated, ref.digest, where="the published updates")
            require_digest(Checkpoint(found), ref.digest, where=f"{found}")
            self._checked.add(ref.digest)
        return found


class SharedModels(ModelChain):
    """A node's models where all nodes read the `published` ones.

    Files take the time of a `link`, as if the node had copies of its own.
    """

    def __init__(self, published: PublishedModels, link: TimedLink, home: Path, announce: Announce) -> None:
        super().__init__(home, link.fetch, announce, published.coordinator.base.directory, durable=False)
        self._base = published.coordinator.base
        self._published = published
        self._link = link
        self._tell = announce
        self._held: set[str] = set()
        self._fetched: set[str] = set()

    def materialise(self, ref: ModelRef, spec: RoundSpec, parent: Path | None = None) -> Path:
        """Return a directory with the version `ref`; candidates, which have a `parent`, as `ModelChain` does."""
        if parent is not None or not ref.updates:
            return super().materialise(ref, spec, parent)
        if ref.digest not in self._held:
            files: list[StepRef] | list[UpdateRef] = cheapest_route(ref, self._held, self._fetched) or ref.updates
            for file in files:
                if file.root not in self._fetched:
                    self._fetched.add(file.root)
                    self._tell(file.round, "update" if isinstance(file, UpdateRef) else "step", file.num_bytes)
                    self._link.pay(file.num_bytes)
            self._held = {ref.digest}
        return self._published.directory(ref)
