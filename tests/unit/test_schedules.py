"""Federations under seeded faults, as `benchmarks/schedules.py` runs them; and bugs that they find."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def schedules() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("schedules")


def test_whatever_happens_every_promise_is_kept(
    schedules: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = schedules.prepare(tmp_path / "run", put=monkeypatch.setattr).run_all(range(1_000_000, 1_000_010))
    assert not found.failures
    assert found.num_deaths > 3


def test_a_seed_happens_in_the_same_way_each_time(
    schedules: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, traces = schedules.prepare(tmp_path / "run", put=monkeypatch.setattr), list[list[str]]()
    for _ in range(2):
        lines: list[str] = []
        runner.run(7, lines.append)
        traces.append(lines)
    assert traces[0] == traces[1]
    assert any("is killed" in line for line in traces[0])


def test_a_node_that_loses_power_at_every_other_of_its_writes_goes_on_to_the_same_model(
    schedules: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, disturbed = (
        schedules.prepare(tmp_path / "run", put=monkeypatch.setattr),
        importlib.import_module("disturbed"),
    )
    schedule = importlib.import_module("drawn").Schedule(1, "everyone", 2, 1, faults=False, witnesses=True)

    def die_at_write(number: int) -> Any:
        federation = disturbed.DisturbedFederation(schedule, runner.template)
        federation.machines["node-1"].fuse = number
        seen = federation.run()
        runner.promises.check(schedule, seen)
        return seen

    num_writes = 0
    while die_at_write(num_writes).num_deaths:
        num_writes += 2
    assert num_writes > 20


@pytest.mark.parametrize("bug", ["effect-first", "late", "unfenced"])  # the others take too long to find
def test_a_bug_that_is_planted_is_found(
    bug: str, schedules: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = schedules.prepare(tmp_path / "run", bug, put=monkeypatch.setattr)
    assert any(runner.run_all([seed]).failures for seed in range(100))
