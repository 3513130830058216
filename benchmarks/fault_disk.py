"""Faults around what is written: kills between two system calls, calls that fail, and disks that are full."""

from __future__ import annotations

import errno
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence

import fault_bugs
from fault_federation import NODES, Before, Failed, Part, Run, Template, Trial, running
from fault_syscalls import Fault, await_tracer, trace, why_not

KILLED = -9
EXIT_RESOURCE = 8
# What a message about a failed call has in it: the system's words, or SQLite's.
WORDS = {
    errno.EIO: ("Input/output error", "disk I/O error"),
    errno.ENOSPC: ("No space left on device", "database or disk is full", "disk I/O error"),
}

# What need not be said: a folder that is there already, something left over that stays, a file that SQLite cuts or
# copies its log into at leisure, and the journal that it does without once the log is there.
UNSAID = re.compile(r"mkdir |unlink|rmdir |ftruncate |.* state/ledger\.sqlite(-journal|-shm)?$|fdatasync state$")


def traced(who: str, fault: Fault | None, num_calls: list[str] | None = None) -> Trial:
    """Bring a fault about in the coordinator or a node."""

    def trial(run: Run) -> bool:
        restarted = (KILLED, EXIT_RESOURCE)
        others = run.before.get(who, [])
        for name in ("coordinator", *NODES):
            run.before[name] = [*others, Before(await_tracer)] if name == who else run.before.get(name, [])
            run.start(name)
            if name == who:
                run.before[who] = others
                connection = run.help(trace, run.pid(who), run.folder, fault)
            if name == "coordinator":
                run.await_ready(restarted=restarted)
        run.finish(restarted=restarted)
        calls: list[str] = connection.recv()
        if num_calls is not None:
            num_calls.extend(calls)
        if fault is None:
            return True
        num_such = len([kind for kind in calls if fault.kind in ("", kind)])
        happened = num_such >= fault.nth
        # When SQLite closes its log, what it could not copy stays in it, without a word.
        closes = fault.kind == "fdatasync state/ledger.sqlite-wal" and fault.nth == num_such
        # A message names what could not be written, and why.
        said = [line for line in run.log(who).splitlines() if "/" in line]
        has_said = fault.error and any(word in line for line in said for word in WORDS[fault.error])
        if happened and fault.error and not (has_said or closes or UNSAID.match(fault.kind)):
            raise Failed(f"{who} did not say that '{fault.kind}' failed with {errno.errorcode[fault.error]}")
        return happened

    return trial


def calls_of(template: Template, who: str) -> list[str]:
    """Return the calls of an undisturbed run, in order."""
    found: list[str] = []
    with running(template, template.folder.with_name(f"calls-{who}")) as run:
        traced(who, None, found)(run)
    return found


def every_call(template: Template, draw: random.Random, quick: bool) -> Sequence[Trial]:
    """Kill at each call; some of them (`quick`)."""
    points = [(who, nth) for who in ("coordinator", "north") for nth in range(1, len(calls_of(template, who)) + 1)]
    return [traced(who, Fault(nth)) for who, nth in (draw.sample(points, 10) if quick else points)]


def every_error(template: Template, draw: random.Random, quick: bool) -> Sequence[Trial]:
    """Have each kind of call fail, with each error."""
    points = []
    for who in ("coordinator", "north"):
        for kind, count in Counter(calls_of(template, who)).items():
            points += [(who, Fault(draw.randint(1, count), kind, error)) for error in (errno.EIO, errno.ENOSPC)]
    return [traced(who, fault) for who, fault in (draw.sample(points, 8) if quick else points)]


def full(who: str, free_kib: int) -> Trial:
    """Give the coordinator's store, or a node's folder, a file system with little space; later, more."""

    def trial(run: Run) -> bool:
        place = run.folder / ("state" if who == "coordinator" else who)
        kept = place.rename(place.with_name("kept"))
        place.mkdir()
        num_kib = sum(-(-path.stat().st_size // 4096) * 4 for path in kept.rglob("*") if path.is_file()) + 16 + free_kib
        call("mount", "-t", "tmpfs", "-o", f"size={num_kib}k", "tmpfs", place)
        run.cleanup.callback(call, "umount", place)
        shutil.copytree(kept, place, dirs_exist_ok=True)
        for name in ("coordinator", *NODES):
            run.start(name)
        give_up_s, said = time.monotonic() + 6, False
        while time.monotonic() < give_up_s and not said:
            time.sleep(0.1)
            run.supervise((0, EXIT_RESOURCE))
            said = any(word in run.log(who) for word in WORDS[errno.ENOSPC])
        time.sleep(0.5)
        call("mount", "-o", "remount,size=64m", place)
        run.finish(restarted=(EXIT_RESOURCE,))
        return said

    return trial


def full_disks(template: Template, draw: random.Random, quick: bool) -> Sequence[Trial]:
    """Fill the coordinator's disk, or a node's, at random points."""
    return [
        full("coordinator" if number % 2 else "north", draw.randrange(0, 3000 if number % 2 else 4000, 4))
        for number in range(4 if quick else 60)
    ]


def mounting_why_not() -> str:
    """Say why file systems can't be mounted here; empty where they can."""
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True, text=True, check=False)
        if done.returncode:
            return done.stderr.strip()
        call("umount", place)
    return ""


def call(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


SYSCALLS = Part(
    "kill -9 at every call that changes a file",
    every_call,
    lambda template, draw: [traced("coordinator", Fault(2, "write state/blobs/*/*"))],
    Before(fault_bugs.blobs_appear_in_parts),
    why_not,
)
ERRORS = Part(
    "EIO and ENOSPC from every kind of call that changes a file",
    every_error,
    lambda template, draw: [traced("coordinator", Fault(1, "fsync state/blobs/parts/*.part", errno.EIO))],
    Before(fault_bugs.errors_of_sync_are_ignored),
    why_not,
)
FOUND = Part(
    "what once broke it",
    lambda template, draw, quick: [
        traced("north", Fault(1, "rename north/rounds/0001-*/.receipt.json.partial")),
        traced("coordinator", Fault(1, "unlink state/blobs/parts/*.part", errno.EIO)),
    ],
    why_not=why_not,
)
FULL = Part(
    "a disk that is full, of the coordinator or a node, until space is made",
    full_disks,
    lambda template, draw: [full("coordinator", 200 + 50 * number) for number in range(8)],
    Before(fault_bugs.halves_of_leaves_stay),
    mounting_why_not,
)
