"""Federations that train adapters: what is published, as a model for transformers and as an adapter for PEFT."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedmerge.config import load_config
from fedmerge.delta.adapter import open_tuned, read_adapter
from fedmerge.errors import DigestMismatch, RoundFailed, VerificationError
from fedmerge.sim import FederationResult, simulate
from fedmerge.store.blobs import BlobStore
from fedmerge.tensors import Checkpoint
from fedmerge.training import Trainer, TrainResult, TrainTask
from fedmerge.verify import replay, verify_directory
from fedmerge_client.train.causal_lm import CausalLM
from tests.conftest import make_config
from tests.e2e.test_federation import coordinator_key
from tests.unit.test_causal_lm import make_llama
from tests.unit.test_lora_training import make_gpt2

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PLAN = """
[train]
trainer = "causal-lm"
steps = 6
batch_size = 4
context_length = 16
lr = 2e-2
num_threads = 1
lora_rank = 4
{train}
[delta]
codec = "auto"
downlink = "fp32"
[publish]
adapter_rank = {rank}
"""


class Keeping:
    """A trainer that keeps the adapters of `inner`, each with the model that it is of."""

    def __init__(self, inner: CausalLM, folder: Path) -> None:
        self.inner, self.folder = inner, folder
        self.adapters: list[tuple[Path, Path]] = []

    def check(self) -> None:
        self.inner.check()

    def train(self, task: TrainTask) -> TrainResult:
        result = self.inner.train(task)
        kept = self.folder / f"round-{task.round}"
        shutil.copytree(result.model_dir, kept / "adapter")
        shutil.copytree(task.model_dir, kept / "model")
        self.adapters.append((kept / "model", kept / "adapter"))
        return result

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        return self.inner.evaluate(model_dir)


def federate(
    folder: Path, base: Path, *, rank: int, train: str = "", num_rounds: int = 2, south_rank: int = 2
) -> tuple[FederationResult, list[Keeping]]:
    base.rename(folder / "base")
    nodes = []
    for name, most, text in (("north", 0, "the cat sat on the mat. "), ("south", south_rank, "a dog ran in the fog; ")):
        (folder / f"{name}.txt").write_text(text * 30)
        nodes.append(Keeping(CausalLM(data=folder / f"{name}.txt", max_lora_rank=most), folder / name))
    trainers: dict[str, Trainer] = dict(zip(("north", "south"), nodes, strict=True))
    text = PLAN.format(train=train, rank=rank)
    _, path = make_config(folder, num_rounds=num_rounds)
    path.write_text(path.read_text().partition("[train]")[0] + text)
    return simulate(load_config(path, environ={}), folder / "base", trainers), nodes


def state_dict(model: Any) -> dict[str, Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_published_adapter_is_the_published_model(tmp_path: Path, kind: str) -> None:
    make = {"llama": make_llama, "gpt2": make_gpt2}[kind]
    result, nodes = federate(tmp_path, make(tmp_path / "made"), rank=12, train="rslora = true\nlora_alpha = 4")
    base, merged = Checkpoint(tmp_path / "base"), Checkpoint(result.model_dir)
    # Exact in product space: each round adds the mean of both nodes' products, of ranks 4 and 2, by their examples.
    expected = {name: base[name].double().clone() for name in base}
    for number in range(2):
        deltas = [
            read_adapter(adapter, Checkpoint(model)) for model, adapter in (one.adapters[number] for one in nodes)
        ]
        assert [next(iter(delta.factors.values())).rank for delta in deltas] == [4, 2]
        weights = [len((tmp_path / f"{name}.txt").read_text()) // 16 for name in ("north", "south")]
        for name, tensor in expected.items():
            for delta, weight in zip(deltas, weights, strict=True):
                tensor.add_(delta[name].double(), alpha=weight / sum(weights))
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name].double(), tensor, atol=1e-5, rtol=0)

    whole: Any = AutoModelForCausalLM.from_pretrained(result.model_dir).eval()
    adapted: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(result.model_dir / "adapter")
    ).eval()
    tokens = torch.arange(24)[None]
    with torch.inference_mode():
        torch.testing.assert_close(adapted(tokens).logits, whole(tokens).logits, atol=1e-4, rtol=0)
    taken = state_dict(adapted.merge_and_unload())
    for name, tensor in state_dict(whole).items():
        torch.testing.assert_close(taken[name], tensor, atol=1e-5, rtol=0)
    assert re.search(r"of rank 12: it keeps 100\.0000%", (result.model_dir / "README.md").read_text())

    key = coordinator_key(tmp_path)
    _, history, checks = verify_directory(result.model_dir, key)
    assert all(check.passed for check in checks if check.name in {"signature", "files", "version", "history"})
    assert replay(history, base, BlobStore(tmp_path / "state/blobs")).passed
    config = result.model_dir / "adapter/adapter_config.json"
    kept = config.read_text()
    config.write_text(kept.replace("somebody", "x") + " ")
    with pytest.raises(DigestMismatch, match=r"adapter_config\.json: was changed"):
        verify_directory(result.model_dir, key)
    config.write_text(kept)
    (result.model_dir / "adapter/more").mkdir()
    with pytest.raises(VerificationError, match="only plain files"):
        verify_directory(result.model_dir, key)


def test_a_lower_rank_keeps_what_its_card_says(tmp_path: Path) -> None:
    result, _ = federate(tmp_path, make_llama(tmp_path / "made"), rank=2, num_rounds=1)
    base, merged = Checkpoint(tmp_path / "base"), Checkpoint(result.model_dir)
    _, delta = open_tuned(result.model_dir / "adapter", base)
    kept = total = 0.0
    for name in base:
        change = merged[name].double() - base[name].double()
        total += float(change.square().sum())
        kept += float(change.square().sum() - (change - delta[name].double()).square().sum())
    card = (result.model_dir / "README.md").read_text()
    told = re.search(r"of rank 2: it keeps (\d+\.\d+)%", card)
    assert told is not None
    assert float(told[1]) == pytest.approx(100 * kept / total, abs=0.01)
    assert 10 < float(told[1]) < 99.9


def test_with_a_frozen_an_adapter_of_one_rank_holds_all_nodes_and_rounds(tmp_path: Path) -> None:
    result, _ = federate(tmp_path, make_llama(tmp_path / "made"), rank=4, train="lora_freeze_a = true")
    assert "of rank 4: it keeps 100.0000%" in (result.model_dir / "README.md").read_text()


def test_factors_are_averaged_by_that_name_with_a_caution(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = '[merge]\nmethod = "factor_average"'
    result, nodes = federate(tmp_path, make_llama(tmp_path / "made"), rank=12, train=train, num_rounds=1, south_rank=4)
    assert [one.message for one in caplog.records if "is not the mean of the adapters" in one.message] == [
        "factor_average multiplies the means of adapters' factors, which is not the mean of the adapters unless A is "
        'frozen (lora_freeze_a); method = "fedavg" is exact'
    ]
    base, merged = Checkpoint(tmp_path / "base"), Checkpoint(result.model_dir)
    deltas = [read_adapter(one.adapters[0][1], Checkpoint(one.adapters[0][0])) for one in nodes]
    sizes = [len((tmp_path / f"{name}.txt").read_text()) // 16 for name in ("north", "south")]
    shares = [size / sum(sizes) for size in sizes]
    for name in deltas[0].factors:
        own = [delta.factors[name] for delta in deltas]
        left, right = (
            sum(share * getattr(one, side).double() for share, one in zip(shares, own, strict=True))
            for side in ("left", "right")
        )
        torch.testing.assert_close(merged[name].double(), base[name] + own[0].scale * left @ right, atol=1e-6, rtol=0)
        exact = sum(share * delta[name].double() for share, delta in zip(shares, deltas, strict=True))
        assert float((merged[name] - base[name] - exact).norm()) > 0.1 * float(exact.norm())
    _, history, _ = verify_directory(result.model_dir, coordinator_key(tmp_path))
    assert replay(history, base, BlobStore(tmp_path / "state/blobs")).passed


def test_factors_of_several_ranks_have_no_average(tmp_path: Path) -> None:
    train = '[merge]\nmethod = "factor_average"'
    with pytest.raises(RoundFailed, match="several ranks or scales have no mean"):
        federate(tmp_path, make_llama(tmp_path / "made"), rank=12, train=train, num_rounds=1)
