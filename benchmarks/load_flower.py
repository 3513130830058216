"""The Flower App that `load_rounds.py` has SuperNodes run: FedAvg over models that take a drawn step."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from load_step import STEP_METRIC, add_step, first_model

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Any) -> Message:
    """Add a step to the model."""
    model = {name: array.numpy() for name, array in message.content["arrays"].items()}
    took_s = add_step(model, int(message.content["config"]["server-round"]), int(context.node_config["partition-id"]))
    metrics = MetricRecord({"num-examples": 1, STEP_METRIC: took_s})
    arrays = ArrayRecord({name: Array(values) for name, values in model.items()})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


class Noted(FedAvg):
    """FedAvg, which notes in a file when rounds begin and end, and what was moved."""

    def __init__(self, notes: Path, num_nodes: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=num_nodes, min_available_nodes=num_nodes)
        self._notes = notes

    def _note(self, **what: object) -> None:
        with self._notes.open("a") as file:
            file.write(json.dumps({"at_s": time.time(), **what}) + "\n")

    def configure_train(self, server_round: int, arrays: ArrayRecord, *others: Any) -> Iterable[Message]:
        """Note a beginning."""
        self._note(begins=server_round)
        messages = list(super().configure_train(server_round, arrays, *others))
        self._down_bytes = len(messages) * _bytes_of(arrays)
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """Note an end."""
        replies = list(replies)
        good = [reply.content for reply in replies if not reply.has_error()]
        up_bytes = sum(_bytes_of(content["arrays"]) for content in good)
        step_cpu_s = sum(float(content["metrics"][STEP_METRIC]) for content in good)
        found = super().aggregate_train(server_round, replies)
        self._note(
            ends=server_round, replies=len(good), step_cpu_s=step_cpu_s, up_bytes=up_bytes, down_bytes=self._down_bytes
        )
        return found


def _bytes_of(arrays: ArrayRecord) -> int:
    return sum(len(array.data) for array in arrays.values())


@server.main()
def serve(grid: Any, context: Any) -> None:
    """Run the rounds."""
    asked = context.run_config
    model = ArrayRecord({name: Array(values) for name, values in first_model(str(asked["size"])).items()})
    strategy = Noted(Path(str(asked["notes"])), int(asked["num-nodes"]))
    strategy.start(grid=grid, initial_arrays=model, num_rounds=int(asked["num-rounds"]))
