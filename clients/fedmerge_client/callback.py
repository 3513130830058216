"""`FedMergeCallback`: a federation in someone's own Hugging Face Trainer script, by one line.

    trainer = Trainer(model, args, train_dataset=data, callbacks=[callback := FedMergeCallback(address, bundle, home)])
    for _ in callback.rounds():
        trainer.train()
    print(callback.model_dir)

The script stays in charge of training. A node runs beside it, in a thread, and the two take turns: the node waits for a
round and fetches its model, training begins from that, and at its end the node sends what has changed.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from fedmerge.errors import ConfigError, InputError
from fedmerge.node.node import Node
from fedmerge.node.witness import Witness
from fedmerge.seeds import derive_seed
from fedmerge.tensors import Checkpoint
from fedmerge.training import TrainResult, TrainTask
from fedmerge.trust.sign import SigningKey
from fedmerge_client.link import GrpcLink

Evaluate = Callable[[Path], dict[str, float]]


@dataclass(frozen=True)
class _Ended:
    """The federation has ended, with a model or an error."""

    model_dir: Path | None
    error: BaseException | None


@dataclass
class _Handover:
    """A `fedmerge.training.Trainer` that has somebody else train: tasks go out by a queue, results come by another."""

    evaluate_with: Evaluate | None
    tasks: queue.Queue[TrainTask | _Ended] = field(default_factory=queue.Queue)
    results: queue.Queue[TrainResult] = field(default_factory=queue.Queue)

    def check(self) -> None:
        """Accept anything: the script has looked at its data itself."""

    def train(self, task: TrainTask) -> TrainResult:
        task.require_whole("FedMergeCallback")
        self.tasks.put(task)
        return self.results.get()

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        return {} if self.evaluate_with is None else self.evaluate_with(model_dir)


class FedMergeCallback(TrainerCallback):
    """Takes part in a federation whenever the Trainer that it was given to trains.

    `coordinator` is HOST:PORT and `bundle` the operator's coordinator.pem; `home` is the node's folder, with its key in
    node.key, made if there is none, unless `key` is another one. `num_examples` is that of the training data set, where
    it has no length. `evaluate` scores a model directory on this site's test data; what it returns is sent, signed. The
    model may be wrapped by PEFT with one LoRA adapter, which then begins anew in every round and is all that is sent.
    Random generators are seeded for each round, or a Trainer would draw the same batches in all of them.
    """

    def __init__(
        self,
        coordinator: str,
        bundle: Path,
        home: Path,
        *,
        key: Path | None = None,
        base: Path | None = None,
        num_examples: int | None = None,
        evaluate: Evaluate | None = None,
    ) -> None:
        self.model_dir: Path | None = None
        self._address = coordinator, bundle
        self._home, self._base = home, base
        self._key_path = key or home / "node.key"
        self._num_examples = num_examples
        self._handover = _Handover(evaluate)
        self._thread: threading.Thread | None = None
        self._task: TrainTask | None = None

    def rounds(self) -> Iterator[int]:
        """Yield the number of each round that this site is to train for; at the end, `model_dir` is the final model.

        Call the Trainer's `train` once for each. Raises what made the node give up.
        """
        while (task := self._next()) is not None:
            yield task.round
            if self._task is task:
                raise ConfigError(f"round {task.round}: nothing was trained", hint="call trainer.train() once a round")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Wait for a round, and give the model its weights. Raises `ConfigError` when the federation has ended."""
        task = self._next()
        if task is None:
            raise ConfigError("the federation has ended: there is no round to train for")
        _load(model, Checkpoint(task.model_dir))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Save the model, and leave it to the node to send."""
        task, self._task = self._task, None
        if task is None:
            return
        num_examples = self._num_examples or _length(train_dataloader)
        tuned = task.workspace / "tuned"
        model.save_pretrained(str(tuned))
        losses = [float(entry["train_loss"]) for entry in state.log_history if "train_loss" in entry]
        self._handover.results.put(TrainResult(tuned, num_examples, {"loss": losses[-1]} if losses else {}))

    def _next(self) -> TrainTask | None:
        """Return the task that is to be trained for, waiting for it if need be; None when the federation has ended."""
        if self._task is None and self.model_dir is None:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fedmerge-node", daemon=True)
                self._thread.start()
            found = self._handover.tasks.get()
            if isinstance(found, TrainTask):
                self._task = found
                set_seed(derive_seed(found.seed, found.round, "trainer") % 2**32)
            elif found.error is not None:
                raise found.error
            else:
                self.model_dir = found.model_dir
        return self._task

    def _run(self) -> None:
        try:
            if not self._key_path.exists():
                SigningKey.generate().save(self._key_path)
            key = SigningKey.load(self._key_path)
            address, bundle = self._address
            link = GrpcLink(address, bundle, key, home=self._home)
            try:
                link.connect()
                witness = Witness(self._home, link, key, link.pin, time.time)
                node = Node(link, self._handover, key, link.pin, self._home, base=self._base, witness=witness)
                self._handover.tasks.put(_Ended(node.run(), None))
            finally:
                link.close()
        except BaseException as err:
            self._handover.tasks.put(_Ended(None, err))


def _load(model: Any, weights: Checkpoint) -> None:
    """Give a model the `weights`, in place, and an adapter that it has a new beginning.

    Raises `InputError` for weights that it has no place for.
    """
    inner = model
    if hasattr(model, "peft_config"):
        inner = model.get_base_model()
        for module in model.modules():
            if hasattr(module, "reset_lora_parameters"):
                for name in module.r:
                    module.reset_lora_parameters(name, True)
    places = {name.replace(".base_layer.", "."): tensor for name, tensor in inner.state_dict(keep_vars=True).items()}
    odd = [name for name in weights if name not in places or places[name].shape != weights[name].shape]
    if odd:
        raise InputError(
            f"the federation's model has {odd[0]}, and the Trainer's has none of that shape",
            hint="make the Trainer's model from the federation's base model",
        )
    with torch.no_grad():
        for name in weights:
            places[name].copy_(weights[name])


def _length(loader: Any) -> int:
    try:
        return len(loader.dataset)
    except (TypeError, AttributeError) as err:
        raise InputError("the training data have no length", hint="give FedMergeCallback a num_examples") from err
