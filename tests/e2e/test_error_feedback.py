"""Federations whose nodes carry over what top-k left unsent: what arrives, and what an interruption changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.errors import ResourceError, RoundClosed, RoundFailed
from fedmerge.sim import FederationResult, LocalLink, node_home, simulate
from fedmerge.store.blobs import BlobStore
from fedmerge.tensors import Checkpoint
from fedmerge.training import Trainer, TrainResult, TrainTask
from fedmerge.verify import replay, verify_directory
from tests.conftest import StepTrainer, make_config
from tests.e2e.test_federation import coordinator_key

TOPK = "[delta]\nvalues = 'fp32'\ndownlink = 'fp32'\nsparsify = 'topk'\ndensity = {density}\nerror_feedback = {decay}\n"
LARGE, SMALL = 0.05, 0.03


class TwoSizes(StepTrainer):
    """Moves every other element by `LARGE` and those between by `SMALL`, the same way in every round."""

    def step(self, name: str, like: torch.Tensor) -> torch.Tensor:
        flat = torch.full((like.numel(),), SMALL)
        flat[::2] = LARGE
        return flat.reshape(like.shape)


def run_simulated(folder: Path, trainers: dict[str, Trainer], *, num_rounds: int, extra: str) -> FederationResult:
    config, _ = make_config(folder, num_rounds=num_rounds, extra=extra)
    return simulate(config, folder / "base", trainers)


def residuals(folder: Path, name: str) -> list[Path]:
    return sorted((node_home(make_config(folder)[0], name) / "rounds").glob("*/residual"))


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_a_constant_direction_arrives_as_the_recurrence_says(tmp_path: Path, decay: float) -> None:
    # Half of the elements travel. Without feedback those are always the large ones. With it the small ones overtake in
    # round 2, and the large ones, which waited then, in round 3: what is left is one step of the small ones.
    trainers: dict[str, Trainer] = {"north": TwoSizes(1), "south": TwoSizes(2)}
    extra = TOPK.format(density=0.5, decay=decay) + "[screen]\nduplicates = 'accept'\n"
    result = run_simulated(tmp_path, trainers, num_rounds=3, extra=extra)
    base, merged = Checkpoint(tmp_path / "base"), Checkpoint(result.model_dir)
    moved = (merged["matrix"].double() - base["matrix"].double()).reshape(-1)
    large = 3 * LARGE if decay == 0 else LARGE * (1 + (decay + 1))
    small = 0 if decay == 0 else SMALL * (decay + 1)
    torch.testing.assert_close(moved[::2], torch.full((300_000,), large).double(), atol=2e-6, rtol=0)
    torch.testing.assert_close(moved[1::2], torch.full((300_000,), small).double(), atol=2e-6, rtol=0)
    # Small tensors travel whole.
    moved, step = merged["vector"].double() - base["vector"].double(), TwoSizes(1).step("vector", base["vector"])
    torch.testing.assert_close(moved, 3 * step.double(), atol=2e-6, rtol=0)
    assert len(residuals(tmp_path, "north")) == (2 if decay else 0)


def test_error_feedback_changes_nothing_for_an_auditor(tmp_path: Path) -> None:
    trainers: dict[str, Trainer] = {"north": StepTrainer(1), "south": StepTrainer(2)}
    extra = TOPK.format(density=0.01, decay=0.95).replace("values = 'fp32'", "values = 'sign'")
    result = run_simulated(tmp_path, trainers, num_rounds=3, extra=extra)
    config, _ = make_config(tmp_path, num_rounds=3, extra=extra)
    _, history, checks = verify_directory(result.model_dir, coordinator_key(tmp_path))
    assert {check.name for check in checks if check.passed} >= {"signature", "files", "version", "history", "deltas"}
    assert replay(history, Checkpoint(tmp_path / "base"), BlobStore(config.federation.state / "blobs")).passed


@dataclass
class Obstructed(StepTrainer):
    """Leaves a thing in its workspace, in one round, in whose place the node can't write what it has to write next."""

    round: int = 2
    file: str | None = None
    folder: str | None = None
    workspaces: list[Path] = field(default_factory=list)

    def train(self, task: TrainTask) -> TrainResult:
        self.workspaces.append(task.workspace)
        if task.round == self.round and self.file:
            (task.workspace / self.file).write_text("in the way")
        if task.round == self.round and self.folder:
            (task.workspace / self.folder).mkdir()
        return super().train(task)


@pytest.mark.parametrize("obstacle", [{"file": "residual"}, {"folder": ".statement.json.partial"}])
def test_a_node_stopped_between_delta_and_statement_sends_what_it_would_have(
    tmp_path: Path, obstacle: dict[str, str]
) -> None:
    extra = TOPK.format(density=0.1, decay=0.95)
    plain: dict[str, Trainer] = {"north": StepTrainer(1), "south": StepTrainer(2)}
    undisturbed = run_simulated(tmp_path / "undisturbed", plain, num_rounds=3, extra=extra)

    folder = tmp_path / "stopped"
    stopped = Obstructed(1, **obstacle)  # type: ignore[arg-type]
    with pytest.raises(ResourceError):
        run_simulated(folder, plain | {"north": stopped}, num_rounds=3, extra=extra)
    outbox = stopped.workspaces[-1]
    assert (outbox / "delta.safetensors").exists()
    assert not (outbox / "statement.json").exists()
    # The first round's residual is still there, and the second's does not count yet.
    assert next(path.parent for path in residuals(folder, "north")) == stopped.workspaces[0]
    first_try = (outbox / "delta.safetensors").read_bytes()

    for name in obstacle.values():
        (outbox / name).unlink() if "file" in obstacle else (outbox / name).rmdir()
    resumed = run_simulated(folder, plain, num_rounds=3, extra=extra)
    assert (outbox / "delta.safetensors").read_bytes() == first_try
    assert resumed.version == undisturbed.version
    for name in plain:
        mine, theirs = (residuals(where, name)[-1] for where in (folder, tmp_path / "undisturbed"))
        assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


