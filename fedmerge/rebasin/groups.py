"""Which axes of which tensors have to be permuted together for a model to compute the same.

An architecture is a table from tensor names to one label per axis, None for an axis that has to stay; axes with the
same label are permuted together. `heads` move as wholes, since rotary embeddings fix what is inside of one. Where
several query heads share a key head, they move with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from fedmerge.errors import InputError
from fedmerge.tensors import Schema

# Groups that reach across the whole model: they need every tensor of it to be known.
WHOLE_MODEL = frozenset({"residual", "pooler"})


class Axis(NamedTuple):
    """One axis of one tensor."""

    tensor: str
    axis: int


class Group(NamedTuple):
    """Axes that are permuted together: each is `num_units` blocks of equal length, which move as wholes."""

    name: str
    num_units: int
    axes: tuple[Axis, ...]


# Patterns of tensor names, without the prefix of the class that wraps the model, to a label per axis, in which {0}
# stands for the number of the layer.
Rules: TypeAlias = dict[str, tuple[str | None, ...]]

_BERT_LAYER = r"encoder\.layer\.(\d+)\."
_BERT: Rules = {
    r"embeddings\.(?:word|position|token_type)_embeddings\.weight": (None, "residual"),
    r"embeddings\.LayerNorm\.(?:weight|bias)": ("residual",),
    _BERT_LAYER + r"attention\.self\.(?:query|key|value)\.weight": ("heads.{0}", "residual"),
    _BERT_LAYER + r"attention\.self\.(?:query|key|value)\.bias": ("heads.{0}",),
    _BERT_LAYER + r"attention\.output\.dense\.weight": ("residual", "heads.{0}"),
    _BERT_LAYER + r"intermediate\.dense\.weight": ("hidden.{0}", "residual"),
    _BERT_LAYER + r"intermediate\.dense\.bias": ("hidden.{0}",),
    _BERT_LAYER + r"output\.dense\.weight": ("residual", "hidden.{0}"),
    _BERT_LAYER + r"(?:attention\.)?output\.(?:dense\.bias|LayerNorm\.(?:weight|bias))": ("residual",),
    r"pooler\.dense\.weight": ("pooler", "residual"),
    r"pooler\.dense\.bias": ("pooler",),
    r"classifier\.weight": (None, "pooler"),
    r"classifier\.bias": (None,),
}

_LLAMA_LAYER = r"layers\.(\d+)\."
_LLAMA: Rules = {
    r"(?:embed_tokens|lm_head)\.weight": (None, "residual"),
    _LLAMA_LAYER + r"self_attn\.[qkv]_proj\.weight": ("heads.{0}", "residual"),
    _LLAMA_LAYER + r"self_attn\.[qkv]_proj\.bias": ("heads.{0}",),
    _LLAMA_LAYER + r"self_attn\.[qk]_norm\.weight": (None,),
    _LLAMA_LAYER + r"self_attn\.o_proj\.weight": ("residual", "heads.{0}"),
    _LLAMA_LAYER + r"mlp\.(?:gate|up)_proj\.weight": ("hidden.{0}", "residual"),
    _LLAMA_LAYER + r"mlp\.down_proj\.weight": ("residual", "hidden.{0}"),
    _LLAMA_LAYER + r"(?:input|post_attention)_layernorm\.weight": ("residual",),
    r"norm\.weight": ("residual",),
}

# By `model_type` of config.json: prefix of names, rules, and the keys one of which holds how many heads move.
ARCHITECTURES: dict[str, tuple[str, Rules, tuple[str, ...]]] = {
    "bert": (r"(?:bert\.)?", _BERT, ("num_attention_heads",)),
    "roberta": (r"(?:roberta\.)?", _BERT, ("num_attention_heads",)),
    "llama": (r"(?:model\.)?", _LLAMA, ("num_key_value_heads", "num_attention_heads")),
    "mistral": (r"(?:model\.)?", _LLAMA, ("num_key_value_heads", "num_attention_heads")),
    "qwen2": (r"(?:model\.)?", _LLAMA, ("num_key_value_heads", "num_attention_heads")),
    "qwen3": (r"(?:model\.)?", _LLAMA, ("num_key_value_heads", "num_attention_heads")),
}


def groups_of(schema: Schema, config: Mapping[str, Any]) -> list[Group]:
    """Return what of a model with this `schema` and Hugging Face `config` may be permuted, sorted by name.

    The architecture is `config["model_type"]`, or else a chain of linear layers. Where a tensor is unknown, groups that
    reach across the whole model (the residual stream) are left out. Raises `InputError` when nothing is known.
    """
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        return mlp_groups(schema)
    prefix, rules, head_keys = ARCHITECTURES[model_type]
    patterns = {re.compile(prefix + pattern): labels for pattern, labels in rules.items()}
    num_heads = next((config[key] for key in head_keys if isinstance(config.get(key), int)), 0)
    axes: dict[str, list[Axis]] = {}
    unknown = [name for name, spec in schema.items() if spec.is_float]
    for name in list(unknown):
        for pattern, labels in patterns.items():
            found = pattern.fullmatch(name)
            if found is None or len(labels) != len(schema[name].shape):
                continue
            unknown.remove(name)
            for axis, label in enumerate(labels):
                if label is not None:
                    axes.setdefault(label.format(*found.groups()), []).append(Axis(name, axis))
            break
    groups = [
        _group(label, found_axes, schema, num_heads if label.startswith("heads") else None)
        for label, found_axes in sorted(axes.items())
        if not (unknown and label in WHOLE_MODEL)
    ]
    if not groups:
        raise InputError(f"no tensor of this {model_type} model has a name that is known")
    return groups


def read_config(directory: Path) -> dict[str, Any]:
    """Return a model directory's config.json, empty where there is none; raise `InputError` when it can't be read."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as err:
        raise InputError(f"{path}: can't be read ({err})") from err
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a JSON object")
    return config


