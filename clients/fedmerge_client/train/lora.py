"""Train low-rank adapters instead of whole models (LoRA, arXiv 2106.09685), with PEFT.

A round begins with a new adapter on the global model, which holds all adapters of the rounds before, multiplied out:
the mean of products is exact whatever each node's own factors are. A node leaves the adapter, and sends its factors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationInfo, field_validator
from transformers.pytorch_utils import Conv1D

from fedmerge.errors import ConfigError, ResourceError
from fedmerge.seeds import derive_seed
from fedmerge_client.train.huggingface import freeze_parameters, quiet_transformers, save_model
from fedmerge_client.train.own_code import seeded

if TYPE_CHECKING:
    from peft import PeftModel

LAYERS = (torch.nn.Linear, Conv1D)
KINDS = (*LAYERS, torch.nn.Embedding)
HEADS = ("classifier", "score")


class LoraSettings(BaseModel):
    """What a plan may ask for under `[train]` of any trainer that can train adapters.

    `lora_rank` of 0 trains the whole model. A product of factors is scaled by `lora_alpha` / rank, or with `rslora` by
    `lora_alpha` / sqrt(rank) (arXiv 2312.03732). `lora_targets` names the layers by the ends of their names, such as
    "q_proj"; without any, all linear layers but the output layer and the classification head get an adapter.
    `lora_whole` names modules that are trained whole beside it. With `lora_freeze_a` A is never trained and the same at
    all nodes in all rounds, drawn from `lora_seed`: FFA-LoRA (arXiv 2403.12313), whose mean is itself an adapter.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lora_rank: Annotated[int, Field(ge=0, le=4096)] = 0
    lora_alpha: Annotated[FiniteFloat, Field(gt=0)] = 16.0
    lora_targets: tuple[str, ...] = ()
    lora_whole: tuple[str, ...] = ()
    lora_dropout: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.0
    rslora: bool = False
    lora_freeze_a: bool = False
    lora_seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("lora_alpha", "lora_targets", "lora_whole", "lora_dropout", "rslora", "lora_freeze_a", "lora_seed")
    @classmethod
    def _has_an_adapter(cls, value: Any, info: ValidationInfo) -> Any:
        if not info.data.get("lora_rank", 1):
            raise ValueError("has no effect without a lora_rank")
        return value


def trained_part(
    model: Any, settings: LoraSettings, freeze: Sequence[str], *, most_rank: int, seed: int
) -> tuple[Any, Mapping[str, torch.nn.Parameter]]:
    """Return what to train of `model`, and its parameters by name: all but those that `freeze` names, or an adapter.

    Raises `ConfigError` when nothing is left to train, or for names that the model does not have.
    """
    if settings.lora_rank:
        return add_adapter(model, settings, freeze, most_rank=most_rank, seed=seed)
    return model, freeze_parameters(model, freeze)


def save_tuned(model: Any, tokenizer: Any | None, settings: LoraSettings, directory: Path) -> Path:
    """Write what was trained, a model with its tokenizer or an adapter, and return the directory.

    Raises `ResourceError`.
    """
    return save_adapter(model, directory) if settings.lora_rank else save_model(model, tokenizer, directory)


def add_adapter(
    model: Any, settings: LoraSettings, freeze: Sequence[str], *, most_rank: int, seed: int
) -> tuple[PeftModel, Mapping[str, torch.nn.Parameter]]:
    """Return `model` with a new adapter, and the parameters to train, by name; the model's own are frozen.

    `freeze` has name prefixes of layers that get none. The rank is the plan's, or `most_rank` if that is lower and not
    0: nodes may differ. A is drawn from `seed`, and B begins at zero. Raises `ConfigError` for targets that the model
    does not have.
    """
    from peft import LoraConfig, get_peft_model

    targets = _target_modules(model, settings, freeze)
    config = LoraConfig(
        r=min(settings.lora_rank, most_rank or settings.lora_rank),
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it, and writes it as JSON
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.rslora,
        target_modules=targets,
        modules_to_save=list(settings.lora_whole) or None,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
    )
    with seeded(seed), warnings.catch_warnings():
        # That one flag can't fit layers of both kinds, which PEFT then sets right; and what others find deprecated.
        warnings.simplefilter("ignore")
        adapted: PeftModel = get_peft_model(model, config)
    if settings.lora_freeze_a:
        _freeze_a(adapted, settings)
    for name, module in adapted.named_modules():
        module.train(".lora_dropout." in name)
    return adapted, {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}


def _freeze_a(adapted: PeftModel, settings: LoraSettings) -> None:
    """Give each layer the A that it has at all nodes; who has a lower rank has the first rows of it."""
    for name, parameter in adapted.named_parameters():
        layer, is_a, _ = name.partition(".lora_A.")
        if is_a:
            rank, num_inputs = parameter.shape
            generator = torch.Generator().manual_seed(derive_seed("lora", settings.lora_seed, layer) % 2**63)
            # As PEFT draws it, but for all rows of the plan's rank, and for each layer on its own.
            drawn = torch.rand(settings.lora_rank, num_inputs, generator=generator) * 2 - 1
            with torch.no_grad():
                parameter.copy_(drawn[:rank] / math.sqrt(num_inputs))
            parameter.requires_grad_(False)


def save_adapter(adapted: PeftModel, directory: Path) -> Path:
    """Write the adapter as PEFT does, and return the directory. Raises `ResourceError`."""
    try:
        with quiet_transformers():
            adapted.save_pretrained(str(directory), save_embedding_layers=False)
    except OSError as err:
        raise ResourceError(f"{directory}: could not write the adapter ({err})", hint="is the disk full?") from err
    return directory


def _target_modules(model: Any, settings: LoraSettings, freeze: Sequence[str]) -> list[str]:
    """Return the full names of the layers that get factors."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KINDS)}
    endings = sorted({name.rpartition(".")[2] for name in layers})
    for target in (*settings.lora_targets, *settings.lora_whole):
        if not any(_is_called(name, target) for name, _ in model.named_modules()):
            raise ConfigError(
                f"[train]: no layer of the model is called {target!r}",
                hint=f"layers that can have adapters end in {', '.join(endings)}",
            )
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    chosen = [
        name
        for name, module in layers.items()
        if not f"{name}.weight".startswith(tuple(freeze))
        and not any(_is_called(name, whole) for whole in settings.lora_whole)
        and (
            any(_is_called(name, target) for target in settings.lora_targets)
            if settings.lora_targets
            else isinstance(module, LAYERS) and module is not head and name.partition(".")[0] not in HEADS
        )
    ]
    weights = [id(module.weight) for module in model.modules() if isinstance(module, KINDS)]
    for name in chosen:
        if settings.lora_freeze_a and isinstance(layers[name], torch.nn.Embedding):
            raise ConfigError(f"[train]: {name} is an embedding, whose A can't be frozen", hint="leave it out")
        if weights.count(id(layers[name].weight)) > 1:
            raise ConfigError(
                f"[train]: {name} shares its weights with another layer, and can't be adapted alone",
                hint="leave it out of lora_targets",
            )
    if not chosen:
        raise ConfigError("[train]: no layer is left to get an adapter", hint="see lora_targets and freeze")
    return chosen


def _is_called(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
