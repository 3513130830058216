"""Processes that are killed."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import fault_bugs
from fault_federation import NODES, Before, Part, Run, Template, Trial


def killed(seed: int) -> Trial:
    """Kill the coordinator or a node at random moments, one to three times."""

    def trial(run: Run) -> bool:
        draw = random.Random(seed)
        run.start("coordinator")
        if draw.random() < 0.2:  # while it starts, too
            time.sleep(draw.uniform(0, 0.2))
            run.kill("coordinator")
            run.start("coordinator")
        run.await_ready()
        for name in NODES:
            run.start(name)
        for number in range(draw.randint(1, 3)):
            time.sleep(draw.uniform(0, 0.8 if number == 0 else 2.0))
            victim = draw.choice([name for name in run.processes if run.code(name) is None])
            run.kill(victim)
            run.start(victim)
        run.await_ready()
        run.check_acknowledged()
        run.finish()
        return True

    return trial


def killed_when_acknowledged(num_receipts: int) -> Trial:
    """Kill the coordinator as soon as nodes have so many receipts."""

    def trial(run: Run) -> bool:
        run.start_all()
        for _ in run.patiently("receipts"):
            if len(run.receipts()) >= num_receipts:
                break
        run.kill("coordinator")
        run.start("coordinator")
        run.await_ready()
        run.check_acknowledged()
        run.finish()
        return True

    return trial


def kills(template: Template, draw: random.Random, quick: bool) -> Sequence[Trial]:
    """Kill at random moments, and right after deltas were acknowledged."""
    at_random = [killed(draw.getrandbits(32)) for _ in range(8 if quick else 280)]
    return at_random + [killed_when_acknowledged(1 + number % 4) for number in range(2 if quick else 40)]


KILL = Part(
    "kill -9 of the coordinator or a node at random moments",
    kills,
    lambda template, draw: [killed_when_acknowledged(1) for _ in range(8)],
    Before(fault_bugs.acknowledge_before_writing),
)
