"""Scripts of a partner's own: one whose Hugging Face Trainer has our callback, and one that knows nothing of us."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from fedmerge.coordinator.report import read_report
from fedmerge.errors import ConfigError, InputError, UntrustedKey
from fedmerge.tensors import Checkpoint
from fedmerge.trust.sign import SigningKey
from fedmerge.verify import verify_directory
from fedmerge_client.callback import FedMergeCallback
from tests.conftest import Federation, make_federation
from tests.e2e.test_federation import coordinator_key
from tests.unit.test_causal_lm import make_llama

APPS = Path(__file__).parents[2] / "clients/apps"
SCRIPT, ORDINARY = APPS / "trainer/finetune.py", APPS / "command/finetune.py"
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning"),
]


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    made = make_federation(
        tmp_path,
        ("site",),
        num_rounds=2,
        min_nodes=1,
        rounds="grace_s = 0",
        extra="[delta]\nvalues = 'fp32'\ndownlink = 'fp32'",
    )
    (tmp_path / "base").rename(tmp_path / "other")
    make_llama(tmp_path / "base")
    (tmp_path / "data.txt").write_text("the cat sat on the mat. " * 40)
    made.keys["site"].save(tmp_path / "home/node.key")
    return made


@pytest.mark.slow
def test_a_script_of_ones_own_trains_in_every_round(federation: Federation) -> None:
    folder, server = federation.folder, federation.serve()
    words = [folder / "base", folder / "data.txt", server.address, server.bundle, folder / "home"]
    try:
        done = subprocess.run(
            [sys.executable, SCRIPT, *words],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.split("\n")
    assert [line for line in lines if line.startswith("round ")] == ["round 1 trained", "round 2 trained"]
    final, base = Checkpoint(Path(lines[-2])), Checkpoint(folder / "base")
    _, history, _ = verify_directory(folder / "state/models/round-0002", coordinator_key(folder))
    published = Checkpoint(folder / "state/models/round-0002")
    assert all(torch.equal(final[name], published[name]) for name in published)
    assert not any(torch.equal(final[name], base[name]) for name in base)
    statements = list(history.deltas.values())
    assert [statement.num_examples for statement in statements] == [60, 60]
    losses = [statement.metrics["loss"] for statement in statements]
    assert losses[1] < losses[0] - 0.3  # it went on from where the first round ended


def test_a_script_that_knows_nothing_of_federations(federation: Federation) -> None:
    assert "fedmerge" not in ORDINARY.read_text()
    folder, config = federation.folder, federation.config_path
    plan = config.read_text().replace('"text-classification"', '"command"')
    config.write_text(plan.replace("num_rounds = 2", "num_rounds = 1"))
    server, script = federation.serve(), f"exec {sys.executable} {ORDINARY}"
    command = f"sh -c '{script} train $FEDMERGE_MODEL data.txt $FEDMERGE_OUTPUT --steps 8 --window 16 --seed 3'"
    options = [f"command={command}", f"folder={folder}", "num_examples=60"]
    words = ["join", "--coordinator", server.address, "--trust", server.bundle, "--home", folder / "home", "--json"]
    words += ["--trainer", "command", *(word for option in options for word in ("--option", option))]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fedmerge", *map(str, words)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr[-3000:]
    final = Checkpoint(Path(json.loads(done.stdout)["model_dir"]))

    by_hand = runpy.run_path(str(ORDINARY))
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    rows = by_hand["windows"](folder / "data.txt", 16)
    by_hand["train"](model, rows, Namespace(steps=8, lr=1e-3, batch=8, seed=3, out=folder / "tuned"))
    expected = Checkpoint(folder / "tuned")
    for name in final:
        torch.testing.assert_close(final[name], expected[name], atol=1e-6, rtol=0)
    assert not any(torch.equal(final[name], tensor) for name, tensor in Checkpoint(folder / "base").items())


def trainer_of(folder: Path, callback: FedMergeCallback, base: Path, model: Any = None) -> Trainer:
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    model = model or AutoModelForCausalLM.from_pretrained(base)
    return Trainer(model, arguments, train_dataset=rows, callbacks=[callback])


def test_of_a_model_wrapped_by_peft_the_adapter_is_sent(tmp_path: Path) -> None:
    made = make_federation(
        tmp_path,
        ("site",),
        min_nodes=1,
        rounds="grace_s = 0",
        extra="[delta]\nsparsify = 'lowrank'\nrank = 3\ndownlink = 'fp32'",
    )
    (tmp_path / "base").rename(tmp_path / "other")
    base = make_llama(tmp_path / "base")
    made.keys["site"].save(tmp_path / "home/node.key")
    server = made.serve()
    try:
        callback = FedMergeCallback(
            server.address,
            server.bundle,
            tmp_path / "home",
            num_examples=5,
            evaluate=lambda model_dir: {"norm": float(Checkpoint(model_dir)["lm_head.weight"].norm())},
        )
        trainer = trainer_of(tmp_path, callback, base)
        adapted: Any = get_peft_model(trainer.model, LoraConfig(r=3, target_modules=["up_proj", "v_proj"]))
        with torch.no_grad():  # what it begins with is not what it is given
            adapted.get_parameter("base_model.model.lm_head.weight").zero_()
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(1.0)
        trainer = trainer_of(tmp_path, callback, base, adapted)
        assert [trainer.train().global_step for _ in callback.rounds()] == [1]
    finally:
        server.stop()
    assert callback.model_dir is not None
    final, before = Checkpoint(callback.model_dir), Checkpoint(base)
    merged = adapted.merge_and_unload().state_dict()
    for name in final:
        torch.testing.assert_close(final[name], merged[name], atol=1e-6, rtol=0)
    changed = {name for name in final if not torch.equal(final[name], before[name])}
    assert changed == {name for name in final if "up_proj" in name or "v_proj" in name}
    assert float((final["model.layers.0.mlp.up_proj.weight"] - before["model.layers.0.mlp.up_proj.weight"]).norm()) < 1
    said = read_report(made.config, "norm").retention
    assert said is not None
    norm = float(before["lm_head.weight"].norm())
    assert [said.tasks[0].base, *said.tasks[0].own, *said.tasks[0].merged] == pytest.approx([norm] * 3)
    payload = next((tmp_path / "home/rounds").glob("*/delta.safetensors"))
    assert payload.stat().st_size < 20_000


class Noting(Dataset[dict[str, torch.Tensor]]):
    """Examples, and which of them were asked for."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        self.taken.append(number)
        return {"input_ids": torch.arange(8), "labels": torch.arange(8)}


