"""Sweeps: each point is the simulation that its settings alone would give, and what is finished is not done again."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

import fedmerge
from fedmerge.cli.simulate import simulate as simulate_command
from fedmerge.config import Config
from fedmerge.errors import ConfigError, RoundFailed
from fedmerge.sim import FederationResult, simulate, sweep
from fedmerge.sim.sweep import points_of
from fedmerge.tensors import Checkpoint
from tests.conftest import StepTrainer, make_base, make_config

NODES = {f"node-{number}": StepTrainer(number) for number in range(2)}
GRID: dict[str, list[object]] = {"outer.lr": [0.5, 1.0], "merge.method": ["fedavg", "ties"]}


class Runs:
    """Simulates, and remembers what; before the run number `stop_at` it is interrupted."""

    def __init__(self, base_dir: Path, stop_at: int | None = None) -> None:
        self.base_dir, self.stop_at = base_dir, stop_at
        self.configs: list[Config] = []

    def __call__(self, config: Config) -> FederationResult:
        if len(self.configs) == self.stop_at:
            raise KeyboardInterrupt
        self.configs.append(config)
        return simulate(config, self.base_dir, NODES)


def test_a_point_is_what_its_settings_give_and_is_simulated_once(tmp_path: Path) -> None:
    _, path = make_config(tmp_path)
    interrupted = Runs(tmp_path / "base", stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        sweep(path, GRID, interrupted)
    again = Runs(tmp_path / "base")
    result = sweep(path, GRID, again)
    assert [len(interrupted.configs), len(again.configs)] == [3, 1]
    assert [(row["outer.lr"], row["merge.method"]) for row in result.rows] == [
        ("0.5", "fedavg"), ("0.5", "ties"), ("1.0", "fedavg"), ("1.0", "ties"),
    ]  # fmt: skip
    for row in result.rows:
        alone = tmp_path / f"alone-{row['outer.lr']}-{row['merge.method']}"
        settings = f"[outer]\nlr = {row['outer.lr']}\n[merge]\nmethod = '{row['merge.method']}'"
        config, _ = make_config(alone, extra=settings)
        assert simulate(config, alone / "base", NODES).version == row["version"]
    assert len({row["version"] for row in result.rows}) == 4
    with (tmp_path / "sweep" / "results.csv").open() as file:
        assert [row["version"] for row in csv.DictReader(file)] == [row["version"] for row in result.rows]
    assert list(result.to_frame()["norm"]) == [row["norm"] for row in result.rows]


def test_failures_stand_below_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is nothing to put into it where one point is all, and it failed."""
    make_base(tmp_path / "base")
    path = tmp_path / "fedmerge.toml"
    path.write_text(FINISHED.replace("tuned", str(tmp_path / "base")))
    with pytest.raises(RoundFailed, match="1 of 1 simulations failed"):
        simulate_command(path, sweep=("screen.max_unchanged=0.5",))
    said = capsys.readouterr().out
    assert "failed" in said
    assert "screen.max_unchanged = 0.5: round 1 failed" in said


def test_points_that_were_simulated_with_other_settings_are_not_passed_off(tmp_path: Path) -> None:
    _, path = make_config(tmp_path)
    grid: dict[str, list[object]] = {"outer.lr": [0.5, 1.0]}
    sweep(path, grid, Runs(tmp_path / "base"))
    make_config(tmp_path, extra="[merge]\nmethod = 'ties'")
    rows = (tmp_path / "sweep" / "results.csv").read_text()
    with pytest.raises(
        ConfigError, match=r"outer.lr=0.5/state: this simulation was begun with other settings: merge.m"
    ):
        sweep(path, grid, Runs(tmp_path / "base"))
    assert (tmp_path / "sweep" / "results.csv").read_text() == rows


