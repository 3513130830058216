"""`fedmerge rounds`: list a federation's rounds, and tell its running coordinator what to do with them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from cyclopts import Parameter

from fedmerge.cli.output import JsonFlag, format_bytes, print_json, printable

if TYPE_CHECKING:
    from fedmerge.rounds.overview import Overview, RoundRow
    from fedmerge.rounds.retention import RetentionMatrix
    from fedmerge_server.admin import Commands

ConfigPath: TypeAlias = Annotated[Path, Parameter(help="The federation's configuration.")]
Reason: TypeAlias = Annotated[str, Parameter(help="Why; it is kept in the ledger.")]

CONFIG = Path("fedmerge.toml")


def show(config: ConfigPath = CONFIG, /, *, json: JsonFlag = False) -> None:
    """List the rounds: phase, deltas, version, bytes, mean metrics, retention. Works without a coordinator, too."""
    from fedmerge.config import load_config
    from fedmerge.errors import InputError
    from fedmerge.rounds.overview import overview
    from fedmerge.store.database import Database
    from fedmerge.store.ledger import Ledger
    from fedmerge.trust.keys import TrustStore

    settings = load_config(config, to_merge=False)
    if settings.store.database is None and not (settings.federation.state / "ledger.sqlite").exists():
        raise InputError(f"{settings.federation.state}: holds no federation yet", hint="start it: fedmerge serve")
    ledger = Ledger(Database(settings.database_url()))
    try:
        trust = TrustStore(settings.federation.trusted)
        found = overview(ledger.entries, trust.keys(), trust.names())
    finally:
        ledger.close()
    if json:
        print_json(found.to_dict())
    else:
        sys.stdout.write(_table(found, settings.rounds.publish_after_cosignatures))


def pause(config: ConfigPath = CONFIG, /, *, reason: Reason) -> None:
    """Open and close no rounds until they are resumed. Deltas are still taken."""
    number = _tell(config, lambda coordinator: coordinator.pause(reason))
    _say(f"paused in round {number}; to go on: fedmerge rounds resume")


def resume(config: ConfigPath = CONFIG, /, *, reason: Reason) -> None:
    """End a pause; the open round's deadline is as much later as the pause was long."""
    number = _tell(config, lambda coordinator: coordinator.resume(reason))
    _say(f"round {number} goes on")


def close(config: ConfigPath = CONFIG, /, *, reason: Reason) -> None:
    """Seal the open round now, with the deltas that it has: of min_nodes nodes at least."""
    number = _tell(config, lambda coordinator: coordinator.close(reason))
    _say(f"round {number} is being closed")


def extend(
    seconds: Annotated[float, Parameter(help="How much later; less than 0 is earlier.", allow_leading_hyphen=True)],
    config: ConfigPath = CONFIG,
    /,
    *,
    reason: Reason,
) -> None:
    """Move the open round's deadline."""
    number = _tell(config, lambda coordinator: coordinator.extend(seconds, reason))
    _say(f"round {number} ends {seconds:g} s later")


def retry(config: ConfigPath = CONFIG, /, *, reason: Reason) -> None:
    """Open a round that failed once more. Starting the coordinator anew does that, too."""
    number = _tell(config, lambda coordinator: coordinator.retry(reason))
    _say(f"round {number} is opened again")


def rollback(
    round_number: Annotated[int, Parameter(name="ROUND", help="Whose version; 0 is the base model.")],
    config: ConfigPath = CONFIG,
    /,
    *,
    reason: Reason,
) -> None:
    """Start the next round from an earlier version; one that is open is given up and opened again from there."""
    _tell(config, lambda coordinator: coordinator.roll_back(round_number, reason))
    _say(f"the next round starts from the version of round {round_number}")


def _tell(config: Path, command: Callable[[Commands], int]) -> int:
    from fedmerge.config import load_config
    from fedmerge_server.admin import commanding

    with commanding(load_config(config, to_merge=False).federation.state) as coordinator:
        return command(coordinator)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _table(found: Overview, cosignatures: int) -> str:
    header = ("round", "phase", "deltas", "received", "version", "metrics")
    rows = [header, *map(_cells, found.rounds)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for row in found.rounds:
        failure = [f"failed: {row.failure}"] if row.failure else []
        refused = [f"delta of node {node_id[:12]} was refused: {detail}" for node_id, detail in row.rejected.items()]
        refused += [f"node {node_id[:12]} is left out: {detail}" for node_id, detail in row.refused.items()]
        lines += [printable(f"round {row.round}: {note}") for note in (*row.notes, *refused, *failure)]
    if found.retention is not None:
        lines += ["", *_retention(found.retention)]
    if found.rounds and found.rounds[-1].phase == "publishing" and found.num_witnesses < cosignatures:
        lines.append(f"waits for cosignatures: of {found.num_witnesses} members, and {cosignatures} are needed")
    if found.is_paused:
        lines.append("paused: fedmerge rounds resume")
    return "\n".join(lines) + "\n"


def _retention(matrix: RetentionMatrix) -> list[str]:
    """Return the lines of the retention matrix: a node each, a round a column."""
    shares = [(printable(task.node), task.retention) for task in matrix.tasks] + [("mean", matrix.mean)]
    rows = [("retention", *map(str, range(1, matrix.num_rounds + 1)))]
    rows += [(name, *("-" if share is None else f"{share:.0%}" for share in found)) for name, found in shares]
    width = max(len(row[0]) for row in rows)
    lines = [row[0].ljust(width) + "".join(cell.rjust(6) for cell in row[1:]) for row in rows]
    return [*lines, printable(f"({matrix.described})")]


def _cells(row: RoundRow) -> tuple[str, ...]:
    deltas = f"{row.num_deltas}" + (f" ({row.num_late} late)" if row.num_late else "")
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in row.metrics.items())
    phase = row.phase + (f" (attempt {row.attempt})" if row.attempt > 1 else "")
    return (f"{row.round}", phase, deltas, format_bytes(row.received_bytes), row.version[:12] or "-", metrics or "-")
