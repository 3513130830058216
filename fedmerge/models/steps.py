"""Step files: what takes one model version to another, bit for bit, however many bits the update had.

A step file is a safetensors file with a byte string (`fedmerge.models.ulp`) for each tensor that changed; one that did
not change costs nothing. It declares nothing but its format: a reader takes names, shapes and dtypes from the version
that it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from fedmerge.delta.container import open_container, writing_container
from fedmerge.delta.task_vector import delta_schema
from fedmerge.errors import InvalidDelta, ModelMismatch
from fedmerge.models.ulp import LAYOUTS, Bits, decode, encode, most_bytes
from fedmerge.tensors import DTYPES, Schema, TensorMap, TensorSpec, tensor_bytes

FORMAT: Final = "fedmerge.steps"
VERSION: Final = 2
KEY: Final = f"{FORMAT}.v{VERSION}"
_HINT = "it is damaged, or leads from another model: fetch it again"


def write_steps(path: Path, before: TensorMap, after: TensorMap, schema: Schema) -> None:
    """Write the step file from version `before` to version `after`, both of the tensors in `schema`.

    Integer tensors are the same in all versions and left out. Tensors are read one at a time. The same versions give
    the same bytes, under the same library versions. Raises `ModelMismatch` when a tensor does not have the schema's
    shape and dtype, and `ResourceError` when the disk does not take the file.
    """
    with writing_container(path, KEY, where=f"steps for {path}") as out:
        for name, spec in delta_schema(schema).items():
            old, new = _bits(before[name], name, spec), _bits(after[name], name, spec)
            if not np.array_equal(old, new):
                out.lengths[name] = out.payload.write(encode(old, new, spec.dtype).data)


class SteppedModel(Mapping[str, Tensor]):
    """The version that the step file at `path` leads to from `before`, computed tensor by tensor when asked for.

    `schema` is that of both. Opening raises `InvalidDelta` for anything but a step file for such a model, decoding for
    sections that no step has, naming the tensor; `InputError` when there is no file. A file that leads from another
    version than `before` gives other weights than it should: whoever reads them has to compare the digest.
    """

    def __init__(self, before: TensorMap, path: Path, schema: Schema) -> None:
        self.before = before
        self.path = path
        self.schema = schema
        floats = delta_schema(schema)
        limit = sum(most_bytes(spec.num_elements, spec.dtype) for spec in floats.values())
        self._file = _open(path, limit)
        self._changed = frozenset(self._file.keys())
        for name in sorted(self._changed):
            if name not in floats:
                raise _invalid(path, f"{name:.200}: not a tensor of this model that can change")
            view = self._file.get_slice(name)
            if view.get_dtype() != "U8" or len(view.get_shape()) != 1:
                raise _invalid(path, f"{name}: is {view.get_dtype()} {view.get_shape()}, not a byte string")

    def __getitem__(self, name: str) -> Tensor:
        old = self.before[name]
        if name not in self._changed:
            return old
        spec = self.schema[name]
        try:
            new = decode(_bits(old, name, spec), self._file.get_tensor(name), spec.dtype)
        except InvalidDelta as err:
            raise _invalid(self.path, f"{name}: {err.message}") from err
        return torch.from_numpy(new.view(np.uint8)).view(DTYPES[spec.dtype]).reshape(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.schema)

    def __len__(self) -> int:
        return len(self.schema)


def inspect_steps(path: Path) -> dict[str, Any]:
    """Return what a step file says of itself, for people: `file_bytes`, and under `tensors` what each one takes.

    Raises `InvalidDelta` when it is no step file, and `InputError` when there is no file to read.
    """
    file = _open(path, 1 << 62)
    sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
    tensors = [{"name": name, "coded_bytes": num_bytes} for name, num_bytes in sizes.items()]
    return {"format": FORMAT, "version": VERSION, "file_bytes": path.stat().st_size, "tensors": tensors}


def _open(path: Path, max_payload_bytes: int) -> Any:
    try:
        file, text = open_container(path, KEY, max_payload_bytes, what="step file")
    except InvalidDelta as err:
        raise _invalid(path, err.message) from err
    if text:
        raise _invalid(path, f"its metadata is {text!r:.100}, and should be empty")
    return file


def _invalid(path: Path, problem: str) -> InvalidDelta:
    return InvalidDelta(f"{path.name}: {problem:.400}", hint=_HINT)


def _bits(tensor: Tensor, name: str, spec: TensorSpec) -> Bits:
    if tensor.dtype != DTYPES[spec.dtype] or tuple(tensor.shape) != spec.shape:
        raise ModelMismatch(f"{name}: is {tensor.dtype} {list(tensor.shape)}, not {spec.dtype} {list(spec.shape)}")
    width = LAYOUTS[spec.dtype].width // 8
    return np.frombuffer(tensor_bytes(tensor), f"u{width}") if spec.num_elements else np.empty(0, f"u{width}")
