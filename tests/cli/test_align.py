"""`fedmerge merge --align`: what a permutation of hidden units hid is found again."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fedmerge.rebasin import groups_of, permuted, read_config
from fedmerge.tensors import Checkpoint
from tests.cli.commands import fine_tune, make_classifier, run_session


def test_a_shuffled_fine_tune_merges_as_if_it_had_not_been(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    base = make_classifier(tmp_path / "base")
    fine_tune(base, tmp_path / "north", 1)
    fine_tune(base, tmp_path / "south", 2)
    fine_tune(base, tmp_path / "shuffled", 2)
    schema = Checkpoint(base).schema
    groups = groups_of(schema, read_config(base))
    generator = torch.Generator().manual_seed(0)
    permutations = {group.name: torch.randperm(group.num_units, generator=generator) for group in groups}
    tensors = load_file(tmp_path / "south" / "model.safetensors")
    save_file(dict(permuted(tensors, groups, permutations)), tmp_path / "shuffled" / "model.safetensors")

    def merge(other: str, *options: str) -> list[str]:
        return ["merge", "north", other, "--base", "base", "--method", "ties", *options]

    (tmp_path / "broken").mkdir()
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    (tmp_path / "broken" / "config.json").write_text("[]")
    fine_tune(base, tmp_path / "diverged", 3)
    spoiled = load_file(tmp_path / "diverged" / "model.safetensors")
    spoiled["bert.pooler.dense.weight"][0, 0] = torch.nan
    save_file(spoiled, tmp_path / "diverged" / "model.safetensors")
    plain, aligned, unaligned, *refused = run_session(
        tmp_path,
        clean_environment,
        [
            merge("south", "--out", "plain"),
            merge("shuffled", "--align", "git_rebasin", "--out", "aligned"),
            merge("shuffled", "--out", "unaligned"),
            merge("diverged", "--align", "git_rebasin", "--out", "new"),
            ["merge", "north", "--base", "broken", "--align", "git_rebasin", "--out", "new"],
            [
                "merge",
                "north",
                "--base",
                "base",
                "--method",
                "fisher",
                "--statistics",
                "a",
                "--align",
                "git_rebasin",
                "--out",
                "new",
            ],
            merge("south", "--align", "zipit", "--out", "new"),
        ],
    )
    assert (plain.code, aligned.code, unaligned.code) == (0, 0, 0), aligned.stderr
    assert "north: moved 0 of " in aligned.stderr
    assert "shuffled: moved 0 of " not in aligned.stderr
    expected, found, wrong = (Checkpoint(tmp_path / name) for name in ("plain", "aligned", "unaligned"))
    assert all(torch.equal(found[name], expected[name]) for name in schema)
    assert not all(torch.equal(wrong[name], expected[name]) for name in schema)
    lineage = json.loads((tmp_path / "aligned" / "lineage.json").read_text())["predicate"]
    assert lineage["merge"]["align"] == "git_rebasin"
    assert {outcome.code for outcome in refused} == {2}
    for problem, outcome in zip(("NaN", "not a JSON object", "do not go together", "zipit"), refused, strict=True):
        assert problem in outcome.stderr
