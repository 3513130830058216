"""Coordinator and nodes in one process, in virtual time. Only gRPC is replaced, by calls: the rest is what is deployed.

The world spawns a task for the coordinator, and one for a node whenever the federation's state asks something of it. So
nodes that have nothing to do cost nothing, and ten thousand of them are as good as ten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmerge.config import Config
from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.coordinator.ownership import open_seat
from fedmerge.errors import ConfigError
from fedmerge.node.chain import Announce, Fetch, ModelChain
from fedmerge.node.events import NodeEvent
from fedmerge.node.node import Node
from fedmerge.node.witness import Witness
from fedmerge.publishing.publish import thin_out
from fedmerge.rounds.state import Phase
from fedmerge.sim.adversary import Adversary
from fedmerge.sim.availability import Availability, availabilities
from fedmerge.sim.models import PublishedModels, SharedModels
from fedmerge.sim.settings import require_same_settings
from fedmerge.sim.sites import LocalLink, TimedLink, make_site, node_home
from fedmerge.sim.trainers import Engine, simulated
from fedmerge.sim.world import World
from fedmerge.store.seat import Seat
from fedmerge.training import Trainer
from fedmerge.trust.keys import Member, TrustStore
from fedmerge.trust.sign import PublicKey, SigningKey

# Up to so many nodes have copies of the models in their own folders.
MOST_COPIES = 16
# What is asked of nodes: a round's spec, its phase, and the generations of candidates so far.
Question: TypeAlias = tuple[str, str, int]


class KnownNodes(TrustStore):
    """A folder of trusted keys that is read once: nobody joins or leaves a simulation."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._members = super().members()
        self._names, self._keys = super().names(), super().keys()

    def members(self) -> Mapping[str, Member]:
        """Return who is trusted, by key id."""
        return self._members

    def names(self) -> Mapping[str, str]:
        """Return the party's name by key id."""
        return self._names

    def keys(self) -> Mapping[str, PublicKey]:
        """Return the trusted keys by key id."""
        return self._keys


class Simulation:
    """A coordinator and its nodes in a world of their own."""

    def __init__(
        self,
        config: Config,
        base_dir: Path,
        trainers: Mapping[str, Trainer],
        *,
        world: World,
        engine: Engine,
        adversary: Adversary,
        availability: Mapping[str, Availability],
        seat: Seat,
        keys: Mapping[str, SigningKey],
        on_event: Callable[[str, NodeEvent], None],
        connect: Callable[[Coordinator, str], LocalLink],
    ) -> None:
        self.config, self.world = config, world
        self._trainers = trainers
        self._engines = dict.fromkeys(trainers, engine) | dict.fromkeys(adversary.names, adversary)
        self._on_event, self._connect = on_event, connect
        self._keys = keys
        trust = KnownNodes(config.federation.trusted)
        # Here nodes read what the coordinator published: see `_thin_out`.
        keeping_all = config.model_copy(update={"publish": config.publish.model_copy(update={"keep_rounds": 0})})
        self.coordinator = Coordinator(keeping_all, base_dir, clock=world.clock, seat=seat, trust=trust)
        self.coordinator.journal.on_change.append(world.notify)
        self._order = {name: number for number, name in enumerate(trainers)}
        began_s = self.coordinator.journal.ledger.entries[0].at_s
        self._sites = {
            name: make_site(config.simulate, name, availability.get(name), began_s=began_s) for name in trainers
        }
        self._nodes: dict[str, tuple[TimedLink, Node]] = {}
        self._busy: set[str] = set()
        # Of those that work, a round that was published when they began.
        self._reading: dict[str, int] = {}
        self._answered: dict[str, Question] = {}
        self._models = PublishedModels(self.coordinator)

    def run(self) -> None:
        """Play to the end of the last round."""
        # One that was stopped goes on when it was, whatever the time is now.
        self.world.begin_at(self.coordinator.journal.ledger.entries[-1].at_s)
        self.coordinator.retry_failed()
        self.world.spawn(self._coordinate)
        self.world.run()

    def _coordinate(self) -> None:
        asked: Question | None = None
        while True:
            while self.coordinator.advance():
                pass
            question = self._question()
            for name in self._asked() if question not in {None, asked} else ():
                if name not in self._busy and self._answered.get(name) != question:
                    self._spawn(name)
            asked = question
            self._thin_out()
            if self.coordinator.finished():
                return
            self.world.wait(self.coordinator.next_due_s())

    def _question(self) -> Question | None:
        """Return what is asked of nodes now, if anything."""
        state = self.coordinator.journal.state
        if state.opened is None or not (
            state.phase in {Phase.OPEN, Phase.SEARCHING, Phase.PUBLISHING} or self.coordinator.finished()
        ):
            return None
        return state.opened.spec_digest, str(state.phase), len(state.proposals)

    def _asked(self) -> list[str]:
        """Return the nodes that the present question is for: of a sample, or of all."""
        state, asked = self.coordinator.journal.state, None
        if state.phase == Phase.SEARCHING:
            asked = state.generations()[-1].judges
        elif self.coordinator.finished() and self.coordinator.policy.sample is not None:
            asked = list(self.coordinator.journal.index.node_keys)
        elif state.opened is not None and state.opened.sample:
            asked = state.opened.sample
        if asked is None:
            return list(self._trainers)
        names = self.coordinator.trust.names()
        wanted = {names[node_id] for node_id in asked if node_id in names}
        return sorted(wanted, key=self._order.__getitem__)

    def _thin_out(self) -> None:
        """Keep the models that the plan asks to keep, and those that nodes read."""
        if self.config.publish.keep_rounds:
            oldest = min([self._newest(), *self._reading.values()])
            thin_out(self.coordinator.published_dir(0).parent, oldest, self.config.publish.keep_rounds)

    def _newest(self) -> int:
        """Return the round that made the newest model; it may be about to be published."""
        current = self.coordinator.journal.state.current
        return current.round if current else 0

    def _spawn(self, name: str) -> None:
        self._busy.add(name)
        self.world.spawn(lambda: self._answer(name))

    def _answer(self, name: str) -> None:
        site = self._sites[name]
        self.world.sleep(site.offline_s(self.world.now_s))
        question = self._question()
        if question is not None:
            link, node = self._node(name)
            view = link.view()
            if view.phase != Phase.OPEN or not site.drops_out(view.round):
                self._reading[name] = self._newest() - 1
                try:
                    node.react(view)
                finally:
                    del self._reading[name]
            self._answered[name] = question
        self._busy.discard(name)
        if self._question() not in {None, question} and name in self._asked():
            self._spawn(name)

    def _node(self, name: str) -> tuple[TimedLink, Node]:
        if name not in self._nodes:
            key, home, site = self._keys[name], node_home(self.config, name), self._sites[name]
            link = TimedLink(self._connect(self.coordinator, key.public.key_id), self.world, site)
            trainer = simulated(self._trainers[name], self._engines[name], self.world, site.train_s)

            def on_event(event: NodeEvent) -> None:
                self._on_event(name, event)

            def make_chain(home: Path, fetch: Fetch, announce: Announce, base: Path | None) -> ModelChain:
                if len(self._trainers) > MOST_COPIES:
                    return SharedModels(self._models, link, home, announce)
                return ModelChain(home, fetch, announce, base, durable=False)

            node = Node(
                link,
                trainer,
                key,
                self.coordinator.key.public,
                home,
                base=self.coordinator.base.directory,
                keep_rounds=self.config.publish.keep_rounds,
                witness=Witness(home, link, key, self.coordinator.key.public, self.world.clock, durable=False),
                on_event=on_event,
                make_chain=make_chain,
                durable=False,
                meanwhile=self.world.begin,
            )
            self._nodes[name] = link, node
        return self._nodes[name]


