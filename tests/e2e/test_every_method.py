"""Every merge method from the three places it can be had: a federation's file, `fedmerge merge`, and METHODS."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedmerge.cli import main
from fedmerge.merge import METHODS, Recipe
from fedmerge.merge.methods import IN_TIME, NEEDS_BASE
from fedmerge.merge.statistics import packed
from fedmerge.seeds import derive_seed
from fedmerge.sim import simulate
from fedmerge.tensors import Checkpoint, model_digest
from fedmerge.training import TrainResult, TrainTask
from tests.conftest import make_config
from tests.provenance import read_provenance

SHAPES = {"model.layers.0.mlp.weight": (12, 8), "model.layers.1.mlp.weight": (8, 12), "model.norm.bias": (12,)}
LOSSLESS = "[delta]\nvalues = 'fp32'\ndownlink = 'fp32'\n[merge]\nmethod = '{method}'\nseed = 7\n"


def normal(name: str, seed: int) -> Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed + len(name)))


@dataclass
class Drift:
    """Leaves a fine-tune that was made before the round."""

    tuned: Path
    num_examples: int

    def check(self) -> None:
        """Accept anything."""

    def train(self, task: TrainTask) -> TrainResult:
        return TrainResult(shutil.copytree(self.tuned, task.workspace / "tuned"), self.num_examples)

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        return {"norm": float(Checkpoint(model_dir)["model.norm.bias"].norm())}

    def statistics(self, model_dir: Path, kind: str) -> Mapping[str, Tensor]:
        """Return positive numbers, and of the matrices Gram matrices, of this node's own."""
        if kind == "fisher":
            return {name: normal(name, self.num_examples).square().to(torch.bfloat16) for name in SHAPES}
        rows = {name: normal(name, self.num_examples) for name in SHAPES if "mlp" in name}
        return {name: row.T @ row / len(row) + torch.eye(row.shape[1]) for name, row in rows.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes of it."""
    folder = tmp_path_factory.mktemp("models")
    base = {name: normal(name, 0) for name in SHAPES}
    for seed, model in enumerate(("base", "north", "south")):
        (folder / model).mkdir()
        tensors = {name: tensor + 0.1 * seed * normal(name, seed) for name, tensor in base.items()}
        save_file(tensors, folder / model / "model.safetensors")
        (folder / model / "config.json").write_text('{"model_type": "made-up"}')
    return folder


def merge_record(path: Path) -> dict[str, Any]:
    """Return what the coordinator signed of the last merge."""
    envelopes = [json.loads(each["envelope"]) for each in read_provenance(path) if each["kind"] == "mergerecord"]
    record: dict[str, Any] = json.loads(base64.b64decode(envelopes[-1]["payload"]))["predicate"]
    return record


@pytest.mark.parametrize("method", sorted(METHODS.keys() - IN_TIME))
def test_all_three_give_the_same_bits(method: str, folder: Path, tmp_path: Path) -> None:
    nodes = {"north": Drift(folder / "north", 10), "south": Drift(folder / "south", 30)}
    (tmp_path / "base").symlink_to(folder / "base")
    config, _ = make_config(tmp_path, extra=LOSSLESS.format(method=method))
    result = simulate(config, folder / "base", nodes)
    record = merge_record(result.model_dir / "provenance.jsonl.zst")
    order = [{10: "north", 30: "south"}[one["num_examples"]] for one in record["contributions"]]
    weights = [one["weight"] for one in record["contributions"]]
    assert sorted(order) == sorted(nodes)
    seed = derive_seed("merge", record["merge_seed"], 1)  # of the first round

    base, models = Checkpoint(folder / "base"), [Checkpoint(folder / node) for node in order]
    kind = Recipe(method).statistics
    files = []
    for node in order if kind is not None else ():
        files.append(str(tmp_path / f"{node}.statistics"))
        assert kind is not None
        save_file(packed(nodes[node].statistics(folder / node, kind), kind, base.schema), files[-1])
    arguments = ["merge", *(str(folder / node) for node in order), "--base", str(folder / "base"), "--method", method]
    arguments += ["--weights", ",".join(map(repr, weights)), "--seed", str(seed)]
    arguments += ["--out", str(tmp_path / "local"), *(["--statistics", *files] if files else [])]
    assert main(arguments) == 0
    assert model_digest(Checkpoint(tmp_path / "local")) == result.version

    published = Checkpoint(result.model_dir)
    for name in SHAPES:
        found = [nodes[node].statistics(folder, kind).get(name) for node in order] if kind is not None else [None]
        merged = METHODS[method](
            torch.stack([model[name] - base[name] for model in models]),
            torch.tensor(weights, dtype=torch.float64),
            seed=derive_seed(seed, name),
            **Recipe(method).params,
            **({"base": base[name]} if method in NEEDS_BASE else {}),
            **(
                {"statistics": torch.stack([one.float() for one in found if one is not None])}
                if None not in found
                else {}
            ),
        )
        assert torch.equal(published[name], base[name] + merged), name
    assert result.version != model_digest(base)
