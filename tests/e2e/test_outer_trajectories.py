"""Whole trajectories of DiLoCo, Streaming DiLoCo and FedOpt: a federation against the few lines that papers have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedmerge.sim import simulate
from fedmerge.sim.inline import KnownNodes
from fedmerge.store.blobs import BlobStore
from fedmerge.tensors import Checkpoint
from fedmerge.training import Trainer, TrainResult, TrainTask
from fedmerge.verify import replay, verify_directory
from tests.conftest import make_config
from tests.e2e.test_federation import coordinator_key

NUM_ROUNDS, INNER_STEPS, INNER_LR = 6, 4, 0.1


def descend(model: torch.Tensor, target: torch.Tensor, num_steps: int = INNER_STEPS) -> torch.Tensor:
    """A node's round: gradient descent to a target of its own, so that each step depends on where it begins."""
    for _ in range(num_steps):
        model = model - INNER_LR * (model - target)
    return model


def target_of(seed: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype)


@dataclass
class Descender:
    seed: int

    def check(self) -> None:
        """Accept anything."""

    def train(self, task: TrainTask) -> TrainResult:
        before, out = Checkpoint(task.model_dir), task.workspace / "tuned"
        out.mkdir(exist_ok=True)
        tuned = {name: before[name] for name in before}
        for name in ("matrix", "vector"):
            num_steps = len(task.part or range(INNER_STEPS))
            tuned[name] = descend(before[name], target_of(self.seed, before[name]), num_steps)
        save_file(tuned, out / "model.safetensors")
        return TrainResult(out, num_examples=10)

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        return {}


def diloco(base: torch.Tensor, seeds: list[int]) -> list[torch.Tensor]:
    """Algorithm 1 of arXiv 2311.08105, with PyTorch's Nesterov."""
    theta = base.clone().requires_grad_()
    outer = torch.optim.SGD([theta], lr=0.7, momentum=0.9, nesterov=True)
    seen = []
    for _ in range(NUM_ROUNDS):
        workers = [descend(theta.detach(), target_of(seed, base)) for seed in seeds]
        theta.grad = torch.stack([theta.detach() - worker for worker in workers]).mean(0)
        outer.step()
        seen.append(theta.detach().clone())
    return seen


def fedadam(base: torch.Tensor, seeds: list[int]) -> list[torch.Tensor]:
    """Algorithm 2 of arXiv 2003.00295."""
    x, m, v = base.clone(), torch.zeros_like(base), torch.full_like(base, 1e-3**2)
    seen = []
    for _ in range(NUM_ROUNDS):
        delta = torch.stack([descend(x, target_of(seed, base)) - x for seed in seeds]).mean(0)
        m = 0.9 * m + 0.1 * delta
        v = 0.99 * v + 0.01 * delta**2
        x = x + 0.02 * m / (v.sqrt() + 1e-3)
        seen.append(x)
    return seen


@pytest.mark.parametrize(
    ("section", "reference"),
    [("name = 'nesterov'\nlr = 0.7\nmomentum = 0.9", diloco), ("name = 'adam'\nlr = 0.02\nbeta1 = 0.9", fedadam)],
)
def test_every_version_is_the_papers(
    tmp_path: Path, section: str, reference: Callable[[torch.Tensor, list[int]], list[torch.Tensor]]
) -> None:
    lossless = "[delta]\nvalues = 'fp32'\ndownlink = 'fp32'\n"
    config, _ = make_config(tmp_path, num_rounds=NUM_ROUNDS, extra=f"{lossless}[outer]\n{section}\n")
    trainers: dict[str, Trainer] = {name: Descender(seed) for name, seed in (("north", 1), ("south", 2), ("west", 3))}
    simulate(config, tmp_path / "base", trainers)
    base = Checkpoint(tmp_path / "base")
    for name in ("matrix", "vector"):
        for number, expected in enumerate(reference(base[name].double(), [1, 2, 3]), start=1):
            found = Checkpoint(tmp_path / f"state/models/round-{number:04d}")[name].double()
            assert float((found - expected).norm() / expected.norm()) < 1e-6, (name, number)


SEEDS = {"north": 1, "south": 2, "west": 3}