def test_every_round_has_batches_of_its_own(federation: Federation, tmp_path: Path) -> None:
    server = federation.serve()
    try:
        callback, data = FedMergeCallback(server.address, server.bundle, tmp_path / "home"), Noting()
        trainer = trainer_of(tmp_path, callback, tmp_path / "base")
        trainer.train_dataset = data
        rounds = []
        for _ in callback.rounds():
            trainer.train()
            rounds.append(data.taken[:8])
            data.taken.clear()
    finally:
        server.stop()
    assert [len(set(taken)) for taken in rounds] == [8, 8]
    assert len({*rounds[0], *rounds[1]}) > 12


def test_what_stops_the_node_stops_the_script(federation: Federation, tmp_path: Path) -> None:
    server = federation.serve()
    try:
        stranger = FedMergeCallback(server.address, server.bundle, tmp_path / "stranger")
        with pytest.raises(UntrustedKey):
            trainer_of(tmp_path, stranger, tmp_path / "base").train()
        callback = FedMergeCallback(server.address, server.bundle, tmp_path / "home")
        with pytest.raises(ConfigError, match=r"round 1: nothing was trained"):
            list(callback.rounds())
        wider = make_llama(tmp_path / "wider", intermediate_size=48)
        with pytest.raises(InputError, match=r"none of that shape"):
            trainer_of(tmp_path, callback, wider).train()
    finally:
        server.stop()


def test_keys_are_made_where_there_are_none(tmp_path: Path) -> None:
    callback = FedMergeCallback("127.0.0.1:1", tmp_path / "missing.pem", tmp_path / "new")
    with pytest.raises(InputError, match=r"missing\.pem"):
        next(callback.rounds())
    assert len(SigningKey.load(tmp_path / "new/node.key").public.key_id) == 64
