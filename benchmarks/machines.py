"""Simulated machines in virtual time: processes that are killed between any two of their writes, disks, and a network.

A process is a set of tasks of a `fedmerge.sim` world. It dies at a moment, or just before its n-th write from now on
(what Python's audit events, `os.fsync` and SQLAlchemy show: files opened for writing, renamed, removed; statements and
commits). From then on nothing that it still does reaches a disk. A power cut also takes what was never synced.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, TypeVar

from greenlet import getcurrent
from sqlalchemy import event
from sqlalchemy.engine import Engine

from fedmerge.errors import Busy, FedmergeError, ResourceError, Unreachable
from fedmerge.sim.world import World

Answer = TypeVar("Answer")

MAX_STEPS = 60_000


class Killed(BaseException):
    """What a process does ends here."""


class Endless(Exception):
    """The schedule does not come to an end."""


class Life:
    """A process from its start to its end. `writes_left` is how many writes it lives for still."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.is_alive = True
        self.writes_left: int | None = None
        self.cut_power = True


class Machine:
    """A computer with a disk at `root`, on which at most one process runs."""

    def __init__(self, name: str, root: Path, stage: Stage) -> None:
        self.name, self.root, self.stage = name, root, stage
        self.disks = f"{root.parent}/"
        self.life: Life | None = None
        self.frozen_until_s = 0.0
        # How many writes the next process lives for; power is cut then.
        self.fuse: int | None = None
        self.num_deaths = 0
        # Files with bytes that were never synced.
        self.unsynced: dict[str, None] = {}
        self.on_death: Callable[[], None] = lambda: None

    def start(self, main: Callable[[], None], after_s: float = 0.0) -> None:
        """Begin a process once `after_s` have passed, and again some time after each of its deaths."""

        def boot() -> None:
            self.life = Life(self)
            self.life.writes_left, self.fuse = self.fuse, None
            self.stage.trace(self.name, "starts")
            self.spawn(main)

        def revive() -> None:
            self.start(main, self.stage.rng.uniform(1.0, 40.0))

        self.revive = revive
        self.stage.world.spawn(boot, after_s=after_s)

    def spawn(self, run: Callable[[], None]) -> None:
        """Begin a task of the process that runs."""
        life = self.life
        assert life is not None

        def task() -> None:
            owners[getcurrent()] = life
            try:
                self.stage.woken()
                run()
            except Killed:
                pass
            finally:
                del owners[getcurrent()]

        self.stage.world.spawn(task)

    def kill(self, *, cut_power: bool = False) -> None:
        """End the process, if one runs."""
        life, self.life = self.life, None
        if life is None:
            return
        life.is_alive = False
        self.num_deaths += 1
        self.stage.trace(self.name, "loses power" if cut_power else "is killed")
        reaping.append(life)
        try:
            self.on_death()
        finally:
            reaping.remove(life)
        if cut_power:
            self._lose_unsynced()
        self.unsynced.clear()
        self.stage.world.notify()
        self.revive()

    def _lose_unsynced(self) -> None:
        for name in self.unsynced:
            path = Path(name)
            if path.is_file():
                kept = self.stage.rng.choice([0, 0.5, 1])
                os.truncate(path, int(path.stat().st_size * kept))

    def wrote(self, what: str, names: tuple[Any, ...]) -> None:
        """Keep account of what is durable."""
        match what, names:
            case "open", (str(name), *_):
                self.unsynced[name] = None
            case "os.rename", (str(old), str(new), *_):
                for name in [each for each in self.unsynced if each == old or each.startswith(f"{old}/")]:
                    del self.unsynced[name]
                    self.unsynced[new + name[len(old) :]] = None
            case "os.remove", (str(name), *_):
                self.unsynced.pop(name, None)


class Stage:
    """What machines share: a world, a source of chance, and a place for what happened."""

    def __init__(self, world: World, rng: Random, trace: Callable[[str], None] | None = None) -> None:
        self.world, self.rng = world, rng
        self._trace = trace
        self._num_steps = 0

    def trace(self, who: str, what: str) -> None:
        """Note something that happened."""
        if self._trace is not None:
            self._trace(f"{self.world.now_s:12.4f}  {who:8} {what}")

    def rest(self, duration_s: float) -> None:
        """Let time pass for the process that calls; it may be dead or frozen then."""
        self.world.sleep(duration_s)
        self.woken()

    def wait(self, until_s: float) -> None:
        """Let time pass until somebody notifies, or `until_s`."""
        self.world.wait(until_s)
        self.woken()

    def woken(self) -> None:
        self._num_steps += 1
        if self._num_steps > MAX_STEPS:
            raise Endless(f"no end after {self.world.now_s:.0f} s and {MAX_STEPS} steps")
        life = owners.get(getcurrent())
        if life is None:
            return
        while life.is_alive and (left_s := life.machine.frozen_until_s - self.world.now_s) > 0:
            self.world.sleep(left_s)
        if not life.is_alive:
            raise Killed

    def yield_now(self) -> None:
        """Let others have their turn, sometimes."""
        if getcurrent() in owners and self.rng.random() < 0.1:
            self.rest(self.rng.choice([0.0, 0.001, 0.05, 1.0]))


class Lock:
    """A lock between a world's tasks that the same task may take again; each time somebody may come in between."""

    def __init__(self) -> None:
        self._holder: object = None
        self._depth = 0

    def __enter__(self) -> None:
        stage, me = stages[-1], getcurrent()
        if self._holder is not me:
            stage.yield_now()
            while self._holder is not None:
                stage.rest(0.001)
            self._holder = me
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._holder = None


