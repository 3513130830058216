"""A node's link in simulations with faults: the calls of the gRPC service, one for one, over a network that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from machines import Machine, Network

from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.errors import BadOffset, Busy, UnknownUpload, Unreachable
from fedmerge.node.link import RoundView
from fedmerge.sim.sites import LocalLink
from fedmerge.transparency.log import Growth
from fedmerge.transparency.merkle import leaves_of

Answer = TypeVar("Answer")

LEAF_BYTES = 512
TICK_S = 20.0


class Server(Protocol):
    """A coordinator's machine, and the coordinator while it leads there."""

    machine: Machine
    coordinator: Coordinator | None


@dataclass
class Observed:
    """What a schedule led to: what the coordinator signed to nodes, and each node's model at its end."""

    receipts: list[bytes] = field(default_factory=list)
    records: set[bytes] = field(default_factory=set)
    finals: dict[str, Path] = field(default_factory=dict)
    vanished: set[str] = field(default_factory=set)
    num_deaths: int = 0


class Calls:
    """A `fedmerge.node.link.Link` of single calls, each of which may fail, with the retries of the gRPC link."""

    def __init__(
        self, network: Network, servers: Sequence[Server], name: str, node_id: str, observed: Observed
    ) -> None:
        self._network, self._servers, self._stage = network, servers, network.stage
        self._name, self._node_id, self._observed = name, node_id, observed
        self._turn = 0

    def _call(self, what: str, serve: Callable[[Coordinator], Answer]) -> Answer:
        host = self._servers[self._turn % len(self._servers)]

        def serve_if_leading() -> Answer:
            if host.coordinator is None:
                raise Unreachable("stands by")
            return serve(host.coordinator)

        return self._network.call(self._name, host.machine, what, serve_if_leading)

    def _insist(self, attempt: Callable[[], Answer], *also: type[Exception]) -> Answer:
        stage, delay_s = self._stage, 1.0
        give_up_s = stage.world.now_s + 900.0
        while True:
            try:
                return attempt()
            except (Unreachable, *also):
                self._turn += 1
                if stage.world.now_s > give_up_s:
                    raise
                stage.rest(stage.rng.uniform(0.0, delay_s))
                delay_s = min(2 * delay_s, 30.0)

    def keep_trying(self, patience_s: float) -> None:
        """Go on as before."""

    def watch(self) -> Iterator[RoundView]:
        """Yield the state now and after every change."""
        stage, num_seen = self._stage, -1

        def look(coordinator: Coordinator) -> tuple[int, RoundView]:
            until_s = stage.world.now_s + 10 * TICK_S
            while len(coordinator.journal.ledger.entries) == num_seen and stage.world.now_s < until_s:
                stage.wait(until_s)
            with coordinator.journal.lock:
                return len(coordinator.journal.ledger.entries), LocalLink(coordinator, self._node_id).view()

        while True:
            num_seen, view = self._insist(lambda: self._call("view", look), Busy)
            self._observed.records.add(view.record_envelope)
            yield view
            if view.finished:
                return

    def fetch(self, root: str, target: Path) -> list[bytes]:
        """Fetch a file into `target`, continuing after the bytes that are there."""

        def attempt() -> None:
            have_bytes = target.stat().st_size if target.exists() else 0

            def read(coordinator: Coordinator) -> bytes:
                path = coordinator.artifact(root)
                if have_bytes > path.stat().st_size:
                    raise BadOffset("the file is shorter")
                return path.read_bytes()[have_bytes:]

            try:
                data = self._call(f"fetch {root[:6]}", read)
            except BadOffset:
                target.unlink()
                raise
            is_cut = self._network.loses()
            with target.open("ab") as file:
                file.write(data[: len(data) // 2] if is_cut else data)
            if is_cut:
                raise Unreachable("the stream broke")

        self._insist(attempt, BadOffset, Busy)
        return leaves_of(target)

    def submit(self, envelope: bytes, payload: Path, leaves: list[bytes], sent: Callable[[int], None]) -> bytes:
        """Upload a payload from wherever it stands, commit it, and return the receipt."""
        me, data = self._node_id, payload.read_bytes()

        def attempt() -> bytes:
            upload_id, stored = self._call("begin", lambda each: each.intake.begin(me, envelope, b"".join(leaves)))
            sent(stored)
            while stored < len(data):
                stored = self._send(upload_id, stored, data[stored : stored + LEAF_BYTES])
                sent(stored)
            return self._call("commit", lambda each: each.intake.commit(me, upload_id))

        receipt = self._insist(attempt, BadOffset, Busy, UnknownUpload)
        self._observed.receipts.append(receipt)
        return receipt

    def _send(self, upload_id: str, offset: int, chunk: bytes) -> int:
        me = self._node_id
        return self._call(f"chunk {offset}", lambda each: each.intake.write_chunk(me, upload_id, offset, chunk))

    def growth(self, old_size: int) -> Growth:
        """Return a checkpoint of the log, and the proof that it continues that of `old_size` events."""
        return self._insist(lambda: self._call("growth", lambda each: each.log.growth(old_size)), Busy)

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """Return the proof that event `index` is among the first `size`."""
        return self._insist(lambda: self._call("inclusion", lambda each: each.log.inclusion(index, size)), Busy)

    def cosign(self, note: bytes, cosignature: bytes) -> None:
        """Hand in a cosignature."""
        me = self._node_id
        self._insist(lambda: self._call("cosign", lambda each: each.log.cosign(me, note, cosignature)), Busy)

    def report_metrics(self, envelope: bytes) -> None:
        """Hand in a signed evaluation."""
        me = self._node_id
        self._insist(lambda: self._call("metrics", lambda each: each.report_metrics(me, envelope)), Busy)
