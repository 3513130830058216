"""Write a model's weights as they are computed: safetensors files laid out beforehand and filled in any order.

The layout follows from names, dtypes and shapes alone, so nothing has to be in memory before it is written, and the
bytes do not depend on who wrote what first.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fedmerge.errors import ResourceError
from fedmerge.tensors import DTYPES, INDEX, WEIGHTS, Schema, TensorSpec, tensor_bytes


class _Place(NamedTuple):
    file: int  # descriptor
    start: int
    itemsize: int
    num_bytes: int


class WeightsWriter:
    """The weight files of a model, open for writing: `write` from any thread, then leave the block that opened them."""

    def __init__(self, places: Mapping[str, _Place]) -> None:
        self._places = places
        self._missing_bytes = {name: place.num_bytes for name, place in places.items()}
        self._lock = threading.Lock()

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write `values`, flat and in the dtype of the schema, as the elements of a tensor from index `start` on.

        Raises `OSError` when the disk does not take them.
        """
        place, data = self._places[name], tensor_bytes(values)
        offset = start * place.itemsize
        if offset + len(data) > place.num_bytes:
            raise ValueError(f"{name} has no room for {len(data)} bytes at {offset}")
        with self._lock:
            self._missing_bytes[name] -= len(data)
        offset += place.start
        while data:
            num_written = os.pwrite(place.file, data, offset)
            data, offset = data[num_written:], offset + num_written

    def require_complete(self) -> None:
        """Raise `ValueError` unless as much was written of every tensor as there is."""
        for name, num_bytes in self._missing_bytes.items():
            if num_bytes:
                raise ValueError(f"{num_bytes} bytes of {name} were not written")


@contextmanager
def writing_weights(directory: Path, schema: Schema, shards: Mapping[str, Sequence[str]]) -> Iterator[WeightsWriter]:
    """Open the safetensors files that `shards` says (tensor names by file name) in `directory`; add an index if needed.

    Every tensor of `schema` is in one shard. Raises `ResourceError` when the disk does not take them.
    """
    places: dict[str, _Place] = {}
    files: list[int] = []
    try:
        for file_name, names in shards.items():
            # What safetensors itself does: wide elements first, so that all are aligned.
            ordered = sorted(names, key=lambda name: (-DTYPES[schema[name].dtype].itemsize, name))
            header, sizes = _header(schema, ordered)
            file = os.open(directory / file_name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            files.append(file)
            os.write(file, header)
            start = len(header)
            for name, num_bytes in sizes.items():
                places[name] = _Place(file, start, DTYPES[schema[name].dtype].itemsize, num_bytes)
                start += num_bytes
            os.ftruncate(file, start)
        writer = WeightsWriter(places)
        yield writer
        writer.require_complete()
        if list(shards) != [WEIGHTS]:
            weight_map = {name: file_name for file_name, names in shards.items() for name in names}
            total_bytes = sum(place.num_bytes for place in places.values())
            index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    except OSError as err:
        raise ResourceError(
            f"{directory}: could not write the model ({err.strerror})", hint="is the disk full?"
        ) from err
    finally:
        for file in files:
            os.close(file)


def num_bytes(spec: TensorSpec) -> int:
    """Return how many bytes a tensor of this `spec` has."""
    return spec.num_elements * DTYPES[spec.dtype].itemsize


def split_shards(schema: Schema, max_shard_bytes: int) -> dict[str, list[str]]:
    """Return shards of at most `max_shard_bytes` each, tensors in the order of `schema`; a larger tensor has its own.

    One shard is called as a model's only file is, several as transformers calls them.
    """
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, spec in schema.items():
        if shards[-1] and num_bytes(spec) > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= num_bytes(spec)
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    stem = WEIGHTS.removesuffix(".safetensors")
    return {f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards)}


def _header(schema: Schema, names: Sequence[str]) -> tuple[bytes, dict[str, int]]:
    """Return a safetensors header for tensors in this order, with its length before it, and the bytes of each."""
    sizes = {name: num_bytes(schema[name]) for name in names}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, size in sizes.items():
        spec = schema[name]
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, sizes