# To be put in place of `threading` in modules whose locks tasks of a world take.
green_threading = SimpleNamespace(**{**vars(threading), "Lock": Lock, "RLock": Lock})

owners: dict[object, Life] = {}
reaping: list[Life] = []
stages: list[Stage] = []
_in_hook: list[None] = []
_installed: list[None] = []
_true_fsync = os.fsync
WRITES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "fsync", "sql", "commit"}


def _before(what: str, arguments: tuple[Any, ...]) -> None:
    """See a write before it takes place; it does not where the process is dead, or dies now."""
    if not owners or what not in WRITES or _in_hook:
        return
    life = owners.get(getcurrent())
    if life is None:
        return
    name = str(arguments[0]) if arguments else ""
    if (what == "open" and not _is_writing(*arguments)) or (
        name[:1] == "/" and not name.startswith(life.machine.disks)
    ):
        return  # caches of compiled code, for instance, which are there the second time
    if not life.is_alive:
        raise Killed
    _in_hook.append(None)
    try:
        if life.writes_left is not None:
            life.writes_left -= 1
            if life.writes_left < 0:
                if what == "open" and arguments[1] == "w" and name[:1] == "/" and not Path(name).is_dir():
                    Path(name).write_bytes(b"")  # opened, and nothing written yet
                life.machine.stage.trace(life.machine.name, f"dies at {what} {_short(arguments)}")
                life.machine.kill(cut_power=life.cut_power)
                raise Killed
        life.machine.wrote(what, arguments)
    finally:
        _in_hook.pop()


def _is_writing(name: object, mode: object, flags: object, *_: object) -> bool:
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def _short(arguments: tuple[Any, ...]) -> str:
    return " ".join("/".join(each.split("/")[-2:]) for each in arguments if isinstance(each, str) and "/" in each)


def _fsync(descriptor: int) -> None:
    life = owners.get(getcurrent())
    if life is None:
        _true_fsync(descriptor)
        return
    name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
    _before("fsync", (name,))
    life.machine.unsynced.pop(name, None)


def _before_statement(*_: object) -> None:
    if reaping:
        raise ResourceError("the process is dead")  # as its end of the connection is
    _before("sql", ())


def _before_commit(*_: object) -> None:
    _before("commit", ())


def install(put: Callable[[Any, str, Any], None]) -> None:
    """Have processes of this interpreter's worlds die at their writes. Of other code the hooks take no notice."""
    put(os, "fsync", _fsync)
    if not _installed:
        _installed.append(None)
        sys.addaudithook(_before)
        event.listen(Engine, "before_cursor_execute", _before_statement)
        event.listen(Engine, "commit", _before_commit)


class Network:
    """Calls to machines: late, lost, doubled, cut short; and machines that can't reach each other for a while."""

    def __init__(self, stage: Stage, *, loss: float, doubling: float, slowest_s: float, until_s: float) -> None:
        self.stage = stage
        self._loss, self._doubling, self._slowest_s, self._until_s = loss, doubling, slowest_s, until_s
        self.cuts: list[tuple[str, float, float]] = []

    @property
    def is_calm(self) -> bool:
        """Whether everything gets through from here on."""
        return self.stage.world.now_s > self._until_s

    def loses(self) -> bool:
        """Whether the next message is lost."""
        return not self.is_calm and self.stage.rng.random() < self._loss

    def call(self, caller: str, callee: Machine, what: str, serve: Callable[[], Answer]) -> Answer:
        """Have `serve` done in the process on another machine. Raises `Unreachable`, and what it raises."""
        stage, rng = self.stage, self.stage.rng
        stage.rest(self._delay_s())
        if self._is_cut(caller) or self.loses():
            stage.trace(caller, f"{what}: lost")
            stage.rest(rng.choice([0.1, 20.0]))
            raise Unreachable("no answer")
        if callee.life is None:
            raise Unreachable("nobody is there")
        life, answers = callee.life, list[Callable[[], Answer]]()

        def handle() -> None:
            stage.yield_now()
            try:
                answer = serve()
            except FedmergeError as err:
                failure = Busy("not at present") if isinstance(err, ResourceError) else err
                answers.append(lambda: _raise(failure))
            else:
                answers.append(lambda: answer)
            stage.world.notify()

        callee.spawn(handle)
        if not self.is_calm and rng.random() < self._doubling:
            self._again(callee, what, serve)
        give_up_s = stage.world.now_s + 120.0
        while not answers and life.is_alive and stage.world.now_s < give_up_s:
            stage.wait(give_up_s)
        if not answers or self._is_cut(caller) or self.loses():
            stage.trace(caller, f"{what}: the answer is lost")
            stage.rest(self._delay_s())
            raise Unreachable("the answer is lost")
        stage.rest(self._delay_s())
        stage.trace(caller, what)
        return answers[0]()

    def _again(self, callee: Machine, what: str, serve: Callable[[], object]) -> None:
        """Have a message arrive once more, any time later."""

        def handle() -> None:
            self.stage.trace(callee.name, f"{what}: once more")
            try:
                serve()
            except FedmergeError as err:
                self.stage.trace(callee.name, f"{what}: {type(err).__name__}")

        def arrive() -> None:
            if callee.life is not None:
                callee.spawn(handle)

        self.stage.world.spawn(arrive, after_s=self.stage.rng.expovariate(1 / 30.0))

    def _delay_s(self) -> float:
        return self.stage.rng.uniform(0.0, 0.01 if self.is_calm else self._slowest_s)

    def _is_cut(self, name: str) -> bool:
        now_s = self.stage.world.now_s
        return any(name == cut and begin_s <= now_s < end_s for cut, begin_s, end_s in self.cuts)


def _raise(err: Exception) -> Any:
    raise err
