"""What an experiment tracker is told of a simulation."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmerge.sim import simulate, to_tensorboard, tracking
from fedmerge.tensors import Checkpoint
from tests.conftest import StepTrainer, make_config


class Writer:
    """Keeps scalars as a SummaryWriter's event file does."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag, step] = value


def test_a_tracker_gets_what_nodes_measure_and_send(tmp_path: Path) -> None:
    config, _ = make_config(tmp_path, num_rounds=2)
    rows: list[tuple[dict[str, float], int]] = []

    def log(values: dict[str, float], /, *, step: int) -> None:
        rows.append((values, step))

    trainers = {"north": StepTrainer(1), "south": StepTrainer(2)}
    result = simulate(config, tmp_path / "base", trainers, on_event=tracking(log))
    (last,) = [values for values, step in rows if step == 2 and "north/global/norm" in values]
    assert last["north/global/norm"] == pytest.approx(float(Checkpoint(result.model_dir)["matrix"].norm()))
    sent = [values["south/delivered/payload_bytes"] for values, _ in rows if "south/delivered/payload_bytes" in values]
    assert len(sent) == 2
    assert sum(sent) == next(node.sent_bytes for node in result.nodes if node.name == "south")


def test_tensorboard_gets_one_scalar_each(tmp_path: Path) -> None:
    config, _ = make_config(tmp_path)
    writer = Writer()
    trainers = {"north": StepTrainer(1), "south": StepTrainer(2)}
    simulate(config, tmp_path / "base", trainers, on_event=tracking(to_tensorboard(writer)))
    assert ("north/global/norm", 1) in writer.scalars
    assert ("south/own/norm", 1) in writer.scalars
