"""What travels down to nodes: steps between versions, snapshots for newcomers, updates where those are smaller."""

from __future__ import annotations

import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmerge.config import Config
from fedmerge.errors import DigestMismatch
from fedmerge.node.events import NodeEvent
from fedmerge.node.node import Node
from fedmerge.sim import FederationResult, node_home, prepare_nodes, result_of, simulate
from fedmerge.statements import ModelRef
from fedmerge.store.blobs import BlobStore
from fedmerge.tensors import Checkpoint, model_digest
from fedmerge.trust.sign import SigningKey
from fedmerge.verify import History, replay, verify_directory
from fedmerge_client.link import GrpcLink
from tests.conftest import ServerProcess, StepTrainer, make_base, make_config
from tests.e2e.test_federation import coordinator_key, kinds, wait_until
from tests.e2e.test_search import Judge

TRAINERS = {"north": StepTrainer(1, num_examples=10), "south": StepTrainer(2, num_examples=30)}
NEWCOMER = {"east": StepTrainer(3)}
SNAPSHOTS = "[delta]\nsnapshot_every = 2\n"


def bf16_federation(folder: Path, **settings: object) -> tuple[Config, Path]:
    if not (folder / "base").exists():
        make_base(folder / "base", torch.bfloat16)
    return make_config(folder, **settings)  # type: ignore[arg-type]


def run_simulated(folder: Path, dtype: torch.dtype, **settings: object) -> tuple[Config, FederationResult]:
    if not (folder / "base").exists():
        make_base(folder / "base", dtype)
    config, _ = make_config(folder, **settings)  # type: ignore[arg-type]
    return config, simulate(config, folder / "base", TRAINERS)


def model_of(result: FederationResult, folder: Path) -> tuple[ModelRef, History]:
    lineage, history, _ = verify_directory(result.model_dir, coordinator_key(folder))
    return lineage.model, history


class Site:
    """A node over gRPC in a thread of its own; `fetched` has bytes by (what, round)."""

    def __init__(self, config: Config, server: ServerProcess, name: str, trainer: StepTrainer) -> None:
        self.fetched: dict[tuple[str, int], int] = defaultdict(int)
        self.final: Path | None = None
        self._home = node_home(config, name)
        self._key = SigningKey.load(self._home / "node.key")
        self._link = GrpcLink(server.address, server.bundle, self._key, connect_patience_s=30)
        self._trainer = trainer
        self._thread = threading.Thread(target=self._take_part, daemon=True)
        self._thread.start()

    def wait(self) -> Path:
        self._thread.join(60)
        assert self.final is not None
        return self.final

    def _take_part(self) -> None:
        link = self._link
        node = Node(link, self._trainer, self._key, link.coordinator, self._home, on_event=self._take_note)
        self.final = node.run()
        link.close()

    def _take_note(self, event: NodeEvent) -> None:
        if event.kind == "fetch":
            self.fetched[event.values["what"], event.round] += event.values["num_bytes"]


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    """Return `ServerProcess`; what was started with it does not outlive the test."""
    started: list[ServerProcess] = []

    def start_one(config_path: Path, **settings: str) -> ServerProcess:
        started.append(ServerProcess(config_path, **settings))
        return started[-1]

    yield start_one
    for server in started:
        if server.child.poll() is None:
            server.kill()


