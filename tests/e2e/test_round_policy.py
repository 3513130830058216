"""Who takes part in a round, and when it closes, in whole federations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedmerge.config import Config
from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.errors import NotAsked
from fedmerge.events import RoundOpened, RoundSealed
from fedmerge.node.link import RoundView
from fedmerge.node.node import Node
from fedmerge.sim import LocalLink, node_home, prepare_nodes, simulate
from fedmerge.statements import RoundSpec
from fedmerge.store.blobs import BlobStore
from fedmerge.tensors import Checkpoint
from fedmerge.training import TrainResult, TrainTask
from fedmerge.trust.sign import PublicKey, SigningKey
from fedmerge.verify import History, replay, verify_directory
from tests.conftest import StepTrainer, make_config

TRAINERS = {name: StepTrainer(seed) for seed, name in enumerate(["north", "south", "east", "west"])}


def coordinator_key(folder: Path) -> dict[str, PublicKey]:
    key = SigningKey.load(folder / "coordinator.key").public
    return {key.key_id: key}


def events_of(coordinator: Coordinator) -> list[object]:
    return [entry.event for entry in coordinator.journal.ledger.entries]


def test_rounds_that_ask_a_sample_are_made_of_it_alone_and_verify(tmp_path: Path) -> None:
    config, _ = make_config(tmp_path, num_rounds=4, extra="[merge]\nseed = 5\n", rounds="sample = 0.5\nfraction = 1")
    seen: list[tuple[str, str, int]] = []
    result = simulate(
        config,
        tmp_path / "base",
        TRAINERS,
        on_event=lambda name, event: seen.append((name, event.kind, event.round)),
    )
    _, history, _ = verify_directory(result.model_dir, coordinator_key(tmp_path))
    asked = [spec.sample for spec in sorted(history.specs.values(), key=lambda spec: spec.round)]
    assert [[c.node_id for c in record.contributions] for record in history.records] == asked
    assert {len(sample) for sample in asked} == {2}
    assert len({tuple(sample) for sample in asked}) > 1
    assert sum(kind == "delivered" for _, kind, _ in seen) == 4 * 2
    assert replay(history, Checkpoint(tmp_path / "base"), BlobStore(config.federation.state / "blobs")).passed


def test_a_node_that_is_not_asked_is_refused_and_a_round_that_failed_asks_others(tmp_path: Path) -> None:
    config, _ = make_config(tmp_path, min_nodes=1, rounds="sample = 1\ndeadline_s = 50")
    keys = prepare_nodes(config, list(TRAINERS))
    now = [0.0]
    coordinator = Coordinator(config, tmp_path / "base", clock=lambda: now[0])
    try:
        asked = set()
        for _ in range(20):
            coordinator.retry_failed()
            while coordinator.advance():
                pass
            asked |= set(coordinator.journal.state.opened.sample)  # type: ignore[union-attr]
            now[0] += 50
            coordinator.advance()
            assert coordinator.journal.state.phase == "failed"
        assert asked == {key.public.key_id for key in keys.values()}
        coordinator.retry_failed()
        coordinator.advance()
        [chosen] = coordinator.journal.state.opened.sample  # type: ignore[union-attr]
        outsider = next(name for name, key in keys.items() if key.public.key_id != chosen)
        node = node_of(coordinator, config, keys, outsider)
        trusted = {coordinator.key.public.key_id: coordinator.key.public}
        spec, _ = RoundSpec.open(coordinator.spec_envelope(), trusted, where="spec")
        with pytest.raises(NotAsked):
            node.contribute(spec, coordinator.journal.state.opened.spec_digest)  # type: ignore[union-attr]
    finally:
        coordinator.close()


def node_of(coordinator: Coordinator, config: Config, keys: dict[str, SigningKey], name: str) -> Node:
    link = LocalLink(coordinator, keys[name].public.key_id)
    home = node_home(config, name)
    return Node(link, TRAINERS[name], keys[name], coordinator.key.public, home, base=coordinator.base.directory)


@dataclass
class Seeker:
    """Goes a part of the way from the model it gets to a target of its own, so that the base of a step matters."""

    target: float

    def check(self) -> None:
        """Accept anything."""

    def train(self, task: TrainTask) -> TrainResult:
        before, out = Checkpoint(task.model_dir), task.workspace / "tuned"
        out.mkdir(exist_ok=True)
        tuned = {name: before[name] for name in before}
        tuned |= {name: tuned[name] + self.step(tuned[name]) for name in ("matrix", "vector")}
        save_file(tuned, out / "model.safetensors")
        return TrainResult(out, 10)

    def step(self, tensor: torch.Tensor) -> torch.Tensor:
        return 0.25 * (self.target - tensor)

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        return {}


SEEKERS = {"north": Seeker(1.0), "south": Seeker(-2.0), "east": Seeker(5.0)}
LOSSLESS = "[delta]\nvalues = 'fp32'\ndownlink = 'fp32'\n"


class Table:
    """A coordinator and its nodes in one process; a test says who acts when, and on what they saw."""

    def __init__(self, folder: Path, rounds: str, num_rounds: int) -> None:
        self.now_s = 0.0
        self.config, _ = make_config(folder, num_rounds=num_rounds, rounds=rounds, extra=LOSSLESS)
        self.base = folder / "base"
        keys = prepare_nodes(self.config, list(SEEKERS))
        self.coordinator = Coordinator(self.config, self.base, clock=lambda: self.now_s)
        self.nodes: dict[str, Node] = {}
        for name, key in keys.items():
            link, home = LocalLink(self.coordinator, key.public.key_id), node_home(self.config, name)
            self.nodes[name] = Node(link, SEEKERS[name], key, self.coordinator.key.public, home, base=self.base)

    def advance(self) -> RoundView:
        """Do what is due; return what nodes see then."""
        while self.coordinator.advance():
            pass
        return LocalLink(self.coordinator, "").view()

    def vector(self, round_number: int) -> torch.Tensor:
        return Checkpoint(self.coordinator.published_dir(round_number))["vector"].double()


def check_history(folder: Path, table: Table, num_rounds: int) -> History:
    """Verify and replay a published model; return its history."""
    _, history, _ = verify_directory(table.coordinator.published_dir(num_rounds), coordinator_key(folder))
    assert replay(history, Checkpoint(table.base), BlobStore(table.config.federation.state / "blobs")).passed
    return history


def test_a_late_delta_is_a_step_from_its_own_base_discounted_by_how_late_it_is(tmp_path: Path) -> None:
    table = Table(tmp_path, "deadline_s = 100\nlate = 'carry'\nmax_staleness = 2", num_rounds=3)
    north, south, east = table.nodes.values()
    try:
        first = table.advance()
        for node in (north, south):
            node.react(first)
        table.now_s = 100.0  # round 1 closes without east, which is still at it
        second = table.advance()
        north.react(second)
        south.react(second)
        table.now_s = 200.0
        third = table.advance()
        east.react(first)
        for node in (south, north, east):
            node.react(third)
        table.advance()

        v0 = Checkpoint(table.base)["vector"].double()
        to_north, to_south, to_east = SEEKERS.values()
        v1 = v0 + (to_north.step(v0) + to_south.step(v0)) / 2
        v2 = v1 + (to_north.step(v1) + to_south.step(v1)) / 2
        v3 = v2 + (to_north.step(v2) + to_south.step(v2) + to_east.step(v2) + to_east.step(v0) / math.sqrt(1 + 2)) / 4
        torch.testing.assert_close(table.vector(2), v2, atol=1e-5, rtol=0)
        torch.testing.assert_close(table.vector(3), v3, atol=1e-5, rtol=0)
        assert (v3 - (v2 + (to_north.step(v2) + to_south.step(v2) + to_east.step(v2)) / 3)).norm() > 1

        history = check_history(tmp_path, table, 3)
        late = [c for record in history.records for c in record.contributions if c.staleness]
        assert [(c.node_id, c.staleness) for c in late] == [(east.node_id, 2)]
        assert late[0].scale == pytest.approx(1 / math.sqrt(3))
    finally:
        table.coordinator.close()


@pytest.mark.parametrize("rounds", ["late = 'reject'", "late = 'carry'\nmax_staleness = 1"])
def test_a_delta_that_is_too_late_is_refused(tmp_path: Path, rounds: str) -> None:
    table = Table(tmp_path, f"deadline_s = 100\n{rounds}", num_rounds=4)
    north, south, east = table.nodes.values()
    try:
        first = table.advance()
        for number in (1, 2):
            view = table.advance()
            north.react(view)
            south.react(view)
            table.now_s = 100.0 * number
        table.advance()
        missed: list[str] = []
        east._on_event = lambda event: missed.append(event.kind)
        east.react(first)
        assert missed[-1] == "missed"
        assert not table.coordinator.journal.state.carried
    finally:
        table.coordinator.close()


def test_a_buffer_merges_what_comes_whoever_it_is_from(tmp_path: Path) -> None:
    table = Table(tmp_path, "async_buffer = 2", num_rounds=3)
    north, south, east = table.nodes.values()
    try:
        first = table.advance()
        north.react(first)
        assert table.advance().round == 1
        south.react(first)
        second = table.advance()
        assert second.round == 2
        north.react(second)  # at once, while east still trains from the base
        east.react(first)
        third = table.advance()
        south.react(second)  # by now late as well
        east.react(third)
        assert table.advance().finished

        v0 = Checkpoint(table.base)["vector"].double()
        to_north, to_south, to_east = SEEKERS.values()
        v1 = v0 + (to_north.step(v0) + to_south.step(v0)) / 2
        v2 = v1 + (to_north.step(v1) + to_east.step(v0) / math.sqrt(2)) / 2
        v3 = v2 + (to_south.step(v1) / math.sqrt(2) + to_east.step(v2)) / 2
        torch.testing.assert_close(table.vector(3), v3, atol=1e-5, rtol=0)
        sealed = [event for event in events_of(table.coordinator) if isinstance(event, RoundSealed)]
        assert [event.closed_by for event in sealed] == ["buffer"] * 3
        check_history(tmp_path, table, 3)
    finally:
        table.coordinator.close()


def test_an_acknowledged_late_delta_survives_a_restart(tmp_path: Path) -> None:
    table = Table(tmp_path, "deadline_s = 100\nlate = 'carry'", num_rounds=2)
    north, south, east = table.nodes.values()
    first = table.advance()
    north.react(first)
    south.react(first)
    table.now_s = 100.0
    table.advance()
    east.react(first)
    table.coordinator.close()
    table.coordinator = Coordinator(table.config, table.base, clock=lambda: table.now_s)
    try:
        second = table.advance()
        for node in table.nodes.values():
            node.link = LocalLink(table.coordinator, node.node_id)
            node.react(second)
        table.advance()
        [late] = [c for c in check_history(tmp_path, table, 2).records[1].contributions if c.staleness]
        assert late.node_id == east.node_id
    finally:
        table.coordinator.close()


def test_the_ledger_says_why_a_round_was_sealed_and_what_grace_was_measured(tmp_path: Path) -> None:
    config, _ = make_config(tmp_path, min_nodes=2, rounds="grace_s = 'auto'")
    keys = prepare_nodes(config, list(TRAINERS))
    now = [1000.0]
    coordinator = Coordinator(config, tmp_path / "base", clock=lambda: now[0])
    try:
        coordinator.advance()
        for name, at_s in (("north", 1100.0), ("south", 1120.0), ("east", 1130.0)):
            now[0] = at_s
            node = node_of(coordinator, config, keys, name)
            assert node.react(LocalLink(coordinator, node.node_id).view()) is None
        # Gaps of 20 and 10 seconds; deviations from 1120 of 20, 0 and 10.
        now[0] = 1130.0 + 15 + 3 * 10 - 0.1
        assert not coordinator.advance()
        now[0] += 0.1
        assert coordinator.advance()
        [opened] = [event for event in events_of(coordinator) if isinstance(event, RoundOpened)]
        [sealed] = [event for event in events_of(coordinator) if isinstance(event, RoundSealed)]
        assert opened.sample == []
        assert (sealed.closed_by, sealed.quorum, sealed.grace_s) == ("grace", 2, 45.0)
    finally:
        coordinator.close()
