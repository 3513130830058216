"""Where simulated nodes train and evaluate: in this process, in several, on Ray, or on Flower's engine.

Everything else that a node does takes place in the simulation's own process, so results do not depend on the engine.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from typing import Any

from fedmerge.config import Simulate
from fedmerge.errors import MissingExtra
from fedmerge.sim.trainers import Engine, Waiting, call, num_threads
from fedmerge.training import Trainer, TrainTask


class Inline:
    """One call after the other, in this process, with `num_threads` each."""

    def __init__(self, num_threads: int = 1) -> None:
        self._num_threads = num_threads

    def submit(self, trainer: Trainer, method: str, *arguments: Any) -> Waiting:
        """Make the call at once."""
        result = call(self._num_threads, trainer, method, *arguments)
        return lambda: result

    def close(self) -> None:
        """Do nothing."""


class Pool:
    """Calls on an executor, with `num_threads` each. Workers see the same files: processes, or Flower's ClientApps."""

    def __init__(self, executor: Executor, num_threads: int = 1) -> None:
        self._executor, self._num_threads = executor, num_threads

    def submit(self, trainer: Trainer, method: str, *arguments: Any) -> Waiting:
        """Hand the call to the next worker that is free."""
        return self._executor.submit(call, self._num_threads, trainer, method, *map(_portable, arguments)).result

    def close(self) -> None:
        """Stop the workers."""
        self._executor.shutdown(cancel_futures=True)


def local_processes(num_workers: int) -> Executor:
    """Return processes on this machine."""
    # Not forked: torch's threads do not survive it.
    return ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn"))


def _portable(argument: Any) -> Any:
    """Return an argument as another process can take it: nobody there could show a trainer's progress."""
    return replace(argument, progress=None) if isinstance(argument, TrainTask) else argument


def _ray(settings: Simulate) -> Engine:
    from fedmerge.sim.ray import Ray

    return Ray(
        settings.ray_address,
        num_cpus=settings.ray_cpus,
        num_gpus=settings.ray_gpus,
        num_threads=num_threads(settings),
    )


def _flower(settings: Simulate) -> Engine:
    from fedmerge.interop.flower.executor import FlowerExecutor

    executor = FlowerExecutor(settings.workers, num_cpus=settings.ray_cpus, num_gpus=settings.ray_gpus)
    return Pool(executor, num_threads(settings))


ENGINES: dict[str, Callable[[Simulate], Engine]] = {
    "inline": lambda settings: Inline(num_threads(settings)),
    "pool": lambda settings: Pool(local_processes(settings.workers), num_threads(settings)),
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
