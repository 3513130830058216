"""Coordinator and nodes in one process. Only gRPC is replaced, by calls: every other step is the deployed one."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmerge.config import Config
from fedmerge.coordinator import Coordinator
from fedmerge.errors import ConfigError
from fedmerge.merkle import LEAF_BYTES
from fedmerge.node import Node, NodeEvent, RoundView
from fedmerge.sign import SigningKey
from fedmerge.sim.results import FederationResult, result_of
from fedmerge.training import Trainer
from fedmerge.trust import TrustStore


class LocalLink:
    """A `fedmerge.node.Link` to a coordinator in the same process."""

    def __init__(self, coordinator: Coordinator, node_id: str) -> None:
        self._coordinator = coordinator
        self._node_id = node_id

    def view(self) -> RoundView:
        """Return the federation's state now."""
        state = self._coordinator.journal.state
        return RoundView(
            round=state.round,
            phase=state.phase,
            spec_envelope=self._coordinator.spec_envelope(),
            record_envelope=self._coordinator.record_envelope(),
            candidates_envelope=self._coordinator.candidates_envelope(),
            num_deltas=len(state.deltas),
            finished=self._coordinator.finished(),
            failure=state.failure,
        )

    def keep_trying(self, patience_s: float) -> None:
        """Do nothing: this coordinator always answers."""

    def watch(self) -> Iterator[RoundView]:
        """Yield the state now; a simulation asks again itself."""
        yield self.view()

    def fetch(self, root: str, target: Path) -> None:
        """Copy a file of the coordinator's."""
        shutil.copyfile(self._coordinator.artifact(root), target)

    def submit(self, envelope: bytes, payload: Path, leaves: list[bytes], sent: Callable[[int], None]) -> bytes:
        """Hand in a payload leaf by leaf, as a server would, and commit it."""
        intake = self._coordinator.intake
        upload_id, offset = intake.begin(self._node_id, envelope, b"".join(leaves))
        with payload.open("rb") as file:
            file.seek(offset)
            while data := file.read(LEAF_BYTES):
                offset = intake.write_chunk(self._node_id, upload_id, offset, data)
                sent(offset)
        return intake.commit(self._node_id, upload_id)

    def report_metrics(self, envelope: bytes) -> None:
        """Hand in a signed evaluation."""
        self._coordinator.report_metrics(self._node_id, envelope)


def simulate(
    config: Config,
    base_dir: Path,
    trainers: Mapping[str, Trainer],
    *,
    clock: Callable[[], float],
    on_event: Callable[[str, NodeEvent], None] = lambda name, event: None,
    connect: Callable[[Coordinator, str], LocalLink] = LocalLink,
) -> FederationResult:
    """Run a federation to its end in this process, one node after the other.

    `trainers` has one trainer by node name; `connect` makes the link of a node, from the coordinator and the node's id.
    A simulation that was stopped goes on where it was. Raises `RoundFailed` when a round ends without a model.
    """
    for trainer in trainers.values():
        trainer.check()
    keys = prepare_nodes(config, list(trainers))
    coordinator = Coordinator(config, base_dir, clock=clock)
    try:
        nodes: list[tuple[LocalLink, Node]] = []
        for name, trainer in trainers.items():
            link = connect(coordinator, keys[name].public.key_id)
            home = node_home(config, name)
            events = _for_node(on_event, name)
            node = Node(link, trainer, keys[name], coordinator.key.public, home, base=base_dir, on_event=events)
            nodes.append((link, node))
        coordinator.retry_failed()
        while True:
            while coordinator.advance():
                pass
            for link, node in nodes:
                node.react(link.view())
            if coordinator.finished():
                break
    finally:
        coordinator.close()
    return result_of(config)


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
            keys[name].save(path)
        trust.add(keys[name].public, name)
    return keys


def node_home(config: Config, name: str) -> Path:
    """Return a simulated node's folder: beside the coordinator's state."""
    return config.federation.state.parent / "nodes" / name


def _for_node(on_event: Callable[[str, NodeEvent], None], name: str) -> Callable[[NodeEvent], None]:
    return lambda event: on_event(name, event)
