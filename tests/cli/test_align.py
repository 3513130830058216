"""`fedmerge merge --align`: what a permutation of hidden units hid is found again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedmerge.rebasin import groups_of, permuted, read_config, weight_matching
from fedmerge.tensors import Checkpoint
from tests.cli.commands import WORDS, fine_tune, make_classifier, run_session
from tests.unit.test_text_classification import write_rows


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
            merge("south", "--repair", "data.jsonl", "--out", "new"),
            merge("south", "--option", "statistics_examples=3", "--out", "new"),
            merge("south", "--align", "git_rebasin", "--repair", "none.jsonl", "--out", "new"),
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
    problems = ("NaN", "not a JSON object", "do not go together", "zipit", "goes with --align", "goes with --repair")
    for problem, outcome in zip((*problems, "none.jsonl"), refused, strict=True):
        assert problem in outcome.stderr


def moments(model_dir: Path, data: Path) -> dict[str, Tensor]:
    """Return mean and standard deviation of every linear layer's outputs over the tokens of the texts in `data`."""
    model = AutoModelForSequenceClassification.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    outputs: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            kept = outputs.setdefault(name, [])
            module.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output.flatten(0, -2)))
    with torch.inference_mode():
        for line in data.read_text().splitlines():
            model(**tokenizer(json.loads(line)["text"], return_tensors="pt"))
    rows = {name: torch.cat(found) for name, found in outputs.items()}
    return {name: torch.stack([found.mean(0), found.std(0, correction=0)]) for name, found in rows.items()}


def test_repaired_units_vary_as_those_of_the_models_do(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    base = make_classifier(tmp_path / "base")
    data = write_rows(tmp_path / "data.jsonl", WORDS, ["the {} is here", "{}"])
    for name, seed in (("north", 1), ("south", 2)):
        fine_tune(base, tmp_path / name, seed)
        path = tmp_path / name / "model.safetensors"
        generator = torch.Generator().manual_seed(seed)
        # Far apart, so that their mean varies less than either.
        save_file(
            {key: t + 0.1 * torch.randn(t.shape, generator=generator) for key, t in load_file(path).items()}, path
        )
    arguments = ["merge", "north", "south", "--base", "base", "--method", "linear", "--weights", "1,3"]
    arguments += ["--align", "git_rebasin"]
    plain, repaired = run_session(
        tmp_path,
        clean_environment,
        [[*arguments, "--out", "plain"], [*arguments, "--out", "repaired", "--repair", "data.jsonl"]],
    )
    assert (plain.code, repaired.code) == (0, 0), repaired.stderr
    north, south, before, after = (moments(tmp_path / name, data) for name in ("north", "south", "plain", "repaired"))
    layers = [name for name in north if "query" in name or "intermediate" in name or "pooler" in name]
    schema = Checkpoint(base).schema
    groups = groups_of(schema, read_config(base))
    aligned = [weight_matching(Checkpoint(base), Checkpoint(tmp_path / name), groups) for name in ("north", "south")]
    assert len(layers) >= 3
    for layer in layers:
        goal = sum(
            weight
            * torch.stack([permuted({f"{layer}.bias": row}, groups, moved)[f"{layer}.bias"] for row in own[layer]])
            for own, moved, weight in zip((north, south), aligned, (0.25, 0.75), strict=True)
        )
        assert isinstance(goal, Tensor)
        torch.testing.assert_close(after[layer], goal, rtol=2e-3, atol=2e-4)
        assert (before[layer] - goal).abs().max() > 10 * (after[layer] - goal).abs().max()
    lineage = json.loads((tmp_path / "repaired" / "lineage.json").read_text())["predicate"]
    assert lineage["merge"]["repair"] == {
        "data": hashlib.sha256(data.read_bytes()).hexdigest(),
        "trainer": "text-classification",
    }
