"""Nodes that exist only in a simulation: made up, each with a part of one data set."""

from __future__ import annotations

import json
from pathlib import Path

from fedmerge.config import Config
from fedmerge.config.simulate import SimulatedNode
from fedmerge.errors import ConfigError, reporting_os_errors
from fedmerge.seeds import derive_seed
from fedmerge.sim.adversary import with_flipped_labels
from fedmerge.sim.partition import share_out
from fedmerge.sim.settings import how_to_begin_anew
from fedmerge.sim.sites import node_home

SETTINGS = ("nodes", "data", "partition", "by", "alpha", "test_share", "seed")


def with_virtual_nodes(config: Config, folder: Path | None = None) -> Config:
    """Return the configuration with the nodes that `simulate.nodes` asks for; without it, with those that it has.

    Their data are written to `folder`, by default beside the coordinator's state, once: a simulation that goes on, and
    others with the same nodes, do so with the same. Bad nodes, made up or not, have their labels flipped, where that is
    the attack. Raises `ConfigError` when data were shared out in another way before, and `InputError` when they can't
    be read.
    """
    settings = config.simulate
    if not settings.nodes:
        return with_flipped_labels(config)
    assert settings.data is not None
    width = len(str(settings.nodes))
    names = [f"node-{number:0{width}}" for number in range(1, settings.nodes + 1)]
    if [node.name for node in config.nodes] == names:  # they are there
        return config
    if config.nodes:
        raise ConfigError("there are both [[nodes]] and simulate.nodes", hint="take one of them out")
    folder = folder or node_home(config, "")
    homes = [folder / name for name in names]
    files = [(home / "data.jsonl", home / "test.jsonl" if settings.test_share else None) for home in homes]
    stamp = folder / "partition.json"
    wanted = partition_of(config)
    with reporting_os_errors(stamp):
        shared_out = stamp.read_text() if stamp.exists() else ""
    if shared_out and shared_out != wanted:
        raise ConfigError(
            f"{stamp.parent}: has data that were shared out by other settings of [simulate]",
            hint=f"restore {', '.join(SETTINGS)}, or begin anew: {how_to_begin_anew(config)}",
        )
    if not shared_out:
        share_out(
            settings.data,
            files,
            settings.partition,
            settings.by,
            alpha=settings.alpha,
            seed=derive_seed("simulate.partition", settings.seed),
            test_share=settings.test_share,
        )
        with reporting_os_errors(stamp):
            stamp.write_text(wanted)
    nodes = tuple(
        SimulatedNode(name=name, data=data, test=test) for name, (data, test) in zip(names, files, strict=True)
    )
    return with_flipped_labels(config.model_copy(update={"nodes": nodes}))


def partition_of(config: Config) -> str:
    """Return the settings that the data of made-up nodes follow from, as text."""
    return json.dumps(config.simulate.model_dump(mode="json", include=set(SETTINGS)), sort_keys=True)
