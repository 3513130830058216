"""Step 0, train: what a node asks of a trainer, and the table of those that are shipped.

A trainer takes a Hugging Face model directory and leaves another with the same tensors, tuned on data that only the
node sees. Trainers live with the client, because they need a training framework; here is the contract alone, and
trainers are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel, ValidationError

from fedmerge.errors import ConfigError, MissingExtra, did_you_mean
from fedmerge.tensors import TensorMap

STATE = "trainer-state"


@dataclass(frozen=True, slots=True)
class TrainTask:
    """One node's work in one round.

    `model_dir` is the global model, a Hugging Face directory that must be left as it is; `settings` is what the
    round's plan says under `[train]`; `round` (of `num_rounds`) and `seed` determine everything that is drawn at
    random; `workspace` is the node's private scratch directory, which exists; `progress` is called with (step,
    num_steps, loss). `share` is which part of the plan's steps this node is asked for; `settings` has its own number.
    `part` are those of the round's steps that are to be taken now, counted from 0; all of them where it is None. What a
    trainer keeps is then what the next part goes on from.

    A trainer may keep an optimizer's state and the like in the folder `workspace / STATE`. `previous_state` is that
    folder of the last round that this node sent a delta in, None in its first. It must be left as it is: if a round is
    interrupted or opened again, its training starts from there once more.
    """

    model_dir: Path
    settings: Mapping[str, Any]
    round: int
    seed: int
    workspace: Path
    progress: Callable[[int, int, float], None] | None = None
    num_rounds: int = 1
    share: float = 1.0
    previous_state: Path | None = None
    part: range | None = None

    def require_whole(self, trainer: str) -> None:
        """Raise `ConfigError` where only a part of a round's steps is asked for, which the `trainer` can't tell."""
        if self.part is not None:
            raise ConfigError(
                f"trainer {trainer} takes all steps of a round at once, and the plan has streaming.overlap_steps",
                hint=f"a plan without it, or a trainer that counts steps: {', '.join(COUNTING)}",
            )


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a trainer leaves: `model_dir` has the tensors of the global model under the same names, tuned.

    Or it has a LoRA adapter of the global model, as PEFT saves it; for `evaluate` it is then merged into a whole model.
    `num_examples` is the size of the node's training data, `metrics` whatever the trainer measured on the way.
    """

    model_dir: Path
    num_examples: int
    metrics: dict[str, float] = field(default_factory=dict)


class Trainer(Protocol):
    """A way to fine-tune; made from a node's own options (data paths and the like) by `load_trainer`."""

    def check(self) -> None:
        """Raise `InputError` or `ConfigError` now if the data can't be trained on, and not in the middle of a round."""
        ...

    def train(self, task: TrainTask) -> TrainResult:
        """Tune `task.model_dir` into a new directory under `task.workspace`. Same task and machine, same weights."""
        ...

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        """Return metrics of a model on the node's test data; empty when it has none."""
        ...


@runtime_checkable
class StatisticsTrainer(Trainer, Protocol):
    """A trainer that can also say how a model treats the node's data, for merge methods that weigh by that."""

    def statistics(self, model_dir: Path, kind: str) -> TensorMap:
        """Return statistics of one `kind` (of `merge.statistics`) of a model on the training data, by parameter.

        Parameters that are left out have zeros. Same model and data, same statistics.
        """
        ...


def require_statistics(trainer: Trainer, kind: str, method: str) -> StatisticsTrainer:
    """Return `trainer` if it computes statistics; raise `ConfigError` if a round asks for what it does not have."""
    if not isinstance(trainer, StatisticsTrainer):
        raise ConfigError(
            f"merge method {method} needs {kind} statistics, which this node's trainer does not compute",
            hint="the plan needs another merge.method, or this node another trainer",
        )
    return trainer


# Pydantic models, so that options from a configuration file are checked before anything is loaded. Beside each stands,
# in its module and called `Settings`, the model of what a plan may ask of it.
TRAINERS: dict[str, str] = {
    "checkpoint": "fedmerge_client.train.checkpoint:ExistingCheckpoint",
    "command": "fedmerge_client.train.command:Command",
    "causal-lm": "fedmerge_client.train.causal_lm:CausalLM",
    "flower": "fedmerge_client.train.flower:FlowerApp",
    "torch": "fedmerge_client.train.torch_function:TorchFunction",
    "text-classification": "fedmerge_client.train.text_classification:TextClassification",
}
# Those that can be asked for a part of a round's steps.
COUNTING = ("causal-lm", "text-classification")


def load_trainer(name: str, options: Mapping[str, Any]) -> Trainer:
    """Import the trainer that `TRAINERS` calls `name` and make it from a node's `options`.

    Raises `ConfigError` for an unknown name or option and `MissingExtra` when its framework is not installed.
    """
    module, attribute = _module_of(name)
    trainer: Trainer = validated(getattr(module, attribute), options, where=f"trainer {name}")
    return trainer


def check_plan(name: str, settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless the trainer called `name` takes the `settings` that a plan has under `[train]`.

    Raises `MissingExtra` when its framework is not installed.
    """
    module, _ = _module_of(name)
    validated(module.Settings, settings, where="[train]")


def _module_of(name: str) -> tuple[Any, str]:
    if name not in TRAINERS:
        raise ConfigError(
            f"unknown trainer {name!r}{did_you_mean(name, TRAINERS)}", hint=f"one of {', '.join(sorted(TRAINERS))}"
        )
    module, _, attribute = TRAINERS[name].partition(":")
    extra = "flower" if name == "flower" else "client"
    return import_client(module, f"the {name} trainer", extra=extra), attribute


def import_client(module: str, what: str, *, extra: str = "client") -> Any:
    """Import a module of the client's; raise `MissingExtra` when `what` needs something that is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        raise MissingExtra(
            f"{what} needs {(err.name or module).partition('.')[0]}", hint=f'pip install "fedmerge[{extra}]"'
        ) from err


ModelT = TypeVar("ModelT", bound=BaseModel)


def validated(model: type[ModelT], values: Mapping[str, Any], *, where: str) -> ModelT:
    """Return `values` as a pydantic `model`; `where` says where they were written.

    Raises `ConfigError` that names each key at fault, with the nearest known one for a key that does not exist.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as err:
        problems = []
        for problem in err.errors(include_url=False, include_context=False):
            key = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                problems.append(f"{key}: unknown key{did_you_mean(key, model.model_fields)}")
            else:
                problems.append(f"{key}: {problem['msg'][:1].lower()}{problem['msg'][1:]}")
        known = ", ".join(model.model_fields)
        raise ConfigError(f"{where}: {'; '.join(problems)}", hint=f"known keys: {known}") from err
