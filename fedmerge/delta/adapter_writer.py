"""Publishing a change of a model as a LoRA adapter: the nearest one of a rank, in a directory that PEFT reads.

Merging multiplies adapters out, since a mean of products is exact and a product of means is not; what comes out is a
matrix, of a rank that is at most the sum of its parts' (stacked, as in FLoRA, arXiv 2409.05976). From that rank on the
adapter here stands for the same model; below it, it keeps the largest singular values, and says how much that is.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fedmerge.delta.adapter import CONFIG, PREFIX, WEIGHTS
from fedmerge.delta.lowrank import Factors, truncate
from fedmerge.seeds import derive_seed
from fedmerge.tensors import Schema, TensorMap, reporting_save_errors, schema_of

_EMBEDDING = re.compile(r"(^|[._])(embed|embeddings?|embed_\w+|wte|wpe)$")


@dataclass(frozen=True)
class AdapterSummary:
    """What an adapter keeps of a change: its largest rank, and its share of the energy, the sum of squares.

    `least` is the tensor of which it keeps the smallest share, and that share. A change of nothing has energy 1.
    """

    rank: int
    energy: float
    least: tuple[str, float]


def write_adapter(directory: Path, change: TensorMap, base: TensorMap, rank: int, *, base_name: str) -> AdapterSummary:
    """Write the change of each tensor of `base` (fp32, by name) as an adapter of `rank` at most, in fp32.

    Matrices become factors by their singular values. Other tensors that changed are in it whole: biases as PEFT's
    `bias`, others as `modules_to_save`. `base_name` is what the adapter calls its base. The directory is made. Raises
    `ResourceError` when the disk does not take it.
    """
    schema = schema_of(base)
    inputs_first = _inputs_first(schema)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    whole: dict[str, Tensor] = {}
    kept = total = 0.0
    least = ("", 1.0)
    for name, spec in schema.items():
        delta = change[name] if spec.is_float else None
        if delta is None or not delta.any():
            continue
        module, _, kind = name.rpartition(".")
        squares = float(delta.double().square().sum())
        total += squares
        if len(spec.shape) != 2 or kind != "weight":
            whole[name] = base[name] + delta.to(base[name].dtype)
            kept += squares
            continue
        factors, energy = truncate(delta.float(), min(rank, *spec.shape), derive_seed("adapter", name))
        kept += energy * squares
        least = min(least, (name, energy), key=lambda one: one[1])
        ranks[module] = factors.rank
        tensors |= _named(module, factors, inputs_first[name])
    modules = sorted({name.rpartition(".")[0] for name in whole} - ranks.keys())
    for name, tensor in whole.items():
        module, _, kind = name.rpartition(".")
        tensors[f"{PREFIX}{module}.{'base_layer.' if module in ranks else ''}{kind}"] = tensor
    most = max(ranks.values(), default=1)
    others = {f"^{re.escape(module)}": found for module, found in ranks.items() if found != most}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,  # factors carry their scale themselves
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "modules_to_save": modules or None,
        "bias": "lora_only" if any(name.rpartition(".")[0] in ranks for name in whole) else "none",
        "fan_in_fan_out": any(inputs_first[f"{module}.weight"] for module in ranks),
    }
    directory.mkdir(parents=True)
    with reporting_save_errors(directory):
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / WEIGHTS).chmod(0o644)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return AdapterSummary(max(ranks.values(), default=0), kept / total if total else 1.0, least)


def _named(module: str, factors: Factors, is_transposed: bool) -> dict[str, Tensor]:
    """Return A and B as PEFT names and shapes them, of about equal size."""
    left, right = factors.left, factors.right * factors.scale
    if _EMBEDDING.search(module):  # its rows are its inputs, and PEFT's A has them as columns
        pair = {"lora_embedding_A": left.T, "lora_embedding_B": right.T}
    elif is_transposed:
        pair = {"lora_A.weight": left.T, "lora_B.weight": right.T}
    else:
        pair = {"lora_A.weight": right, "lora_B.weight": left}
    return {f"{PREFIX}{module}.{kind}": factor.contiguous() for kind, factor in pair.items()}


def _inputs_first(schema: Schema) -> dict[str, bool]:
    """Return of each matrix whether it is kept as (inputs, outputs), as GPT-2's are: biases are as long as outputs.

    A matrix without a bias, or a square one, is like most of those that show it.
    """
    shown: dict[str, bool] = {}
    for name, spec in schema.items():
        bias = schema.get(f"{name.removesuffix('.weight')}.bias")
        if len(spec.shape) == 2 and bias is not None and spec.shape[0] != spec.shape[1]:
            shown[name] = bias.shape == spec.shape[1:]
    most = 2 * sum(shown.values()) > len(shown)
    return {name: shown.get(name, most) for name, spec in schema.items() if len(spec.shape) == 2}