def mlp_groups(schema: Schema) -> list[Group]:
    """Return the hidden units between the linear layers of a plain chain, whose tensors are `N.weight` and `N.bias`.

    The layers are in the order of the numbers in their names. Raises `InputError` unless every tensor is part of such a
    chain.
    """
    layers = sorted({name.rpartition(".")[0] for name in schema}, key=_numbers_in)
    problem = f"{', '.join(sorted(schema)[:3])} and so on are not a chain of linear layers"
    hint = f"git_rebasin knows such chains and {', '.join(ARCHITECTURES)} models"
    for name, spec in schema.items():
        if len(spec.shape) != {"weight": 2, "bias": 1}.get(name.rpartition(".")[2]):
            raise InputError(problem, hint=hint)
    groups = []
    for number, (layer, following) in enumerate(pairwise(layers)):
        weight, read_by = schema.get(f"{layer}.weight"), schema.get(f"{following}.weight")
        if weight is None or read_by is None or weight.shape[0] != read_by.shape[1]:
            raise InputError(problem, hint=hint)
        axes = [Axis(f"{layer}.weight", 0), Axis(f"{following}.weight", 1)]
        if f"{layer}.bias" in schema:
            axes.append(Axis(f"{layer}.bias", 0))
        groups.append(_group(f"hidden.{number}", axes, schema, None))
    if not groups:
        raise InputError(problem, hint=hint)
    return groups


def _group(label: str, axes: list[Axis], schema: Schema, num_units: int | None) -> Group:
    """Return the group of these axes, of units of one element unless `num_units` says how many there are."""
    lengths = {schema[axis.tensor].shape[axis.axis] for axis in axes}
    if num_units is None and len(lengths) == 1:
        num_units = lengths.pop()
    if not num_units or any(length % num_units for length in lengths):
        raise InputError(f"{axes[0].tensor}: {label} does not come in equal parts", hint="is the config.json its own?")
    return Group(label, num_units, tuple(axes))


def _numbers_in(name: str) -> tuple[object, ...]:
    """Return a key that sorts names by the numbers in them: 2 before 10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)
