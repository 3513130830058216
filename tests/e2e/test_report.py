"""`fedmerge report` on a federation that ran: against the scores that the trainers gave, and deltas they left."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fedmerge.cli.app import app
from fedmerge.errors import InputError
from fedmerge.sim import simulate
from fedmerge.tensors import Checkpoint
from fedmerge.training import Trainer, TrainResult, TrainTask
from tests.conftest import StepTrainer, make_config

LOSSLESS = "[delta]\nvalues = 'fp32'\ndownlink = 'fp32'\n"


@dataclass
class ScoringTrainer(StepTrainer):
    """Scores a model by how far it is from the base in this node's own direction, and not at all without data."""

    base: Path | None = None
    rounds: int = 0

    def train(self, task: TrainTask) -> TrainResult:
        self.rounds = task.round
        return super().train(task)

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        if self.base is None:
            return {}
        before, after = Checkpoint(self.base)["matrix"], Checkpoint(model_dir)["matrix"]
        own = self.step("matrix", before)
        return {"accuracy": 0.1 + float(((after - before) * own).sum() / own.square().sum())}


def report(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    app(["report", str(folder / "fedmerge.toml"), *options], exit_on_error=False, result_action="return_value")
    return capsys.readouterr().out


def test_it_says_what_merging_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = make_config(tmp_path, num_rounds=2, extra=LOSSLESS)
    base = tmp_path / "base"
    trainers = {"north": ScoringTrainer(1, base=base), "south": ScoringTrainer(2, base=base)}
    with pytest.raises(InputError, match="no federation's state"):
        report(tmp_path, capsys)
    held: dict[str, Trainer] = dict(trainers)
    simulate(config, base, held)
    found = json.loads(report(tmp_path, capsys, "--json"))
    like = Checkpoint(base)["matrix"]
    steps = {name: trainer.step("matrix", like).double() for name, trainer in trainers.items()}
    vectors = {name: trainer.step("vector", torch.empty(300)).double() for name, trainer in trainers.items()}
    mean = (steps["north"] + steps["south"]) / 2
    for row in found["retention"]["tasks"]:
        own = steps[row["node"]]
        shared = float((mean * own).sum() / own.square().sum())
        assert row["base"] == pytest.approx(0.1)
        assert row["merged"] == pytest.approx([0.1 + shared, 0.1 + 2 * shared], abs=1e-4)
        assert row["own"] == pytest.approx([1.1, 1.1 + shared], abs=1e-4)
        assert row["retention"] == pytest.approx([m / o for m, o in zip(row["merged"], row["own"], strict=True)])
        assert row["forgetting"] == pytest.approx(-shared, abs=1e-4)
    whole = {name: torch.cat([steps[name].flatten(), vectors[name]]) for name in steps}
    cosine = float(torch.cosine_similarity(whole["north"], whole["south"], dim=0))
    (pair,) = found["interference"]["pairs"]
    assert pair["models"] == ["north", "south"]
    assert pair["cosine"] == pytest.approx(cosine, abs=1e-4)
    shown = report(tmp_path, capsys)
    for text in ("retention by round: accuracy, merged over own", "forgot", "north", "mean", "interference"):
        assert text in shown
    assert f"{found['retention']['mean'][1]:.0%}" in shown
    app(["rounds", str(tmp_path / "fedmerge.toml"), "--json"], exit_on_error=False, result_action="return_value")
    assert json.loads(capsys.readouterr().out)["retention"] == found["retention"]
    app(["rounds", str(tmp_path / "fedmerge.toml")], exit_on_error=False, result_action="return_value")
    *_, header, north, _, mean_row, note = capsys.readouterr().out.splitlines()
    assert header.split() == ["retention", "1", "2"]
    matrix = found["retention"]
    assert north.split() == ["north", *(f"{share:.0%}" for share in matrix["tasks"][0]["retention"])]
    assert mean_row.split() == ["mean", *(f"{share:.0%}" for share in matrix["mean"])]
    assert note == "(accuracy, merged over own)"
    assert "accuracy, own over merged: lower is better" in report(tmp_path, capsys, "--metric=-accuracy")
    with pytest.raises(InputError, match="no node reported 'f1'"):
        report(tmp_path, capsys, "--metric", "f1")


def test_without_test_data_it_still_says_how_deltas_interfere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = make_config(tmp_path, extra=LOSSLESS)
    trainers: dict[str, Trainer] = {"north": ScoringTrainer(1), "south": ScoringTrainer(2)}
    simulate(config, tmp_path / "base", trainers)
    assert "no node scored a model" in report(tmp_path, capsys)
    assert json.loads(report(tmp_path, capsys, "--json"))["retention"] is None
