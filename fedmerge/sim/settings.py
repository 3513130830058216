"""What a simulation was begun with: it does not go on, unnoticed, with something else."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedmerge.config import Config
from fedmerge.errors import ConfigError, InputError, reporting_os_errors
from fedmerge.files import replace_file
from fedmerge.sim.sites import node_home
from fedmerge.sim.trainers import num_threads

log = logging.getLogger(__name__)

FILE = "simulated.json"
SECTIONS = {
    "model", "rounds", "train", "delta", "merge", "screen", "search", "outer", "streaming", "publish", "simulate",
}  # fmt: skip
# What may change on the way: how far it goes, what is kept, and by which means.
NUM_ROUNDS = "rounds.num_rounds"
FREE = {
    NUM_ROUNDS, "merge.memory_budget", "merge.threads", "publish.keep_rounds", "simulate.engine",
    "simulate.ray_address", "simulate.ray_cpus", "simulate.ray_gpus", "simulate.workers",
}  # fmt: skip
THREADS = "simulate.threads"
MOST_NAMED = 3


def with_threads(config: Config) -> Config:
    """Return the configuration with the number of threads that nodes train with, where it leaves that open.

    A simulation that goes on does so with as many as it was begun with, whatever machine or `workers` it has now.
    """
    if config.simulate.threads:
        return config
    begun = (_written(config.federation.state / FILE, config) or {}).get(THREADS)
    threads = begun if isinstance(begun, int) and begun > 0 else num_threads(config.simulate)
    return config.model_copy(update={"simulate": config.simulate.model_copy(update={"threads": threads})})


def require_same_settings(config: Config, *, has_failed: bool) -> None:
    """See that the simulation in the configuration's state folder, if there is one, was begun with the same settings.

    They are written down. Where its round failed, or it is to go on for more rounds, others are taken from there on,
    and logged. Raises `ConfigError` for others at any other time, and `InputError` when what was written can't be read.
    """
    path = config.federation.state / FILE
    settings = dict(_settings(config))
    before: Mapping[str, Any] = _written(path, config) or settings
    keys = sorted((settings.keys() | before.keys()) - FREE)
    changed = [
        f"{key} was {_shown(before.get(key))} and is {_shown(settings.get(key))}"
        for key in keys
        if settings.get(key) != before.get(key)
    ]
    if changed:
        more = f", and {len(changed) - MOST_NAMED} more" if len(changed) > MOST_NAMED else ""
        others = f"{', '.join(changed[:MOST_NAMED])}{more}"
        if not has_failed and config.rounds.num_rounds <= before.get(NUM_ROUNDS, 0):
            raise ConfigError(
                f"{config.federation.state}: this simulation was begun with other settings: {others}",
                hint=f"restore them, or begin anew: {how_to_begin_anew(config)}",
            )
        log.warning("the simulation goes on with other settings than before: %s", others)
    replace_file(path, json.dumps(settings, indent=1).encode(), durable=False)


def _written(path: Path, config: Config) -> dict[str, Any] | None:
    try:
        with reporting_os_errors(path):
            written = json.loads(path.read_bytes()) if path.exists() else None
        if not isinstance(written, dict | None):
            raise ValueError("it is no table")
    except ValueError as err:
        hint = f"begin anew: {how_to_begin_anew(config)}"
        raise InputError(f"{path}: not what a simulation wrote ({err})", hint=hint) from err
    return written


def how_to_begin_anew(config: Config) -> str:
    """Return what to delete for a simulation to start from its first round again."""
    return f"delete {config.federation.state} and {node_home(config, '')}"


def _settings(config: Config) -> Iterator[tuple[str, object]]:
    """Yield what a simulation's outcome follows from, by key; paths are relative, so that folders can be moved."""
    found = config.model_dump(include=SECTIONS)
    if not config.simulate.nodes:  # the data of made-up nodes are guarded by themselves
        found["nodes"] = {node.name: node.model_dump(exclude={"name"}) for node in config.nodes}
    for key, value in _flat(found):
        if value is not None:
            relative = os.path.relpath(value, config.federation.state.parent) if isinstance(value, Path) else value
            yield key, json.loads(json.dumps(relative, default=str))


def _flat(settings: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: object) -> str:
    return "not set" if value is None else json.dumps(value)
