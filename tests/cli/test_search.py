"""`fedmerge merge --search`: candidates are scored by a command, and the outcome can be merged again without it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.commands import run_session

Run = Callable[..., subprocess.CompletedProcess[str]]

# No torch, which takes seconds to start: the tensors' bytes are doubles, behind a header of known length.
SCORE = """
import json, struct, sys
data = open(sys.argv[1] + "/model.safetensors", "rb").read()
size, = struct.unpack("<Q", data[:8])
first, last = json.loads(data[8:8 + size])["weight"]["data_offsets"]
values = struct.unpack("<4d", data[8 + size + first:8 + size + last])
print("a line for people")
print(json.dumps({"loss": sum((v - t) ** 2 for v, t in zip(values, TARGET))}))
"""
TUNED = {"a": [1.0, 0.0, 0.0, 0.1], "b": [0.0, 1.0, 0.0, 0.1], "c": [0.0, 0.0, 1.0, -0.9]}
OPTIMUM = (0.5, 0.8, 0.1)  # coefficients of the task vectors


@pytest.fixture
def models(tmp_path: Path) -> Path:
    base = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    steps = {name: torch.tensor(step, dtype=torch.float64) for name, step in TUNED.items()}
    for name, weight in [("base", base), *((name, base + step) for name, step in steps.items())]:
        (tmp_path / name).mkdir()
        save_file({"weight": weight}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    target = base + sum(c * step for c, step in zip(OPTIMUM, steps.values(), strict=True))
    (tmp_path / "score.py").write_text(f"TARGET = {target.tolist()}\n{SCORE}")
    return tmp_path


EVALUATE = f"{sys.executable} -S score.py {{model}}"
MODELS = ["a", "b", "c", "--base", "base"]


def weight_of(directory: Path) -> torch.Tensor:
    return load_file(directory / "model.safetensors")["weight"]


def test_a_greedy_soup_can_be_merged_again_without_searching(run: Run, models: Path) -> None:
    arguments = [*MODELS, "--method", "fedavg", "--out", "soup", "--search", "greedy_soup", "--json"]
    result = run("merge", *arguments, "--evaluate", EVALUATE)
    assert result.returncode == 0, result.stderr
    record = json.loads((models / "soup" / "search.json").read_text())
    scores = {tuple(each["factors"]): each["score"] for each in record["candidates"]}
    assert len(scores) == 5
    assert record["chosen"]["factors"] == [1.0, 1.0, 0.0]  # c pulls the last element away from the optimum
    assert scores[1.0, 1.0, 0.0] == max(scores.values())
    lineage = json.loads((models / "soup" / "lineage.json").read_text())["predicate"]
    names = [item["name"] for item in lineage["inputs"]]
    weights = ",".join(str(item["weight"]) for item in lineage["inputs"])
    assert (names, weights) == (["a", "b"], "1.0,1.0")
    again = run(
        "merge", *names, "--base", "base", "--weights", weights, "--method", "fedavg", "--out", "again", "--json"
    )
    assert json.loads(again.stdout)["version"] == json.loads(result.stdout)["version"]


def test_cma_es_comes_near_the_best_coefficients(run: Run, models: Path) -> None:
    settings = ["--search-set", "evaluations=90", "--search-set", "metric=-loss", "--seed", "3"]
    result = run("merge", *MODELS, "--out", "found", "--search", "cma_es", *settings, "--evaluate", EVALUATE)
    assert result.returncode == 0, result.stderr
    chosen = json.loads((models / "found" / "search.json").read_text())["chosen"]["factors"]
    assert chosen == pytest.approx(OPTIMUM, abs=0.1)
    merged = weight_of(models / "base") + sum(
        factor * torch.tensor(step, dtype=torch.float64) for factor, step in zip(chosen, TUNED.values(), strict=True)
    )
    torch.testing.assert_close(weight_of(models / "found"), merged, atol=1e-6, rtol=0)


SOUP = ["--search", "greedy_soup"]
MISTAKES: list[tuple[list[str], str]] = [
    (SOUP, "--search needs --evaluate"),
    (["--evaluate", "x {model}"], "--evaluate and --search-set go with --search"),
    ([*SOUP, "--evaluate", "x"], "--evaluate x: has no {model}"),
    ([*SOUP, "--evaluate", "'x {model}"], "--evaluate: No closing quotation"),
    (["--search", "soup", "--evaluate", "x {model}"], "--search: strategy: input should be 'none', 'greedy_soup'"),
    ([*SOUP, "--evaluate", "./nothing {model}"], "the evaluation can't be started: ./nothing"),
    ([*SOUP, "--evaluate", "cat {model}"], "the evaluation failed with exit code 1: cat: "),
    ([*SOUP, "--evaluate", "echo {model}"], "the evaluation's last line is '"),
    ([*SOUP, "--evaluate", "printf '[1]\n' {model}"], "the evaluation's last line is '[1]'"),
    ([*SOUP, "--evaluate", """sh -c 'echo {\\"f1\\": true}' {model}"""], """last line is '{"f1": true}'"""),
    ([*SOUP, "--evaluate", """sh -c 'echo {\\"f1\\": 1}' {model}"""], "the evaluation gave f1, not auto"),
    (
        [*SOUP, "--search-set", "deadline_s=0.2", "--evaluate", "sh -c 'sleep 60' {model}"],
        "the evaluation took more than 0.2 s",
    ),
    (["--search", "cma_es", "--evaluate", "x {model}", "--search-set", "stp=1"], "stp: unknown key"),
]


def test_a_search_that_can_not_be_done_is_one_clear_line(models: Path, clean_environment: dict[str, str]) -> None:
    commands = [["merge", *MODELS, "--out", "out", *arguments] for arguments, _ in MISTAKES]
    for outcome, (arguments, error) in zip(run_session(models, clean_environment, commands), MISTAKES, strict=True):
        assert outcome.code == 2, arguments
        assert error in outcome.stderr
        assert outcome.left == []
