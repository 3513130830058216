"""Train a Hugging Face causal language model on texts, as one stretch of a run that spans the whole federation.

Unlike a classifier's short fine-tune, language-model training does not begin anew each round: AdamW's moments and the
place in the data are kept between rounds, and the learning rate follows one schedule over all rounds (DiLoCo, arXiv
2311.08105). Without a merge in between, R rounds of H steps are R * H steps, to the bit. Dropout is off, but for
adapters' own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from fedmerge.errors import InputError
from fedmerge.seeds import derive_seed
from fedmerge.tensors import Checkpoint
from fedmerge.training import STATE, TrainResult, TrainTask, validated
from fedmerge_client.train.adamw_state import Place
from fedmerge_client.train.checkpoints import Checkpoints, save_between_rounds
from fedmerge_client.train.conversations import conversation_stream
from fedmerge_client.train.datasets import Conversation, read_conversations, read_texts
from fedmerge_client.train.drift import DriftSettings, Proximal, Scaffold, require_whole_models
from fedmerge_client.train.harness import harness_metrics, require_harness
from fedmerge_client.train.huggingface import (
    Device,
    find_device,
    has_tokenizer,
    limited_threads,
    num_positions,
    open_model,
    open_tokenizer,
)
from fedmerge_client.train.lora import LoraSettings, save_tuned, trained_part
from fedmerge_client.train.own_code import seeded
from fedmerge_client.train.statistics import collect, spread
from fedmerge_client.train.token_stream import NO_TARGET, TokenStream, shuffled, token_stream

EVAL_BATCH_SIZE = 16


class Settings(LoraSettings, DriftSettings):
    """What a plan may ask for under `[train]`, beside `LoraSettings` and `DriftSettings`.

    A round is `steps` updates, each from `batch_size` windows of `context_length` tokens. `lr` is the peak learning
    rate, and `warmup` the share of all rounds' steps that it rises for before it falls by `schedule`, to `final_lr`
    times the peak in the last round. Matrices decay, vectors don't; gradients longer than `max_grad_norm` are cut to
    it (0: never). `precision` "bf16" multiplies in bf16; weights that are trained, gradients and moments are fp32 all
    the same. `freeze` has name prefixes of tensors to leave alone. `num_threads` of 0 leaves torch's own choice.
    """

    steps: Annotated[int, Field(ge=1)] = 100
    batch_size: Annotated[int, Field(ge=1)] = 8
    context_length: Annotated[int, Field(ge=2)] = 512
    lr: Annotated[FiniteFloat, Field(gt=0)] = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.05
    final_lr: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.1
    beta1: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.95
    weight_decay: Annotated[FiniteFloat, Field(ge=0)] = 0.1
    max_grad_norm: Annotated[FiniteFloat, Field(ge=0)] = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    freeze: tuple[str, ...] = ()
    num_threads: Annotated[int, Field(ge=0)] = 0

    def lr_at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of the 0-based `step` of the `num_steps` of all rounds."""
        num_warmup = round(self.warmup * num_steps)
        if step < num_warmup:
            return self.lr * (step + 1) / num_warmup
        done = (step - num_warmup) / max(1, num_steps - num_warmup)
        fall = {"cosine": (1 - math.cos(math.pi * done)) / 2, "linear": done, "constant": 0.0}[self.schedule]
        return self.lr * (1 - (1 - self.final_lr) * fall)


