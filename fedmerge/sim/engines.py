"""Where simulated nodes train and evaluate: in this process, in several, on Ray, or on Flower's engine.

Everything else that a node does takes place in the simulation's own process, so results do not depend on the engine.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from typing import Any

from fedmerge.config import Simulate
from fedmerge.errors import MissingExtra
from fedmerge.sim.trainers import Engine, Waiting, call
from fedmerge.training import Trainer, TrainTask


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


def _limit_threads(num_threads: int) -> None:
    import torch

    torch.set_num_threads(num_threads)


def _portable(argument: Any) -> Any:
    """Return an argument as another process can take it: nobody there could show a trainer's progress."""
    return replace(argument, progress=None) if isinstance(argument, TrainTask) else argument


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
