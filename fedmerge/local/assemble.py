"""A merge of checkpoints on this machine: which layers of which models become which layers of the result, and how.

Most often it is one slice: all layers of some fine-tunes, merged by one recipe. Several slices stand one on the other,
each made from layers of its own sources by a recipe of its own, which makes models of other depths than their sources.
Tensors outside all layers come from the first slice if they embed, and from the last one otherwise.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fedmerge.delta.adapter import is_adapter, read_adapter
from fedmerge.delta.lowrank import LowRankDelta
from fedmerge.delta.task_vector import UpdatedModel, subtract
from fedmerge.errors import ConfigError, InputError, ModelMismatch
from fedmerge.merge import Recipe, Step, Workers, Write, merge_models
from fedmerge.merge.layers import Value, layer_of, require_fitting, restrict
from fedmerge.merge.recipe import step_names
from fedmerge.merge.statistics import read_statistics
from fedmerge.models.weights import split_shards, writing_weights
from fedmerge.rebasin import Group, groups_of, permuted, read_config, weight_matching
from fedmerge.statements import LocalInput
from fedmerge.tensors import (
    DTYPE_NAMES,
    DTYPES,
    WEIGHTS,
    Checkpoint,
    Renamed,
    Schema,
    TensorMap,
    TensorSpec,
    copy_side_files,
    model_digest,
    schema_of,
)

CONFIG = "config.json"

# Names of embeddings; what GPT-NeoX calls embed_out is a head.
_EMBEDS = re.compile(r"embed(?!_out)|(?:^|\.)w[tp]e\.")
_NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True)
class Source:
    """A model directory, what it counts for, and which of its layers are taken, from the first up to the second.

    `statistics` is a file with those of its data (`fedmerge.merge.statistics`), for methods that need them.
    """

    model: Path
    weight: Value = 1.0
    layers: tuple[int, int] | None = None
    statistics: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the source as JSON types."""
        return {"model": self.model.name, "layers": self.layers and list(self.layers), "weight": self.weight}


@dataclass(frozen=True)
class Slice:
    """Layers that are made by one recipe from the same number of layers of each source.

    Task vectors start from `base`, and from zero where there is none.
    """

    recipe: Recipe
    sources: tuple[Source, ...]
    base: Source | None = None


