"""Federations whose recipe is more than a method's name: what is signed, published and replayed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.errors import ConfigError
from fedmerge.sim import FederationResult, simulate
from fedmerge.store.blobs import BlobStore
from fedmerge.tensors import Checkpoint
from fedmerge.trust.sign import SigningKey
from fedmerge.verify import History, replay, verify_directory
from tests.conftest import StepTrainer, make_config

TRAINERS = {"north": StepTrainer(1, num_examples=10), "south": StepTrainer(2, num_examples=30)}
PLAIN = "[delta]\nvalues = 'fp32'\ndownlink = 'fp32'\n[screen]\nweighting = 'equal'\n"


def run(folder: Path, num_rounds: int, recipe: str) -> tuple[FederationResult, History]:
    """Run a federation to its end, and check and replay what it published."""
    config, _ = make_config(folder, num_rounds=num_rounds, extra=PLAIN + recipe)
    result = simulate(config, folder / "base", TRAINERS)
    key = SigningKey.load(folder / "coordinator.key").public
    _, history, _ = verify_directory(result.model_dir, {key.key_id: key})
    assert replay(history, Checkpoint(folder / "base"), BlobStore(config.federation.state / "blobs")).passed
    return result, history


def test_values_by_name_stand_in_the_signed_record_and_replay(tmp_path: Path) -> None:
    recipe = "[merge]\nmethod = 'task_arithmetic'\n[merge.lambda]\n'mat*' = 0.5\ndefault = 2\n"
    result, history = run(tmp_path, 1, recipe)
    recorded: dict[str, Any] = {"lambda": {"mat*": 0.5, "default": 2.0}, "normalize": False}
    assert history.records[0].merge == {"method": "task_arithmetic", "params": recorded}
    base, merged = Checkpoint(tmp_path / "base"), Checkpoint(result.model_dir)
    for name, factor in (("matrix", 0.5), ("vector", 2.0)):
        mean = torch.stack([trainer.step(name, base[name]) for trainer in TRAINERS.values()]).double().mean(dim=0)
        torch.testing.assert_close(merged[name].double(), base[name].double() + factor * mean, atol=1e-6, rtol=0)


def test_a_pattern_that_fits_nothing_is_refused_before_a_round_opens(tmp_path: Path) -> None:
    config, _ = make_config(tmp_path, extra="[merge]\nmethod = 'ties'\ndensity = {'*.vektor' = 0.5}\n")
    with pytest.raises(ConfigError, match=r"fits no tensor; did you mean 'vector'\?"):
        Coordinator(config, tmp_path / "base", clock=time.time)


STEPS = """[outer]
name = 'nesterov'
[[merge.steps]]
method = 'dare'
density = {'vec*' = 0.5, default = 0.2}
[[merge.steps]]
method = 'elect'
[[merge.steps]]
method = 'lawa'
latest = 2
[[merge.steps]]
method = 'wise_ft'
alpha = 0.75
"""


def test_steps_with_state_over_rounds_replay_bit_for_bit(tmp_path: Path) -> None:
    _, history = run(tmp_path, 3, STEPS)
    for record in history.records:
        assert [step["method"] for step in record.merge["steps"]] == ["dare", "elect", "lawa", "wise_ft"]
        assert record.outer_state_root is not None


@pytest.mark.parametrize("method", ["dare_ties", "karcher", "tsv", "trimmed_mean"])
def test_threads_and_memory_change_no_bit_of_what_is_published(method: str, tmp_path: Path) -> None:
    digests = set()
    for index, workers in enumerate(("threads = 1", "threads = 3\nmemory_budget = '1GiB'", "memory_budget = 1")):
        _, history = run(tmp_path / f"{index}", 2, f"[merge]\nmethod = '{method}'\n{workers}\n")
        digests.add(history.records[-1].model.digest)
        assert "threads" not in str(history.records[-1].merge)
    assert len(digests) == 1


def test_what_is_published_after_each_round_is_the_average_so_far(tmp_path: Path) -> None:
    recipe = "[[merge.steps]]\nmethod = 'fedavg'\n[[merge.steps]]\nmethod = 'ema'\ndecay = 0.5\n"
    result, _ = run(tmp_path, 3, recipe)
    base, merged = Checkpoint(tmp_path / "base"), Checkpoint(result.model_dir)
    mean = torch.stack([one.step("vector", base["vector"]) for one in TRAINERS.values()]).double().mean(dim=0)
    # Every round leads on by the same step; the models 1, 2 and 3 steps away weigh 1/4, 1/2 and 1.
    expected = base["vector"].double() + mean * (1 / 4 + 2 / 2 + 3) / (1 / 4 + 1 / 2 + 1)
    torch.testing.assert_close(merged["vector"].double(), expected, atol=1e-6, rtol=0)


def test_a_coordinator_that_starts_again_goes_on_from_the_published_state(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", 3, STEPS)
    run(tmp_path / "parts", 2, STEPS)
    resumed, _ = make_config(tmp_path / "again", num_rounds=3, extra=PLAIN + STEPS)
    shutil.rmtree(tmp_path / "again")
    shutil.copytree(tmp_path / "parts", tmp_path / "again")
    result = simulate(resumed, tmp_path / "again/base", TRAINERS)
    assert result.version == whole.version
