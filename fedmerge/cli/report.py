"""`fedmerge report`: how a federation goes, in numbers that its nodes signed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from fedmerge.cli.output import JsonFlag, print_json, printable, stdout
from fedmerge.config import load_config
from fedmerge.coordinator.report import read_report
from fedmerge.merge.measure import Interference
from fedmerge.rounds.retention import RetentionMatrix


def report(
    config: Annotated[Path, Parameter(help="The federation's configuration.")] = Path("fedmerge.toml"),
    /,
    *,
    metric: Annotated[
        str,
        Parameter(help="Which of the nodes' metrics: NAME, or -NAME where lower is better. auto: accuracy or -loss."),
    ] = "auto",
    json: JsonFlag = False,
) -> None:
    """Show what each merged model keeps of the nodes' own (retention, by round), and how the last deltas interfere."""
    found = read_report(load_config(config), metric)
    if json:
        print_json(found.to_dict())
        return
    if found.retention is None:
        stdout.print("no node scored a model: none has test data")
    else:
        _show_retention(found.retention)
    _show_interference(found.interference)


def _show_retention(matrix: RetentionMatrix) -> None:
    table = Table(title=f"retention by round: {printable(matrix.described)}")
    table.add_column("node")
    for heading in ("base", "own", "merged", *map(str, range(1, matrix.num_rounds + 1)), "forgot"):
        table.add_column(heading, justify="right")
    for task in matrix.tasks:
        last = [_value(values[-1]) for values in (task.own, task.merged)]
        shares = map(_share, task.retention)
        table.add_row(escape(printable(task.node)), _value(task.base), *last, *shares, _value(task.forgetting))
    table.add_row("mean", "", "", "", *map(_share, matrix.mean), "")
    stdout.print(table)


def _show_interference(found: Interference) -> None:
    names = [model.name for model in found.models]
    table = Table(title="interference of the last round's deltas: cosine, and conflict of signs by magnitude")
    table.add_column("")
    for name in names:
        table.add_column(escape(printable(name)), justify="right")
    pairs = {frozenset(pair): agreement for pair, agreement in found.pairs.items()}
    for row in names:
        cells = []
        for column in names:
            pair = pairs.get(frozenset((row, column)))
            if pair is None:
                cells.append("")
            else:
                cosine = "-" if pair.cosine is None else f"{pair.cosine:z.3f}"
                cells.append(f"{cosine}  {_share(pair.weighted_conflict)}")
        table.add_row(escape(printable(row)), *cells)
    stdout.print(table)


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:z.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
