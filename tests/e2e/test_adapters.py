"""Nodes that leave LoRA adapters, or too large a change for a random mask; and adapters merged without a federation."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedmerge.cli.app import app
from fedmerge.errors import InputError
from fedmerge.node.events import NodeEvent
from fedmerge.sim import FederationResult, simulate
from fedmerge.store.blobs import BlobStore
from fedmerge.tensors import Checkpoint
from fedmerge.training import Trainer, TrainResult, TrainTask
from fedmerge.verify import replay, verify_directory
from tests.conftest import StepTrainer, make_config
from tests.e2e.test_federation import coordinator_key


def make_model(directory: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    directory.mkdir(parents=True)
    tensors = {
        "layer.weight": torch.randn(200, 300, generator=generator),
        "layer.bias": torch.randn(200, generator=generator),
        "ids": torch.arange(5),
    }
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")


def write_adapter(directory: Path, rank: int, seed: int) -> torch.Tensor:
    """Write an adapter of the layer with rsLoRA, and return its product in fp64."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 300, generator=generator), 0.01 * torch.randn(200, rank, generator=generator)
    directory.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "use_rslora": True, "target_modules": ["layer"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.layer.lora_"
    save_file({f"{prefix}A.weight": a, f"{prefix}B.weight": b}, directory / "adapter_model.safetensors")
    return 3 / math.sqrt(rank) * b.double() @ a.double()


@dataclass
class AdapterTrainer:
    """Leaves an adapter; scores whole models alone."""

    rank: int
    seed: int
    products: list[torch.Tensor] = field(default_factory=list)
    scored: list[float] = field(default_factory=list)

    def check(self) -> None:
        """Accept anything."""

    def train(self, task: TrainTask) -> TrainResult:
        self.products.append(write_adapter(task.workspace / "tuned", self.rank, self.seed + task.round))
        return TrainResult(task.workspace / "tuned", num_examples=10)

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        norm = float(Checkpoint(model_dir)["layer.weight"].double().norm())
        self.scored.append(norm)
        return {"norm": norm}


def run_simulated(
    folder: Path, trainers: dict[str, Trainer], *, num_rounds: int, delta: str
) -> tuple[FederationResult, list[NodeEvent]]:
    config, _ = make_config(folder, num_rounds=num_rounds, extra=f"[delta]\n{delta}\n")
    events: list[NodeEvent] = []
    result = simulate(config, folder / "base", trainers, on_event=lambda name, event: events.append(event))
    _, history, checks = verify_directory(result.model_dir, coordinator_key(folder))
    assert all(check.passed for check in checks if check.name in {"signature", "files", "version", "history"})
    assert replay(history, Checkpoint(folder / "base"), BlobStore(config.federation.state / "blobs")).passed
    return result, events


@pytest.mark.parametrize(
    "delta", ["sparsify = 'lowrank'\nrank = 4\ndownlink = 'fp32'", "values = 'fp32'\ndownlink = 'fp32'"]
)
def test_the_mean_of_the_products_is_merged(tmp_path: Path, delta: str) -> None:
    make_model(tmp_path / "base")
    north, south = AdapterTrainer(2, 1), AdapterTrainer(4, 5)
    result, events = run_simulated(tmp_path, {"north": north, "south": south}, num_rounds=2, delta=delta)
    base, merged = Checkpoint(tmp_path / "base"), Checkpoint(result.model_dir)
    changes = [(a + b) / 2 for a, b in zip(north.products, south.products, strict=True)]
    expected = base["layer.weight"].double() + changes[0] + changes[1]
    torch.testing.assert_close(merged["layer.weight"].double(), expected, atol=2e-6, rtol=0)
    assert torch.equal(merged["layer.bias"], base["layer.bias"])
    # Scored whole: the base, and the fine-tune of round 1.
    own = base["layer.weight"].double() + north.products[0]
    assert north.scored[1] == pytest.approx(float(own.norm()), rel=1e-7)
    sent = {event.values["payload_bytes"] for event in events if event.kind == "encoded"}
    factor_bytes = 4 * 4 * (200 + 300)
    assert max(sent) < factor_bytes + 1500 if "lowrank" in delta else min(sent) > 20 * factor_bytes
    outbox = next((tmp_path / "nodes/north/rounds").glob("0001-*"))
    kept = {path.name for path in outbox.iterdir()}
    assert kept == {"delta.safetensors", "statement.json", "receipt.json", "metrics.json"}


def test_a_change_too_large_for_a_mask_travels_dense_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_model(tmp_path / "base")
    trainers: dict[str, Trainer] = {"north": _Step(1, scale=0.001), "south": _Step(2, scale=0.05)}
    plan = "sparsify = 'seeded'\ndensity = 0.01\nvalues = 'lloyd2'\nblock_size = 64"
    _, events = run_simulated(tmp_path, trainers, num_rounds=1, delta=plan)
    encodings = [event.values["encodings"] for event in events if event.kind == "encoded"]
    assert encodings == [{"lloyd2": 1, "seeded+lloyd2": 1}, {"lloyd2": 1, "lloyd3": 1}]
    notes = [note for event in events if event.kind == "encoded" for note in event.values["notes"]]
    base = Checkpoint(tmp_path / "base")["layer.weight"]
    ratio = float(_Step(2, scale=0.05).step("layer.weight", base).norm() / base.norm()) * math.sqrt(99)
    assert notes == [
        f"1 tensors travel dense as lloyd3: a mask of density 0.01 would add noise of up to {ratio:.3g} times the "
        "weights (layer.weight), above 0.1"
    ]
    assert f"round 1: {notes[0]}" in caplog.text


class _Step(StepTrainer):
    def evaluate(self, model_dir: Path) -> dict[str, float]:
        return {}


def test_merge_and_diff_take_adapters_beside_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(tmp_path / "base")
    base = Checkpoint(tmp_path / "base")
    product = write_adapter(tmp_path / "adapter", 3, seed=7)
    (tmp_path / "model").mkdir()
    save_file({**base, "layer.bias": base["layer.bias"] + 1}, tmp_path / "model/model.safetensors")
    monkeypatch.chdir(tmp_path)
    arguments = "merge adapter model --base base --out merged --weights 0.5,2"
    app(arguments.split(), exit_on_error=False, result_action="return_value")
    merged = Checkpoint(tmp_path / "merged")
    expected = base["layer.weight"].double() + 0.5 * product
    torch.testing.assert_close(merged["layer.weight"].double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(merged["layer.bias"], base["layer.bias"] + 2)
    capsys.readouterr()
    app(["diff", "adapter", "model", "--base", "base", "--json"], exit_on_error=False, result_action="return_value")
    found = json.loads(capsys.readouterr().out)
    assert found["models"][0]["norm"] == pytest.approx(float(product.norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("delta", "encoding", "bounds"),
    [
        ("sparsify = 'lowrank'\nrank = 4", "lowrank2+fp32", (0, 1e-7)),
        ("values = 'int8'", "int8", (1e-3, 0.02)),
        ("sparsify = 'seeded'\ndensity = 0.5\n[merge]\nseed = 7", "seeded+int8", (0.9, 1.1)),
    ],
)
def test_inspect_measures_what_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], delta: str, encoding: str, bounds: tuple[float, float]
) -> None:
    make_model(tmp_path / "base")
    trainers: dict[str, Trainer] = {"north": AdapterTrainer(2, 1), "south": AdapterTrainer(2, 9)}
    run_simulated(tmp_path, trainers, num_rounds=1, delta=delta)
    write_adapter(tmp_path / "tuned", 2, seed=2)  # north's, of round 1
    payload = next((tmp_path / "nodes/north/rounds").glob("0001-*")) / "delta.safetensors"
    command = ["inspect", str(payload), "--base", str(tmp_path / "base"), "--tuned", str(tmp_path / "tuned")]
    app([*command, "--seed", "7", "--json"], exit_on_error=False, result_action="return_value")
    found = json.loads(capsys.readouterr().out)
    row = next(row for row in found["tensors"] if row["name"] == "layer.weight")
    assert row["encoding"] == encoding
    assert row["bits_per_parameter"] == 8 * row["coded_bytes"] / (200 * 300)
    assert bounds[0] <= row["relative_error"] <= bounds[1]
    assert found["totals"]["relative_error"] == pytest.approx(row["relative_error"])  # the rest did not change
    assert next(row for row in found["tensors"] if row["name"] == "layer.bias")["relative_error"] == 0
    app([*command, "--seed", "7"], exit_on_error=False, result_action="return_value")
    shown = capsys.readouterr().out
    assert all(text in shown for text in (encoding, "200 x 300", "bits/param", "rel. error"))
    if "seeded" in encoding:
        app([*command, "--json"], exit_on_error=False, result_action="return_value")
        found = json.loads(capsys.readouterr().out)
        assert 1.2 < found["totals"]["relative_error"] < 2  # another mask: the sum of both, not the difference
        payload.with_name("statement.json").unlink()
        with pytest.raises(InputError, match=r"no statement\.json beside it"):
            app([*command, "--json"], exit_on_error=False, result_action="return_value")
