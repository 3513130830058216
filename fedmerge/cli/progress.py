"""What a node does, shown as it happens: live bars on a terminal, one log record per event elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from fedmerge.cli.output import format_bytes, printable, stderr
from fedmerge.node.events import EVENT_FIELD, NodeEvent

log = logging.getLogger(__name__)


class NodeProgress:
    """One line per node. Call it with (name, event), from any thread."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, name: str, event: NodeEvent) -> None:
        """Show an event."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task("", total=None, name=name)
        task, values = self._tasks[name], event.values
        text = printable(describe(event))
        match event.kind:
            case "train":
                self._progress.update(task, completed=values["step"], total=values["num_steps"], description=text)
            case "upload":
                self._progress.update(
                    task, completed=values["sent_bytes"], total=values["payload_bytes"], description=text
                )
            case "finished":
                self._progress.update(task, completed=1, total=1, description=text)
            case _:
                self._progress.update(task, description=text)


def describe(event: NodeEvent) -> str:
    """Return an event as a few words for people."""
    values = event.values
    where = f"round {event.round}"
    match event.kind:
        case "train":
            return f"{where}: training, loss {values['loss']:.3f}"
        case "encoded":
            notes = "".join(f"; {note}" for note in values["notes"])
            return f"{where}: delta has {values['bits_per_parameter']:.3g} bits per parameter{notes}"
        case "upload":
            return f"{where}: uploading {format_bytes(values['payload_bytes'])}"
        case "delivered":
            return f"{where}: delta delivered, waiting for the others"
        case "fetch":
            return f"{where}: fetching {values['what']} ({format_bytes(values['num_bytes'])})"
        case "evaluated":
            scores = ", ".join(f"{key} {value:.3f}" for key, value in values.items() if isinstance(value, float))
            return f"{where}: {values['model']} model: {scores}"
        case "waiting":
            return f"{where}: other nodes are asked, waiting for the next"
        case "cosigned":
            return f"{where}: checked and cosigned the coordinator's log of {values['log_events']} events"
        case "excluded":
            found = "" if values["value"] is None else f", {values['value']:.3g}"
            found += "" if values["limit"] is None else f" against a limit of {values['limit']:.3g}"
            return f"{where}: this site's delta was not merged ({values['reason']}{found})"
        case "missed":
            return f"{where}: missed ({values['reason']})"
        case _:
            return f"finished with version {values['version'][:12]}"


@contextmanager
def node_progress() -> Iterator[NodeProgress]:
    """Show events live on a terminal, as log records elsewhere, while the block runs."""
    if not sys.stderr.isatty():
        yield _LoggedProgress()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.fields[name]:>14}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr, transient=False) as progress:
        yield NodeProgress(progress)


def counting(done: Iterable[object], total: int, what: str) -> None:
    """Exhaust `done`, of `total` things, with a bar on a terminal and in silence elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not sys.stderr.isatty()) as progress:
        for _ in progress.track(done, total=total, description=what):
            pass


class _LoggedProgress(NodeProgress):
    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def __call__(self, name: str, event: NodeEvent) -> None:
        # Bars move often; a log wants to know where they started and ended.
        values = event.values
        done, total = values.get("step", values.get("sent_bytes")), values.get("num_steps", values.get("payload_bytes"))
        if event.kind in {"train", "upload"} and done not in {1, total} and not _tenth(done, total):
            return
        log.info("%s: %s", name, describe(event), extra={EVENT_FIELD: asdict(event)})


def _tenth(done: Any, total: Any) -> bool:
    step = max(1, int(total) // 10)
    return int(done) % step == 0
