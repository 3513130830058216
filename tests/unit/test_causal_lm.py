from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedmerge.errors import ConfigError, InputError
from fedmerge.merge.statistics import STATISTICS, side_tensors, statistics_schema
from fedmerge.tensors import Checkpoint, model_digest, schema_of
from fedmerge.training import STATE, TrainTask, load_trainer
from fedmerge_client.train.causal_lm import CausalLM, Settings
from fedmerge_client.train.token_stream import shuffled, token_stream

TEXT = "the cat sat on the mat; the dog sat on the log. " * 40
SETTINGS: dict[str, Any] = {"steps": 4, "batch_size": 4, "context_length": 16, "lr": 5e-3, "num_threads": 1}


def make_llama(directory: Path, *, vocab_size: int = 256, **settings: Any) -> Path:
    """Write a Llama of two layers of 16, random but the same each time."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 32, **settings}
    config = LlamaConfig(vocab_size=vocab_size, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model") / "base", tie_word_embeddings=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.txt"
    path.write_text(TEXT)
    return path


def task(model_dir: Path, workspace: Path, number: int = 1, num_rounds: int = 1, **settings: Any) -> TrainTask:
    workspace.mkdir(exist_ok=True, parents=True)
    previous = workspace.parent / f"round{number - 1}" / STATE
    return TrainTask(
        model_dir,
        SETTINGS | settings,
        number,
        seed=number,  # a node's seed differs from round to round
        workspace=workspace,
        num_rounds=num_rounds,
        previous_state=previous if previous.exists() else None,
    )


def train_rounds(trainer: CausalLM, base: Path, folder: Path, num_rounds: int, **settings: Any) -> Path:
    """Train round after round, each from where the last one ended, and return the last model."""
    model_dir = base
    for number in range(1, num_rounds + 1):
        work = task(model_dir, folder / f"round{number}", number, num_rounds, **settings)
        model_dir = trainer.train(work).model_dir
    return model_dir


def test_training_learns_and_evaluate_agrees_with_transformers(base: Path, data: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    documents = ["the dog sat on the mat.", "on the log the cat sat; " * 4, "é"]
    test.write_text("".join(json.dumps({"body": text}) + "\n" for text in documents))
    trainer = CausalLM(data=data, test=test, text_column="body", eval_context_length=24)
    trainer.check()
    digest = model_digest(Checkpoint(base))
    before = trainer.evaluate(base)
    seen: list[tuple[int, int, float]] = []
    work = task(base, tmp_path / "work", steps=40)
    result = trainer.train(
        TrainTask(base, work.settings, 1, 3, work.workspace, lambda step, steps, loss: seen.append((step, steps, loss)))
    )
    after = trainer.evaluate(result.model_dir)
    assert [(step, steps) for step, steps, _ in seen] == [(step, 40) for step in range(1, 41)]
    assert result.metrics["loss"] == pytest.approx(sum(loss for *_, loss in seen[-4:]) / 4)
    assert result.num_examples == len(TEXT) // 16
    assert before["loss"] == pytest.approx(math.log(256), abs=0.3)
    assert after["loss"] < before["loss"] - 1
    assert schema_of(Checkpoint(result.model_dir)) == schema_of(Checkpoint(base))
    assert model_digest(Checkpoint(base)) == digest

    # The same number from transformers alone: windows of 24 bytes, each of which is told the byte before it.
    model: Any = AutoModelForCausalLM.from_pretrained(result.model_dir).eval()
    stream = b"".join(b"\n" + text.encode() for text in documents)
    total = 0.0
    for start in range(0, len(stream) - 1, 24):
        window = torch.tensor([list(stream[start : start + 25])])
        with torch.inference_mode():
            logits = model(input_ids=window[:, :-1]).logits[0]
        total += float(cross_entropy(logits, window[0, 1:], reduction="sum"))
    assert after["loss"] == pytest.approx(total / (len(stream) - 1), rel=1e-5)
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))
    assert after["byte_loss"] == pytest.approx(total / (len(stream) - 3), rel=1e-5)


def test_rounds_without_a_merge_are_one_training(base: Path, data: Path, tmp_path: Path) -> None:
    # AdamW's moments, the place in the data and the learning rate go on as if there were no rounds.
    trainer = CausalLM(data=data)
    in_one = train_rounds(trainer, base, tmp_path / "one", 1, steps=12)
    in_three = train_rounds(trainer, base, tmp_path / "three", 3, steps=4)
    assert model_digest(Checkpoint(in_three)) == model_digest(Checkpoint(in_one))
    states = [
        load_file(folder / STATE / "adamw.safetensors")
        for folder in (tmp_path / "one/round1", tmp_path / "three/round3")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert float(states[0]["step:model.norm.weight"]) == 12


def test_a_round_in_two_parts_is_that_round(base: Path, data: Path, tmp_path: Path) -> None:
    trainer = CausalLM(data=data)
    whole = trainer.train(task(base, tmp_path / "whole", steps=6, warmup=0.5))
    first = trainer.train(dataclasses.replace(task(base, tmp_path / "first", steps=6, warmup=0.5), part=range(2)))
    rest = task(first.model_dir, tmp_path / "rest", steps=6, warmup=0.5)
    done = trainer.train(dataclasses.replace(rest, part=range(2, 6), previous_state=tmp_path / "first" / STATE))
    assert model_digest(Checkpoint(done.model_dir)) == model_digest(Checkpoint(whole.model_dir))


def test_without_its_state_a_round_begins_anew(base: Path, data: Path, tmp_path: Path) -> None:
    trainer = CausalLM(data=data)
    train_rounds(trainer, base, tmp_path, 1)
    second = task(tmp_path / "round1" / "tuned", tmp_path / "round2", 2, 2)
    kept = trainer.train(second)
    assert second.previous_state is not None
    forgetful = trainer.train(
        TrainTask(second.model_dir, second.settings, 2, second.seed, tmp_path / "forgetful", num_rounds=2)
    )
    assert model_digest(Checkpoint(kept.model_dir)) != model_digest(Checkpoint(forgetful.model_dir))
    step = "step:model.norm.weight"
    assert float(load_file(tmp_path / "round2" / STATE / "adamw.safetensors")[step]) == 8
    assert float(load_file(tmp_path / "forgetful" / STATE / "adamw.safetensors")[step]) == 4


def test_a_round_that_is_done_again_gives_the_same_bits(base: Path, data: Path, tmp_path: Path) -> None:
    trainer = CausalLM(data=data)
    train_rounds(trainer, base, tmp_path, 1)
    second = task(tmp_path / "round1" / "tuned", tmp_path / "round2", 2, 2)
    first, again = (model_digest(Checkpoint(trainer.train(second).model_dir)) for _ in range(2))
    assert first == again


class Stop(Exception):
    """Ends a training where it stands."""


def stopping_at(step: int) -> Callable[[int, int, float], None]:
    def progress(done: int, num_steps: int, loss: float) -> None:
        if done == step:
            raise Stop

    return progress


@pytest.mark.parametrize("stopped_at", [1, 5, 6, 9])
def test_an_interrupted_round_ends_in_the_same_bits(base: Path, data: Path, tmp_path: Path, stopped_at: int) -> None:
    trainer = CausalLM(data=data, checkpoint_steps=3)
    undisturbed = train_rounds(trainer, base, tmp_path / "undisturbed", 1, steps=10)
    work = task(base, tmp_path / "stopped", steps=10)
    with pytest.raises(Stop):
        trainer.train(
            TrainTask(base, work.settings, work.round, work.seed, work.workspace, progress=stopping_at(stopped_at))
        )
    steps: list[int] = []
    resumed = TrainTask(
        base, work.settings, work.round, work.seed, work.workspace, progress=lambda step, *_: steps.append(step)
    )
    result = trainer.train(resumed)
    assert steps[0] == stopped_at // 3 * 3 + 1
    assert model_digest(Checkpoint(result.model_dir)) == model_digest(Checkpoint(undisturbed))
    assert not (work.workspace / "checkpoint").exists()


def test_accumulated_gradients_are_those_of_the_batch(base: Path, data: Path, tmp_path: Path) -> None:
    whole = CausalLM(data=data).train(task(base, tmp_path / "whole", batch_size=5))
    parts = CausalLM(data=data, micro_batch_size=2).train(task(base, tmp_path / "parts", batch_size=5))
    for name, tensor in Checkpoint(whole.model_dir).items():
        torch.testing.assert_close(Checkpoint(parts.model_dir)[name], tensor, atol=1e-4, rtol=0)
    assert parts.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-4)


def test_one_step_is_adamw_on_the_mean_loss_of_its_windows(base: Path, data: Path, tmp_path: Path) -> None:
    # From no moments AdamW's first step is lr against the gradient's sign; with lr * decay of it, for matrices only.
    lr, decay = 1e-3, 0.5
    settings = {"steps": 1, "batch_size": 3, "lr": lr, "warmup": 0, "weight_decay": decay, "max_grad_norm": 0.0}
    work = task(base, tmp_path / "work", **settings)
    data.write_text(TEXT[:48])  # three windows, so that the batch is all of them whatever their order
    after = Checkpoint(CausalLM(data=data).train(work).model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(base).eval()
    stream = list(b"\n" + TEXT[:48].encode())
    windows = torch.tensor([stream[start : start + 17] for start in (0, 16, 32)])
    logits = model(input_ids=windows[:, :-1]).logits
    torch.autograd.backward(cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))
    before = Checkpoint(base)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight", "model.norm.weight"):
        gradient = model.get_parameter(name).grad
        large = gradient.abs() > 1e-4
        expected = -lr * gradient.sign() - lr * (decay if before[name].ndim > 1 else 0) * before[name]
        assert large.float().mean() > 0.3
        torch.testing.assert_close((after[name] - before[name])[large], expected[large], rtol=0, atol=1e-5)


def test_long_gradients_are_cut(base: Path, data: Path, tmp_path: Path) -> None:
    # AdamW's second moment after one step is (1 - beta2) * gradient^2.
    CausalLM(data=data).train(task(base, tmp_path / "round1", steps=1, max_grad_norm=0.01, beta2=0.75))
    state = load_file(tmp_path / "round1" / STATE / "adamw.safetensors")
    squares = sum(float(tensor.double().sum()) for name, tensor in state.items() if name.startswith("exp_avg_sq:"))
    assert math.sqrt(squares / 0.25) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", lambda x: 0.2 + 0.8 * math.cos(math.pi * x / 2) ** 2),
        ("linear", lambda x: 1 - 0.8 * x),
        ("constant", lambda x: 1.0),
    ],
)
def test_learning_rates_rise_and_fall_once(schedule: Any, expected: Callable[[float], float]) -> None:
    settings = Settings(lr=3.0, schedule=schedule, warmup=0.1, final_lr=0.2)
    rates = [settings.lr_at(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([3.0 * (step + 1) / 10 for step in range(10)])
    assert rates[10:] == pytest.approx([3.0 * expected(step / 90) for step in range(90)])


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(base: Path, data: Path, tmp_path: Path) -> None:
    models = {}
    for precision in ("fp32", "bf16"):
        result = CausalLM(data=data).train(task(base, tmp_path / precision, steps=1, precision=precision))
        models[precision] = Checkpoint(result.model_dir)
        assert {spec.dtype for spec in models[precision].schema.values()} == {"F32"}
    assert model_digest(models["bf16"]) != model_digest(models["fp32"])
    state = [load_file(tmp_path / name / STATE / "adamw.safetensors") for name in ("fp32", "bf16")]
    exact, rounded = (tensors["exp_avg:model.layers.0.mlp.up_proj.weight"] for tensors in state)
    assert rounded.dtype == torch.float32
    assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.99


def word_tokenizer(directory: Path, **special: str) -> None:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "the", "cat", "sat", ";"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=4, **special
    ).save_pretrained(directory)


def test_a_tokenizer_beside_the_model_is_used_and_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = make_llama(tmp_path / "base", vocab_size=7)
    word_tokenizer(base, eos_token="</s>")
    data = tmp_path / "rows.csv"
    data.write_text("id,text\n" + "1,the cat sat ; the cat sat\n2,cat\n" * 8)
    trainer = CausalLM(data=data, test=data, eval_context_length=8)
    capfd.readouterr()
    result = trainer.train(task(base, tmp_path / "work", steps=20))
    values = trainer.evaluate(result.model_dir)
    assert values["loss"] < trainer.evaluate(base)["loss"]
    # 8 words and 2 separators for 28 bytes, and the first separator is not predicted.
    assert values["byte_loss"] == pytest.approx(values["loss"] * 79 / (8 * 28))
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in result.model_dir.iterdir()}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("special", "separator"), [({"eos_token": "</s>"}, [2]), ({"bos_token": "<s>"}, [1]), ({}, [])]
)
def test_documents_stand_behind_separators(tmp_path: Path, special: dict[str, str], separator: list[int]) -> None:
    word_tokenizer(tmp_path, **special)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    stream = token_stream(tmp_path / "x", ["the cat sat ; the cat", "sat"], tokenizer, 7)
    assert stream.tokens.tolist() == [*separator, 3, 4, 5, 6, 3, 4, *separator, 5]
    assert stream.num_bytes == 24


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 50])
def test_windows_predict_every_token_but_the_first_once(tmp_path: Path, length: int) -> None:
    stream = token_stream(tmp_path / "x", ["abcdef"], None, 256)
    windows = [stream.tokens[window].tolist() for window in stream.windows(length)]
    assert [token for window in windows for token in window[1:]] == list(b"abcdef")
    assert all(len(window) == length + 1 for window in windows[:-1])
    assert 2 <= len(windows[-1]) <= length + 1


def test_every_epoch_has_all_windows_in_another_order_from_any_start() -> None:
    def first(start: int, count: int) -> list[int]:
        order = shuffled(6, 9, start)
        return [next(order) for _ in range(count)]

    whole = first(0, 18)
    epochs = [whole[i : i + 6] for i in (0, 6, 12)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(first(start, 18 - start) == whole[start:] for start in range(18))


def test_evaluating_some_windows_spread_over_the_text(base: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.txt"
    test.write_text("a" * 160 + "b" * 160)

    def loss(text: str, **options: int) -> float:
        test.write_text(text)
        return CausalLM(data=test, test=test, eval_context_length=16, **options).evaluate(base)["loss"]

    halves = [loss(letter * 16) for letter in "ab"]
    # 320 bytes behind a newline are 20 windows; of four that are spread evenly two lie in each half.
    spread = loss("a" * 159 + "b" * 161, eval_windows=4)
    assert min(halves) - 0.05 < spread < max(halves) + 0.05
    assert loss("a" * 160 + "b" * 160, eval_windows=100) == loss("a" * 160 + "b" * 160)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 16}, r"\[train\]: max_length: unknown key"),
        ({"schedule": "sine"}, "schedule: input should be 'cosine', 'linear' or 'constant'"),
        ({"precision": "fp16"}, "precision: input should be 'fp32' or 'bf16'"),
        ({"freeze": ["nothing"]}, "no tensor of the model starts with 'nothing'"),
    ],
)
def test_settings_that_can_not_be(
    base: Path, data: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        CausalLM(data=data).train(task(base, tmp_path / "work", **settings))


def test_models_and_data_that_do_not_fit(base: Path, data: Path, tmp_path: Path) -> None:
    trainer = CausalLM(data=data, test=data)
    with pytest.raises(InputError, match="not a causal language model that transformers opens"):
        trainer.evaluate(tmp_path / "nothing")
    small = make_llama(tmp_path / "small", vocab_size=100)
    with pytest.raises(InputError, match="neither a tokenizer nor the 256 tokens of a byte-level model"):
        trainer.evaluate(small)
    word_tokenizer(make_llama(tmp_path / "tiny", vocab_size=5))
    data.write_text("the cat sat")
    with pytest.raises(InputError, match=r"train\.txt: the tokenizer makes token 5, and the model has 5"):
        trainer.evaluate(tmp_path / "tiny")
    lame = make_llama(tmp_path / "lame")
    tensors = load_file(lame / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, lame / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"has no model\.norm\.weight"):
        trainer.evaluate(lame)
    with pytest.raises(InputError, match="training diverged at step"):
        trainer.train(task(base, tmp_path / "diverged", lr=1e30, warmup=0))
    data.write_text(" \n")
    with pytest.raises(InputError, match=r"train\.txt:1: .* is empty"):
        trainer.check()
    with pytest.raises(InputError, match="don't know how to read"):
        CausalLM(data=tmp_path / "x.feather").check()


@pytest.mark.parametrize("damage", ["empty", "cut", "other"])
def test_a_damaged_state_is_an_error_that_says_what_to_do(base: Path, data: Path, tmp_path: Path, damage: str) -> None:
    trainer = CausalLM(data=data)
    train_rounds(trainer, base, tmp_path, 1)
    file = tmp_path / "round1" / STATE / "adamw.safetensors"
    if damage == "other":
        save_file({"x": torch.zeros(1)}, file)
    else:
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else 1000])
    with pytest.raises(InputError, match=r"adamw\.safetensors: ") as caught:
        trainer.train(task(base, tmp_path / "round2", 2, 2))
    assert "delete" in (caught.value.hint or "")


def test_frozen_tensors_keep_their_bits_and_have_no_moments(base: Path, data: Path, tmp_path: Path) -> None:
    result = CausalLM(data=data).train(task(base, tmp_path / "work", freeze=("model.embed_tokens", "model.layers.0.")))
    before, after = Checkpoint(base), Checkpoint(result.model_dir)
    frozen = {name for name in before if torch.equal(before[name], after[name])}
    assert frozen == {name for name in before if name.startswith(("model.embed_tokens", "model.layers.0."))}
    state = load_file(tmp_path / "work" / STATE / "adamw.safetensors")
    assert {name.partition(":")[2] for name in state} == set(before) - frozen
    # A plan that later trains them gives them moments of their own.
    trained = CausalLM(data=data).train(
        TrainTask(
            result.model_dir, SETTINGS, 2, 3, tmp_path / "work2", num_rounds=2, previous_state=tmp_path / "work" / STATE
        )
    )
    steps = load_file(tmp_path / "work2" / STATE / "adamw.safetensors")
    assert float(steps["step:model.norm.weight"]) == 8
    assert float(steps["step:model.embed_tokens.weight"]) == 4
    assert not torch.equal(
        Checkpoint(trained.model_dir)["model.embed_tokens.weight"], before["model.embed_tokens.weight"]
    )


def test_the_trainer_loads_by_name(data: Path) -> None:
    loaded = load_trainer("causal-lm", {"data": str(data), "micro_batch_size": "2"})
    assert loaded == CausalLM(data=data, micro_batch_size=2)


@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics_of_a_language_model_can_be_sent(kind: str, base: Path, data: Path) -> None:
    trainer = CausalLM(data=data, eval_context_length=24)
    schema = Checkpoint(base).schema
    found = trainer.statistics(base, kind)
    assert sorted(side_tensors(found, kind, schema)) == sorted(statistics_schema(kind, schema))
    assert found["model.layers.1.mlp.down_proj.weight"].any()
    # The output layer shares its weight with the embeddings, and has no statistics under a name of its own.
    assert ("model.embed_tokens.weight" in found) == (kind == "fisher")
    assert "lm_head.weight" not in found
    few = CausalLM(data=data, eval_context_length=24, statistics_windows=2).statistics(base, kind)
    assert not torch.equal(few["model.layers.1.mlp.down_proj.weight"], found["model.layers.1.mlp.down_proj.weight"])
