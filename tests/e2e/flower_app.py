"""Several strategies, one after the other, under Flower's own simulation engine; run by test_flower.py as a program.

A client adds a fixed step of its own to the model, so that a test can work out what every strategy should arrive at.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from fedmerge.delta.codec import Codec
from fedmerge.interop.flower import MergeStrategy, fedmerge_delta
from fedmerge.merge import Recipe
from fedmerge.screening.checks import ScreenPolicy

NUM_CLIENTS = 3
EXAMPLES = [10, 20, 30]
SHAPE = (64, 256)


def base() -> dict[str, np.ndarray]:
    draw = np.random.Generator(np.random.PCG64(0))
    return {
        "matrix": draw.standard_normal(SHAPE, dtype=np.float32),
        "bias": draw.standard_normal(64, dtype=np.float32),
        "steps": np.array(7),
    }


def step(partition_id: int) -> dict[str, np.ndarray]:
    draw = np.random.Generator(np.random.PCG64(partition_id + 1))
    return {
        "matrix": 0.01 * draw.standard_normal(SHAPE, dtype=np.float32),
        "bias": 0.01 * draw.standard_normal(64, dtype=np.float32),
    }


client_app = ClientApp(mods=[fedmerge_delta])


@client_app.train()
def train(message: Message, context: Context) -> Message:
    partition_id = int(context.node_config["partition-id"])
    config = message.content["config"]
    arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
    for name, change in step(partition_id).items():
        arrays[name] = arrays[name] + change
    if partition_id == 1 and "bad" in config:
        if config["bad"] == "crash":
            raise RuntimeError("out of memory")
        if config["bad"] == "nan":
            arrays["matrix"][0, 0] = np.nan
        if config["bad"] == "shape":
            arrays["bias"] = arrays["bias"][:1]
        if config["bad"] == "name":
            arrays["extra"] = arrays.pop("bias")
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    metrics = MetricRecord({"num-examples": EXAMPLES[partition_id]})
    return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)


UNCAPPED = ScreenPolicy(max_weight_ratio=1e6)
TOPK = Codec(sparsify="topk", density=64 / 4096, values="fp32", small_elements=4096)
RUNS = {
    # What the first strategy averages are the clients that answer while everything starts: it is not looked at. Both
    # wait until every client has connected, where Flower's default is two.
    "start": (FedAvg(fraction_evaluate=0.0, min_available_nodes=NUM_CLIENTS), {}, 1),
    "flower": (FedAvg(fraction_evaluate=0.0, min_available_nodes=NUM_CLIENTS, min_train_nodes=NUM_CLIENTS), {}, 1),
    "fedavg": (MergeStrategy("fedavg", screen=UNCAPPED, fraction_evaluate=0.0), {}, 1),
    "ties": (MergeStrategy(Recipe("ties", {"density": 0.3}), fraction_evaluate=0.0), {}, 1),
    "lawa": (
        MergeStrategy(
            Recipe.from_steps([("fedavg", {}), ("lawa", {"latest": 2})]), screen=UNCAPPED, fraction_evaluate=0.0
        ),
        {},
        3,
    ),
    "nesterov": (
        MergeStrategy(outer={"name": "nesterov", "lr": 0.7, "momentum": 0.9}, screen=UNCAPPED, fraction_evaluate=0.0),
        {},
        3,
    ),
    "int8": (MergeStrategy("fedavg", codec=Codec(), screen=UNCAPPED, fraction_evaluate=0.0), {}, 1),
    "topk": (
        MergeStrategy("fedavg", codec=TOPK, error_feedback=1.0, screen=UNCAPPED, fraction_evaluate=0.0),
        {},
        70,
    ),
    **{
        f"bad {kind}": (MergeStrategy("fedavg", screen=UNCAPPED, fraction_evaluate=0.0), {"bad": kind}, 1)
        for kind in ("crash", "nan", "shape", "name")
    },
}


def main() -> None:
    out = Path(sys.argv[1])
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        for label, (strategy, config, num_rounds) in RUNS.items():
            initial = ArrayRecord({name: Array(array) for name, array in base().items()})
            result = strategy.start(
                grid=grid, initial_arrays=initial, num_rounds=num_rounds, train_config=ConfigRecord(config)
            )
            np.savez(out / f"{label}.npz", **{name: array.numpy() for name, array in result.arrays.items()})
            metrics = {number: dict(record) for number, record in result.train_metrics_clientapp.items()}
            (out / f"{label}.json").write_text(json.dumps(metrics))

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app, client_app, num_supernodes=NUM_CLIENTS, backend_config=resources)


if __name__ == "__main__":
    main()