def test_a_point_whose_round_fails_is_a_row_and_is_tried_again(tmp_path: Path) -> None:
    _, path = make_config(tmp_path, rounds="deadline_s = 10.0")
    runs = Runs(tmp_path / "base")
    for num_runs in (2, 3):
        good, bad = sweep(path, {"rounds.min_nodes": [2, 3]}, runs).rows
        assert "failure" not in good
        assert "2 of at least 3 nodes" in bad["failure"]
        assert len(runs.configs) == num_runs


@pytest.mark.parametrize(
    ("grid", "problem"),
    [
        ({"merge.densty": [1]}, "merge.densty=1: merge.densty: unknown key"),
        ({"outer.lr": [1.0, -1.0]}, "outer.lr=-1.0: outer.lr: should be above 0"),
        ({"mrege.seed": [1]}, "unknown section 'mrege'"),
        ({"merge.seed": []}, "the sweep has 0 points"),
        ({"federation.state": ["a", "b"]}, "a sweep can't vary federation.state"),
    ],
)
def test_a_wrong_point_is_reported_before_anything_runs(
    tmp_path: Path, grid: dict[str, list[object]], problem: str
) -> None:
    runs = Runs(tmp_path / "base")
    with pytest.raises(ConfigError, match=problem):
        sweep(make_config(tmp_path)[1], grid, runs)
    assert not runs.configs


def test_points_share_the_data_of_made_up_nodes_unless_they_differ_in_it(tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text("".join(f'{{"x": {number}}}\n' for number in range(9)))
    _, path = make_config(tmp_path, extra="[simulate]\nnodes = 2\ndata = 'all.jsonl'")
    data = {
        (point.settings["simulate.seed"], point.settings["outer.lr"]): point.config.nodes[0].data
        for point in points_of(path, {"simulate.seed": [0, 1], "outer.lr": [0.5, 1.0]})
    }
    assert data["0", "0.5"] == data["0", "1.0"] != data["1", "0.5"] == data["1", "1.0"]
    assert data["0", "0.5"].read_text() != data["1", "0.5"].read_text()  # type: ignore[union-attr]


FINISHED = """
[federation]
name = "test"
[model]
base = "base"
[rounds]
num_rounds = 1
min_nodes = 1
[train]
trainer = "checkpoint"
[[nodes]]
name = "north"
model = "tuned"
num_examples = 1
"""


def test_the_command_prints_a_row_per_point(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Checkpoint(make_base(tmp_path / "base"))
    make_base(tmp_path / "tuned")
    save_file({**base, "vector": base["vector"] + 1.0}, tmp_path / "tuned" / "model.safetensors")
    path = tmp_path / "fedmerge.toml"
    path.write_text(FINISHED)
    monkeypatch.chdir(tmp_path)
    simulate_command(path, sweep=("outer.lr=0.5, 1.0", "merge.seed=1"), json=True)
    rows = json.loads(capsys.readouterr().out)["points"]
    assert [(row["outer.lr"], row["merge.seed"], row["deltas"]) for row in rows] == [("0.5", "1", 1), ("1.0", "1", 1)]
    simulate_command(path, sweep=("outer.lr=0.5,1.0", "merge.seed=1"))
    assert rows[1]["version"][:8] in capsys.readouterr().out
    # From Python, too, and nothing is left for it to do.
    assert sweep("fedmerge.toml", {"outer.lr": [0.5, 1.0], "merge.seed": [1]}).rows == rows
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/fedmerge.toml").write_text(FINISHED.replace('"base"', '"../base"'))
    assert fedmerge.simulate("alone/fedmerge.toml").version == rows[1]["version"]
    for wrong in ("outer.lr", "outer.lr=", "lr=1"):
        with pytest.raises(ConfigError, match=r"expected SECTION\.KEY=VALUE,VALUE"):
            simulate_command(path, sweep=(wrong,))
    with pytest.raises(ConfigError, match="do not go together"):
        simulate_command(path, sweep=("outer.lr=1",), processes=True)
