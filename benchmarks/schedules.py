"""Federations under seeded faults, by the ten thousand: the deployed coordinator and nodes, in virtual time.

    python benchmarks/schedules.py [--quick] [--seeds N] [--first S] [--workers N] [--json FILE]
    python benchmarks/schedules.py --seed N [--trace] [--plant BUG]

A seed draws a round policy, two to four nodes, one or two coordinators on one database, and what happens to them: calls
that are lost, late, doubled or out of order, links that are down for a while, processes that are killed before any of
their writes to disk or at any moment, machines that lose power (and with it what was never synced) or stand still past
their lease, clocks that step, commands of an operator, a node that never comes back. Tasks that take the same lock may
come in between each other there. After a few minutes of virtual time nothing more happens, and the federation must end.
Then, from the ledger and the blobs alone (`promises.py`):

- every receipt that a node holds is for an event of the ledger, and every delta that was accepted was merged, or left
  out with a reason, or its round failed with one;
- each round was merged and published once, and nobody was told otherwise before;
- what was merged was signed by its node, for this round and this model, and not later than the plan allows;
- every node that is not gone for good ends with the published model;
- the same deltas lead to the same model, bit for bit: the one that an undisturbed run gives, and an auditor.

A failure prints the command that repeats it. Bugs that are planted must be found as well. Everything lies in memory.
"""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from calls import Observed
from disturbed import DisturbedFederation, Template, remember, small_leaves
from drawn import Schedule, draw
from greenlet import getcurrent
from machines import install, owners
from promises import Broken, History, Promises
from shared import at_least, at_most, print_table, report

from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.events import RoundPublished
from fedmerge.rounds import state as rounds
from fedmerge.rounds.journal import Journal
from fedmerge.rounds.state import FederationState, Phase, replay
from fedmerge.store import shelves
from fedmerge.store.lease import Lease
from fedmerge.store.ledger import Ledger

Put: TypeAlias = Callable[[Any, str, Any], None]

NUM_SEEDS = 20_000
BLOCK = 20
MAX_TO_FIND = 500


# Bugs, each planted by taking something away


def _unsynced(put: Put) -> None:
    """A delta is acknowledged before its bytes are durable."""
    put(shelves, "sync_file", lambda path: None)


def _effect_first(put: Put) -> None:
    """An event is committed a little later: what follows from it may happen before."""
    write, advance = Ledger._write, Coordinator.advance
    queued: list[Callable[[], None]] = []

    def write_later(self: Ledger, work: Any) -> None:
        flush()
        life = owners.get(getcurrent())
        if life is None or life.machine.life is not life:
            return
        queued.append(lambda: write(self, work) if life.is_alive else None)

    def flush() -> None:
        while queued:
            queued.pop()()

    def flush_and_advance(self: Coordinator) -> bool:
        flush()
        return advance(self)

    put(Ledger, "_write", write_later)
    put(Coordinator, "advance", flush_and_advance)


def _late(put: Put) -> None:
    """A delta is taken after its round was sealed."""
    staleness = FederationState.staleness

    def lenient(self: FederationState, round_number: int) -> int | None:
        return 0 if round_number == self.round and self.phase != Phase.FAILED else staleness(self, round_number)

    put(FederationState, "staleness", lenient)


def _twice(put: Put) -> None:
    """A restart forgets that the last round was published."""
    opened = Journal.__init__

    def forgetful(self: Journal, ledger: Ledger, *arguments: Any) -> None:
        opened(self, ledger, *arguments)
        if ledger.entries and isinstance(ledger.entries[-1].event, RoundPublished):
            self.state = replay(ledger.entries[:-1])

    put(Journal, "__init__", forgetful)
    put(rounds, "_LEGAL", {**rounds._LEGAL, RoundPublished: {Phase.PUBLISHING, Phase.PUBLISHED}})


def _unfenced(put: Put) -> None:
    """A coordinator that was deposed may go on writing."""
    put(Lease, "require", lambda self, connection: None)


PLANTED: dict[str, Callable[[Put], None]] = {
    "unsynced": _unsynced,
    "effect-first": _effect_first,
    "late": _late,
    "twice": _twice,
    "unfenced": _unfenced,
}


@dataclass
class Found:
    """What a number of seeds came to."""

    num_seeds: int = 0
    num_deaths: int = 0
    cpu_s: float = 0.0
    failures: dict[int, str] = field(default_factory=dict)
    digests: dict[tuple[tuple[str, int, int], History], str] = field(default_factory=dict)

    def add(self, other: Found) -> None:
        """Take in what others found; that the same deltas gave another model there is a failure, too."""
        self.num_seeds += other.num_seeds
        self.num_deaths += other.num_deaths
        self.cpu_s += other.cpu_s
        self.failures |= other.failures
        for key, digest in other.digests.items():
            if self.digests.setdefault(key, digest) != digest:
                self.failures[-1] = f"two processes got different models from the same deltas: {key}"


