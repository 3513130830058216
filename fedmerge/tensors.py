"""The tensor map: model weights by name, read lazily from a Hugging Face directory, and their digests.

A *tensor map* is any `Mapping[str, Tensor]`: a dict in memory, or a `Checkpoint`, which maps files and reads a
tensor when asked for it, so that a model never has to be in memory whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedmerge.errors import InputError, ModelMismatch, ResourceError

TensorMap: TypeAlias = Mapping[str, Tensor]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})

# The names safetensors uses, which are also what fedmerge writes into schemas and digests.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor must look like: `shape` and `dtype` (a name from `DTYPES`)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def is_float(self) -> bool:
        """Whether the tensor has a difference that can be merged; integer buffers do not."""
        return DTYPES[self.dtype].is_floating_point


Schema: TypeAlias = dict[str, TensorSpec]


class Checkpoint(Mapping[str, Tensor]):
    """The weights of a Hugging Face model directory, sorted by name and read on demand.

    Reads `model.safetensors`, or the shards that `model.safetensors.index.json` names. Tensors may share memory with
    the file: never change one in place. Raises `InputError` when the directory has no safetensors weights or a file
    can't be parsed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file_of: dict[str, Path] = {}
        self._files: dict[Path, Any] = {}
        self.schema: Schema = {}
        for path in _weight_files(directory):
            try:
                # Kept open: parsing a header again for every tensor would cost more than reading the tensor.
                file: Any = safe_open(path, framework="pt")
                self._files[path] = file
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    view = file.get_slice(name)
                    self.schema[name] = TensorSpec(tuple(view.get_shape()), view.get_dtype())
                    self._file_of[name] = path
            except (SafetensorError, OSError) as err:
                raise InputError(f"{path}: not a readable safetensors file ({err})") from err
        self.schema = dict(sorted(self.schema.items()))
        unknown = sorted({spec.dtype for spec in self.schema.values()} - DTYPES.keys())
        if unknown:
            raise InputError(
                f"{directory}: tensors of dtype {', '.join(unknown)} are not supported",
                hint=f"convert the checkpoint to one of {', '.join(DTYPES)}",
            )

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[self._file_of[name]].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.schema)

    def __len__(self) -> int:
        return len(self.schema)

    def shards(self) -> dict[str, list[str]]:
        """Return the tensor names of each weight file, by file name, so that a copy can be sharded alike."""
        found: dict[str, list[str]] = {}
        for name, path in self._file_of.items():
            found.setdefault(path.name, []).append(name)
        return found


