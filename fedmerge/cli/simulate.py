"""`fedmerge simulate`: run a whole federation on this machine."""

from __future__ import annotations

import datetime as dt
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from fedmerge.cli.output import JsonFlag, format_bytes, format_ratio, print_json, print_table, printable, stderr, stdout
from fedmerge.cli.progress import node_progress
from fedmerge.config import Config, load_config
from fedmerge.config.base import prepare_base
from fedmerge.errors import ConfigError, RoundFailed, reporting_os_errors
from fedmerge.sim import FederationResult, World, load_trainers, simulate_processes, with_virtual_nodes
from fedmerge.sim import simulate as simulate_inline
from fedmerge.sim import sweep as run_sweep
from fedmerge.sim.page import page
from fedmerge.sim.sweep import Point


def simulate(
    config: Annotated[
        Path, Parameter(help="The federation's configuration, with [[nodes]] or [simulate] nodes.")
    ] = Path("fedmerge.toml"),
    /,
    *,
    processes: Annotated[
        bool, Parameter(negative=(), help="One process for each party, over gRPC and TLS on loopback.")
    ] = False,
    sweep: Annotated[
        tuple[str, ...],
        Parameter(
            name="--sweep",
            help="Simulate once for each of these, SECTION.KEY=VALUE,VALUE, and show what came of each. Repeatable: all"
            " combinations.",
        ),
    ] = (),
    report: Annotated[
        Path | None, Parameter(help="HTML file to write: metrics against rounds, bytes and hours, and a table.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Run coordinator and nodes here, to the last round; started again, it goes on where it was."""
    if sweep:
        for option, is_given in (("--processes", processes), ("--report", report)):
            if is_given:
                raise ConfigError(f"--sweep and {option} do not go together", hint=f"leave {option} out")
        _simulate_grid(config, _grid(sweep), json=json)
        return
    settings = with_virtual_nodes(load_config(config))
    result = _simulate(settings, prepare_base(settings), deployed=config if processes else None)
    if report is not None:
        with reporting_os_errors(report):
            report.write_text(page(result, settings.federation.name), encoding="utf-8")
    if json:
        print_json(result.to_dict())
        return
    print_result(result)
    if any(node.is_bad for node in result.nodes):
        stdout.print(_of_bad_nodes(settings.simulate.attack, result), soft_wrap=True)
    if not processes:
        stdout.print(_took(result))
    sys.stdout.write(f"{result.model_dir}\n")


def _simulate(settings: Config, base_dir: Path | None, deployed: Path | None = None) -> FederationResult:
    """Simulate a federation, or deploy it here, as the file at `deployed` says, in processes of their own."""
    trainers = load_trainers(settings)
    with node_progress() as show:
        if deployed is not None:
            return simulate_processes(settings, deployed, on_event=show)
        return simulate_inline(settings, base_dir, trainers, world=World(time.time()), on_event=show)


def _simulate_grid(path: Path, grid: dict[str, list[str]], *, json: bool) -> None:
    """Simulate the federation for each combination of values, all from the same base model."""
    shared = None if any(key.startswith("model.") for key in grid) else prepare_base(load_config(path))

    def announce(point: Point) -> None:
        stderr.print(f"[bold]{escape(printable(describe_settings(point.settings)))}[/]")

    def run(config: Config) -> FederationResult:
        return _simulate(config, shared)

    result = run_sweep(path, grid, run, on_point=announce)
    if json:
        print_json({"points": result.rows})
        _raise_failures(result.rows)
        return
    print_table(_grid_table(result.rows, grid))
    for row in result.rows:
        if "failure" in row:
            failed = describe_settings({key: row[key] for key in grid})
            stdout.print(escape(printable(f"{failed}: {row['failure']}")))
    sys.stdout.write(f"{result.csv_path}\n")
    _raise_failures(result.rows)


def _raise_failures(rows: Sequence[Mapping[str, object]]) -> None:
    num_failed = sum("failure" in row for row in rows)
    if num_failed:
        raise RoundFailed(f"{num_failed} of {len(rows)} simulations failed", hint="started again, only they are")


def _grid_table(rows: Sequence[Mapping[str, object]], grid: Mapping[str, list[str]]) -> Table:
    """Return a row for each point: what it was chosen for, and what came of it; results.csv has more columns."""
    columns = dict.fromkeys(column for row in rows for column in row)
    hidden = {"rounds", "fetched_bytes", "failure", *(key for key, values in grid.items() if len(values) == 1)}
    shown = [column for column in columns if column not in hidden]
    table = Table(title=f"{len(rows)} simulations")
    for column in shown:
        heading = column.removeprefix("simulate.").removesuffix("_bytes")
        table.add_column(printable(heading), justify="left" if column in {*grid, "version"} else "right")
    some_failed = any("failure" in row for row in rows)
    if some_failed:
        table.add_column("outcome")
    for row in rows:
        outcome = ["failed" if "failure" in row else ""] if some_failed else []
        table.add_row(*(escape(_cell(column, row.get(column))) for column in shown), *outcome)
    return table


def _cell(column: str, value: object) -> str:
    if column == "sent_bytes" and isinstance(value, int):
        return format_bytes(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else printable(str(value))[: 8 if column == "version" else 200]


def describe_settings(settings: Mapping[str, str]) -> str:
    """Return a point of a sweep as a few words."""
    return ", ".join(f"{key} = {value}" for key, value in settings.items())


def _grid(assignments: Sequence[str]) -> dict[str, list[str]]:
    """Parse the SECTION.KEY=VALUE,VALUE of --sweep; raise `ConfigError` for one that is none."""
    grid: dict[str, list[str]] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        # Commas inside of a list or a table belong to the value.
        values = [value.strip() for value in re.findall(r"(?:[^,\[{]|\[[^\]]*\]|\{[^}]*\})+", text)]
        if not re.fullmatch(r"[a-z]+\.\w+", key) or not separator or not all(values) or not values or key in grid:
            raise ConfigError(
                f"--sweep {assignment}: expected SECTION.KEY=VALUE,VALUE, each key once",
                hint="such as merge.density=0.1,0.2",
            )
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise ConfigError(f"--sweep {assignment}: has {twice[0]} twice", hint="leave one out")
        grid[key] = values
    return grid


def _took(result: FederationResult) -> str:
    took = dt.timedelta(seconds=round(result.rounds[-1].published_s))
    num_deltas = sum(each.num_deltas for each in result.rounds)
    sent = format_bytes(sum(each.sent_bytes for each in result.rounds))
    return f"{num_deltas} deltas of {len(result.nodes)} nodes, {sent} in all, in {took} of virtual time"


def _of_bad_nodes(attack: str, result: FederationResult) -> str:
    bad, good = ([node for node in result.nodes if node.is_bad == is_bad] for is_bad in (True, False))
    of_bad, of_good = (
        f"{sum(node.num_merged for node in nodes)} of {sum(node.num_deltas for node in nodes)}" for nodes in (bad, good)
    )
    names = ", ".join(escape(printable(node.name)) for node in bad)
    return f"bad nodes ({attack}): {names}; {of_bad} deltas of theirs were merged, {of_good} of the others'"


def print_result(result: FederationResult) -> None:
    """Print one row per node: scores of the base, its own and the merged model on its test data, and bytes sent."""
    metric = next((name for node in result.nodes for name in ("accuracy", *node.merged) if name in node.merged), None)
    table = Table(title=f"{result.num_rounds} rounds, version {result.version[:12]}")
    for heading in ("node", "examples", f"base {metric or ''}", "own, round 1", "merged", "sent", "against fp32"):
        table.add_column(heading, justify="left" if heading == "node" else "right")
    for node in result.nodes:
        scores = [f"{values[metric]:.3f}" if metric in values else "-" for values in (node.base, node.own, node.merged)]
        ratio = result.dense_bytes * result.num_rounds / node.sent_bytes
        table.add_row(
            node.name, f"{node.num_examples:,}", *scores, format_bytes(node.sent_bytes), f"{format_ratio(ratio)} less"
        )
    print_table(table)
