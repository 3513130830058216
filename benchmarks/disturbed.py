"""A federation on simulated machines: the deployed coordinator and nodes, a schedule of faults, and what came of it.

Only what lies between coordinator and nodes is replaced: a link whose calls are those of the gRPC service, one for one,
over `machines.Network`. Everything in a schedule follows from its seed.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from calls import LEAF_BYTES, TICK_S, Calls, Observed
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from drawn import LEASE_S, Schedule
from machines import Machine, Network, Stage, green_threading, stages
from safetensors.torch import save_file

from fedmerge.config import Config, parse_config
from fedmerge.coordinator import intake
from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.coordinator.ownership import open_seat
from fedmerge.errors import Deposed, RoundFailed, Unreachable, WrongPhase
from fedmerge.node.node import Node
from fedmerge.node.witness import Witness
from fedmerge.publishing import publish
from fedmerge.rounds import journal
from fedmerge.rounds.state import Phase
from fedmerge.sim.world import World
from fedmerge.statements import Statement
from fedmerge.store import blobs
from fedmerge.store.database import Database, sqlite_url
from fedmerge.store.seat import Seat
from fedmerge.tensors import Checkpoint
from fedmerge.training import TrainResult, TrainTask
from fedmerge.transparency import merkle
from fedmerge.trust.keys import Member, TrustStore
from fedmerge.trust.sign import PublicKey, SigningKey


def small_leaves(put: Callable[[Any, str, Any], None]) -> None:
    """Have payloads of a kilobyte consist of several leaves, and locks be those of a world's tasks."""
    put(merkle, "LEAF_BYTES", LEAF_BYTES)
    put(blobs, "LEAF_BYTES", LEAF_BYTES)
    put(intake, "threading", green_threading)
    put(journal, "threading", green_threading)


def remember(put: Callable[[Any, str, Any], None]) -> None:
    """Have what is found out again and again be found out once: statements under the same keys, package versions."""
    put(publish, "version", cache(publish.version))
    verify, known = Statement.open.__func__, dict[Any, Any]()  # type: ignore[attr-defined]

    def open_once(cls: type[Statement], envelope: bytes, trusted: Mapping[str, PublicKey], *, where: str) -> Any:
        asked = cls, envelope, *sorted(trusted)
        if asked not in known:
            if len(known) > 2000:
                known.clear()
            known[asked] = verify(cls, envelope, trusted, where=where)
        return known[asked]

    put(Statement, "open", classmethod(open_once))


class Known(TrustStore):
    """Keys that are trusted, and stay so."""

    def __init__(self, keys: Mapping[str, SigningKey]) -> None:
        self._known = {key.public.key_id: Member(name, key.public, name, "node") for name, key in keys.items()}
        self._public = {key_id: member.key for key_id, member in self._known.items()}
        self._named = {key_id: member.name for key_id, member in self._known.items()}

    def members(self) -> dict[str, Member]:
        """Return who is trusted, by key id."""
        return self._known

    def names(self) -> dict[str, str]:
        """Return the party's name by key id."""
        return self._named

    def keys(self) -> dict[str, PublicKey]:
        """Return the trusted keys by key id."""
        return self._public


class Walk:
    """A trainer: adds a step that depends on the node and the round."""

    def __init__(self, number: int, stage: Stage, *, evaluates: bool) -> None:
        self._number, self._stage, self._evaluates = number, stage, evaluates

    def check(self) -> None:
        """Accept anything."""

    def train(self, task: TrainTask) -> TrainResult:
        """Train for a while."""
        self._stage.rest(self._stage.rng.uniform(1.0, 30.0))
        before = Checkpoint(task.model_dir)
        generator = torch.Generator().manual_seed(1000 * task.round + self._number)
        tuned = {name: before[name] + 0.01 * torch.randn(before[name].shape, generator=generator) for name in before}
        out = task.workspace / "tuned"
        out.mkdir(exist_ok=True)
        with (out / "model.safetensors").open("wb"):
            pass  # whoever is killed from here on leaves a file that is not whole
        self._stage.rest(self._stage.rng.uniform(0.0, 5.0))
        save_file(tuned, out / "model.safetensors")
        return TrainResult(out, 10 + self._number)

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        """Have something to say, or not."""
        return {"norm": float(Checkpoint(model_dir)["matrix"].norm())} if self._evaluates else {}


class Template:
    """What all schedules begin with: a base model, keys, and a ledger with its tables, in a folder in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_folder = folder, folder / "run"
        self.base = folder / "base"
        self.base.mkdir(parents=True)
        generator = torch.Generator().manual_seed(0)
        tensors = {"matrix": torch.randn(12, 32, generator=generator), "vector": torch.randn(24, generator=generator)}
        save_file(tensors, self.base / "model.safetensors")
        (self.base / "config.json").write_text("{}")
        Database(sqlite_url(folder / "ledger.sqlite")).close()
        self.coordinator_key = _key(0)
        self.node_keys = {f"node-{number}": _key(number) for number in range(1, 5)}
        self.model_key = folder / "model-signing.key"
        SigningKey.load_or_create(self.model_key, "p256")

    def config(self, schedule: Schedule, host: str) -> Config:
        """Return a coordinator's configuration."""
        text = schedule.toml().replace("@HOST", str(self.run_folder / host))
        text = text.replace("@SHARED", str(self.run_folder / "shared"))
        return parse_config(text, folder=self.folder, where="fedmerge.toml")