@dataclass(frozen=True)
class MergeJob:
    """A merge as it was asked for. `host` is the model directory whose config and tokenizer the result takes.

    `dtype`, as safetensors names it, is that of the result; that of the base, or of the first source, where it is None.
    With `align` each model's hidden units are first permuted towards the base's (`fedmerge.rebasin`). `repair` says by
    which data, its SHA-256, and trainer the merged units are given the moments that those of the models have.
    """

    slices: tuple[Slice, ...]
    host: Path
    dtype: str | None = None
    align: Literal["git_rebasin"] | None = None
    repair: Mapping[str, str] | None = None

    @property
    def models(self) -> list[Path]:
        """The directories that are merged, once each, in their order; a base is none of them."""
        return list(dict.fromkeys(source.model for part in self.slices for source in part.sources))

    @property
    def methods(self) -> list[str]:
        """The names of all steps, once each."""
        return step_names(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return how the models are merged as JSON types: the recipe, or each slice's."""
        if self._is_plain():
            more = {"align": self.align, "repair": self.repair and dict(self.repair)}
            return self.slices[0].recipe.to_dict() | {key: value for key, value in more.items() if value}
        slices = [
            {
                "merge": part.recipe.to_dict(),
                "base": part.base and part.base.to_dict(),
                "sources": [source.to_dict() for source in part.sources],
            }
            for part in self.slices
        ]
        return {"slices": slices}

    def _is_plain(self) -> bool:
        (first, *rest) = self.slices
        whole = all(source.layers is None for source in first.sources)
        return whole and not rest and first.base is not None


@dataclass(frozen=True)
class _Part:
    """A slice with its models opened: tensor maps under the names that the result's tensors have.

    An adapter is there as the task vector that it is; everything else as a model.
    """

    recipe: Recipe
    weights: tuple[Value, ...]
    base: TensorMap
    tuned: tuple[tuple[Path, TensorMap], ...]
    statistics: tuple[TensorMap, ...] | None = None

    @property
    def schema(self) -> Schema:
        return schema_of(self.base)


class Assembly:
    """A merge job whose models are open: the schema of the result, and its tensors as they are merged.

    Raises `InputError` when a model can't be opened or has no such layers, `ModelMismatch` when models that are merged
    do not have the same tensors, and `ConfigError` when a value varies by a pattern that fits no tensor.
    """

    def __init__(self, job: MergeJob) -> None:
        self.job = job
        self._models: dict[Path, Checkpoint] = {}
        # What may be permuted, and where the units of each model that was aligned went, by group.
        self.groups: list[Group] = []
        self.alignments: dict[Path, dict[str, Tensor]] = {}
        if job.align is not None and (self._is_sliced() or job.slices[0].base is None):
            raise ConfigError("models are aligned whole, and to a base: not slices, and not without one")
        self.host = self._open(job.host)
        self._parts = self._open_parts()
        self.schema: Schema = {}
        for part in self._parts:
            self.schema |= {name: self._cast(spec) for name, spec in part.schema.items()}
        self.schema = dict(sorted(self.schema.items()))
        if self._is_sliced():
            self._require_hosted()

    def inputs(self) -> list[LocalInput]:
        """Return what was merged, for the record."""
        plain = not self._is_sliced()
        weights = {source.model: source.weight for source in self.job.slices[0].sources} if plain else {}
        opened = {path: model for part in self._parts for path, model in part.tuned}
        files = {
            source.model: hashlib.sha256(source.statistics.read_bytes()).hexdigest()
            for source in self.job.slices[0].sources
            if source.statistics is not None
        }
        return [
            LocalInput(
                name=path.name,
                digest=model_digest(self._whole(path, opened[path])),
                weight=weights.get(path, 1.0),
                statistics=files.get(path),
            )
            for path in self.job.models
        ]

    def shards(self, max_shard_bytes: int | None) -> dict[str, list[str]]:
        """Return which file each tensor goes to: as in the host, or in files of at most `max_shard_bytes`."""
        if max_shard_bytes is not None:
            return split_shards(self.schema, max_shard_bytes)
        return {WEIGHTS: list(self.schema)} if self._is_sliced() else self.host.shards()

    def merge(self, write: Write, *, seed: int, workers: Workers, only: Collection[str] | None = None) -> Iterator[str]:
        """Merge, and `write` each tensor in its dtype; yield its name when it is done, as `merge_models` does."""

        def cast(name: str, start: int, values: Tensor) -> None:
            narrow = values.to(DTYPES[self.schema[name].dtype])
            if narrow.dtype == torch.float16 and not narrow.isfinite().all():
                raise InputError(f"{name} holds values that are too large for float16", hint="bfloat16 has the range")
            write(name, start, narrow)

        for part in self._parts:
            vectors = [
                model if isinstance(model, LowRankDelta) else subtract(model, part.base, where=str(path))
                for path, model in part.tuned
            ]
            yield from merge_models(
                vectors,
                part.weights,
                part.recipe,
                part.base,
                cast,
                seed=seed,
                statistics=part.statistics,
                workers=workers,
                only=only,
            )

    def write(self, directory: Path, *, seed: int, workers: Workers) -> None:
        """Merge into a new `directory`: weights, config and tokenizer. Raises `ResourceError` as the disk does."""
        directory.mkdir()
        with writing_weights(directory, self.schema, self.shards(None)) as writer:
            for _ in self.merge(writer.write, seed=seed, workers=workers):
                pass
        self.write_side_files(directory)

    def write_side_files(self, directory: Path) -> None:
        """Put the host's config and tokenizer beside the merged weights. Raises `InputError` as `config_changes`."""
        changes = self.config_changes()
        copy_side_files(self.host.directory, directory)
        if changes:
            config = json.loads((self.host.directory / CONFIG).read_text())
            (directory / CONFIG).write_text(json.dumps(config | changes, indent=2) + "\n")

    def config_changes(self) -> dict[str, Any]:
        """Return what differs in config.json from the host's."""
        path = self.job.host / CONFIG
        try:
            config = json.loads(path.read_text()) if path.exists() else {}
        except (OSError, ValueError) as err:
            raise InputError(f"{path}: not a model configuration ({type(err).__name__})") from err
        if not isinstance(config, dict):
            raise InputError(f"{path}: not a model configuration")
        changes: dict[str, Any] = {}
        if self.job.dtype is not None and config:
            named = str(DTYPES[self.job.dtype]).removeprefix("torch.")
            changes["dtype" if "dtype" in config else "torch_dtype"] = named
        if self._is_sliced():
            taken = self._layers_taken()
            key = next((name for name in _NUM_LAYERS if name in config), None)
            if key is None:
                raise InputError(
                    f"{path}: does not say how many layers the model has", hint=f"it has no {_NUM_LAYERS[0]}"
                )
            changes[key] = len(taken)
            if isinstance(kinds := config.get("layer_types"), list) and len(kinds) > max(taken):
                changes["layer_types"] = [kinds[layer] for layer in taken]
        return changes

    def _is_sliced(self) -> bool:
        return len(self.job.slices) > 1 or any(one.layers is not None for one in self.job.slices[0].sources)

    def _layers_taken(self) -> list[int]:
        """Return for each layer of the result which layer of its first source it comes from."""
        ranges = [part.sources[0].layers or (0, 0) for part in self.job.slices]
        return [layer for start, stop in ranges for layer in range(start, stop)]

    def _open(self, path: Path) -> Checkpoint:
        if path not in self._models:
            self._models[path] = Checkpoint(path)
        return self._models[path]

    def _open_tuned(self, path: Path, base: Source | None) -> TensorMap:
        """Return a fine-tune: a model, or an adapter as its task vector."""
        return (
            read_adapter(path, self._open(base.model), where=str(path))
            if base and is_adapter(path)
            else self._open(path)
        )

    def _aligned(self, path: Path, model: TensorMap, base: Checkpoint) -> TensorMap:
        """Return `model`, which computes the same, with its units in the order that brings it closest to `base`."""
        if isinstance(model, LowRankDelta):
            return model  # an adapter of the base, whose units are where they were
        self.alignments[path] = weight_matching(base, model, self.groups)
        return permuted(model, self.groups, self.alignments[path])

    def _whole(self, path: Path, opened: TensorMap) -> TensorMap:
        """Return the model that was `opened` from `path`, under its own names."""
        return UpdatedModel(self.host, [opened]) if isinstance(opened, LowRankDelta) else self._open(path)

    def _open_parts(self) -> list[_Part]:
        if not self._is_sliced():
            (only,) = self.job.slices
            sources = tuple((source.model, self._open_tuned(source.model, only.base)) for source in only.sources)
            if self.job.align is not None and only.base is not None:
                reference = self._open(only.base.model)
                self.groups = groups_of(reference.schema, read_config(reference.directory))
                sources = tuple((path, self._aligned(path, model, reference)) for path, model in sources)
            base = self._wide(self._open(only.base.model) if only.base else _Zeros(sources[0][1]))
            weights = tuple(source.weight for source in only.sources)
            return [_Part(only.recipe, weights, base, sources, _read_statistics(only, schema_of(base)))]
        parts: list[_Part] = []
        first = 0
        for index, part in enumerate(self.job.slices):
            place = (index == 0, index == len(self.job.slices) - 1)
            views = [(source.model, self._view(source, first, place)) for source in part.sources]
            base = self._wide(self._view(part.base, first, place) if part.base else _Zeros(views[0][1]))
            parts.append(_Part(part.recipe, tuple(one.weight for one in part.sources), base, tuple(views)))
            start, stop = part.sources[0].layers or (0, 0)
            first += stop - start
        names = [name for part in parts for name in part.schema]
        return [_restricted(part, names) for part in parts]

    def _view(self, source: Source, first: int, place: tuple[bool, bool]) -> Renamed:
        """Return the layers of a source, numbered from `first` on, and what it brings beside layers at this `place`."""
        model = self._open(source.model)
        start, stop = source.layers or (0, 0)
        stacks = {layer[0] for name in model.schema if (layer := layer_of(name))}
        if len(stacks) != 1:
            found = ", ".join(sorted(stacks)) or "none"
            raise InputError(f"{source.model}: slices need a model with one stack of layers; this one has {found}")
        names: dict[str, str] = {}
        missing = set(range(start, stop))
        for name in model.schema:
            layer = layer_of(name)
            if layer is None:
                is_first, is_last = place
                if is_first if _EMBEDS.search(name) else is_last:
                    names[name] = name
            elif start <= layer[1] < stop:
                missing.discard(layer[1])
                stack, number = layer
                names[f"{stack}.{number - start + first}{name[len(f'{stack}.{number}') :]}"] = name
        if missing:
            raise InputError(f"{source.model}: has no layer {min(missing)}", hint="layers are numbered from 0")
        return Renamed(model, names)

    def _require_hosted(self) -> None:
        """Raise `ModelMismatch` unless each tensor has the shape that the host's config stands for."""
        shapes = {_place_in_layer(name): spec.shape for name, spec in self.host.schema.items()}
        for name, spec in self.schema.items():
            expected = shapes.get(_place_in_layer(name))
            if expected != spec.shape:
                found = f"shape {list(spec.shape)}, not {list(expected)}" if expected else "no counterpart"
                raise ModelMismatch(
                    f"{name} has {found} in {self.job.host}, whose config the result takes",
                    hint="models that are stacked need layers of the same kind and the same vocabulary",
                )

    def _wide(self, base: TensorMap) -> TensorMap:
        """Return `base` in the result's dtype where that holds more digits, so that sums are rounded only once."""
        if self.job.dtype is None or all(self._cast(spec) == spec for spec in schema_of(base).values()):
            return base
        return _Widened(base, DTYPES[self.job.dtype])

    def _cast(self, spec: TensorSpec) -> TensorSpec:
        return TensorSpec(spec.shape, self.job.dtype) if self.job.dtype and spec.is_float else spec


def _read_statistics(part: Slice, schema: Schema) -> tuple[TensorMap, ...] | None:
    """Return the statistics of each source's data that the recipe needs, None if it needs none."""
    kind = part.recipe.statistics
    if kind is None:
        return None
    files = [source.statistics for source in part.sources if source.statistics is not None]
    return tuple(read_statistics(path, kind, schema) for path in files)


class _Widened(Mapping[str, Tensor]):
    """A tensor map whose floating-point tensors are converted to `dtype` where it is the wider one."""

    def __init__(self, tensors: TensorMap, dtype: torch.dtype) -> None:
        self._tensors = tensors
        self.schema = {name: _wider(spec, dtype) for name, spec in schema_of(tensors).items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to(DTYPES[self.schema[name].dtype])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Zeros(_Widened):
    """A tensor map with zeros for the floating-point tensors of another: what whole models are task vectors from."""

    def __init__(self, tensors: TensorMap) -> None:
        super().__init__(tensors, torch.float16)

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        return torch.zeros_like(tensor) if tensor.is_floating_point() else tensor


def _wider(spec: TensorSpec, dtype: torch.dtype) -> TensorSpec:
    wider = spec.is_float and torch.finfo(dtype).bits > torch.finfo(DTYPES[spec.dtype]).bits
    return TensorSpec(spec.shape, DTYPE_NAMES[dtype]) if wider else spec


def _place_in_layer(name: str) -> str:
    layer = layer_of(name)
    return name if layer is None else f"{layer[0]}.*{name[len(f'{layer[0]}.{layer[1]}') :]}"


def _restricted(part: _Part, names: Sequence[str]) -> _Part:
    """Return `part` without patterns that fit tensors of other parts alone; raise `ConfigError` for those of none."""

    def fit(value: Value, where: str) -> Value:
        require_fitting(value, names, where=where)
        return restrict(value, part.schema)

    def step(one: Step) -> Step:
        return Step(one.name, {key: fit(value, f"{one.name}: {key}") for key, value in one.params.items()})

    before, method, after = part.recipe.before, Step(part.recipe.method, part.recipe.params), part.recipe.after
    method = step(method)
    recipe = Recipe(method.name, method.params, tuple(map(step, before)), tuple(map(step, after)), part.recipe.scope)
    weights = tuple(
        fit(weight, f"weight of {path}") for weight, (path, _) in zip(part.weights, part.tuned, strict=True)
    )
    return _Part(recipe, weights, part.base, part.tuned)