class Renamed(Mapping[str, Tensor]):
    """Tensors of a checkpoint under other names: `names` gives each name's own there."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
        self._checkpoint, self._names = checkpoint, dict(sorted(names.items()))
        self.schema: Schema = {name: checkpoint.schema[own] for name, own in self._names.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _weight_files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise InputError(f"{directory}: no such model directory")
    index = directory / INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as err:
            raise InputError(f"{index}: not a safetensors index ({err})") from err
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise InputError(f"{index}: shard names must be plain file names")
        return sorted(directory / name for name in names)
    weights = directory / WEIGHTS
    if not weights.is_file():
        raise InputError(
            f"{directory}: no {WEIGHTS} and no {INDEX}",
            hint="fedmerge reads Hugging Face directories with safetensors weights; "
            "re-save the model with save_pretrained(..., safe_serialization=True)",
        )
    return [weights]


def is_resident(tensors: TensorMap) -> bool:
    """Return whether every tensor is there already, in memory or in a mapped file, so that asking for one is free."""
    return isinstance(tensors, dict | Checkpoint | Renamed)


class Computed(Mapping[str, Tensor]):
    """A tensor map of the given names whose tensors are computed when they are asked for."""

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def schema_of(tensors: TensorMap) -> Schema:
    """Return the names, shapes and dtypes of `tensors`, sorted by name."""
    known: Schema | None = getattr(tensors, "schema", None)
    if known is not None:
        return known
    return {name: TensorSpec(tuple(tensors[name].shape), DTYPE_NAMES[tensors[name].dtype]) for name in sorted(tensors)}


def require_same_schema(expected: Schema, found: Schema, *, where: str) -> None:
    """Raise `ModelMismatch` naming the first differences unless `found` has exactly the tensors of `expected`.

    Dtypes may differ between floating types: a fine-tune in bf16 of an fp32 base is still a fine-tune.
    """
    problems = [f"misses {name}" for name in expected if name not in found]
    problems += [f"has unknown {name}" for name in found if name not in expected]
    for name, spec in expected.items():
        other = found.get(name)
        if other is not None and other.shape != spec.shape:
            problems.append(f"{name} has shape {list(other.shape)}, not {list(spec.shape)}")
        elif other is not None and other.dtype != spec.dtype and not (other.is_float and spec.is_float):
            problems.append(f"{name} is {other.dtype}, not {spec.dtype}")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ModelMismatch(
            f"{where}: not the same architecture: {'; '.join(problems[:3])}{more}",
            hint="every checkpoint of a federation must be a fine-tune of its base model",
        )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the little-endian row-major bytes of `tensor`, without a copy where it is contiguous already."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy arrays are buffers


def schema_digest(schema: Schema) -> str:
    """Return the SHA-256 (hex) that stands for the names, shapes and dtypes of a model."""
    lines = [json.dumps([name, spec.dtype, list(spec.shape)]) for name, spec in sorted(schema.items())]
    return hashlib.sha256(("fedmerge.schema.v1\n" + "\n".join(lines)).encode()).hexdigest()


def model_digest(tensors: TensorMap) -> str:
    """Return the SHA-256 (hex) that names a model version: over each tensor's name, dtype, shape and content digest.

    It does not depend on file layout, so a model re-sharded is the same version.
    """
    outer = hashlib.sha256(b"fedmerge.model.v1\n")
    for name in sorted(tensors):
        tensor = tensors[name]
        content = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        outer.update(json.dumps([name, DTYPE_NAMES[tensor.dtype], list(tensor.shape), content]).encode() + b"\n")
    return outer.hexdigest()


@contextmanager
def reporting_save_errors(where: object) -> Iterator[None]:
    """Turn what safetensors raises when a disk does not take a file into a `ResourceError` that names `where`."""
    try:
        yield
    except SafetensorError as err:
        raise ResourceError(f"{where}: could not be written ({err})", hint="is the disk full?") from err


def write_weights(tensors: TensorMap, directory: Path, shards: dict[str, list[str]]) -> None:
    """Write `tensors` into `directory` as safetensors, split as `shards` says, holding one shard in memory at a time.

    Raises `ResourceError` when the disk does not take it.
    """
    total_bytes = 0
    try:
        for file_name, names in shards.items():
            shard = {name: tensors[name].contiguous() for name in names}
            total_bytes += sum(tensor.nbytes for tensor in shard.values())
            save_file(shard, directory / file_name, metadata={"format": "pt"})
            # safetensors makes files that their owner alone can read; a model is meant for others.
            (directory / file_name).chmod(0o644)
        if list(shards) != [WEIGHTS]:
            weight_map = {name: file_name for file_name, names in shards.items() for name in names}
            index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    except (SafetensorError, OSError) as err:
        raise ResourceError(f"{directory}: could not write the model ({err})", hint="is the disk full?") from err


def copy_side_files(source: Path, target: Path, *, skip: Iterable[str] = ()) -> None:
    """Copy config, tokenizer and the like from one model directory to another: every plain file but weights and `skip`.

    Pickled weights are left behind: nothing that fedmerge publishes executes code when opened.
    """
    skipped = {INDEX, "README.md", *skip}
    for path in sorted(source.iterdir()):
        weights = path.suffix in PICKLED or path.suffix == ".safetensors"
        if path.is_file() and path.name not in skipped and not weights and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