def _key(number: int) -> SigningKey:
    return SigningKey(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


class Host:
    """A coordinator's machine: takes the lead when it is free, and moves rounds along."""

    def __init__(self, name: str, federation: DisturbedFederation) -> None:
        template, stage = federation.template, federation.stage
        self._federation = federation
        self.config = template.config(federation.schedule, name)
        self.coordinator: Coordinator | None = None
        self._seat: Seat | None = None
        self.clock_is_off_s = 0.0
        self.machine = Machine(name, template.run_folder / name, stage)
        self.machine.on_death = self.close
        self.config.federation.state.mkdir(parents=True)
        shutil.copy(template.model_key, self.config.federation.state / "model-signing.key")
        self.machine.start(lambda: self._until_deposed(self._main))

    def clock(self) -> float:
        """Return what this machine takes for the time."""
        return self._federation.stage.world.now_s + self.clock_is_off_s

    def close(self) -> None:
        """Let go of what the process holds."""
        self.coordinator = None
        if self._seat is not None:
            seat, self._seat = self._seat, None
            seat.close()

    def _main(self) -> None:
        stage, template = self._federation.stage, self._federation.template
        self._seat = seat = open_seat(self.config, stage.world.clock)
        stood_by = False
        while not seat.try_take():
            stood_by = True
            stage.rest(LEASE_S / 6)
        if self._federation.schedule.num_coordinators > 1:
            self.machine.spawn(lambda: self._until_deposed(lambda: self._keep_lease(seat)))
        trust = Known({name: template.node_keys[name] for name in self._federation.names})
        self.coordinator = Coordinator(
            self.config, template.base, clock=self.clock, seat=seat, key=template.coordinator_key, trust=trust
        )
        stage.trace(self.machine.name, "leads")
        self.coordinator.journal.on_change.append(stage.world.notify)
        if not stood_by:
            self.coordinator.retry_failed()
        self._move_rounds(self.coordinator)

    def _move_rounds(self, coordinator: Coordinator) -> None:
        stage = self._federation.stage
        while not self._federation.is_over:
            if coordinator.advance():
                state = coordinator.journal.state
                stage.trace(self.machine.name, f"round {state.round} is {state.phase}")
                stage.yield_now()
            else:
                stage.wait(stage.world.now_s + TICK_S)

    def _keep_lease(self, seat: Seat) -> None:
        while not self._federation.is_over:
            self._federation.stage.rest(LEASE_S / 3)
            seat.lease.renew()

    def _until_deposed(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Deposed:
            self.machine.kill()


class DisturbedFederation:
    """A federation in a world of its own, to be run once."""

    def __init__(self, schedule: Schedule, template: Template, trace: Callable[[str], None] | None = None) -> None:
        self.schedule, self.template = schedule, template
        self.rng = Random(f"course {schedule.seed}")
        self.world = World(1e6)
        self.stage = Stage(self.world, self.rng, trace)
        self.horizon_s = self.world.now_s + 60.0 * schedule.num_rounds
        self.network = Network(
            self.stage,
            loss=schedule.loss,
            doubling=schedule.doubling,
            slowest_s=schedule.slowest_s,
            until_s=self.horizon_s,
        )
        self.observed = Observed()
        self.names = list(template.node_keys)[: schedule.num_nodes]
        stages[:] = [self.stage]
        shutil.rmtree(template.run_folder, ignore_errors=True)
        (template.run_folder / "shared").mkdir(parents=True)
        shutil.copyfile(template.folder / "ledger.sqlite", template.run_folder / "shared" / "ledger.sqlite")
        self.hosts = [Host(f"host-{letter}", self) for letter in "ab"[: schedule.num_coordinators]]
        self.machines = {name: Machine(name, template.run_folder / name, self.stage) for name in self.names}
        for number, name in enumerate(self.names):
            self._start_node(number + 1, name)
        self.world.spawn(self._operate, after_s=20.0)
        if schedule.faults:
            self._plan_faults()

    @property
    def is_over(self) -> bool:
        """Whether every node that lives has its last model."""
        return self.observed.finals.keys() | self.observed.vanished >= set(self.names)

    def run(self) -> Observed:
        """Let it happen."""
        token_hex = secrets.token_hex
        secrets.token_hex = lambda num_bytes=32: self.rng.randbytes(num_bytes).hex()  # type: ignore[assignment]
        try:
            self.world.run()
        finally:
            secrets.token_hex = token_hex
            for host in self.hosts:
                host.close()
        self.observed.num_deaths = sum(each.num_deaths for each in self._all_machines())
        return self.observed

    def _start_node(self, number: int, name: str) -> None:
        schedule, template, machine = self.schedule, self.template, self.machines[name]
        key, coordinator = template.node_keys[name], template.coordinator_key.public
        trainer = Walk(number, self.stage, evaluates=schedule.evaluates)

        def main() -> None:
            while True:
                link = Calls(self.network, self.hosts, name, key.public.key_id, self.observed)
                witness = Witness(machine.root, link, key, coordinator, self.world.clock)
                member = Node(
                    link,
                    trainer,
                    key,
                    coordinator,
                    machine.root,
                    base=None if schedule.fetches_base else template.base,
                    witness=witness if schedule.witnesses else None,
                )
                try:
                    final = member.run()
                except (RoundFailed, Unreachable) as err:
                    self.stage.trace(name, f"ends: {err.message}")
                    self.stage.rest(self.rng.uniform(5.0, 60.0))  # then somebody starts it again
                else:
                    self.stage.trace(name, f"has the last model, {final.name[:12]}")
                    self.observed.finals[name] = final
                    self.world.notify()
                    return

        machine.start(main, self.rng.uniform(0.0, 10.0))

    def _operate(self) -> None:
        """Be the operator: have rounds that failed tried again, and those that were paused go on, after a while."""
        while not self.is_over:
            for host in self.hosts:
                coordinator = host.coordinator
                if coordinator is not None and coordinator.journal.state.phase == Phase.FAILED:
                    host.machine.spawn(lambda host=host: self._order(host, "retry"))
                if coordinator is not None and coordinator.journal.state.paused_at_s is not None:
                    host.machine.spawn(lambda host=host: self._order(host, "resume"))
            self.world.sleep(50.0)

    def _order(self, host: Host, what: str) -> None:
        if host.coordinator is None:
            return
        operator = host.coordinator.operator
        orders: dict[str, Callable[[], int]] = {
            "retry": lambda: operator.retry("again"),
            "pause": lambda: operator.pause("wait"),
            "resume": lambda: operator.resume("go on"),
            "close": lambda: operator.close("enough"),
            "extend": lambda: operator.extend(60.0, "more time"),
        }
        with suppress(WrongPhase, Deposed):
            orders[what]()
            self.stage.trace(host.machine.name, f"is told to {what}")

    def _all_machines(self) -> list[Machine]:
        return [*(host.machine for host in self.hosts), *self.machines.values()]

    def _plan_faults(self) -> None:
        schedule, rng = self.schedule, self.rng

        def at_some_time(act: Callable[[], None]) -> None:
            self.world.spawn(act, after_s=rng.uniform(0.0, self.horizon_s - self.world.now_s))

        for _ in range(schedule.num_kills):
            at_some_time(self._kill_some)
        for _ in range(schedule.num_cuts):
            begin_s = rng.uniform(self.world.now_s, self.horizon_s)
            self.network.cuts.append((rng.choice(self.names), begin_s, begin_s + rng.uniform(1.0, 60.0)))
        for _ in range(schedule.num_freezes):
            at_some_time(self._freeze)
        for _ in range(schedule.num_clock_steps):
            at_some_time(self._step_clock)
        for _ in range(schedule.num_orders):
            what = rng.choice(["pause", "close", "extend"])
            at_some_time(lambda what=what: self._order_all(what))
        if schedule.vanishes:
            at_some_time(self._vanish)

    def _order_all(self, what: str) -> None:
        for host in self.hosts:
            if host.machine.life is not None:
                host.machine.spawn(lambda host=host: self._order(host, what))

    def _kill_some(self) -> None:
        """Kill a machine now, or at one of its next writes; coordinators twice as often."""
        machine = self.rng.choice([*(host.machine for host in self.hosts * 2), *self.machines.values()])
        cut_power = self.schedule.cuts_power and self.rng.random() < 0.5
        if machine.life is None or machine.name in self.observed.finals:
            return
        if self.rng.random() < 0.2:
            machine.kill(cut_power=cut_power)
        else:
            machine.life.writes_left = int(self.rng.expovariate(1 / 30))
            machine.life.cut_power = cut_power

    def _freeze(self) -> None:
        machine = self.rng.choice(self._all_machines())
        machine.frozen_until_s = self.world.now_s + self.rng.uniform(1.0, 2 * LEASE_S)
        self.stage.trace(machine.name, f"is stopped until {machine.frozen_until_s:.4f}")

    def _step_clock(self) -> None:
        host = self.rng.choice(self.hosts)
        host.clock_is_off_s += self.rng.choice([-3600.0, -5.0, 5.0, 50.0])
        self.stage.trace(host.machine.name, f"has a clock that is off by {host.clock_is_off_s:g} s")

    def _vanish(self) -> None:
        name = self.rng.choice(self.names)
        if name not in self.observed.finals:
            machine = self.machines[name]
            machine.revive = lambda: None
            machine.kill()
            self.observed.vanished.add(name)
            self.stage.trace(name, "is gone for good")
