"""Flower both ways: fedmerge's strategy in a ServerApp, and a Flower ClientApp as the trainer of a node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedmerge.config import parse_config
from fedmerge.delta.codec import Codec
from fedmerge.errors import ConfigError, InputError
from fedmerge.interop.flower import MergeStrategy
from fedmerge.merge import METHODS, Recipe
from fedmerge.sim import simulate
from fedmerge.tensors import Checkpoint
from fedmerge.training import TrainTask, load_trainer
from tests.e2e.flower_app import EXAMPLES, NUM_CLIENTS, RUNS, SHAPE, base, step

ROOT = Path(__file__).parents[2]
APP = ROOT / "clients" / "apps" / "flower"
BAD = [label for label in RUNS if label.startswith("bad ")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all strategies under Flower's simulation engine, once, and return the folder with what they arrived at."""
    out = tmp_path_factory.mktemp("flower")
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **quiet, "FLWR_HOME": str(out / "home")}
    command = [sys.executable, "-m", "tests.e2e.flower_app", str(out)]
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def arrived(results: Path, label: str) -> dict[str, Tensor]:
    with np.load(results / f"{label}.npz", allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def metrics(results: Path, label: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((results / f"{label}.json").read_text())
    return found


def start() -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in base().items()}


def steps(name: str) -> Tensor:
    return torch.stack([torch.from_numpy(step(number)[name]) for number in range(NUM_CLIENTS)])


def mean_step(name: str, clients: tuple[int, ...] = (0, 1, 2)) -> Tensor:
    total = sum(EXAMPLES[client] for client in clients)
    return sum((steps(name)[client] * EXAMPLES[client] for client in clients), torch.zeros(())) / total


@pytest.mark.slow
class TestMergeStrategy:
    def test_fedavg_is_flowers(self, results: Path) -> None:
        for name in ("matrix", "bias"):
            torch.testing.assert_close(arrived(results, "fedavg")[name], arrived(results, "flower")[name])

    def test_integer_arrays_stay(self, results: Path) -> None:
        assert arrived(results, "fedavg")["steps"].equal(start()["steps"])

    def test_ties_on_the_differences(self, results: Path) -> None:
        weights = torch.tensor(EXAMPLES, dtype=torch.float64)
        weights = weights / weights.sum()
        for name in ("matrix", "bias"):
            tuned = start()[name] + steps(name)
            expected = start()[name] + METHODS["ties"](tuned - start()[name], weights, density=0.3)
            torch.testing.assert_close(arrived(results, "ties")[name], expected)

    def test_nesterov_is_torchs(self, results: Path) -> None:
        for name in ("matrix", "bias"):
            parameter = torch.nn.Parameter(start()[name].clone())
            optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
            for _ in range(3):
                parameter.grad = -mean_step(name)
                optimizer.step()
            torch.testing.assert_close(arrived(results, "nesterov")[name], parameter.detach(), rtol=1e-5, atol=1e-6)

    def test_lawa_publishes_the_mean_of_the_latest(self, results: Path) -> None:
        # Three rounds that each add one step to what was published, which is the mean of the latest two rounds' models.
        for name in ("matrix", "bias"):
            torch.testing.assert_close(
                arrived(results, "lawa")[name], start()[name] + 2.5 * mean_step(name), rtol=1e-5, atol=1e-6
            )

    def test_the_mod_sends_few_bytes_and_changes_little(self, results: Path) -> None:
        dense_bytes = NUM_CLIENTS * 4 * (SHAPE[0] * SHAPE[1] + SHAPE[0])
        assert metrics(results, "int8")["1"]["fedmerge-payload-bytes"] < dense_bytes / 3
        assert metrics(results, "fedavg")["1"]["fedmerge-payload-bytes"] >= dense_bytes
        moved = arrived(results, "int8")["matrix"] - start()["matrix"]
        assert (moved - mean_step("matrix")).norm() < 0.02 * mean_step("matrix").norm()

    def test_error_feedback_sends_everything_in_time(self, results: Path) -> None:
        # 64 of each 4096 elements a round: without feedback the same 1.6 % of each client would move in every round.
        # With it a residual grows until it is among the largest: 70 rounds of 64 are enough for each element.
        moved = arrived(results, "topk")["matrix"] - start()["matrix"]
        assert (moved != 0).float().mean() > 0.8
        expected = 70 * mean_step("matrix")
        assert (moved - expected).norm() < 0.6 * expected.norm()

    @pytest.mark.parametrize("label", BAD)
    def test_a_bad_reply_is_left_out(self, results: Path, label: str) -> None:
        for name in ("matrix", "bias"):
            expected = start()[name] + mean_step(name, clients=(0, 2))
            torch.testing.assert_close(arrived(results, label)[name], expected)
        assert metrics(results, label)["1"]["fedmerge-refused"] == 1


class TestArguments:
    def test_unknown_method(self) -> None:
        with pytest.raises(ConfigError, match=r"no merge method 'tiez'.*did you mean 'ties'"):
            MergeStrategy("tiez")

    def test_unknown_optimizer(self) -> None:
        with pytest.raises(ConfigError, match="no outer optimizer 'adm'"):
            MergeStrategy(outer={"name": "adm"})

    def test_time_is_not_an_order_of_clients(self) -> None:
        with pytest.raises(ConfigError, match="clients have no order"):
            MergeStrategy("swa")

    def test_feedback_under_an_average_over_rounds(self) -> None:
        recipe = Recipe.from_steps([("fedavg", {}), ("ema", {})])
        with pytest.raises(ConfigError, match="does not go with ema"):
            MergeStrategy(recipe, codec=Codec(sparsify="topk", density=0.1), error_feedback=0.9)

    def test_feedback_without_topk(self) -> None:
        with pytest.raises(ConfigError, match="topk"):
            MergeStrategy(error_feedback=0.9)


def make_digits_model(directory: Path) -> Path:
    directory.mkdir()
    sys.path.insert(0, str(APP))
    try:
        from digits.task import make_model
    finally:
        sys.path.remove(str(APP))
    save_file(make_model().state_dict(), directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return directory


def digits_trainer(partition_id: int, **options: object) -> object:
    node_config = {"partition-id": partition_id, "num-partitions": 2}
    return load_trainer(
        "flower", {"app": "digits.client_app:app", "folder": APP, "node_config": node_config, **options}
    )


FEDERATION = """
[federation]
name = "digits"
[model]
base = "base"
[rounds]
num_rounds = 3
min_nodes = 2
[train]
trainer = "flower"
[train.run_config]
local-epochs = 2
learning-rate = 0.1
[merge]
method = "ties"
"""


class TestFlowerAppAsTrainer:
    def test_a_federation_of_flower_apps(self, tmp_path: Path) -> None:
        base_dir = make_digits_model(tmp_path / "base")
        config = parse_config(FEDERATION, folder=tmp_path, where="fedmerge.toml")
        trainers = {f"site-{number}": digits_trainer(number) for number in range(2)}
        result = simulate(config, base_dir, trainers)  # type: ignore[arg-type]
        accuracies = [node.merged["accuracy"] for node in result.nodes]
        assert min(accuracies) > 0.75

    def test_the_same_round_trains_to_the_same_weights(self, tmp_path: Path) -> None:
        base_dir = make_digits_model(tmp_path / "base")
        settings = {"run_config": {"local-epochs": 1, "learning-rate": 0.1}}
        tuned = []
        for attempt in ("a", "b"):
            (tmp_path / attempt).mkdir()
            task = TrainTask(base_dir, settings, round=1, seed=3, workspace=tmp_path / attempt)
            tuned.append(Checkpoint(digits_trainer(0).train(task).model_dir))  # type: ignore[attr-defined]
        assert all(tuned[0][name].equal(tuned[1][name]) for name in tuned[0])
        assert not tuned[0]["0.weight"].equal(Checkpoint(base_dir)["0.weight"])

    def test_what_is_no_app(self) -> None:
        with pytest.raises(ConfigError, match="can't be imported"):
            digits_trainer(0, app="digits.client_app:nothing").check()  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match="is a function, not a ClientApp"):
            digits_trainer(0, app="digits.task:train").check()  # type: ignore[attr-defined]

    def test_an_app_that_fails(self, tmp_path: Path) -> None:
        task = TrainTask(make_digits_model(tmp_path / "base"), {}, round=1, seed=0, workspace=tmp_path)
        with pytest.raises(InputError, match=r"failed on train: KeyError: 'local-epochs'"):
            digits_trainer(0).train(task)  # type: ignore[attr-defined]
