"""The trainer that runs a function of the partner's own, and its example."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmerge.cli.app import app
from fedmerge.errors import ConfigError, InputError
from fedmerge.tensors import Checkpoint
from fedmerge.training import STATE, TrainTask, check_plan, load_trainer

EXAMPLE = Path(__file__).parents[2] / "clients/apps/torch"
CODE = """
import random
import numpy as np
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

def train(model, work):
    assert model.training
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    earlier = (work.previous_state / "seen").read_text() if work.previous_state else ""
    (work.state / "seen").write_text(earlier + f"{work.round}/{work.num_rounds} ")
    for step in range(2):
        model(torch.randn(8, 3))
        work.progress(step + 1, 2, 0.5)
    with torch.no_grad():
        model[0].weight += work.settings["step"] * work.options["factor"] + sum(drawn)
    return 7, {"first": drawn[0]}

def count(model, work):
    return 5

def evaluate(model, work):
    assert not model.training
    return {"weight": float(model[0].weight.sum()), "site": work.options["factor"]}

def nothing(model, work):
    return None

def broken(model, work):
    raise KeyError("labels")

def words(model, work):
    return 3, {"loss": "low"}

def grows(model, work):
    model.append(nn.Linear(2, 2))
    return 3

def other():
    return nn.Linear(4, 4)

def no_module():
    return 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_functions.py").write_text(CODE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_functions", raising=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base/model.safetensors")
    return tmp_path


def trainer(folder: Path, function: str = "train", **options: Any) -> Any:
    own = {"function": f"own_functions:{function}", "model": "own_functions:make", "folder": folder}
    return load_trainer("torch", {**own, "options": {"factor": 2.0}, **options})


def task(home: Path, number: int = 1, seed: int = 3, **settings: Any) -> TrainTask:
    workspace = home / f"round{number}"
    workspace.mkdir(exist_ok=True)
    previous = home / f"round{number - 1}" / STATE
    return TrainTask(
        home / "base",
        {"step": 0.25, **settings},
        number,
        seed,
        workspace,
        num_rounds=2,
        previous_state=previous if previous.exists() else None,
    )


def test_the_function_tunes_a_module_of_its_own(folder: Path) -> None:
    made = trainer(folder, evaluate_function="own_functions:evaluate")
    made.check()
    before = torch.random.get_rng_state()
    result = made.train(task(folder))
    assert torch.equal(torch.random.get_rng_state(), before)
    base, tuned = Checkpoint(folder / "base"), Checkpoint(result.model_dir)
    shift = tuned["0.weight"] - base["0.weight"]
    assert (result.num_examples, set(result.metrics)) == (7, {"first"})
    torch.testing.assert_close(shift, shift[0, 0].expand(2, 3))
    assert 0.5 < float(shift[0, 0]) < 3.5
    assert not torch.equal(tuned["1.running_mean"], base["1.running_mean"])
    assert torch.equal(tuned["1.num_batches_tracked"], base["1.num_batches_tracked"])  # a counter has no mean
    assert made.evaluate(result.model_dir) == pytest.approx({"weight": float(tuned["0.weight"].sum()), "site": 2.0})
    assert trainer(folder).evaluate(result.model_dir) == {}


def test_the_same_round_gives_the_same_bits_and_state_goes_on(folder: Path) -> None:
    made = trainer(folder)
    first, again, other = (
        load_file(made.train(task(folder, seed=seed)).model_dir / "model.safetensors") for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert trainer(folder, "count").train(task(folder)).num_examples == 5
    made.train(task(folder))
    made.train(task(folder, 2))
    assert (folder / "round2" / STATE / "seen").read_text() == "1/2 2/2 "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function": "nothing"}, r"own_functions:nothing: returned None"),
        ({"function": "broken"}, r"own_functions:broken failed: KeyError: 'labels'"),
        ({"function": "words"}, r"metric loss is 'low'"),
        ({"function": "grows"}, r"tensors are others \(2\.bias\)"),
        ({"model": "own_functions:other"}, r"does not have the global model's tensors"),
        ({"model": "own_functions:no_module"}, r"returned a int, not a torch\.nn\.Module"),
    ],
)
def test_what_goes_wrong_in_it_is_named(folder: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trainer(folder, **options).train(task(folder))


def test_what_is_not_there_is_said_before_the_first_round(folder: Path) -> None:
    for name in ("own_functions:trane", "no_such_package:train", "own_functions"):
        with pytest.raises(ConfigError, match="can't be imported"):
            trainer(folder, evaluate_function=name).check()
    with pytest.raises(ConfigError, match="is no function"):
        trainer(folder, "__name__").check()
    with pytest.raises(InputError, match="no such file"):
        trainer(folder, data=folder / "none").check()


@pytest.mark.parametrize("key", ["function", "model", "evaluate_function", "folder"])
def test_a_plan_can_not_say_what_runs(folder: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: .*names what runs at a node, which a plan may not"):
        check_plan("torch", {key: "os:system"})
    with pytest.raises(ConfigError, match="may not"):
        trainer(folder).train(task(folder, **{key: "os:system"}))


def test_the_example_federates_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("digits.py", "fedmerge.toml"):
        (tmp_path / name).write_text((EXAMPLE / name).read_text().replace("clients/apps/torch", "."))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "digits", raising=False)
    monkeypatch.setattr(sys, "argv", ["digits.py", "base"])
    runpy.run_path("digits.py", run_name="__main__")
    app(["simulate", "fedmerge.toml"], exit_on_error=False, result_action="return_value")
    model_dir = Path(capsys.readouterr().out.strip().split("\n")[-1])
    app(["report", "fedmerge.toml", "--json"], exit_on_error=False, result_action="return_value")
    tasks = json.loads(capsys.readouterr().out)["retention"]["tasks"]
    assert len(tasks) == 4
    for row in tasks:
        assert row["merged"][-1] > 0.75 > row["own"][0]
    assert set(Checkpoint(model_dir)) == set(Checkpoint(tmp_path / "base"))
