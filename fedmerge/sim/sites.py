"""Simulated partner sites: how fast they train and send, when they are there, and a link that takes that long."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from fedmerge.config import Config
from fedmerge.config.simulate import Simulate
from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.node.link import RoundView
from fedmerge.seeds import derive_seed, fraction
from fedmerge.sim.availability import Availability
from fedmerge.sim.world import World
from fedmerge.transparency.log import Growth
from fedmerge.transparency.merkle import LEAF_BYTES, leaves_of

BYTES_PER_MBIT = 125_000
SLOT_S = 3600.0
NUM_SLOTS = 24 * 366


@dataclass(frozen=True)
class Site:
    """One partner's machine and line. A rate of 0 bytes per second stands for one without limit.

    `train_s` is how long a fine-tune takes, `online` the share of hours in which the site is there, `dropout` the share
    of rounds that it begins and never delivers in. `seed` is its own. Where there is an `availability`, that says when
    it is there. Hours, and that, count from `began_s` on.
    """

    up_bytes_per_s: float = 0.0
    down_bytes_per_s: float = 0.0
    latency_s: float = 0.0
    train_s: float = 0.0
    online: float = 1.0
    dropout: float = 0.0
    seed: int = 0
    availability: Availability | None = None
    began_s: float = 0.0

    def send_s(self, num_bytes: int) -> float:
        """Return how long an upload takes."""
        return _transfer_s(num_bytes, self.up_bytes_per_s, self.latency_s)

    def fetch_s(self, num_bytes: int) -> float:
        """Return how long a download takes."""
        return _transfer_s(num_bytes, self.down_bytes_per_s, self.latency_s)

    def drops_out(self, round_number: int) -> bool:
        """Return whether the site begins a round without ever delivering in it."""
        return self.dropout > 0 and fraction(self.seed, "dropout", round_number) < self.dropout

    def offline_s(self, now_s: float) -> float:
        """Return how long it takes until the site is there: infinity when it never is again.

        Without an `availability` it is, or is not, for an hour at a time.
        """
        since_s = now_s - self.began_s
        if self.availability is not None:
            return self.availability.away_s(since_s)
        if self.online >= 1:
            return 0.0
        first = int(since_s // SLOT_S)
        for slot in range(first, first + NUM_SLOTS):
            if fraction(self.seed, "online", slot) < self.online:
                return max(0.0, slot * SLOT_S - since_s)
        return NUM_SLOTS * SLOT_S


def make_site(settings: Simulate, name: str, availability: Availability | None = None, *, began_s: float = 0.0) -> Site:
    """Return the site called `name`. It depends on the settings and the name alone, not on what other sites there are.

    It is there by `availability`, of a simulation that began at `began_s`. Speeds are drawn log-normally around their
    medians, with a standard deviation of `spread` in the logarithm.
    """
    seed = derive_seed("simulate.site", settings.seed, name)

    def median(value: float, what: str) -> float:
        return value * math.exp(settings.spread * NormalDist().inv_cdf(fraction(seed, what)))

    straggles = fraction(seed, "straggler") < settings.stragglers
    return Site(
        up_bytes_per_s=median(settings.up_mbit_s, "up") * BYTES_PER_MBIT,
        down_bytes_per_s=median(settings.down_mbit_s, "down") * BYTES_PER_MBIT,
        latency_s=settings.latency_s,
        train_s=median(settings.train_s, "train") * (settings.straggler_factor if straggles else 1.0),
        online=settings.online,
        dropout=settings.dropout,
        seed=seed,
        availability=availability,
        began_s=began_s,
    )


def node_home(config: Config, name: str) -> Path:
    """Return a simulated node's folder: beside the coordinator's state."""
    return config.federation.state.parent / "nodes" / name


def _transfer_s(num_bytes: int, bytes_per_s: float, latency_s: float) -> float:
    return latency_s + (num_bytes / bytes_per_s if bytes_per_s else 0.0)


class LocalLink:
    """A `fedmerge.node.link.Link` to a coordinator in the same process."""

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

    def size(self, root: str) -> int:
        """Return the size of a file of the coordinator's, in bytes."""
        return self._coordinator.artifact(root).stat().st_size

    def fetch(self, root: str, target: Path) -> list[bytes]:
        """Copy a file of the coordinator's."""
        shutil.copyfile(self._coordinator.artifact(root), target)
        return leaves_of(target)

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

    def growth(self, old_size: int) -> Growth:
        """Return a checkpoint of the log, and the proof that it continues that of `old_size` events."""
        return self._coordinator.log.growth(old_size)

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """Return the proof that event `index` is among the first `size`."""
        return self._coordinator.log.inclusion(index, size)

    def cosign(self, note: bytes, cosignature: bytes) -> None:
        """Hand in a cosignature."""
        self._coordinator.log.cosign(self._node_id, note, cosignature)

    def report_metrics(self, envelope: bytes) -> None:
        """Hand in a signed evaluation."""
        self._coordinator.report_metrics(self._node_id, envelope)


class TimedLink:
    """A link whose transfers take as long as a site's line makes them."""

    def __init__(self, link: LocalLink, world: World, site: Site) -> None:
        self._link, self._world, self._site = link, world, site

    def view(self) -> RoundView:
        """Return the federation's state now."""
        return self._link.view()

    def keep_trying(self, patience_s: float) -> None:
        """Do nothing: this coordinator always answers."""

    def watch(self) -> Iterator[RoundView]:
        """Yield the state now; a simulation asks again itself."""
        return self._link.watch()

    def pay(self, num_bytes: int) -> None:
        """Take the time of a download."""
        self._world.sleep(self._site.fetch_s(num_bytes))

    def fetch(self, root: str, target: Path) -> list[bytes]:
        """Fetch a file."""
        self.pay(self._link.size(root))
        return self._link.fetch(root, target)

    def submit(self, envelope: bytes, payload: Path, leaves: list[bytes], sent: Callable[[int], None]) -> bytes:
        """Deliver a payload, once the site is there."""
        self._world.sleep(self._site.offline_s(self._world.now_s))
        self._world.sleep(self._site.send_s(payload.stat().st_size))
        return self._link.submit(envelope, payload, leaves, sent)

    def growth(self, old_size: int) -> Growth:
        """Return a checkpoint of the log, and the proof that it continues that of `old_size` events."""
        return self._link.growth(old_size)

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """Return the proof that event `index` is among the first `size`."""
        return self._link.inclusion(index, size)

    def cosign(self, note: bytes, cosignature: bytes) -> None:
        """Hand in a cosignature."""
        self._link.cosign(note, cosignature)

    def report_metrics(self, envelope: bytes) -> None:
        """Hand in a signed evaluation."""
        self._link.report_metrics(envelope)
