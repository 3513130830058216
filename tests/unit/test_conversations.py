"""Learning replies alone: which tokens count, against transformers and a loss worked out token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fedmerge.errors import InputError
from fedmerge_client.train.causal_lm import CausalLM
from tests.unit.test_causal_lm import make_llama, task

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SAID: list[list[tuple[str, str]]] = [
    [("user", "how are you"), ("assistant", "well"), ("user", "and now"), ("assistant", "as well")],
    [("system", "be brief"), ("user", "hm"), ("assistant", "yes")],
]


def add_tokenizer(directory: Path, template: str | None) -> None:
    """Write a tokenizer of bytes, with the template's marks as tokens of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
    )
    made.chat_template = template
    made.save_pretrained(directory)


def make_base(directory: Path, template: str | None = TEMPLATE) -> Path:
    make_llama(directory, vocab_size=260, max_position_embeddings=128)
    add_tokenizer(directory, template)
    return directory


def write_conversations(path: Path, said: list[list[tuple[str, str]]]) -> Path:
    rows = [{"talk": [{"role": role, "content": text} for role, text in one]} for one in said]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def trainer(tmp_path: Path) -> CausalLM:
    path = write_conversations(tmp_path / "said.jsonl", SAID)
    return CausalLM(data=path, test=path, messages_column="talk", eval_context_length=100)


def loss_of_replies(model_dir: Path) -> tuple[float, int, list[bool]]:
    """Return the sum of losses over replies and their ends, how many tokens that is, and which greedy search gives."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    total, num_targets, exact = 0.0, 0, []
    for one in SAID:
        text = ""
        for role, content in one:
            given = tokenizer(text + "<|assistant|>", add_special_tokens=False)["input_ids"]
            text += f"<|{role}|>{content}<|end|>"
            if role != "assistant":
                continue
            whole = tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                found = log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
                rest = len(whole) - len(given)
                made = model.generate(
                    torch.tensor([given]), max_new_tokens=rest, min_new_tokens=rest, do_sample=False, pad_token_id=0
                )[0].tolist()
            total -= sum(float(found[place - 1, whole[place]]) for place in range(len(given), len(whole)))
            num_targets += rest
            exact.append(made == whole)
    return total, num_targets, exact


def test_only_replies_and_their_ends_count(trainer: CausalLM, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    trainer.check()
    found = trainer.evaluate(base)
    total, num_targets, exact = loss_of_replies(base)
    assert num_targets == len("well") + len("as well") + len("yes") + 3
    assert found["loss"] == pytest.approx(total / num_targets, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    num_bytes = len("well<|end|>as well<|end|>yes<|end|>")
    assert found["byte_loss"] == pytest.approx(total / num_bytes, rel=1e-5)
    assert found["exact_match"] == sum(exact) / 3 == 0


def test_they_are_learnt_until_greedy_search_gives_them(trainer: CausalLM, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    settings = {"steps": 150, "batch_size": 1, "context_length": 100, "lr": 1e-2, "weight_decay": 0.0}
    result = trainer.train(task(base, tmp_path / "work", **settings))
    found = trainer.evaluate(result.model_dir)
    total, num_targets, exact = loss_of_replies(result.model_dir)
    assert found["loss"] == pytest.approx(total / num_targets, rel=1e-4)
    assert found["loss"] < 0.2
    assert found["exact_match"] == sum(exact) / 3 > 0.6
    # What was asked was not learnt: the model is no better at it than at the start, by far.
    asked = write_conversations(tmp_path / "asked.jsonl", [[("user", "x"), ("assistant", "how are you")]])
    other = trainer.model_copy(update={"test": asked})
    assert other.evaluate(result.model_dir)["loss"] > 3


def test_gradients_of_parts_add_up_by_their_targets(trainer: CausalLM, tmp_path: Path) -> None:
    # Of 56 tokens in windows of 10, two have no targets and the last is shorter; the others have different numbers.
    base = make_base(tmp_path / "base")
    settings = {"steps": 3, "batch_size": 3, "context_length": 10, "lr": 1e-3}
    whole = trainer.train(task(base, tmp_path / "whole", **settings))
    parts = trainer.model_copy(update={"micro_batch_size": 1}).train(task(base, tmp_path / "parts", **settings))
    assert parts.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-4)
    assert parts.num_examples == whole.num_examples == 3


def test_a_reply_that_is_cut_is_neither_right_nor_wrong(trainer: CausalLM, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    assert "exact_match" not in trainer.model_copy(update={"eval_context_length": 4}).evaluate(base)


@pytest.mark.parametrize(
    ("template", "said", "message"),
    [
        (None, SAID, "no fast tokenizer with a chat template"),
        (
            TEMPLATE.replace("{{ message.content }}", "{{ message.content if loop.last else '...' }}"),
            SAID,
            r"said\.jsonl:1: the chat template writes message 2 otherwise",
        ),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE,
            SAID,
            r"said\.jsonl:2: the model's chat template does not take this conversation \(no system\)",
        ),
        ("{{ messages[3].content }}{{ 1 / 0 }}", SAID, "does not take this conversation"),
    ],
)
def test_templates_that_do_not_fit_are_named(
    trainer: CausalLM, tmp_path: Path, template: str | None, said: list[list[tuple[str, str]]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        trainer.evaluate(make_base(tmp_path / "base", template))


def test_a_model_of_bytes_has_no_template(trainer: CausalLM, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="chat template"):
        trainer.evaluate(make_llama(tmp_path / "base"))
