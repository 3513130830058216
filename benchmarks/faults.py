"""What happens to a federation of real processes when things go wrong, and whether what is promised of it still holds.

    python benchmarks/faults.py [--quick] [--part NAME]... [--jobs N] [--seed N] [--json FILE]

Two nodes and a coordinator, `fedmerge join` and `fedmerge serve`, merge two rounds of a small model with seeded masks
and Nesterov momentum. After every trial: each receipt that a node holds is for an event in the ledger, each delta was
accepted once and each round published once, and coordinator and nodes end with the version that an undisturbed
simulation gives, in a directory that verifies. No failure in N trials means with 95 % confidence fewer than 3 in N.

Each part first runs with a bug planted in the product, which it must find. A part that this machine does not allow says
why and is skipped. `--seed` draws other moments than the ones of last time.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import fault_clock
import fault_disk
import fault_network
import fault_power
import fault_processes
from fault_federation import NODES, Failed, Part, Template, Trial, running
from shared import at_least, at_most, print_table, report

from fedmerge.errors import FedmergeError

PARTS = {
    "found": fault_disk.FOUND,
    "kill": fault_processes.KILL,
    "syscalls": fault_disk.SYSCALLS,
    "errors": fault_disk.ERRORS,
    "full": fault_disk.FULL,
    "power": fault_power.POWER,
    "standby": fault_clock.STANDBY,
    "clock": fault_clock.CLOCK,
    "lines": fault_network.LINES,
    "chunks": fault_network.CHUNKS,
    "network": fault_network.NETWORK,
}


class Outcome(NamedTuple):
    """How a trial went: whether the fault came about, and what was broken by it; empty for nothing."""

    happened: bool
    broken: str


def attempt(template: Template, trial: Trial, number: int, part: Part, *, planted: bool) -> Outcome:
    """Do a trial in a folder of its own."""
    with running(template, template.folder.with_name(f"trial-{number}")) as run:
        if planted and part.bug is not None:
            run.before = {name: [part.bug] for name in ("coordinator", *NODES)}
        try:
            happened = trial(run)
            run.check()
        except (Failed, FedmergeError) as err:
            return Outcome(True, str(err))
    return Outcome(happened, "")


def find_planted(template: Template, part: Part, draw: random.Random) -> tuple[bool, int]:
    """Return whether the planted bug was found, and in which trial."""
    number = 0
    for number, trial in enumerate(part.planted(template, draw), 1):
        outcome = attempt(template, trial, number, part, planted=True)
        if "TypeError" in outcome.broken:  # of what was planted: the product has changed since
            raise SystemExit(outcome.broken)
        if outcome.broken:
            print(f"  found what was planted, in trial {number}: {outcome.broken[:300]}", flush=True)
            return True, number
    return False, number


def do_trials(template: Template, part: Part, trials: Sequence[Trial], jobs: int) -> list[Outcome]:
    """Do trials, several at a time, and print what was broken."""
    outcomes = []
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [
            pool.submit(attempt, template, trial, number, part, planted=False) for number, trial in enumerate(trials)
        ]
        for number, each in enumerate(waiting):
            outcomes.append(each.result())
            if outcomes[-1].broken:
                print(f"  BROKEN in trial {number}: {outcomes[-1].broken}", flush=True)
    return outcomes


def main() -> None:
    """Do the parts, print a table, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", action="append", choices=list(PARTS))
    parser.add_argument("--jobs", type=int, default=4, help="trials at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    targets, figures, rows = [], {}, []
    with tempfile.TemporaryDirectory(prefix="fedmerge-faults-") as scratch:
        template = Template(Path(scratch))
        for name in arguments.part or PARTS:
            part, draw, began_s = PARTS[name], random.Random(f"{name} {arguments.seed}"), time.monotonic()
            if reason := part.why_not():
                print(f"{name}: skipped: {reason}")
                rows.append([part.about, "skipped", "", "", ""])
                continue
            print(f"{name}: {part.about}", flush=True)
            found, num_planted = (False, 0) if part.bug is None else find_planted(template, part, draw)
            outcomes = do_trials(template, part, part.trials(template, draw, arguments.quick), arguments.jobs)
            num_trials = sum(each.happened for each in outcomes)
            broken = [each.broken for each in outcomes if each.broken]
            wall_s = time.monotonic() - began_s
            rows.append(
                [
                    part.about,
                    str(num_trials),
                    str(len(broken)),
                    str(num_planted) if found else "NO" if part.bug else "",
                    f"{wall_s:.0f}",
                ]
            )
            targets += [
                at_most(0, f"{name}: failures in {num_trials} trials", len(broken)),
            ]
            if part.bug is not None:
                targets.append(at_least(1, f"{name}: planted bug found", int(found)))
            figures[name] = {"trials": num_trials, "broken": broken, "planted_after": num_planted, "wall_s": wall_s}
    print()
    print_table(["fault", "trials", "failures", "planted found in trial", "wall s"], rows)
    report(targets, figures, arguments.json)


if __name__ == "__main__":
    main()
