"""LoRA adapters as PEFT saves them: a directory with adapter_config.json and adapter_model.safetensors.

Read without PEFT, into a `LowRankDelta` of the base model. An adapter says which modules it changes by names that have
to be found in the base, and is otherwise not believed: ranks, shapes and orientation must agree with the base's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedmerge.delta.lowrank import Factors, LowRankDelta
from fedmerge.delta.task_vector import UpdatedModel, difference, subtract
from fedmerge.errors import InputError, did_you_mean
from fedmerge.tensors import Checkpoint, Schema, TensorMap, schema_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_embedding_[AB])")
_BASE_LAYER = ".base_layer."

Number = TypeVar("Number", int, float)

_Rank = Annotated[int, Field(ge=1, le=1 << 16)]
_Alpha = Annotated[float, Field(allow_inf_nan=False)]


class _Config(BaseModel):
    """What of adapter_config.json decides what the adapter means."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    peft_type: Literal["LORA"]
    r: _Rank
    lora_alpha: _Alpha
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    use_dora: Literal[False] = False
    lora_bias: Literal[False] = False
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None

    def rank(self, module: str) -> int:
        return _of_module(self.rank_pattern or {}, module, self.r)

    def scale(self, module: str) -> float:
        """lora_alpha / r, or with rsLoRA (arXiv 2312.03732) lora_alpha / sqrt(r)."""
        rank = self.rank(module)
        alpha = _of_module(self.alpha_pattern or {}, module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _of_module(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    """Return what the first of `patterns` that matches the end of a module's name says, as PEFT looks it up."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def is_adapter(directory: Path) -> bool:
    """Return whether `directory` holds a PEFT adapter instead of a whole model."""
    return (directory / CONFIG).is_file()


def open_tuned(directory: Path, base: TensorMap, *, where: str | None = None) -> tuple[TensorMap, TensorMap]:
    """Return a fine-tune of `base`, whole model or adapter, as the tuned model and its task vector.

    `where` names it in errors. Raises what `subtract` and `read_adapter` raise, and `InputError` for a directory that
    is neither.
    """
    if not is_adapter(directory):
        tuned = Checkpoint(directory)
        return tuned, subtract(tuned, base, where=where or "fine-tuned model")
    delta = read_adapter(directory, base, where=where)
    return UpdatedModel(base, [delta]), delta


def read_adapter(directory: Path, base: TensorMap, *, where: str | None = None) -> LowRankDelta:
    """Read a LoRA adapter of the model `base` as its task vector; `where` names it in errors.

    Ranks may differ between modules (`rank_pattern`, `alpha_pattern`), layers may have their weights transposed
    (`fan_in_fan_out`, as GPT-2's do), and tensors that were tuned whole (`modules_to_save`, biases) are differences.
    Raises `InputError` that names the tensor for files that can't be read, an adapter of another kind (DoRA,
    lora_bias), and for factors that do not fit each other, the configuration or the base.
    """
    try:
        return _read(directory, base)
    except InputError as err:
        raise InputError(f"{where or directory}: {err.message}", hint=err.hint) from err


def _read(directory: Path, base: TensorMap) -> LowRankDelta:
    config, schema = _read_config(directory / CONFIG), schema_of(base)
    pairs: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in _read_weights(directory / WEIGHTS).items():
        if not name.startswith(PREFIX):
            raise InputError(f"{name}: does not begin with {PREFIX!r}, as the tensors of an adapter do")
        if not (tensor.is_floating_point() and torch.isfinite(tensor).all()):
            raise InputError(f"{name}: holds something else than finite numbers", hint="training diverged?")
        factor = _FACTOR.fullmatch(name.removeprefix(PREFIX))
        if factor:
            pairs.setdefault(factor[1], {})[factor[2]] = tensor
            continue
        target, change = _whole(name, tensor, base, schema)
        if target in rest:
            raise InputError(f"{name}: is in the adapter twice")
        rest[target] = change
    factors: dict[str, Factors] = {}
    orientation = _Orientation(config.fan_in_fan_out)
    for module, pair in pairs.items():
        target = _target(f"{module}.weight", schema)
        if target in factors:
            raise InputError(f"{module}: two modules of the adapter change the base's {target}")
        # Beside the factors of an embedding PEFT keeps its frozen weights.
        if target in rest and rest.pop(target).any():
            raise InputError(f"{module}: its own weights are not the base's")
        factors[target] = _factors(module, pair, schema[target].shape, config, orientation)
    orientation.require_clear()
    return LowRankDelta(schema, factors, rest)


class _Orientation:
    """Which way round the base keeps the weights of layers.

    PEFT goes by the type of a layer, and its one flag for the whole adapter is that of the last layer it met. Shapes
    tell for all but square matrices, and say whether the flag is to be trusted for those.
    """

    def __init__(self, flag: bool) -> None:
        self.flag = flag
        self._contradicted = self._square = ""

    def is_transposed(self, module: str, shape: tuple[int, ...], outputs_inputs: tuple[int, int]) -> bool | None:
        """Return whether `shape` is (inputs, outputs), or None when it is neither that nor (outputs, inputs)."""
        if shape not in {outputs_inputs, outputs_inputs[::-1]}:
            return None
        if shape[0] == shape[1]:
            self._square = module
            return self.flag
        transposed = shape != outputs_inputs
        if transposed != self.flag:
            self._contradicted = module
        return transposed

    def require_clear(self) -> None:
        if self._square and self._contradicted:
            raise InputError(
                f"{self._square}: is square, and fan_in_fan_out, which is wrong for {self._contradicted}, does not say "
                "which way round",
                hint="merge the adapter into its model first (merge_and_unload) and give that directory",
            )


def _read_config(path: Path) -> _Config:
    try:
        config = _Config.model_validate(json.loads(path.read_bytes()))
        for pattern in (*(config.rank_pattern or {}), *(config.alpha_pattern or {})):
            re.compile(pattern)
        return config
    except OSError as err:
        raise InputError(f"{path.name} can't be read ({err.strerror})") from err
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        raise InputError(
            f"{path.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}, not {first['input']!r:.60}",
            hint="only LoRA adapters of matrices are read (no DoRA, no lora_bias); merge others into their model first "
            "(merge_and_unload) and give that directory",
        ) from err
    except (ValueError, RecursionError, re.error) as err:
        raise InputError(f"{path.name} is not an adapter's configuration ({err})") from err


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as opened:
            file: Any = opened  # its methods have no annotations
            return {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as err:
        raise InputError(
            f"{path.name} can't be read ({err})",
            hint="save the adapter with save_pretrained(..., safe_serialization=True)",
        ) from err


def _target(name: str, schema: Schema) -> str:
    """Return what the base calls an adapter's tensor; a base without a head lacks the prefix of one that has it."""
    for candidate in (name, name.partition(".")[2]):
        if candidate in schema:
            return candidate
    raise InputError(
        f"{name}: the base has no such tensor{did_you_mean(name, schema)}",
        hint="the adapter was trained on another model, or its base ties this tensor to one of another name",
    )


def _whole(name: str, tensor: Tensor, base: TensorMap, schema: Schema) -> tuple[str, Tensor]:
    """Return the base's name and the difference of a tensor that is in the adapter whole."""
    target = _target(name.removeprefix(PREFIX).replace(_BASE_LAYER, "."), schema)
    if tuple(tensor.shape) != schema[target].shape:
        raise InputError(f"{name}: has shape {list(tensor.shape)}, not the base's {list(schema[target].shape)}")
    return target, difference(tensor, base[target])


def _factors(
    module: str, pair: Mapping[str, Tensor], shape: tuple[int, ...], config: _Config, orientation: _Orientation
) -> Factors:
    """Return the factors of weights that the base keeps in `shape`, from A (r, inputs) and B (outputs, r)."""
    if len(pair) != 2 or len({"embedding" in kind for kind in pair}) != 1:
        raise InputError(f"{module}: has {' and '.join(pair)}, not one A and one B")
    a, b = (pair[kind].to(torch.float32) for kind in sorted(pair))
    if a.ndim != 2 or b.ndim != 2 or len(shape) != 2:
        found = " and ".join(str(list(tensor.shape)) for tensor in (a, b, torch.empty(shape, device="meta")))
        raise InputError(f"{module}: factors and weights of shapes {found}: only matrices can be read")
    rank = config.rank(module)
    if not a.shape[0] == b.shape[1] == rank:
        raise InputError(f"{module}: factors of rank {a.shape[0]} and {b.shape[1]}, where {CONFIG} says {rank}")
    outputs_inputs = (b.shape[0], a.shape[1])
    if any("embedding" in kind for kind in pair):  # an embedding's rows are its inputs, whatever the flag says
        transposed = True if shape == outputs_inputs[::-1] else None
    else:
        transposed = orientation.is_transposed(module, shape, outputs_inputs)
    if transposed is None:
        raise InputError(f"{module}: factors for {list(outputs_inputs)} do not fit the base's {list(shape)}")
    left, right = (a.T, b.T) if transposed else (b, a)
    return Factors(left.contiguous(), right.contiguous(), config.scale(module))