def play(
    config: Config,
    base_dir: Path,
    trainers: Mapping[str, Trainer],
    *,
    world: World,
    engine: Engine,
    on_event: Callable[[str, NodeEvent], None],
    connect: Callable[[Coordinator, str], LocalLink],
) -> None:
    """Run a federation to its end in this process; raise as `fedmerge.sim.simulate` does."""
    adversary, availability = Adversary(config, trainers, engine), availabilities(config, trainers)
    keys = prepare_nodes(config, list(trainers))
    with closing(adversary), closing(open_seat(config, world.clock, durable=False)) as seat:
        seat.take()
        simulation = Simulation(
            config,
            base_dir,
            trainers,
            world=world,
            engine=engine,
            adversary=adversary,
            availability=availability,
            seat=seat,
            keys=keys,
            on_event=on_event,
            connect=connect,
        )
        require_same_settings(config, has_failed=simulation.coordinator.journal.state.phase == Phase.FAILED)
        simulation.run()


def prepare_nodes(config: Config, names: list[str]) -> dict[str, SigningKey]:
    """Make each simulated node's key, have the coordinator trust it, and return the keys by name.

    The keys are derived from the plan's seed and the names, so that a simulation replays to the same bits. That makes
    them worthless for anything but a simulation. Raises `ConfigError` where real nodes are trusted.
    """
    trust = TrustStore(config.federation.trusted)
    strangers = sorted(set(trust.names().values()) - set(names))
    if strangers:
        raise ConfigError(
            f"{trust.directory}: has the key of {strangers[0]}, which is not simulated",
            hint="anybody can derive a simulated node's key: simulate in a folder of its own",
        )
    keys: dict[str, SigningKey] = {}
    for name in names:
        secret = hashlib.sha256(f"fedmerge.simulated.{config.merge.seed}.{name}".encode()).digest()
        keys[name] = SigningKey(Ed25519PrivateKey.from_private_bytes(secret))
        path = node_home(config, name) / "node.key"
        if not path.exists():
            keys[name].save(path, durable=False)
        trust.add(keys[name].public, name, durable=False)
    return keys
