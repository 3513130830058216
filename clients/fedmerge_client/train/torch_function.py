"""Run a function of the partner's own as the trainer: any `torch.nn.Module`, in the node's own process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from fedmerge.errors import ConfigError, FedmergeError, InputError, reporting_os_errors
from fedmerge.seeds import derive_seed
from fedmerge.tensors import Checkpoint, copy_side_files, write_weights
from fedmerge.training import STATE, TrainResult, TrainTask, validated
from fedmerge_client.train.own_code import import_attribute, seeded

Value: TypeAlias = bool | int | float | str
OWN = ("function", "model", "evaluate_function", "folder")


@dataclass(frozen=True, slots=True)
class Work:
    """What the function learns of its round beside the model.

    `settings` is the plan's `[train]`, `options` the node's own, `data` and `test` its paths. `round` (of `num_rounds`)
    and `seed` determine what is drawn at random; Python's, numpy's and torch's generators are seeded already. What it
    leaves in `state` it finds in `previous_state` in its next round, which is None in the first.
    """

    settings: Mapping[str, Any]
    options: Mapping[str, Any]
    data: Path | None
    test: Path | None
    round: int
    num_rounds: int
    seed: int
    state: Path
    previous_state: Path | None
    progress: Callable[[int, int, float], None]


class Settings(BaseModel):
    """What a plan may ask for under `[train]`: whatever the functions agreed on, passed on as it is.

    But not what runs: that is each node's own choice.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    function: None = None
    model: None = None
    evaluate_function: None = None
    folder: None = None

    @field_validator(*OWN, mode="before")
    @classmethod
    def _is_for_nodes(cls, value: object) -> None:
        raise ValueError("names what runs at a node, which a plan may not: give it as the node's own option")


class TorchFunction(BaseModel):
    """The `torch` trainer; its fields are a node's own options.

    `model` names, as "package.module:attribute", what returns the module to train: it is given the tensors of the
    global model by their names. `function` names what tunes it in place: called with the module and a `Work`, it
    returns the number of its examples, or that and a dict of metrics. `evaluate_function` names what returns a dict of
    metrics, called with a module and a `Work`. `folder` is where their package lies when it is not installed, `data`,
    `test` and `options` are whatever they need.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    function: Annotated[str, Field(min_length=1)]
    model: Annotated[str, Field(min_length=1)]
    evaluate_function: str | None = None
    folder: Path | None = None
    data: Path | None = None
    test: Path | None = None
    options: dict[str, Value] = {}

    def check(self) -> None:
        """Raise `ConfigError` unless the functions can be imported, `InputError` unless the data are there."""
        for name in (self.function, self.model, self.evaluate_function):
            if name is not None and not callable(self._load(name)):
                raise ConfigError(f"trainer torch: {name!r} is no function")
        for path in (self.data, self.test):
            if path is not None and not path.exists():
                raise InputError(f"{path}: no such file or directory")

    def train(self, task: TrainTask) -> TrainResult:
        """Have the function tune the module, and write its tensors into `workspace/tuned`.

        Integer buffers are left as the global model has them: counters have no mean. Raises `InputError` when the
        function fails, says no number of examples, or leaves other tensors than it was given.
        """
        task.require_whole("torch")
        settings = validated(Settings, task.settings, where="[train]").model_extra or {}
        base = Checkpoint(task.model_dir)
        state, tuned_dir = task.workspace / STATE, task.workspace / "tuned"
        with reporting_os_errors(task.workspace):
            state.mkdir(exist_ok=True)
            tuned_dir.mkdir(exist_ok=True)
        work = Work(
            settings=settings,
            options=self.options,
            data=self.data,
            test=self.test,
            round=task.round,
            num_rounds=task.num_rounds,
            seed=derive_seed(task.seed, task.round, "torch"),
            state=state,
            previous_state=task.previous_state,
            progress=task.progress or _ignore,
        )
        with seeded(work.seed):
            module = self._open(base)
            module.train()
            said = self._call(self.function, module, work)
        num_examples, metrics = said if isinstance(said, tuple) and len(said) == 2 else (said, {})
        if isinstance(num_examples, bool) or not isinstance(num_examples, int) or num_examples < 1:
            raise InputError(
                f"{self.function}: returned {said!r:.60}",
                hint="return the number of examples it trained on, or that and a dict of metrics",
            )
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
        odd = sorted(base.keys() ^ tensors.keys())
        if odd:
            raise InputError(f"{self.function}: after it the module's tensors are others ({odd[0]})")
        copy_side_files(task.model_dir, tuned_dir)
        kept = {name: tensors[name] if base.schema[name].is_float else base[name] for name in base}
        write_weights(kept, tuned_dir, base.shards())
        return TrainResult(tuned_dir, num_examples, _figures(metrics, self.function))

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        """Return what `evaluate_function` says of a model; empty without one."""
        if self.evaluate_function is None:
            return {}
        seed = derive_seed("torch", "evaluate")
        work = Work(
            {}, self.options, self.data, self.test, 0, 0, seed, Path(), None, lambda step, num_steps, loss: None
        )
        with seeded(seed), torch.no_grad():
            module = self._open(Checkpoint(model_dir))
            module.eval()
            return _figures(self._call(self.evaluate_function, module, work), self.evaluate_function)

    def _load(self, name: str) -> Any:
        return import_attribute(name, self.folder, where="trainer torch:")

    def _open(self, weights: Checkpoint) -> torch.nn.Module:
        module = self._call(self.model)
        if not isinstance(module, torch.nn.Module):
            raise InputError(f"{self.model}: returned a {type(module).__name__}, not a torch.nn.Module")
        tensors: dict[str, Tensor] = {name: weights[name] for name in weights}
        try:
            module.load_state_dict(tensors)
        except RuntimeError as err:
            raise InputError(
                f"{self.model}: its module does not have the global model's tensors ({err})",
                hint="names and shapes must be those in model.safetensors, which is the state_dict of such a module",
            ) from err
        return module

    def _call(self, name: str, *arguments: Any) -> Any:
        function = self._load(name)
        try:
            return function(*arguments)
        except FedmergeError:
            raise
        except Exception as err:
            raise InputError(f"{name} failed: {type(err).__name__}: {err}") from err


def _ignore(step: int, num_steps: int, loss: float) -> None:
    """Take note of nothing."""


def _figures(values: object, name: str) -> dict[str, float]:
    if not isinstance(values, Mapping):
        raise InputError(f"{name}: gave {values!r:.60} as metrics, not a dict")
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{name}: metric {key} is {value!r:.50}, not a finite number")
    return {str(key): float(value) for key, value in values.items()}
