"""What nodes report while they run, for an experiment tracker: wandb, trackio, TensorBoard, or what takes numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from fedmerge.node.events import NodeEvent


class Log(Protocol):
    """What wandb and trackio call `log`: numbers by name, at a step."""

    def __call__(self, values: dict[str, float], /, *, step: int) -> object:
        """Keep these."""
        ...


def tracking(log: Log) -> Callable[[str, NodeEvent], None]:
    """Return an `on_event` that hands every number that a node reports to `log`, with its round as the step.

    Metrics are called NODE/MODEL/METRIC, as in "north/global/loss"; other numbers NODE/KIND/NAME, as in
    "north/delivered/payload_bytes".
    """

    def on_event(node: str, event: NodeEvent) -> None:
        of = event.values.get("model", event.kind) if event.kind == "evaluated" else event.kind
        numbers = {
            f"{node}/{of}/{name}": float(value)
            for name, value in event.values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if numbers:
            log(numbers, step=event.round)

    return on_event


def to_tensorboard(writer: Any) -> Log:
    """Return a `Log` that writes to a `torch.utils.tensorboard.SummaryWriter`, or what has its `add_scalar`."""

    def log(values: dict[str, float], /, *, step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log
