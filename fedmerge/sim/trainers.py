"""Trainers as simulated nodes see them: an engine does the work, and the simulation's clock says how long it took."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from fedmerge.config import Simulate
from fedmerge.sim.world import World
from fedmerge.tensors import TensorMap
from fedmerge.training import StatisticsTrainer, Trainer, TrainResult, TrainTask

Waiting: TypeAlias = Callable[[], Any]


class Engine(Protocol):
    """Runs methods of trainers."""

    def submit(self, trainer: Trainer, method: str, *arguments: Any) -> Waiting:
        """Begin `trainer.method(*arguments)` and return a function that waits for what it returns or raises."""
        ...

    def close(self) -> None:
        """Stop whatever the engine started."""
        ...


def num_threads(settings: Simulate) -> int:
    """Return how many threads a node trains with: results depend on it, so it is the same on every engine."""
    import torch

    return settings.threads or max(1, torch.get_num_threads() // settings.workers)


def call(num_threads: int, trainer: Trainer, method: str, *arguments: Any) -> Any:
    """Make a call with so many threads of torch's, here, wherever that is."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return getattr(trainer, method)(*arguments)
    finally:
        torch.set_num_threads(before)


class SimulatedTrainer:
    """A trainer as a simulated node sees it: `engine` does the work, and a round takes `train_s` of that time."""

    def __init__(self, trainer: Trainer, engine: Engine, world: World, train_s: float) -> None:
        self._trainer, self._engine, self._world, self._train_s = trainer, engine, world, train_s

    def check(self) -> None:
        """Check the trainer."""
        self._trainer.check()

    def train(self, task: TrainTask) -> TrainResult:
        """Train, and let others get on meanwhile."""
        result: TrainResult = self._do(self._train_s * task.share, "train", task)
        return result

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        """Evaluate, and let others get on meanwhile."""
        values: dict[str, float] = self._do(0.0, "evaluate", model_dir)
        return values

    def _do(self, duration_s: float, method: str, *arguments: Any) -> Any:
        waiting = self._engine.submit(self._trainer, method, *arguments)
        self._world.sleep(duration_s)
        return waiting()


class SimulatedStatisticsTrainer(SimulatedTrainer):
    """The same, of a trainer that computes statistics."""

    def statistics(self, model_dir: Path, kind: str) -> TensorMap:
        """Compute statistics, and let others get on meanwhile."""
        computed: TensorMap = self._do(0.0, "statistics", model_dir, kind)
        return computed


def simulated(trainer: Trainer, engine: Engine, world: World, train_s: float) -> SimulatedTrainer:
    """Return `trainer` as a simulated node sees it."""
    kind = SimulatedStatisticsTrainer if isinstance(trainer, StatisticsTrainer) else SimulatedTrainer
    return kind(trainer, engine, world, train_s)
