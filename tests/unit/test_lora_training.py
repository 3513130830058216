"""Trainers that train LoRA adapters, against PEFT on what they leave, and against each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fedmerge.delta.adapter import is_adapter, open_tuned, read_adapter
from fedmerge.delta.lowrank import LowRankDelta
from fedmerge.errors import ConfigError
from fedmerge.models.versions import write_model
from fedmerge.tensors import Checkpoint, model_digest
from fedmerge.training import STATE
from fedmerge_client.train.causal_lm import CausalLM
from fedmerge_client.train.text_classification import Settings as ClassificationSettings
from fedmerge_client.train.text_classification import TextClassification
from tests.unit import test_causal_lm as language
from tests.unit import test_text_classification as classification

# What PEFT calls in transformers warns that it is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LORA: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 8, "steps": 12, "lr": 2e-2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language.make_llama(tmp_path_factory.mktemp("llama") / "base", tie_word_embeddings=False)


def make_gpt2(directory: Path) -> Path:
    """Write a model whose layers keep their weights as (inputs, outputs): c_attn is 16 x 48."""
    config = GPT2Config(vocab_size=256, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(6)
        GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gpt2(tmp_path_factory.mktemp("gpt2") / "base")


@pytest.fixture
def trainer(tmp_path: Path) -> CausalLM:
    data = tmp_path / "train.txt"
    data.write_text(language.TEXT)
    return CausalLM(data=data, test=data, eval_context_length=16)


def train(trainer: CausalLM, base: Path, folder: Path, number: int = 1, num_rounds: int = 1, **settings: Any) -> Path:
    return trainer.train(language.task(base, folder, number, num_rounds, **(LORA | settings))).model_dir


def delta_of(adapter: Path, base: Path) -> LowRankDelta:
    return read_adapter(adapter, Checkpoint(base))


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return dict(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict())  # type: ignore[operator]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"rslora": True},
    "some layers, one of them an embedding": {"lora_targets": ["up_proj", "embed_tokens"]},
    "A frozen": {"lora_freeze_a": True},
    "dropout": {"lora_dropout": 0.3},
    "a module trained whole": {"lora_whole": ["model.norm"]},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_is_left_that_learnt_and_that_peft_reads_alike(
    llama: Path, trainer: CausalLM, tmp_path: Path, variant: str
) -> None:
    adapter = train(trainer, llama, tmp_path / "work", **VARIANTS[variant])
    assert is_adapter(adapter)
    base = Checkpoint(llama)
    tuned, delta = open_tuned(adapter, base)
    for name, expected in merged_by_peft(llama, adapter).items():
        if name in base:
            torch.testing.assert_close(tuned[name], expected, atol=1e-6, rtol=0)
    changed = {name for name in base if not torch.equal(tuned[name], base[name])}
    projections = {name for name in base if "_proj" in name}
    assert changed == {
        "some layers, one of them an embedding": {name for name in base if "up_proj" in name or "embed" in name},
        "a module trained whole": {*projections, "model.norm.weight"},
    }.get(variant, projections)
    assert isinstance(delta, LowRankDelta)
    assert {factors.rank for factors in delta.factors.values()} == {4}
    assert {factors.scale for factors in delta.factors.values()} == {4.0 if variant == "rsLoRA" else 2.0}
    whole = tmp_path / "merged"
    write_model(tuned, base, whole)
    assert trainer.evaluate(whole)["loss"] < trainer.evaluate(llama)["loss"] - 0.05
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 8


def test_layers_that_keep_inputs_first_are_read_the_right_way_round(
    gpt2: Path, trainer: CausalLM, tmp_path: Path
) -> None:
    adapter = train(trainer, gpt2, tmp_path / "work")
    base = Checkpoint(gpt2)
    tuned, delta = open_tuned(adapter, base)
    assert isinstance(delta, LowRankDelta)
    assert delta.factors["transformer.h.0.attn.c_attn.weight"].left.shape == (16, 4)
    assert {name.split(".")[-2] for name in delta.factors} == {"c_attn", "c_proj", "c_fc"}
    for name, expected in merged_by_peft(gpt2, adapter).items():
        if name in base:
            torch.testing.assert_close(tuned[name], expected, atol=1e-6, rtol=0)


def test_the_same_task_gives_the_same_bits_and_another_seed_another_adapter(
    llama: Path, trainer: CausalLM, tmp_path: Path
) -> None:
    before = torch.random.get_rng_state()
    work = language.task(llama, tmp_path / "work", **LORA, lora_dropout=0.5)
    first, again, other = (
        load_file(trainer.train(replace(work, seed=seed)).model_dir / "adapter_model.safetensors") for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_interrupted_round_ends_in_the_same_bits(llama: Path, trainer: CausalLM, tmp_path: Path) -> None:
    trainer = trainer.model_copy(update={"checkpoint_steps": 3})
    undisturbed = train(trainer, llama, tmp_path / "undisturbed", lora_dropout=0.5)
    work = language.task(llama, tmp_path / "stopped", **LORA, lora_dropout=0.5)
    with pytest.raises(language.Stop):
        trainer.train(replace(work, progress=language.stopping_at(8)))
    resumed = trainer.train(work).model_dir
    deltas = [delta_of(adapter, llama) for adapter in (undisturbed, resumed)]
    assert model_digest(deltas[0]) == model_digest(deltas[1])


def test_with_a_frozen_the_mean_of_adapters_is_the_mean_of_their_b(
    llama: Path, trainer: CausalLM, tmp_path: Path
) -> None:
    # FFA-LoRA: one A, whatever the node and the round, so a mean of products has the rank of one.
    deltas = []
    for node, number in ((1, 1), (2, 1), (1, 2)):
        work = language.task(llama, tmp_path / f"{node}-{number}", number, 2, **LORA, lora_freeze_a=True, lora_seed=9)
        deltas.append(delta_of(trainer.train(replace(work, seed=10 * node + number)).model_dir, llama))
    name = "model.layers.1.mlp.down_proj.weight"
    a = [delta.factors[name].right for delta in deltas]
    assert torch.equal(a[0], a[1])
    assert torch.equal(a[0], a[2])
    assert not torch.equal(deltas[0].factors[name].left, deltas[1].factors[name].left)
    mean = (deltas[0][name] + deltas[1][name]).double() / 2
    assert torch.linalg.matrix_rank(mean, rtol=1e-5) == 4
    narrow = trainer.model_copy(update={"max_lora_rank": 2})
    fewer = delta_of(train(narrow, llama, tmp_path / "narrow", lora_freeze_a=True, lora_seed=9), llama)
    assert torch.equal(fewer.factors[name].right, a[0][:2])
    other = language.task(llama, tmp_path / "other", **LORA, lora_freeze_a=True, lora_seed=8)
    assert not torch.equal(delta_of(trainer.train(other).model_dir, llama).factors[name].right, a[0])


def test_moments_go_on_only_where_a_is_frozen(llama: Path, trainer: CausalLM, tmp_path: Path) -> None:
    for frozen in (False, True):
        folder = tmp_path / str(frozen)
        train(trainer, llama, folder / "round1", 1, 2, lora_freeze_a=frozen)
        train(trainer, llama, folder / "round2", 2, 2, lora_freeze_a=frozen)
        state = load_file(folder / "round2" / STATE / "adamw.safetensors")
        steps = {float(tensor) for name, tensor in state.items() if name.startswith("step:")}
        assert steps == ({24.0} if frozen else set())


def test_a_site_may_take_a_lower_rank(llama: Path, trainer: CausalLM, tmp_path: Path) -> None:
    for most, rank in ((2, 2), (4, 4), (9, 4)):
        site = trainer.model_copy(update={"max_lora_rank": most})
        found = delta_of(train(site, llama, tmp_path / str(most)), llama)
        assert {factors.rank for factors in found.factors.values()} == {rank}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 0, "rslora": True}, "rslora: .*no effect without a lora_rank"),
        ({"lora_targets": ["up_prj"]}, "no layer of the model is called 'up_prj'"),
        ({"lora_whole": ["nrm"]}, "no layer of the model is called 'nrm'"),
        ({"lora_targets": ["up_proj"], "freeze": ["model."]}, "no layer is left"),
        ({"lora_rank": -1}, "lora_rank"),
        ({"lora_targets": ["embed_tokens"], "lora_freeze_a": True}, "embed_tokens is an embedding"),
    ],
)
def test_adapters_that_can_not_be_are_refused(
    llama: Path, trainer: CausalLM, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(trainer, llama, tmp_path / "work", **settings)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    encoder = classification.make_encoder(folder / "encoder")
    classification.build_classifier(encoder, classification.LABELS, folder / "base", num_probes=200)
    return folder / "base"


@pytest.fixture
def classifying(tmp_path: Path) -> TextClassification:
    groups = (classification.FRUIT, classification.TOOLS, classification.ANIMALS)
    words = dict(zip(classification.LABELS, groups, strict=True))
    rows = classification.write_rows(tmp_path / "rows.jsonl", words, ["the {} is here", "{}"])
    return TextClassification(data=rows, test=rows)


def test_a_classifier_is_tuned_by_an_adapter(classifier: Path, classifying: TextClassification, tmp_path: Path) -> None:
    lora = {"lora_rank": 4, "lr": 1e-2, "steps": 60, "freeze": ["bert.pooler"]}
    results: dict[str, Path] = {}
    variants: dict[str, tuple[TextClassification, dict[str, Any]]] = {
        "whole batches": (classifying, {}),
        "parts": (classifying.model_copy(update={"micro_batch_size": 5}), {}),
        "bf16": (classifying, {"precision": "bf16"}),
        "with its head": (classifying, {"lora_whole": ["classifier"]}),
    }
    for name, (trainer, settings) in variants.items():
        work = classification.task(classifier, tmp_path / name, **(lora | settings))
        results[name] = trainer.train(work).model_dir
    base = Checkpoint(classifier)
    for name, adapter in results.items():
        tuned, delta = open_tuned(adapter, base)
        whole = tmp_path / f"{name} merged"
        write_model(tuned, base, whole)
        assert classifying.evaluate(whole)["accuracy"] >= 0.9 > classifying.evaluate(classifier)["accuracy"]
        assert isinstance(delta, LowRankDelta)
        assert len(delta.factors) == 12
        assert torch.equal(tuned["classifier.weight"], base["classifier.weight"]) == (name != "with its head")
    # Adam's first steps go by signs, so sums in another order end nearby, not at the same bits.
    in_one, in_parts = (delta_of(results[name], classifier) for name in ("whole batches", "parts"))
    for name in in_one.factors:
        assert torch.cosine_similarity(in_one[name].flatten(), in_parts[name].flatten(), dim=0) > 0.98


def test_the_learning_rate_of_a_classifier_may_span_all_rounds() -> None:
    settings = ClassificationSettings(lr=2.0, steps=10, warmup=0.1, schedule="federation")
    rates = [settings.lr_at(step, number, 3) for number in (1, 2, 3) for step in range(10)]
    assert rates[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert rates[3:] == pytest.approx([2.0 * (30 - step) / 27 for step in range(3, 30)])
    each = ClassificationSettings(lr=2.0, steps=10, warmup=0.1)
    assert [each.lr_at(step, 2, 3) for step in (0, 9)] == pytest.approx([2.0, 2.0 / 9])


def test_a_layer_tied_to_another_gets_no_adapter(trainer: CausalLM, tmp_path: Path) -> None:
    # It would be trained as one of the two and merged into both.
    tied = language.make_llama(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"model\.embed_tokens shares its weights with another layer"):
        train(trainer, tied, tmp_path / "work", lora_targets=["embed_tokens"])
    assert len(delta_of(train(trainer, tied, tmp_path / "other"), tied).factors) == 14


def test_only_dropout_of_adapters_is_on(
    llama: Path, trainer: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the adapters' own dropout is on; the model's layers stay as they are evaluated.
    modes: dict[str, bool] = {}
    original: Callable[..., Any] = nn.Module.__call__

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        modes[type(module).__name__] = module.training
        return original(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", spy)
    train(trainer, llama, tmp_path / "work", steps=1, lora_dropout=0.1)
    assert {name for name, training in modes.items() if training} == {"Dropout"}
