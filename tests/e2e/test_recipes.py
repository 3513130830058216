"""Federations whose recipe is more than a method's name: what is signed, published and replayed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmerge.coordinator import Coordinator
from fedmerge.errors import ConfigError
from fedmerge.sign import SigningKey
from fedmerge.sim import FederationResult, simulate
from fedmerge.store.blobs import BlobStore
from fedmerge.tensors import Checkpoint
from fedmerge.verify import History, replay, verify_directory
from tests.conftest import StepTrainer, make_config

TRAINERS = {"north": StepTrainer(1, num_examples=10), "south": StepTrainer(2, num_examples=30)}
PLAIN = "[delta]\nvalues = 'fp32'\n[screen]\nweighting = 'equal'\n"


def run(folder: Path, num_rounds: int, recipe: str) -> tuple[FederationResult, History]:
    """Run a federation to its end, and check and replay what it published."""
    config, _ = make_config(folder, num_rounds=num_rounds, extra=PLAIN + recipe)
    result = simulate(config, folder / "base", TRAINERS, clock=time.time)
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
