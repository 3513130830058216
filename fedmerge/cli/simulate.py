"""`fedmerge simulate`: run a whole federation on this machine."""

from __future__ import annotations

import datetime as dt
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from fedmerge.cli.base import prepare_base
from fedmerge.cli.output import JsonFlag, format_bytes, format_ratio, print_json, stdout
from fedmerge.cli.progress import node_progress
from fedmerge.config import Config, load_config
from fedmerge.errors import ConfigError
from fedmerge.sim import FederationResult, World, open_engine, simulate_processes, with_virtual_nodes
from fedmerge.sim import simulate as simulate_inline
from fedmerge.training import check_plan, load_trainer


def simulate(
    config: Annotated[Path, Parameter(help="The federation's configuration, with [[nodes]].")] = Path("fedmerge.toml"),
    /,
    *,
    processes: Annotated[
        bool, Parameter(negative=(), help="One process for each party, over gRPC and TLS on loopback.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Run coordinator and nodes here, to the last round; started again, it goes on where it was."""
    settings = with_virtual_nodes(load_config(config))
    if not settings.nodes:
        hint = "add a [[nodes]] section for each, or set simulate.nodes and simulate.data"
        raise ConfigError(f"{config}: there are no nodes to simulate", hint=hint)
    if len(settings.nodes) < settings.rounds.min_nodes:
        raise ConfigError(f"{config}: rounds.min_nodes is more than the {len(settings.nodes)} nodes there are")
    check_plan(settings.train.trainer, settings.train.extras)
    trainers = {
        node.name: load_trainer(settings.train.trainer, node.model_dump(exclude={"name"}, exclude_none=True))
        for node in settings.nodes
    }
    for trainer in trainers.values():
        trainer.check()
    base_dir = prepare_base(settings)
    with node_progress() as show:
        if processes:
            result = simulate_processes(settings, config, on_event=show)
        else:
            with closing(open_engine(settings.simulate)) as engine:
                world = World(time.time())
                result = simulate_inline(settings, base_dir, trainers, world=world, engine=engine, on_event=show)
    if json:
        print_json(result.to_dict())
        return
    print_result(result)
    if not processes:
        stdout.print(_took(settings, result))
    sys.stdout.write(f"{result.model_dir}\n")


def _took(settings: Config, result: FederationResult) -> str:
    took = dt.timedelta(seconds=round(result.rounds[-1].published_s))
    num_deltas = sum(each.num_deltas for each in result.rounds)
    sent = format_bytes(sum(each.sent_bytes for each in result.rounds))
    return f"{num_deltas} deltas of {len(settings.nodes)} nodes, {sent} in all, in {took} of virtual time"


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
    stdout.print(table)