def streaming(  # type: ignore[no-untyped-def]
    base: dict[str, torch.Tensor], fragments: list[str], asked: list[list[int]], alpha: float, tau: int = 0
):
    """Streaming DiLoCo, arXiv 2501.18512: one tensor is a fragment, and due in every other round."""
    theta = {name: tensor.clone().requires_grad_() for name, tensor in base.items()}
    outer = {name: torch.optim.SGD([theta[name]], lr=0.7, momentum=0.9, nesterov=True) for name in base}
    local: dict[int, dict[str, torch.Tensor]] = {}
    missed: dict[int, set[str]] = {}
    for number, seeds in enumerate(asked):
        due = fragments[number % len(fragments)]
        for seed in seeds:
            # A newcomer takes what is published; so does everybody else of what moved, but for a share of its own.
            num_left = INNER_STEPS - tau if seed in local else INNER_STEPS
            mine = local.setdefault(seed, {name: tensor.detach().clone() for name, tensor in theta.items()})
            for name in missed.pop(seed, set()):
                mine[name] = alpha * mine[name] + (1 - alpha) * theta[name].detach()
            for name, tensor in base.items():
                mine[name] = descend(mine[name], target_of(seed, tensor), num_left)
        theta[due].grad = torch.stack([theta[due].detach() - local[seed][due] for seed in seeds]).mean(0)
        outer[due].step()
        for seed in seeds:  # while that was under way
            local[seed] = {name: descend(local[seed][name], target_of(seed, base[name]), tau) for name in base}
        for seed in local:
            missed.setdefault(seed, set()).add(due)
        yield {name: tensor.detach().clone() for name, tensor in theta.items()}


@pytest.mark.parametrize(
    ("mixing", "overlap", "rounds"), [(0.0, 0, ""), (0.5, 0, "sample = 2"), (0.5, 3, "sample = 2")]
)
def test_fragments_travel_in_turn_and_nodes_go_on_from_their_own(
    tmp_path: Path, mixing: float, overlap: int, rounds: str
) -> None:
    sections = f"""
steps = {INNER_STEPS}
[delta]
values = "fp32"
downlink = "fp32"
[outer]
name = "nesterov"
lr = 0.7
[streaming]
fragments = 2
mixing = {mixing}
overlap_steps = {overlap}
"""
    config, _ = make_config(tmp_path, num_rounds=NUM_ROUNDS, rounds=rounds, extra=sections)
    result = simulate(config, tmp_path / "base", {name: Descender(seed) for name, seed in SEEDS.items()})
    _, history, _ = verify_directory(result.model_dir, coordinator_key(tmp_path))
    names = KnownNodes(config.federation.trusted).names()
    asked = [[SEEDS[names[c.node_id]] for c in record.contributions] for record in history.records]
    base = Checkpoint(tmp_path / "base")
    doubles = {name: base[name].double() for name in ("matrix", "vector")}
    expected = streaming(doubles, ["matrix", "vector"], asked, mixing, overlap)
    for number, versions in enumerate(expected, start=1):
        published = Checkpoint(tmp_path / f"state/models/round-{number:04d}")
        for name, version in versions.items():
            assert float((published[name].double() - version).norm() / version.norm()) < 1e-6, (name, number)
    assert replay(history, base, BlobStore(config.federation.state / "blobs")).passed
    sizes = [record.contributions[0].payload_bytes for record in history.records]
    assert max(sizes[1::2]) < 10 * base["vector"].nbytes < min(sizes[::2])


@dataclass
class Leaver(Descender):
    """Leaves before it has trained on while its delta was under way, for the second time."""

    num_left: int = 2

    def train(self, task: TrainTask) -> TrainResult:
        if task.part is not None and task.part.start == 0:
            self.num_left -= 1
            if not self.num_left:
                raise KeyboardInterrupt
        return super().train(task)


def test_a_site_that_left_before_it_trained_on_makes_up_for_it(tmp_path: Path) -> None:
    extra = f"steps = {INNER_STEPS}\n[streaming]\nfragments = 2\nmixing = 0.5\noverlap_steps = 2\n"

    def run(folder: Path, first: Trainer) -> str:
        folder.mkdir(exist_ok=True)
        config, _ = make_config(folder, num_rounds=4, extra=extra)
        trainers = {name: Descender(seed) for name, seed in SEEDS.items()}
        return simulate(config, folder / "base", {**trainers, "south": first}).version

    undisturbed = run(tmp_path / "undisturbed", Descender(2))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "disturbed", Leaver(2))
    assert run(tmp_path / "disturbed", Descender(2)) == undisturbed


@pytest.mark.parametrize(("overlap", "training_s"), [(0, 4 * 20), (2, 20 + 10 + 20 + 10)])
def test_while_a_delta_is_on_a_slow_line_its_site_trains_on(tmp_path: Path, overlap: int, training_s: float) -> None:
    # In odd rounds the matrix travels, for longer than half a round's training takes; in even ones next to nothing.
    extra = f"steps = {INNER_STEPS}\n[streaming]\nfragments = 2\noverlap_steps = {overlap}\n"
    extra += "[delta]\nvalues = 'fp32'\n[simulate]\ntrain_s = 20.0\nup_mbit_s = 1.0\n"
    config, _ = make_config(tmp_path, num_rounds=4, extra=extra)
    result = simulate(config, tmp_path / "base", {name: Descender(seed) for name, seed in SEEDS.items()})
    _, history, _ = verify_directory(result.model_dir, coordinator_key(tmp_path))
    sending_s = sum(record.contributions[0].payload_bytes for record in history.records) * 8 / 1e6
    assert result.rounds[-1].published_s == pytest.approx(training_s + sending_s, rel=0.02)
