"""Run a Flower ClientApp as the trainer of a node: the app stays as it is, and its site takes part in signed rounds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TypeAlias

from flwr.app import DEFAULT_TTL, ConfigRecord, Context, Message, MessageType, Metadata, RecordDict
from flwr.clientapp import ClientApp
from pydantic import BaseModel, ConfigDict, PrivateAttr
from torch import Tensor

from fedmerge.errors import ConfigError, FedmergeError, InputError
from fedmerge.interop.flower.arrays import to_record, to_tensors
from fedmerge.interop.flower.mod import only_arrays
from fedmerge.seeds import derive_seed
from fedmerge.tensors import Checkpoint, copy_side_files, require_same_schema, schema_of, write_weights
from fedmerge.training import TrainResult, TrainTask, validated
from fedmerge_client.train.own_code import import_attribute, seeded

Value: TypeAlias = bool | int | float | str


class Settings(BaseModel):
    """What a plan may ask for under `[train]`.

    `run_config` is what the app finds in `context.run_config`, `config` what it finds in the message's ConfigRecord
    beside `server-round`, as a Flower strategy would send it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_config: dict[str, Value] = {}
    config: dict[str, Value] = {}


class FlowerApp(BaseModel):
    """The `flower` trainer; its fields are a node's own options.

    `app` names the ClientApp as a Flower App's pyproject.toml does, "package.module:attribute"; `folder` is where its
    package lies when it is not installed. `node_config` is what the app finds in `context.node_config`, such as
    `partition-id`. `weighted_by_key`, `arrayrecord_key` and `configrecord_key` are as for Flower's strategies. What
    the app keeps in `context.state` lasts while the node runs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    app: str
    folder: Path | None = None
    node_config: dict[str, Value] = {}
    weighted_by_key: str = "num-examples"
    arrayrecord_key: str = "arrays"
    configrecord_key: str = "config"

    _state: RecordDict = PrivateAttr(default_factory=RecordDict)
    _settings: Settings = PrivateAttr(default_factory=Settings)

    def check(self) -> None:
        """Raise `ConfigError` unless `app` names a ClientApp that can be imported."""
        self._load()

    def train(self, task: TrainTask) -> TrainResult:
        """Have the app train on the weights of `task.model_dir`, and write what it replies into `workspace/tuned`.

        Random generators of Python, numpy and torch are seeded for each round. Raises `InputError` when the app fails,
        or its reply is no model of the same architecture with one metric record.
        """
        task.require_whole("flower")
        self._settings = validated(Settings, task.settings, where="[train]")
        base = Checkpoint(task.model_dir)
        content = self._ask(MessageType.TRAIN, base, task.round, derive_seed(task.seed, task.round, "flower"))
        try:
            tuned = to_tensors(only_arrays(content)[1])
        except FedmergeError as err:
            raise InputError(f"{self.app}: {err.message}", hint=err.hint) from err
        require_same_schema(base.schema, schema_of(tuned), where=self.app)
        metrics = self._metrics(content)
        num_examples = metrics.pop(self.weighted_by_key, None)
        if num_examples is None:
            raise InputError(f"{self.app}: the reply's metrics have no {self.weighted_by_key!r}")
        directory = task.workspace / "tuned"
        directory.mkdir(exist_ok=True)
        copy_side_files(task.model_dir, directory)
        write_weights(tuned, directory, base.shards())
        return TrainResult(directory, int(num_examples), metrics)

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        """Return the metrics that the app replies to an evaluate message; empty when it answers none."""
        try:
            content = self._ask(MessageType.EVALUATE, Checkpoint(model_dir), 0, derive_seed("flower", "evaluate"))
        except _NotHandled:
            return {}
        metrics = self._metrics(content)
        metrics.pop(self.weighted_by_key, None)
        return metrics

    def _ask(self, kind: str, model: Checkpoint, round_number: int, seed: int) -> RecordDict:
        """Return what the app replies to a message with `model`."""
        app = self._load()
        tensors: dict[str, Tensor] = {name: model[name] for name in model}
        config = ConfigRecord({**self._settings.config, "server-round": round_number})
        records = RecordDict({self.arrayrecord_key: to_record(tensors), self.configrecord_key: config})
        context = Context(
            run_id=1,
            node_id=1,
            node_config=dict(self.node_config),
            state=self._state,
            run_config=dict(self._settings.run_config),
        )
        # Outside of Flower's own processes a message has no sender to take its metadata from, so they are given.
        metadata = Metadata(
            run_id=context.run_id,
            message_id="fedmerge",
            src_node_id=0,
            dst_node_id=context.node_id,
            reply_to_message_id="",
            group_id=str(round_number),
            created_at=time.time(),
            ttl=DEFAULT_TTL,
            message_type=kind,
        )
        message = Message(content=records, metadata=metadata)  # type: ignore[call-overload]
        with seeded(seed):
            try:
                reply = app(message, context)
            except Exception as err:
                if str(err).startswith(f"No {kind} function"):
                    raise _NotHandled(str(err)) from err
                raise InputError(f"{self.app}: the app failed on {kind}: {type(err).__name__}: {err}") from err
        if reply.has_error():
            raise InputError(f"{self.app}: the app answered {kind} with an error: {reply.error.reason}")
        return reply.content

    def _metrics(self, content: RecordDict) -> dict[str, float]:
        values = {}
        for record in content.metric_records.values():
            values.update({key: float(value) for key, value in record.items() if isinstance(value, int | float)})
        return values

    def _load(self) -> ClientApp:
        app = import_attribute(self.app, self.folder, where="trainer flower: app")
        if not isinstance(app, ClientApp):
            raise ConfigError(f"trainer flower: {self.app!r} is a {type(app).__name__}, not a ClientApp")
        return app


class _NotHandled(Exception):
    pass
