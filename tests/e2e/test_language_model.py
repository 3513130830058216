"""A federation that trains a language model: what its nodes keep from round to round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmerge.config import Config, parse_config
from fedmerge.errors import RoundFailed
from fedmerge.sim import FederationResult, node_home, simulate
from fedmerge.tensors import Checkpoint
from fedmerge.training import STATE, Trainer, TrainResult, TrainTask
from fedmerge_client.train.causal_lm import CausalLM
from tests.conftest import make_config
from tests.unit.test_causal_lm import make_llama

TEXTS = {"north": "the cat sat on the mat. " * 20, "south": "colourless green ideas sleep. " * 20}
PLAN = """\
trainer = "causal-lm"
steps = 3
batch_size = 2
context_length = 16
lr = 1e-2
warmup = 0.0
num_threads = 1
"""
TOPK = '[delta]\nvalues = "sign"\nsparsify = "topk"\ndensity = 0.1\nerror_feedback = 0.95\n'


def prepare(folder: Path, *, num_rounds: int, min_nodes: int = 2) -> tuple[Config, dict[str, Trainer]]:
    folder.mkdir(exist_ok=True)
    if not (folder / "base").exists():
        make_llama(folder / "base")
    _, path = make_config(folder, num_rounds=num_rounds, min_nodes=min_nodes)
    text = path.read_text().replace('trainer = "text-classification"\n', PLAN) + TOPK
    trainers: dict[str, Trainer] = {}
    for name, content in TEXTS.items():
        (folder / f"{name}.txt").write_text(content)
        trainers[name] = CausalLM(data=folder / f"{name}.txt", test=folder / f"{name}.txt")
    return parse_config(text, folder=folder, where="fedmerge.toml"), trainers


def run(folder: Path, trainers: dict[str, Trainer] | None = None, *, num_rounds: int = 3) -> FederationResult:
    config, own = prepare(folder, num_rounds=num_rounds)
    return simulate(config, folder / "base", own | (trainers or {}))


def states(folder: Path, name: str) -> list[Path]:
    return sorted((node_home(prepare(folder, num_rounds=3)[0], name) / "rounds").glob(f"*/{STATE}"))


def test_moments_and_schedule_go_on_from_round_to_round(tmp_path: Path) -> None:
    result = run(tmp_path)
    for node in result.nodes:
        assert node.merged["loss"] < node.base["loss"] - 0.2
        kept = states(tmp_path, node.name)
        assert len(kept) == 2  # of the last round, and of the one before, which it began from
        steps = [float(load_file(folder / "adamw.safetensors")["step:model.norm.weight"]) for folder in kept]
        assert steps == [6, 9]


class Interrupted(CausalLM):
    """Is stopped in round 2, after its training and before its delta is signed."""

    def train(self, task: TrainTask) -> TrainResult:
        result = super().train(task)
        if task.round == 2:
            raise KeyboardInterrupt
        return result


def test_a_node_stopped_after_training_starts_from_the_state_of_the_round_before(tmp_path: Path) -> None:
    undisturbed = run(tmp_path / "undisturbed")
    folder = tmp_path / "stopped"
    prepare(folder, num_rounds=3)
    with pytest.raises(KeyboardInterrupt):
        run(folder, {"north": Interrupted(data=folder / "north.txt", test=folder / "north.txt")})
    assert len(states(folder, "north")) == 2  # one of them without a statement
    assert run(folder).version == undisturbed.version


class Diverged(CausalLM):
    """Sends, in its first attempt at round 2, a delta that screening refuses."""

    def train(self, task: TrainTask) -> TrainResult:
        result = super().train(task)
        if task.round == 2:
            file = result.model_dir / "model.safetensors"
            tensors = {name: tensor * 1e4 for name, tensor in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
        return result


def test_a_round_that_is_opened_again_starts_from_the_state_of_the_round_before(tmp_path: Path) -> None:
    def federation(folder: Path, *, diverges: bool) -> FederationResult:
        config, trainers = prepare(folder, num_rounds=3, min_nodes=3)
        (folder / "east.txt").write_text("to be, or not to be. " * 20)
        trainers["east"] = CausalLM(data=folder / "east.txt")
        if diverges:
            trainers["north"] = Diverged(data=folder / "north.txt", test=folder / "north.txt")
        return simulate(config, folder / "base", trainers)

    undisturbed = federation(tmp_path / "undisturbed", diverges=False)
    with pytest.raises(RoundFailed, match="times the median"):
        federation(tmp_path / "failed", diverges=True)
    again = federation(tmp_path / "failed", diverges=False)
    assert again.version == undisturbed.version
    model, expected = Checkpoint(again.model_dir), Checkpoint(undisturbed.model_dir)
    assert all(torch.equal(model[name], expected[name]) for name in expected)
