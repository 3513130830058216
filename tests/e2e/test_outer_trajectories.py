"""DiLoCo's and FedOpt's whole trajectories: a federation against the few lines that the papers have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedmerge.sim import simulate
from fedmerge.tensors import Checkpoint
from fedmerge.training import Trainer, TrainResult, TrainTask
from tests.conftest import make_config

NUM_ROUNDS, INNER_STEPS, INNER_LR = 6, 4, 0.1


def descend(model: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A node's round: gradient descent to a target of its own, so that each step depends on where it begins."""
    for _ in range(INNER_STEPS):
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
            tuned[name] = descend(before[name], target_of(self.seed, before[name]))
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
