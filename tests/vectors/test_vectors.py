"""Parity with other implementations, on outputs recorded from them (see README.md)."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedmerge.delta.task_vector import apply_one
from fedmerge.merge import METHODS
from fedmerge.merge.methods.consensus import Consensus, elect_and_merge
from fedmerge.merge.methods.dare import drop
from tests.vectors.runs_elementwise import RUNS_ELEMENTWISE, WHOLE_MODEL_ELEMENTWISE

from .runs_geometric import RUNS_GEOMETRIC
from .runs_statistics import RUNS_STATISTICS

HERE = Path(__file__).parent
MANIFEST = json.loads((HERE / "manifest.json").read_text())
CASES: dict[str, dict[str, Any]] = {case["case"]: case for case in MANIFEST["cases"]}

# (stack of deltas, weights, stack of recorded masks) -> merged task vector
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def method(name: str, **params: Any) -> Run:
    return lambda deltas, weights, masks: METHODS[name](deltas, weights, **params)


def dare_linear(density: float, rescale: str) -> Run:
    def run(deltas: Tensor, weights: Tensor, masks: Tensor) -> Tensor:
        thinned = drop(deltas.flatten(1), masks.flatten(1).bool(), density=density, rescale=rescale)
        return METHODS["task_arithmetic"](thinned, weights).view(deltas.shape[1:])

    return run


def dare_ties(density: float, rescale: str, rules: Consensus) -> Run:
    def run(deltas: Tensor, weights: Tensor, masks: Tensor) -> Tensor:
        thinned = drop(deltas.flatten(1), masks.flatten(1).bool(), density=density, rescale=rescale)
        merged = elect_and_merge(lambda block: thinned[:, block], thinned[0], weights.tolist(), rules)
        return merged.view(deltas.shape[1:])

    return run


MERGEKIT_TIES = {"election": "weighted"}
AUTHORS_TIES = {"density": 0.2, "trim": "authors", "zero_sum": "majority", "normalizer": "count"}

RUNS: dict[str, Run] = {
    "mergekit_linear_normalized": method("fedavg"),
    "mergekit_linear_bf16": method("fedavg"),
    "mergekit_task_arithmetic": method("task_arithmetic", lambda_=1.5),
    "peft_task_arithmetic": method("task_arithmetic"),
    "mergekit_ties_d20_w1": method("ties", density=0.2, **MERGEKIT_TIES),
    "mergekit_ties_nonorm": method("ties", density=0.5, normalize=False, **MERGEKIT_TIES),
    "mergekit_ties_edge_dense": method("ties", density=1.0, **MERGEKIT_TIES),
    "ties_authors_K20_sum": method("ties", normalize=False, **AUTHORS_TIES),
    "ties_authors_K20_max": method("ties", aggregation="max", **AUTHORS_TIES),
    "peft_ties_d20": method("ties", density=0.2, normalizer="count"),
    "mergekit_dare_linear_d30": dare_linear(0.3, "l1"),
    "peft_dare_linear_d30": dare_linear(0.3, "paper"),
    "mergekit_dare_ties_d50": dare_ties(0.5, "l1", Consensus(election="weighted", normalize=False)),
    **RUNS_ELEMENTWISE,
}

# The TIES authors trim and elect over the whole model, its tensors sorted by name and flattened into one.
WHOLE_MODEL = {"ties_authors_K20_sum", "ties_authors_K20_max"} | WHOLE_MODEL_ELEMENTWISE


# Not of a merge, but of what comes before one: tests/unit/test_rebasin.py runs it.
ALIGNMENTS = {"rebasin_weight_matching_1hidden_random"}


def load_inputs(file_name: str) -> dict[str, dict[str, Tensor]]:
    """Return the models in an input file: "base", "ft0" and so on, each by tensor name."""
    models: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(HERE / file_name).items():
        model, name = key.split(".", 1)
        models.setdefault(model, {})[name] = tensor
    return models


def weights_of(params: dict[str, Any]) -> Tensor:
    given = params.get("weight", params.get("weights", 1.0))
    return torch.tensor(given if isinstance(given, list) else [given] * 4)


@pytest.mark.parametrize("name", sorted(CASES.keys() - ALIGNMENTS))
def test_reproduces_the_recorded_output(name: str) -> None:
    case = CASES[name]
    recorded = load_file(HERE / case["file"])
    models = load_inputs(case["inputs"])
    base = models.pop("base")
    names = sorted(key for key in base if f"out.{key}" in recorded)
    dtype = torch.float64 if case["dtype"] == "float64" else torch.float32
    base_values = {key: base[key].to(dtype) for key in names}
    deltas = {key: torch.stack([models[m][key].to(dtype) - base_values[key] for m in sorted(models)]) for key in names}
    no_masks = torch.empty(0)
    masks = {
        key: torch.stack([recorded[f"mask.{key}.{m}"] for m in sorted(models) if f"mask.{key}.{m}" in recorded])
        if f"mask.{key}.ft0" in recorded
        else no_masks
        for key in names
    }
    weights = weights_of(case["params"])

    if name in WHOLE_MODEL:
        flat = RUNS[name](torch.cat([deltas[key].flatten(1) for key in names], dim=1), weights, no_masks)
        parts = flat.split([base[key].numel() for key in names])
        merged = {key: part.view(base[key].shape) for key, part in zip(names, parts, strict=True)}
    elif name in RUNS_STATISTICS:
        merged = RUNS_STATISTICS[name](deltas, recorded)
    elif name in RUNS_GEOMETRIC:
        merged = {key: RUNS_GEOMETRIC[name](deltas[key], weights, base_values[key]) for key in names}
    else:
        merged = {key: RUNS[name](deltas[key], weights, masks[key]) for key in names}

    for key in names:
        expected = recorded[f"out.{key}"]
        ours = apply_one(base[key].to(expected.dtype), merged[key]) if case["kind"] == "weight" else merged[key]
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, atol=case["atol"], rtol=1e-6)


def test_files_are_the_ones_that_were_recorded() -> None:
    for case in CASES.values():
        assert hashlib.sha256((HERE / case["file"]).read_bytes()).hexdigest() == case["sha256"], case["case"]


def test_every_recorded_file_is_in_the_manifest() -> None:
    listed = {case["file"] for case in CASES.values()} | set(MANIFEST["inputs"])
    assert {path.name for path in HERE.glob("*.safetensors")} == listed
    assert RUNS.keys() | RUNS_GEOMETRIC.keys() | RUNS_STATISTICS.keys() | ALIGNMENTS == CASES.keys()