class CausalLM(BaseModel):
    """The `causal-lm` trainer; its fields are a node's own options.

    `data` and `test` are texts (see `datasets.read_texts`), or with a `messages_column` conversations (see
    `datasets.read_conversations`), of which only the assistant's replies are learnt. A batch goes through the model
    `micro_batch_size` windows at a time (0: all at once) and its gradients are accumulated. Training is written to disk
    every `checkpoint_steps` (0: every five minutes) and goes on from there when it was interrupted in the middle of a
    round. `evaluate` cuts the test texts into windows of `eval_context_length` tokens and takes `eval_windows` of them,
    evenly spread (0: all); so does `statistics` with the training texts and `statistics_windows`. `harness_tasks` are
    tasks of lm-evaluation-harness, by name with commas in between, that models are scored on as well, at most
    `harness_limit` examples of each (0: all); `harness_folder` has YAML files of tasks of one's own. `max_lora_rank` is
    for a site that can't train adapters of the plan's rank (0: it can). `device` "auto" takes a CUDA device when there
    is one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path
    test: Path | None = None
    text_column: str = "text"
    messages_column: str | None = None
    micro_batch_size: Annotated[int, Field(ge=0)] = 0
    checkpoint_steps: Annotated[int, Field(ge=0)] = 0
    eval_context_length: Annotated[int, Field(ge=2)] = 512
    eval_windows: Annotated[int, Field(ge=0)] = 0
    statistics_windows: Annotated[int, Field(ge=1)] = 64
    harness_tasks: str = ""
    harness_folder: Path | None = None
    harness_limit: Annotated[int, Field(ge=0)] = 0
    max_lora_rank: Annotated[int, Field(ge=0)] = 0
    device: Device = "auto"

    def check(self) -> None:
        """Raise `InputError` unless the training and test files can be read, `ConfigError` if the device is missing."""
        for path in (self.data, self.test):
            if path is not None:
                self._read(path)
        find_device(self.device)
        if self.harness_tasks:
            require_harness()

    def train(self, task: TrainTask) -> TrainResult:
        """Take one round's steps by `Settings` from `task.model_dir`; leave a model or adapter in `workspace/tuned`.

        A new adapter has new moments, unless its A is frozen and so goes on in the next. The result's `num_examples` is
        the number of windows in the data. Raises `ConfigError` for settings that can't be, `InputError` for unusable
        data, a state that can't be read, or when training diverges.
        """
        settings = validated(Settings, task.settings, where="[train]")
        require_whole_models(settings.lora_rank, fedprox_mu=settings.fedprox_mu, scaffold=settings.scaffold)
        bare, tokenizer = self._open(task.model_dir, as_stored=settings.lora_rank > 0 and settings.precision == "bf16")
        stream = self._stream(self.data, bare, tokenizer)
        windows = self._windows(stream, min(settings.context_length, num_positions(bare)))
        seed = derive_seed(task.seed, task.round, "adapter")
        model, parameters = trained_part(bare, settings, settings.freeze, most_rank=self.max_lora_rank, seed=seed)
        proximal = Proximal(parameters, settings.fedprox_mu)
        scaffold = Scaffold(parameters, task.round, task.previous_state) if settings.scaffold else None
        optimizer = _optimizer(parameters, settings)
        part = task.part or range(settings.steps)
        place = Place(part.start, 0, derive_seed(task.seed, task.round, "windows"))
        checkpoints = Checkpoints(task.workspace, self.checkpoint_steps)
        place = checkpoints.begin(place, optimizer, parameters, task.previous_state)
        order = shuffled(len(windows), place.order_seed, place.num_taken)

        losses = []
        with limited_threads(settings.num_threads):
            for step in part:
                lr = settings.lr_at((task.round - 1) * settings.steps + step, task.num_rounds * settings.steps)
                if step < place.step:
                    if scaffold is not None:
                        scaffold.skip(lr)
                    continue
                for group in optimizer.param_groups:
                    group["lr"] = lr
                batch = _batch(stream, [windows[i] for i in islice(order, settings.batch_size)])
                optimizer.zero_grad(set_to_none=True)
                with seeded(derive_seed(seed, step)):  # dropout in adapters, the same when a round is resumed
                    losses.append(self._accumulate_gradients(model, batch, settings.precision))
                if not math.isfinite(losses[-1]):
                    raise InputError(f"training diverged at step {step + 1} (loss {losses[-1]})", hint="lower the lr")
                proximal.correct()
                if settings.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
                if scaffold is not None:
                    scaffold.correct(lr)
                optimizer.step()
                place = Place(step + 1, place.num_taken + settings.batch_size, place.order_seed)
                if place.step < part.stop:
                    checkpoints.keep(place, optimizer, parameters)
                if task.progress is not None:
                    task.progress(place.step, settings.steps, losses[-1])
        if scaffold is not None:
            scaffold.save(task.workspace / STATE)
        save_between_rounds(task, settings, place, optimizer, parameters)
        tuned_dir = save_tuned(model, tokenizer, settings, task.workspace / "tuned")
        checkpoints.drop()
        return TrainResult(tuned_dir, len(windows), {"loss": fmean(losses[-max(1, len(losses) // 10) :])})

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        """Return the `loss` (nats per token), `perplexity` and `byte_loss` (nats per byte) on the test texts.

        Every window begins without context, so longer windows give lower losses. Of conversations only replies count,
        and `exact_match` is the share of those within one window that the likeliest token each time gives, to the last.
        Empty without test texts, but for what the harness says (`harness.harness_metrics`).
        """
        if self.test is None and not self.harness_tasks:
            return {}
        model, tokenizer = self._open(model_dir)
        found = {} if self.test is None else self._losses(self.test, model, tokenizer)
        if self.harness_tasks:
            tasks = [task.strip() for task in self.harness_tasks.split(",")]
            found |= harness_metrics(model, tokenizer, tasks, folder=self.harness_folder, limit=self.harness_limit)
        return found

    def _losses(self, test: Path, model: Any, tokenizer: Any | None) -> dict[str, float]:
        stream = self._stream(test, model, tokenizer)
        windows = stream.document_windows(min(self.eval_context_length, num_positions(model)))
        num_all = len(windows)
        if 0 < self.eval_windows < num_all:
            windows = [windows[i * num_all // self.eval_windows] for i in range(self.eval_windows)]
        total_loss, num_targets = 0.0, 0
        said: dict[int, tuple[int, bool]] = {}  # of conversations, by place: in which window, and whether it is right
        with torch.inference_mode():
            for chosen in _batches_of_equal_length(windows):
                batch = _batch(stream, chosen)
                logits = _logits(model, batch, "fp32")
                num_targets += batch.num_targets
                total_loss += float(_loss(logits, batch, reduction="sum"))
                if stream.replies:
                    right = logits.argmax(-1).cpu() == batch.targets
                    for window, row in zip(chosen, right.tolist(), strict=True):
                        said |= {window.start + 1 + place: (window.start, hit) for place, hit in enumerate(row)}
        if not num_targets:
            raise InputError(f"{test}: no window has anything to predict", hint="raise the eval_context_length")
        loss = total_loss / num_targets
        # Of the bytes, the windows that were taken have their share of the targets.
        bytes_per_token = stream.num_bytes / stream.num_targets(slice(None))
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "byte_loss": loss / bytes_per_token}
        replies = [[said.get(place, (-1, False)) for place in range(one.start, one.stop)] for one in stream.replies]
        whole = [reply for reply in replies if reply[0][0] >= 0 and len({window for window, _ in reply}) == 1]
        if whole:
            found["exact_match"] = sum(all(hit for _, hit in reply) for reply in whole) / len(whole)
        return found

    def statistics(self, model_dir: Path, kind: str) -> dict[str, Tensor]:
        """Return statistics of one `kind` (see `statistics.collect`) on windows spread evenly over the texts."""
        model, tokenizer = self._open(model_dir)
        stream = self._stream(self.data, model, tokenizer)
        windows = stream.windows(min(self.eval_context_length, num_positions(model)))
        chosen = (stream.tokens[windows[index]] for index in spread(len(windows), self.statistics_windows))
        examples = (
            {"input_ids": tokens[None, :-1].to(model.device, torch.long), "use_cache": False} for tokens in chosen
        )
        return collect(kind, model, examples, Checkpoint(model_dir).schema, seed=derive_seed("statistics"))

    def _open(self, model_dir: Path, *, as_stored: bool = False) -> tuple[Any, Any | None]:
        model = open_model(
            AutoModelForCausalLM,
            model_dir,
            find_device(self.device),
            what="causal language model",
            hint="the base must be a causal language model with all its weights",
            as_stored=as_stored,
        )
        return model, open_tokenizer(model_dir) if has_tokenizer(model_dir) else None

    def _read(self, path: Path) -> list[str] | list[Conversation]:
        if self.messages_column is not None:
            return read_conversations(path, messages_column=self.messages_column)
        return read_texts(path, text_column=self.text_column)

    def _stream(self, path: Path, model: Any, tokenizer: Any | None) -> TokenStream:
        if self.messages_column is not None:
            conversations = read_conversations(path, messages_column=self.messages_column)
            return conversation_stream(path, conversations, tokenizer, model.config.vocab_size)
        return token_stream(path, read_texts(path, text_column=self.text_column), tokenizer, model.config.vocab_size)

    def _windows(self, stream: TokenStream, num_tokens: int) -> list[slice]:
        """Return the windows to learn from, all of one length."""
        windows = stream.windows(num_tokens)
        full = windows[0].stop  # the last may be shorter
        windows = [one for one in windows if one.stop - one.start == full and stream.num_targets(one)]
        if not windows:
            raise InputError(f"{self.data}: no window has anything to learn", hint="raise the context_length")
        return windows

    def _accumulate_gradients(self, model: Any, batch: Batch, precision: str) -> float:
        """Add the gradient of the mean loss of `batch` to the parameters'; return that loss."""
        total = 0.0
        for part in batch.split(self.micro_batch_size):
            loss = _loss(_logits(model, part, precision), part) * (part.num_targets / batch.num_targets)
            torch.autograd.backward(loss)
            total += loss.item()
        return total