class Runner:
    """Runs schedules, one after the other, in a folder in memory."""

    def __init__(self, folder: Path) -> None:
        self.template = Template(folder)
        self.promises = Promises(self.template)

    def run(self, seed: int, trace: Callable[[str], None] | None = None) -> Observed:
        """Run a seed's schedule. Raises whatever is wrong."""
        schedule = draw(seed)
        if schedule.variant not in self.promises.undisturbed:
            self._run(schedule.undisturbed(), None)
        return self._run(schedule, trace)

    def _run(self, schedule: Schedule, trace: Callable[[str], None] | None) -> Observed:
        seen = DisturbedFederation(schedule, self.template, trace).run()
        self.promises.check(schedule, seen)
        return seen

    def run_all(self, seeds: Iterable[int]) -> Found:
        """Run many seeds."""
        found, began_s = Found(), time.process_time()
        for seed in seeds:
            try:
                found.num_deaths += self.run(seed).num_deaths
            except Exception as err:
                found.failures[seed] = f"{type(err).__name__}: {err}"
            found.num_seeds += 1
        gc.collect()
        found.digests = dict(self.promises.digests)
        found.cpu_s = time.process_time() - began_s
        return found


def prepare(folder: Path, bug: str | None = None, put: Put = setattr) -> Runner:
    """Make this process one that runs schedules, in a folder of its own, with a bug if there is to be one."""
    install(put)
    small_leaves(put)
    remember(put)
    if bug:
        PLANTED[bug](put)
    return Runner(folder)


runners: list[Runner] = []  # of a worker: its own


def _prepare_worker(folder: Path, bug: str | None) -> None:
    torch.set_num_threads(1)
    logging.disable()
    runners.append(prepare(folder / str(os.getpid()), bug))
    gc.disable()  # it is collected after each block
    gc.freeze()


def _run_block(seeds: range) -> Found:
    return runners[0].run_all(seeds)


def run_seeds(seeds: range, folder: Path, *, workers: int, bug: str | None = None, until_found: bool = False) -> Found:
    """Run seeds in processes of their own, in blocks; end with the first failure where that is wanted."""
    found, blocks = Found(), [seeds[start : start + BLOCK] for start in range(0, len(seeds), BLOCK)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker, initargs=(folder, bug)) as pool:
        for block in pool.map(_run_block, blocks):
            found.add(block)
            if bug is None and sys.stderr.isatty():
                print(f"\r{found.num_seeds} seeds, {len(found.failures)} failures", end="", file=sys.stderr)
            if until_found and found.failures:
                pool.shutdown(cancel_futures=True)
                break
    return found


def main() -> None:
    """Run what is asked for, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--plant", choices=PLANTED)
    arguments = parser.parse_args()
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="fedmerge-schedules-", dir=memory))
    try:
        if arguments.seed is not None:
            _run_one(arguments.seed, folder, arguments.plant, trace=arguments.trace)
        else:
            _run_many(arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_one(seed: int, folder: Path, bug: str | None, *, trace: bool) -> None:
    logging.disable()
    one = prepare(folder / "one", bug)
    print(draw(seed))
    try:
        one.run(seed, print if trace else None)
    except Broken as err:
        sys.exit(f"seed {seed}: {err}")
    print(f"seed {seed}: every promise was kept")


def _run_many(arguments: argparse.Namespace, folder: Path) -> None:
    num_seeds = arguments.seeds or (NUM_SEEDS // 100 if arguments.quick else NUM_SEEDS)
    seeds = range(arguments.first, arguments.first + num_seeds)
    found = run_seeds(seeds, folder, workers=arguments.workers)
    for seed, what in sorted(found.failures.items()):
        print(f"seed {seed}: {what}\n    python benchmarks/schedules.py --seed {seed} --trace")
    per_seed_ms = 1e3 * found.cpu_s / found.num_seeds
    print(
        f"{found.num_seeds} seeds, {len(found.failures)} failures; {found.num_deaths} processes were killed; "
        f"{len(found.digests)} sets of merged deltas; {per_seed_ms:.0f} ms of CPU a seed"
    )
    taken: dict[str, int] = {}
    for bug in PLANTED:
        broken = run_seeds(range(MAX_TO_FIND), folder, workers=1, bug=bug, until_found=True)
        taken[bug] = min(broken.failures) + 1 if broken.failures else MAX_TO_FIND + 1
    rows = [(bug, (PLANTED[bug].__doc__ or "").rstrip("."), str(taken[bug])) for bug in PLANTED]
    print()
    print_table(["bug", "what it is", "seeds to find it"], rows)
    targets = [
        at_most(0, "seeds that break a promise", len(found.failures)),
        *(at_most(MAX_TO_FIND, f"seeds until the planted bug is found, {bug}", taken[bug]) for bug in PLANTED),
        at_most(60, "CPU per seed, ms", per_seed_ms),
    ]
    if not arguments.quick:
        targets.insert(0, at_least(NUM_SEEDS, "seeds", found.num_seeds))
    report(targets, {"seeds": found.num_seeds, "deaths": found.num_deaths, "planted": taken}, arguments.json)
    if found.failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
