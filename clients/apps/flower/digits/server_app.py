"""The server's side: an ordinary ServerApp whose strategy is fedmerge's."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from digits.task import make_model
from fedmerge.delta.codec import Codec
from fedmerge.interop.flower import MergeStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds, and print what they came to."""
    method, codec = str(context.run_config["method"]), str(context.run_config["codec"])
    strategy = (
        FedAvg()
        if method == "flower"
        else MergeStrategy(method, codec=None if codec == "none" else Codec(values=codec))
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(make_model().state_dict()),
        num_rounds=int(context.run_config["num-server-rounds"]),
    )
    for number, metrics in result.evaluate_metrics_clientapp.items():
        print(f"round {number}: accuracy {metrics['accuracy']:.3f}")  # noqa: T201
