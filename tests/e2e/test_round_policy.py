"""Who takes part in a round, and when it closes, in whole federations."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fedmerge.config import Config
from fedmerge.coordinator import Coordinator
from fedmerge.errors import NotAsked
from fedmerge.events import RoundOpened, RoundSealed
from fedmerge.node import Node
from fedmerge.sign import PublicKey, SigningKey
from fedmerge.sim import node_home, prepare_nodes, simulate
from fedmerge.sim.inline import LocalLink
from fedmerge.statements import RoundSpec
from fedmerge.store.blobs import BlobStore
from fedmerge.tensors import Checkpoint
from fedmerge.verify import replay, verify_directory
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
        clock=time.time,
        on_event=lambda name, event: seen.append((name, event.kind, event.round)),
    )
    _, history, _ = verify_directory(result.model_dir, coordinator_key(tmp_path))
    asked = [spec.sample for spec in sorted(history.specs.values(), key=lambda spec: spec.round)]
    assert [[c.node_id for c in record.contributions] for record in history.records] == asked
    assert {len(sample) for sample in asked} == {2}
    assert len({tuple(sample) for sample in asked}) > 1
    # Each node said in each round that it delivered or that it waits.
    assert sum(kind in {"delivered", "waiting"} for _, kind, _ in seen) == 4 * 4
    assert replay(history, Checkpoint(tmp_path / "base"), BlobStore(config.federation.state / "blobs")).passed


def test_a_node_that_is_not_asked_is_refused_and_a_round_that_failed_asks_others(tmp_path: Path) -> None:
    config, _ = make_config(tmp_path, min_nodes=1, rounds="sample = 1\ndeadline_s = 50")
    keys = prepare_nodes(config, list(TRAINERS))
    now = [0.0]
    coordinator = Coordinator(config, tmp_path / "base", clock=lambda: now[0])
    try:
        asked = set()
        for _ in range(20):
            if coordinator.journal.state.phase == "failed":
                coordinator.open_round()
            while coordinator.advance():
                pass
            asked |= set(coordinator.journal.state.opened.sample)  # type: ignore[union-attr]
            now[0] += 50
            coordinator.advance()
            assert coordinator.journal.state.phase == "failed"
        assert asked == {key.public.key_id for key in keys.values()}
        coordinator.open_round()
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
