"""A merge on Ray: workers open the same models, each merges some of the tensors, and what comes back is written here.

The models have to be under the same paths on every machine of the cluster: a shared disk, or a copy. The bytes are
those of a merge on one machine, whichever worker makes what.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError
from ray.util import ActorPool

from fedmerge.cluster import connect
from fedmerge.errors import ConfigError, FedmergeError, ResourceError
from fedmerge.local.assemble import Assembly, MergeJob, Slice, Source
from fedmerge.merge import Workers, Write
from fedmerge.models.weights import num_bytes, split_shards
from fedmerge.tensors import DTYPES, tensor_bytes

Merged: TypeAlias = Mapping[str, NDArray[np.uint8]]
# What a worker returns at once, unless one tensor has more: small tensors are not worth a call each.
BATCH_BYTES = 64 << 20


def merge_on_ray(
    assembly: Assembly, write: Write, *, seed: int, workers: Workers, address: str | None = None
) -> Iterator[str]:
    """Do what `assembly.merge` does on a cluster, and leave it; yield each tensor's name when it is written.

    `workers` says how many there are to be, 0 for one per core of the cluster, and on which device each computes.
    Raises as `Assembly` and its `merge` do, `ConfigError` for a model that is merged as one vector, and `ResourceError`
    without a cluster or when a worker dies.
    """
    if any(part.recipe.scope == "model" for part in assembly.job.slices):
        raise ConfigError("a model that is merged as one vector can't be spread over workers", hint="merge it here")
    connect(address)
    try:
        num_workers = workers.num_threads or max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]
        remote = ray.remote(num_cpus=1, num_gpus=1 if workers.device == "cuda" else 0)(_Worker)
        job, each = _absolute(assembly.job), replace(workers, num_threads=1)
        pool = ActorPool([remote.remote(job, seed, each) for _ in range(num_workers)])
        batches = list(split_shards(assembly.schema, BATCH_BYTES).values())
        for merged in pool.map_unordered(_merge, batches):
            for name, data in merged.items():
                # A copy: what Ray hands out can't be written to, which torch warns of.
                write(name, 0, torch.from_numpy(data.copy()).view(DTYPES[assembly.schema[name].dtype]))
                yield name
    except RayTaskError as err:
        if isinstance(err.cause, FedmergeError):
            raise err.cause from None
        raise ResourceError(f"a worker failed: {err.cause}") from err
    except RayError as err:
        raise ResourceError(f"the cluster failed: {err}") from err
    finally:
        ray.shutdown()


class _Worker:
    """Merges tensors of a job, which it opens when the first ones are asked for."""

    def __init__(self, job: MergeJob, seed: int, workers: Workers) -> None:
        self._job, self._seed, self._workers = job, seed, workers
        self._assembly: Assembly | None = None

    def merge(self, names: list[str]) -> Merged:
        """Return the bytes of some tensors of the result."""
        torch.set_num_threads(1)
        self._assembly = self._assembly or Assembly(self._job)
        schema = self._assembly.schema
        merged = {name: np.empty(num_bytes(schema[name]), np.uint8) for name in names}

        def write(name: str, start: int, values: torch.Tensor) -> None:
            first = start * values.element_size()
            data = tensor_bytes(values)
            merged[name][first : first + len(data)] = data

        for _ in self._assembly.merge(write, seed=self._seed, workers=self._workers, only=set(names)):
            pass
        return merged


def _merge(worker: Any, names: list[str]) -> Any:
    return worker.merge.remote(names)


def _absolute(job: MergeJob) -> MergeJob:
    """Return `job` as it reads in any working directory."""

    def source(one: Source) -> Source:
        statistics = None if one.statistics is None else one.statistics.absolute()
        return replace(one, model=one.model.absolute(), statistics=statistics)

    def part(one: Slice) -> Slice:
        return replace(one, sources=tuple(map(source, one.sources)), base=one.base and source(one.base))

    return replace(job, slices=tuple(map(part, job.slices)), host=Path(job.host).absolute())
