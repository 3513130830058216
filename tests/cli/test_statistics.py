"""`fedmerge statistics`, and merging with what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fedmerge.merge import METHODS
from fedmerge.merge.statistics import read_statistics, statistics_schema
from fedmerge.tensors import Checkpoint
from tests.cli.commands import fine_tune, make_classifier, run_session, write_data

WEIGHT = "bert.encoder.layer.0.output.dense.weight"
KINDS = {"fisher": "fisher", "regmean": "gram"}


def merge(method: str, *statistics: str, out: str) -> list[str]:
    files = ["--statistics", *statistics] if statistics else []
    return ["merge", "north", "south", "--base", "base", "--method", method, *files, "--out", out]


def test_statistics_change_the_merge_and_are_on_record(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    base = make_classifier(tmp_path / "base")
    for seed, name in enumerate(("north", "south")):
        fine_tune(base, tmp_path / name, seed)
    write_data(tmp_path)
    commands = []
    for method in KINDS:
        for name, data in (("north", "north.jsonl"), ("south", "south.csv")):
            file = f"{name}-{method}"
            commands.append(["statistics", name, "--method", method, "--data", data, "--out", file])
        commands.append(merge(method, f"north-{method}", f"south-{method}", out=f"by-{method}"))
    commands.append(merge("fedavg", out="mean"))
    outcomes = run_session(tmp_path, clean_environment, commands)
    assert {outcome.code for outcome in outcomes} == {0}, outcomes
    assert outcomes[0].stdout == "north-fisher\n"

    before = Checkpoint(base)
    mean = Checkpoint(tmp_path / "mean")[WEIGHT]
    deltas = torch.stack([Checkpoint(tmp_path / name)[WEIGHT] - before[WEIGHT] for name in ("north", "south")])
    for method, kind in KINDS.items():
        files = [read_statistics(tmp_path / f"{name}-{method}", kind, before.schema) for name in ("north", "south")]
        assert len(files[0]) == len(statistics_schema(kind, before.schema))
        found = torch.stack([file[WEIGHT] for file in files])
        assert found.any()
        expected = METHODS[method](deltas, torch.ones(2), statistics=found)
        merged = Checkpoint(tmp_path / f"by-{method}")[WEIGHT]
        assert torch.equal(merged, before[WEIGHT] + expected)
        assert not torch.equal(merged, mean)
        lineage = json.loads((tmp_path / f"by-{method}" / "lineage.json").read_text())["predicate"]
        assert len({entry["statistics"] for entry in lineage["inputs"]} - {None}) == 2

    damaged = load_file(tmp_path / "north-fisher")
    damaged["fisher:classifier.bias"][1] = -1
    save_file(damaged, tmp_path / "damaged")
    refusals = {
        "needs --statistics of every model: 0 for 2": merge("fisher", out="new"),
        "1 for 2 models": merge("fisher", "north-fisher", out="new"),
        "ties takes none": merge("ties", "north-fisher", "south-fisher", out="new"),
        "is not one of this model's gram statistics": merge("regmean", "north-fisher", "south-regmean", out="new"),
        "damaged: fisher statistics of classifier.bias: 1 v": merge("fisher", "north-fisher", "damaged", out="new"),
        "nothing: not a readable safetensors file": merge("fisher", "nothing", "south-fisher", out="new"),
        "ties needs no statistics": [
            "statistics", "north", "--method", "ties", "--data", "north.jsonl", "--out", "new"
        ],
    }  # fmt: skip
    for problem, outcome in zip(
        refusals, run_session(tmp_path, clean_environment, list(refusals.values())), strict=True
    ):
        assert (outcome.code, outcome.left) == (2, [])
        assert problem in " ".join(outcome.stderr.split())
