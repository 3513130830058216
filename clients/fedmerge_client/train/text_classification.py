"""Fine-tune a Hugging Face sequence classifier on labelled texts: AdamW or SGD, a warm-up and a linear decay.

Deliberately plain: a federated round is a short fine-tune of a good model, and what it needs is to be quick, to
repeat exactly and to leave frozen weights untouched to the bit. Dropout stays off for all three, but for adapters' own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

from fedmerge.errors import InputError
from fedmerge.seeds import derive_seed
from fedmerge.tensors import Checkpoint
from fedmerge.training import STATE, TrainResult, TrainTask, validated
from fedmerge_client.train.adamw_state import Place
from fedmerge_client.train.checkpoints import Checkpoints, save_between_rounds
from fedmerge_client.train.datasets import label_ids, read_rows
from fedmerge_client.train.drift import DriftSettings, Proximal, Scaffold, require_whole_models
from fedmerge_client.train.huggingface import (
    Device,
    find_device,
    limited_threads,
    num_positions,
    open_model,
    open_tokenizer,
)
from fedmerge_client.train.lora import LoraSettings, save_tuned, trained_part
from fedmerge_client.train.metrics import classification_metrics
from fedmerge_client.train.own_code import seeded
from fedmerge_client.train.statistics import collect, spread

EVAL_BATCH_SIZE = 64
POOL_BATCHES = 8  # batches are cut from this many batches' worth of shuffled examples, sorted by length


class Settings(LoraSettings, DriftSettings):
    """What a plan may ask for under `[train]`, beside `LoraSettings` and `DriftSettings`.

    `lr` is the peak learning rate of the `optimizer`, `warmup` the share of the `steps` that it rises for before it
    falls linearly to 0, in each round or, with `schedule` "federation", over all rounds, through which AdamW's moments
    are then kept, too. `max_length` is in tokens, `freeze` has name prefixes of tensors to leave alone, such as
    "bert.embeddings".
    `precision` "bf16" multiplies in bf16; weights that are trained, gradients and moments are fp32 all the same.
    `num_threads` of 0 leaves torch's own choice.
    """

    steps: Annotated[int, Field(ge=1)] = 100
    batch_size: Annotated[int, Field(ge=1)] = 16
    lr: Annotated[FiniteFloat, Field(gt=0)] = 1e-4
    max_length: Annotated[int, Field(ge=4)] = 128
    warmup: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.1
    schedule: Literal["round", "federation"] = "round"
    weight_decay: Annotated[FiniteFloat, Field(ge=0)] = 0.01
    label_smoothing: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    freeze: tuple[str, ...] = ()
    num_threads: Annotated[int, Field(ge=0)] = 0

    def lr_at(self, step: int, round_number: int, num_rounds: int) -> float:
        """Return the learning rate of the 0-based `step` of a 1-based round."""
        num_steps = self.steps
        if self.schedule == "federation":
            step, num_steps = (round_number - 1) * self.steps + step, num_rounds * self.steps
        num_warmup = round(self.warmup * num_steps)
        if step < num_warmup:
            return self.lr * ((step + 1) / num_warmup)
        return self.lr * ((num_steps - step) / max(1, num_steps - num_warmup))


class TextClassification(BaseModel):
    """The `text-classification` trainer; its fields are a node's own options.

    `data` and `test` are JSON Lines or CSV files (see `datasets.read_rows`) whose labels are labels of the model. A
    batch goes through the model `micro_batch_size` texts at a time (0: all at once) and its gradients are accumulated.
    Training is written to disk every `checkpoint_steps` (0: every five minutes) and goes on from there when it was
    interrupted in the middle of a round.
    `max_lora_rank` is for a site that can't train adapters of the plan's rank (0: it can).
    `eval_max_length` (tokens) bounds the texts of `evaluate` and `statistics`; the latter looks at no more than
    `statistics_examples` of the training texts. `device` "auto" takes a CUDA device when there is one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path
    test: Path | None = None
    text_column: str = "text"
    label_column: str = "label"
    micro_batch_size: Annotated[int, Field(ge=0)] = 0
    checkpoint_steps: Annotated[int, Field(ge=0)] = 0
    max_lora_rank: Annotated[int, Field(ge=0)] = 0
    eval_max_length: Annotated[int, Field(ge=4)] = 128
    statistics_examples: Annotated[int, Field(ge=1)] = 256
    device: Device = "auto"

    def check(self) -> None:
        """Raise `InputError` unless the training and test files can be read, `ConfigError` if the device is missing."""
        for path in (self.data, self.test):
            if path is not None:
                self._read(path)
        find_device(self.device)

    def train(self, task: TrainTask) -> TrainResult:
        """Tune `task.model_dir` by `Settings` into `task.workspace/tuned`, a model or an adapter.

        The loss is cross-entropy over all labels of the model, also those that the node has no example of. Raises
        `ConfigError` for settings that can't be, `InputError` for unusable data or when training diverges.
        """
        settings = validated(Settings, task.settings, where="[train]")
        require_whole_models(settings.lora_rank, fedprox_mu=settings.fedprox_mu, scaffold=settings.scaffold)
        bare, tokenizer = self._open(task.model_dir, as_stored=settings.lora_rank > 0 and settings.precision == "bf16")
        texts, labels = self._examples(self.data, bare)
        tokens = _tokenize(tokenizer, texts, min(settings.max_length, num_positions(bare)))
        seed = derive_seed(task.seed, task.round, "adapter")
        model, parameters = trained_part(bare, settings, settings.freeze, most_rank=self.max_lora_rank, seed=seed)
        # Both start from the global model, and a resumed round from what was tuned of it so far.
        proximal = Proximal(parameters, settings.fedprox_mu)
        scaffold = Scaffold(parameters, task.round, task.previous_state) if settings.scaffold else None
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters.values(), weight_decay=settings.weight_decay)
        if settings.optimizer == "sgd":
            optimizer = torch.optim.SGD(parameters.values())
        order_seed = derive_seed(task.seed, task.round, "batches")
        batches = _batches([len(row) for row in tokens], settings.batch_size, order_seed)
        checkpoints = Checkpoints(task.workspace, self.checkpoint_steps)
        part = task.part or range(settings.steps)
        kept_state = task.previous_state if settings.schedule == "federation" else None
        place = checkpoints.begin(Place(part.start, 0, order_seed), optimizer, parameters, kept_state)
        losses = []
        with limited_threads(settings.num_threads):
            for step, chosen in zip(part, islice(batches, part.start, None), strict=False):
                lr = settings.lr_at(step, task.round, task.num_rounds)
                if step < place.step:
                    if scaffold is not None:
                        scaffold.skip(lr)
                    continue
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.zero_grad(set_to_none=True)
                parts = [
                    (_pad(tokenizer, [tokens[i] for i in held], model.device), labels[held])
                    for held in _parts(chosen, self.micro_batch_size)
                ]
                losses.append(_accumulate_gradients(model, parts, settings, derive_seed(seed, step)))
                if not math.isfinite(losses[-1]):
                    raise InputError(f"training diverged at step {step + 1} (loss {losses[-1]})", hint="lower the lr")
                proximal.correct()
                if scaffold is not None:
                    scaffold.correct(lr)
                optimizer.step()
                if step + 1 < part.stop:
                    checkpoints.keep(Place(step + 1, 0, order_seed), optimizer, parameters)
                if task.progress is not None:
                    task.progress(step + 1, settings.steps, losses[-1])
        if scaffold is not None:
            scaffold.save(task.workspace / STATE)
        if settings.schedule == "federation":
            save_between_rounds(task, settings, place, optimizer, parameters)
        tuned_dir = save_tuned(model, tokenizer, settings, task.workspace / "tuned")
        checkpoints.drop()
        last = losses[-max(1, len(losses) // 10) :]
        return TrainResult(tuned_dir, len(texts), {"loss": sum(last) / len(last)})

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        """Return the `loss` (nats per text), `accuracy`, `macro_f1` and `ece` (see `metrics`) on the test file.

        They are over all labels of the model. Empty without a test file.
        """
        if self.test is None:
            return {}
        model, tokenizer = self._open(model_dir)
        texts, labels = self._examples(self.test, model)
        tokens = _tokenize(tokenizer, texts, min(self.eval_max_length, num_positions(model)))
        by_length = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        rows = []
        with torch.inference_mode():
            for start in range(0, len(by_length), EVAL_BATCH_SIZE):
                chosen = by_length[start : start + EVAL_BATCH_SIZE]
                rows.append(model(**_pad(tokenizer, [tokens[i] for i in chosen], model.device)).logits.cpu())
        logits, labels = torch.cat(rows), labels[by_length]
        return {"loss": float(cross_entropy(logits, labels)), **classification_metrics(logits, labels)}

    def statistics(self, model_dir: Path, kind: str) -> dict[str, Tensor]:
        """Return statistics of one `kind` (see `statistics.collect`) on texts spread evenly over the training file."""
        model, tokenizer = self._open(model_dir)
        texts, _ = self._examples(self.data, model)
        chosen = [texts[index] for index in spread(len(texts), self.statistics_examples)]
        tokens = _tokenize(tokenizer, chosen, min(self.eval_max_length, num_positions(model)))
        examples = (_pad(tokenizer, [row], model.device) for row in tokens)
        return collect(kind, model, examples, Checkpoint(model_dir).schema, seed=derive_seed("statistics"))

    def _read(self, path: Path) -> Any:
        return read_rows(path, text_column=self.text_column, label_column=self.label_column)

    def _examples(self, path: Path, model: Any) -> tuple[list[str], Tensor]:
        rows = self._read(path)
        return [row.text for row in rows], torch.tensor(label_ids(path, rows, model.config.label2id))

    def _open(self, model_dir: Path, *, as_stored: bool = False) -> tuple[Any, Any]:
        model = open_model(
            AutoModelForSequenceClassification,
            model_dir,
            find_device(self.device),
            what="classifier",
            hint="the base must be a sequence classifier; label_head.build_classifier makes one from an encoder",
            as_stored=as_stored,
        )
        return model, open_tokenizer(model_dir)


def _tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Return token ids by text, unpadded: a batch is padded to its own longest text only."""
    limit = min(max_length, tokenizer.model_max_length)
    tokens: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    return tokens


def _accumulate_gradients(
    model: Any, parts: Sequence[tuple[dict[str, Tensor], Tensor]], settings: Settings, seed: int
) -> float:
    """Add the gradient of the mean loss of a batch, given in parts, to the parameters'; return that loss."""
    total, num_texts = 0.0, sum(len(targets) for _, targets in parts)
    for number, (inputs, targets) in enumerate(parts):
        # Dropout in adapters, the same when a round is resumed.
        with (
            seeded(derive_seed(seed, number)),
            torch.autocast(model.device.type, torch.bfloat16, enabled=settings.precision == "bf16"),
        ):
            logits = model(**inputs).logits.float()
        loss = cross_entropy(logits, targets.to(model.device), label_smoothing=settings.label_smoothing)
        loss = loss * (len(targets) / num_texts)
        torch.autograd.backward(loss)
        total += loss.item()
    return total


def _pad(tokenizer: Any, tokens: Sequence[list[int]], device: torch.device) -> dict[str, Tensor]:
    longest = max(map(len, tokens))
    pad_id = tokenizer.pad_token_id or 0
    input_ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row in tokens])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in tokens])
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}


def _parts(chosen: list[int], size: int) -> list[list[int]]:
    return [chosen[start : start + size] for start in range(0, len(chosen), size)] if size else [chosen]


def _batches(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of indices for ever, epoch after epoch, each of texts of similar length to waste no padding."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    batch_size = min(batch_size, len(lengths))
    pool_size = POOL_BATCHES * batch_size
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        for start in range(0, len(order), pool_size):
            pool = sorted(order[start : start + pool_size], key=lambda i: lengths[i])
            cut = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
            for index in torch.randperm(len(cut), generator=generator).tolist():
                yield cut[index]