@pytest.mark.slow
def test_a_newcomer_takes_a_snapshot_and_the_steps_after_it(
    tmp_path: Path, start: Callable[..., ServerProcess]
) -> None:
    def three_rounds(folder: Path) -> tuple[Config, Path]:
        return bf16_federation(folder, num_rounds=3, extra=SNAPSHOTS)

    def one_more_with_a_newcomer(folder: Path) -> tuple[Config, Path]:
        return bf16_federation(folder, num_rounds=4, min_nodes=3, extra=SNAPSHOTS)

    config, _ = three_rounds(tmp_path / "simulated")
    simulate(config, tmp_path / "simulated" / "base", TRAINERS)
    config, _ = one_more_with_a_newcomer(tmp_path / "simulated")
    undisturbed = simulate(config, tmp_path / "simulated" / "base", TRAINERS | NEWCOMER)

    folder = tmp_path / "deployed"
    config, path = three_rounds(folder)
    prepare_nodes(config, list(TRAINERS))
    server = start(path)
    sites = {name: Site(config, server, name, trainer) for name, trainer in TRAINERS.items()}
    wait_until(folder, lambda ledger: kinds(ledger).count("merge_started") == 2)
    server.kill()
    server = start(path, listen=server.address)
    for site in sites.values():
        site.wait()
    server.kill()
    config, path = one_more_with_a_newcomer(folder)
    prepare_nodes(config, [*TRAINERS, *NEWCOMER])
    server = start(path)
    again = {name: Site(config, server, name, trainer) for name, trainer in (TRAINERS | NEWCOMER).items()}
    versions = {model_digest(Checkpoint(site.wait())) for site in again.values()}

    result = result_of(config)
    assert versions == {undisturbed.version} == {result.version}
    model, _ = model_of(result, folder)
    sizes = {(step.round, step.before == model.base_digest): step.num_bytes for step in model.steps}
    assert sorted(sizes) == [(1, True), (2, False), (2, True), (3, False), (4, False), (4, True)]
    # Those who were there from the start fetched a step a round, which is far less than the update it stands for.
    north = sites["north"].fetched | again["north"].fetched
    steps = {("step", number): sizes[number, number == 1] for number in range(1, 5)}
    assert {key: num_bytes for key, num_bytes in north.items() if key[0] in {"step", "update"}} == steps
    assert result.fetched_bytes == sum(steps.values())
    for update in model.updates:
        assert 5 * steps["step", update.round] < update.num_bytes
    # The newcomer fetched the second round's snapshot, and then went on like the others.
    snapshot = {("step", 2): sizes[2, True], ("step", 3): sizes[3, False], ("step", 4): sizes[4, False]}
    east = {key: num_bytes for key, num_bytes in again["east"].fetched.items() if key[0] in {"step", "update"}}
    assert east == snapshot
    for name in again:
        assert list((node_home(config, name) / "updates").iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("downlink", ["auto", "steps", "bf16"])
def test_every_downlink_ends_at_the_version_that_updates_define(
    tmp_path: Path, dtype: torch.dtype, downlink: str
) -> None:
    extra = f"[delta]\ndownlink = '{downlink}'\nsnapshot_every = 2\n"
    config, result = run_simulated(tmp_path, dtype, num_rounds=3, extra=extra)
    model, history = model_of(result, tmp_path)
    every_round = downlink == "steps" or (downlink == "auto" and dtype == torch.bfloat16)
    assert [step.round for step in model.steps] == ([1, 2, 2, 3] if every_round else [])
    assert replay(history, Checkpoint(tmp_path / "base"), BlobStore(config.federation.state / "blobs")).passed
    for name in TRAINERS:
        held = [folder.name for folder in (node_home(config, name) / "models").iterdir()]
        assert held == [result.version]
    travelled = [step for step in model.steps if step.before != model.base_digest or step.round == 1]
    assert result.fetched_bytes == sum(file.num_bytes for file in travelled or model.updates)


def test_candidates_of_a_search_travel_as_steps(tmp_path: Path) -> None:
    before = Checkpoint(make_base(tmp_path / "base", torch.bfloat16))["matrix"].float()
    judges = {name: Judge(trainer.seed) for name, trainer in TRAINERS.items()}
    for judge in judges.values():
        judge.target = before + judges["north"].step("matrix", before)
    extra = "[merge]\nmethod = 'task_arithmetic'\n[search]\nstrategy = 'greedy_soup'\nevaluations = 4\n"
    config, _ = make_config(tmp_path, extra=extra)
    result = simulate(config, tmp_path / "base", judges)
    model, history = model_of(result, tmp_path)
    candidates = [each for proposal in history.proposals.values() for each in proposal.candidates]
    steps = {each.digest: each.step for each in candidates}
    assert model.steps == [steps[result.version]]
    assert replay(history, Checkpoint(tmp_path / "base"), BlobStore(config.federation.state / "blobs")).passed
    # No node fetched an update, which would be larger.
    assert result.fetched_bytes == sum(step.num_bytes for step in [*steps.values(), *model.steps] if step is not None)
    for name in judges:
        assert list((node_home(config, name) / "updates").iterdir()) == []


def test_a_record_that_lists_a_wrong_step_is_reported(tmp_path: Path) -> None:
    config, result = run_simulated(tmp_path, torch.bfloat16, num_rounds=2, extra=SNAPSHOTS)
    base, blobs = Checkpoint(tmp_path / "base"), BlobStore(config.federation.state / "blobs")
    model, history = model_of(result, tmp_path)

    def listing(root: str) -> History:
        steps = [*model.steps[:-1], model.steps[-1].model_copy(update={"root": root})]
        last = history.records[-1]
        lying = last.model_copy(update={"model": last.model.model_copy(update={"steps": steps})})
        return replace(history, records=[*history.records[:-1], lying])

    check = replay(listing(model.steps[-1].root), base, blobs)
    assert "3 step files" in check.detail
    for root, message in {
        model.steps[0].root: "leads to version",
        model.updates[0].root: "can't be followed",
        "0" * 64: "is listed, but not stored",
    }.items():
        with pytest.raises(DigestMismatch, match=rf"round 2: .*{message}"):
            replay(listing(root), base, blobs)


def test_a_node_whose_version_was_damaged_goes_by_the_updates(tmp_path: Path) -> None:
    config, first = run_simulated(tmp_path, torch.bfloat16, num_rounds=1)
    weights = node_home(config, "north") / "models" / first.version / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    _, result = run_simulated(tmp_path, torch.bfloat16, num_rounds=2)
    held = node_home(config, "north") / "models" / result.version
    assert model_digest(Checkpoint(held)) == result.version
    # It has the updates' sum now; its neighbour never needed them.
    assert (node_home(config, "north") / "sum").exists()
    assert not (node_home(config, "south") / "sum").exists()


def test_a_node_keeps_the_updates_sum_and_asks_for_each_once(tmp_path: Path) -> None:
    fetched: list[tuple[str, int]] = []

    def take_note(name: str, event: NodeEvent) -> None:
        if name == "north" and event.kind == "fetch":
            fetched.append((event.values["what"], event.round))

    def rounds(num_rounds: int) -> tuple[FederationResult, Path]:
        config, _ = make_config(tmp_path, num_rounds=num_rounds)
        fetched.clear()
        return simulate(config, tmp_path / "base", TRAINERS, on_event=take_note), node_home(config, "north")

    make_base(tmp_path / "base")
    result, home = rounds(3)
    assert fetched == [("update", 1), ("update", 2), ("update", 3)]
    (kept,) = (home / "sum").iterdir()
    assert not list((home / "updates").iterdir())
    model, base = Checkpoint(result.model_dir), Checkpoint(tmp_path / "base")
    assert all(torch.equal(base[name] + change, model[name]) for name, change in Checkpoint(kept).items())
    # What a power cut may leave of a file that was not synced.
    weights = kept / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    result, home = rounds(4)
    assert fetched == [("update", 4), ("update", 1), ("update", 2), ("update", 3)]
    shutil.rmtree(home / "sum")
    weights.parent.mkdir(parents=True)
    weights.touch()
    result, home = rounds(5)
    assert sorted(fetched) == [("update", number) for number in range(1, 6)]
    assert model_digest(Checkpoint(home / "models" / result.version)) == result.version