class Loud(StepTrainer):
    """Takes a step, in its first attempt at round 2, that screening refuses."""

    attempts: int = 0

    def step(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return super().step(name, like) * (1e4 if self.attempts == 2 else 1)

    def train(self, task: TrainTask) -> TrainResult:
        self.attempts += 1
        return super().train(task)


def test_an_attempt_that_the_coordinator_gave_up_leaves_no_residual(tmp_path: Path) -> None:
    extra = TOPK.format(density=0.1, decay=0.95)
    plain: dict[str, Trainer] = {name: StepTrainer(i) for i, name in enumerate(("east", "north", "south"))}

    def run(folder: Path, trainers: dict[str, Trainer]) -> FederationResult:
        config, _ = make_config(folder, num_rounds=3, min_nodes=3, extra=extra)
        return simulate(config, folder / "base", trainers)

    undisturbed = run(tmp_path / "undisturbed", plain)
    with pytest.raises(RoundFailed, match="times the median"):
        run(tmp_path / "failed", plain | {"south": Loud(2)})
    assert run(tmp_path / "failed", plain).version == undisturbed.version


@dataclass
class Late(TwoSizes):
    """Is too late for some rounds."""

    late_in: tuple[int, ...] = ()

    def train(self, task: TrainTask) -> TrainResult:
        if task.round in self.late_in:
            raise RoundClosed(f"round {task.round} is closed")
        return super().train(task)


def run_with_a_late_node(folder: Path, *late_in: int) -> FederationResult:
    extra = TOPK.format(density=0.5, decay=1.0)
    config, _ = make_config(folder, num_rounds=3, min_nodes=1, rounds="grace_s = 0", extra=extra)
    trainers = {"north": TwoSizes(1), "south": Late(2, late_in=late_in)}
    return simulate(config, folder / "base", trainers)


def test_a_node_that_missed_a_round_goes_on_from_its_newest_residual(tmp_path: Path) -> None:
    result = run_with_a_late_node(tmp_path, 2)
    # Round 1: both send the large ones. Round 2: north alone sends two steps of the small ones. Round 3: north sends
    # two steps of the large ones, and south, for whom it is the second, two of the small ones.
    base, merged = Checkpoint(tmp_path / "base"), Checkpoint(result.model_dir)
    moved = (merged["matrix"].double() - base["matrix"].double()).reshape(-1)
    torch.testing.assert_close(moved[::2], torch.full((300_000,), LARGE + 2 * LARGE / 2).double(), atol=2e-6, rtol=0)
    expected = torch.full((300_000,), 2 * SMALL + 2 * SMALL / 2).double()
    torch.testing.assert_close(moved[1::2], expected, atol=2e-6, rtol=0)


class RefusesFirst(LocalLink):
    """Comes too late with the first delta that it is given."""

    def submit(self, envelope: bytes, payload: Path, leaves: list[bytes], sent: Callable[[int], None]) -> bytes:
        if self.view().round == 1:
            raise RoundClosed("round 1 is closed")
        return super().submit(envelope, payload, leaves, sent)


def test_what_was_sent_in_vain_is_not_sent_again(tmp_path: Path) -> None:
    config, _ = make_config(
        tmp_path, num_rounds=2, min_nodes=1, rounds="grace_s = 0", extra=TOPK.format(density=0.5, decay=1.0)
    )
    made: list[LocalLink] = []

    def connect(coordinator: Coordinator, node_id: str) -> LocalLink:
        made.append((RefusesFirst if made else LocalLink)(coordinator, node_id))
        return made[-1]

    result = simulate(
        config,
        tmp_path / "base",
        {"north": TwoSizes(1), "south": TwoSizes(2)},
        connect=connect,
    )
    # Round 1: north's large elements arrive, south's do not. Round 2: both send two steps of the small ones.
    base, merged = Checkpoint(tmp_path / "base"), Checkpoint(result.model_dir)
    moved = (merged["matrix"].double() - base["matrix"].double()).reshape(-1)
    torch.testing.assert_close(moved[::2], torch.full((300_000,), LARGE).double(), atol=2e-6, rtol=0)
    torch.testing.assert_close(moved[1::2], torch.full((300_000,), 2 * SMALL).double(), atol=2e-6, rtol=0)


def test_residuals_of_another_run_are_not_carried_over(tmp_path: Path) -> None:
    expected = run_with_a_late_node(tmp_path / "fresh", 1, 2)
    # In this folder's second run, south's first round is the third, and the first run left residuals of earlier ones.
    run_with_a_late_node(tmp_path / "used")
    (tmp_path / "used" / "state").rename(tmp_path / "used" / "old-state")
    assert run_with_a_late_node(tmp_path / "used", 1, 2).version == expected.version
