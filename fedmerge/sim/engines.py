"""Where simulated nodes train and evaluate: in this process, in several, on Ray, or on Flower's engine.

Everything else that a node does takes place in the simulation's own process, so results do not depend on the engine.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from fedmerge.config import Simulate
from fedmerge.errors import MissingExtra
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


class Inline:
    """One call after the other, in this process."""

    def submit(self, trainer: Trainer, method: str, *arguments: Any) -> Waiting:
        """Make the call at once."""
        result = getattr(trainer, method)(*arguments)
        return lambda: result

    def close(self) -> None:
        """Do nothing."""


class Pool:
    """Calls on an executor, whose workers see the same files: processes here, or Flower's ClientApps."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def submit(self, trainer: Trainer, method: str, *arguments: Any) -> Waiting:
        """Hand the call to the next worker that is free."""
        return self._executor.submit(call, trainer, method, *map(_portable, arguments)).result

    def close(self) -> None:
        """Stop the workers."""
        self._executor.shutdown(cancel_futures=True)


def local_processes(num_workers: int) -> Executor:
    """Return processes on this machine, which divide its cores among them."""
    # Not forked: torch's threads do not survive it.
    return ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_limit_threads,
        initargs=(max(1, (os.cpu_count() or 1) // num_workers),),
    )


def call(trainer: Trainer, method: str, *arguments: Any) -> Any:
    """Make a call here, wherever that is."""
    return getattr(trainer, method)(*arguments)


def _limit_threads(num_threads: int) -> None:
    import torch

    torch.set_num_threads(num_threads)


def _portable(argument: Any) -> Any:
    """Return an argument as another process can take it: nobody there could show a trainer's progress."""
    return replace(argument, progress=None) if isinstance(argument, TrainTask) else argument


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


def _ray(settings: Simulate) -> Engine:
    from fedmerge.sim.ray import Ray

    return Ray(settings.ray_address, num_cpus=settings.ray_cpus, num_gpus=settings.ray_gpus)


def _flower(settings: Simulate) -> Engine:
    from fedmerge.interop.flower.executor import FlowerExecutor

    return Pool(FlowerExecutor(settings.workers, num_cpus=settings.ray_cpus, num_gpus=settings.ray_gpus))


ENGINES: dict[str, Callable[[Simulate], Engine]] = {
    "inline": lambda settings: Inline(),
    "pool": lambda settings: Pool(local_processes(settings.workers)),
    "ray": _ray,
    "flower": _flower,
}


def open_engine(settings: Simulate) -> Engine:
    """Return the engine that a configuration names; raise `MissingExtra` when it is not installed."""
    try:
        return ENGINES[settings.engine](settings)
    except ModuleNotFoundError as err:
        raise MissingExtra(
            f"simulate.engine = {settings.engine!r} needs {err.name}", hint=f'pip install "fedmerge[{settings.engine}]"'
        ) from err
