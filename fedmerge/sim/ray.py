"""The engine on Ray: a laptop's cores, or a cluster that somebody started, whose machines share no disk.

Directories of models travel through Ray's object store, each model once, and come back the same way. What trainers read
of their own, the nodes' data, has to be under the same paths on every machine.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import ray
from numpy.typing import NDArray

from fedmerge.cluster import connect, require_room
from fedmerge.sim.trainers import Waiting, call
from fedmerge.training import STATE, Trainer, TrainResult, TrainTask

Files: TypeAlias = Mapping[str, NDArray[np.uint8]]
# Of the newest models: the global one, and those that nodes have just tuned.
NUM_KEPT = 8


class Ray:
    """Runs trainers as Ray tasks. Without an `address` a cluster is started here, for as long as the engine is open.

    Each call takes `num_cpus` and `num_gpus` of a machine, which may be fractions, and `num_threads`. Raises
    `ResourceError` when there is no cluster at the address, or this machine has less.
    """

    def __init__(self, address: str | None, *, num_cpus: float, num_gpus: float, num_threads: int = 1) -> None:
        connect(address)
        require_room(num_cpus, num_gpus, may_grow=address is not None)
        self._num_threads = num_threads
        self._run = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(_run)
        self._stored: OrderedDict[Path, ray.ObjectRef[Files]] = OrderedDict()

    def submit(self, trainer: Trainer, method: str, *arguments: Any) -> Waiting:
        """Hand the call to the next machine with room for it."""
        first, *rest = arguments
        doing = self._num_threads, trainer, method
        if isinstance(first, TrainTask):
            previous = None if first.previous_state is None else _pack(first.previous_state)
            task = replace(first, progress=None)
            pending = self._run.remote(doing, self._store(first.model_dir), task, previous)
            return lambda: _unpack_result(ray.get(pending), first.workspace)
        pending = self._run.remote(doing, self._store(first), None, None, *rest)
        return lambda: ray.get(pending)

    def close(self) -> None:
        """Leave the cluster."""
        self._stored.clear()
        ray.shutdown()

    def _store(self, directory: Path) -> ray.ObjectRef[Files]:
        if directory not in self._stored:
            self._stored[directory] = ray.put(_pack(directory))
        self._stored.move_to_end(directory)
        if len(self._stored) > NUM_KEPT:
            self._stored.popitem(last=False)
        return self._stored[directory]


def _run(
    doing: tuple[int, Trainer, str], model: Files, task: TrainTask | None, previous: Files | None, *rest: Any
) -> Any:
    """Make a call on whatever machine this is, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="fedmerge-") as scratch:
        model_dir = _unpack(model, Path(scratch, "model"))
        if task is None:
            return call(*doing, model_dir, *rest)
        workspace = Path(scratch, "workspace")
        workspace.mkdir()
        state = None if previous is None else _unpack(previous, Path(scratch, "previous"))
        result: TrainResult = call(
            *doing, replace(task, model_dir=model_dir, workspace=workspace, previous_state=state)
        )
        kept = workspace / STATE
        return result, _pack(result.model_dir), _pack(kept) if kept.exists() else None


def _unpack_result(packed: tuple[TrainResult, Files, Files | None], workspace: Path) -> TrainResult:
    result, tuned, state = packed
    if state is not None:
        _unpack(state, workspace / STATE)
    return replace(result, model_dir=_unpack(tuned, workspace / "tuned"))


def _pack(directory: Path) -> Files:
    """Return a folder's files by name, as arrays, which workers on the same machine then read without a copy."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {path.relative_to(directory).as_posix(): np.fromfile(path, np.uint8) for path in paths}


def _unpack(files: Files, directory: Path) -> Path:
    for name, content in files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        content.tofile(target)
    directory.mkdir(parents=True, exist_ok=True)
    return directory