class Batch(NamedTuple):
    """Windows of equal length: what goes into the model, and what should come out of it: each (windows, tokens)."""

    inputs: Tensor
    targets: Tensor

    @property
    def num_targets(self) -> int:
        """How many tokens are to be predicted."""
        return int((self.targets != NO_TARGET).sum())

    def split(self, size: int) -> list[Batch]:
        """Return parts of `size` windows; 0 for all in one."""
        size = size or len(self.inputs)
        return [
            Batch(*parts) for parts in zip(torch.split(self.inputs, size), torch.split(self.targets, size), strict=True)
        ]


def _batch(stream: TokenStream, windows: list[slice]) -> Batch:
    return Batch(
        torch.stack([stream.tokens[window][:-1] for window in windows]).long(),
        torch.stack([stream.targets[window][1:] for window in windows]).long(),
    )


def _optimizer(parameters: Mapping[str, torch.nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters.values())
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(settings.beta1, settings.beta2),
    )


def _logits(model: Any, batch: Batch, precision: str) -> Tensor:
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits: Tensor = model(input_ids=batch.inputs.to(model.device), use_cache=False).logits
    return logits.float()


def _loss(logits: Tensor, batch: Batch, *, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of the targets of `batch`, of which there are some if it is their mean."""
    return cross_entropy(logits.flatten(0, 1), batch.targets.to(logits.device).flatten(), reduction=reduction)


def _batches_of_equal_length(windows: list[slice]) -> Iterator[list[slice]]:
    by_length: dict[int, list[slice]] = {}
    for window in windows:
        by_length.setdefault(window.stop - window.start, []).append(window)
    for same in by_length.values():
        for start in range(0, len(same), EVAL_BATCH_SIZE):
            yield same[start : start + EVAL_BATCH_SIZE]
