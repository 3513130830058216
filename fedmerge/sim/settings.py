"""What a simulation was begun with: it does not go on, unnoticed, with something else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedmerge.config import Config
from fedmerge.errors import ConfigError, InputError, reporting_os_errors
from fedmerge.files import replace_file
from fedmerge.sim.sites import node_home

FILE = "simulated.json"
SECTIONS = {
    "model", "rounds", "train", "delta", "merge", "screen", "search", "outer", "streaming", "publish", "simulate",
}  # fmt: skip
# What may change on the way: how far it goes, what is kept, and by which means.
FREE = {
    "merge.memory_budget", "merge.threads", "publish.keep_rounds", "rounds.num_rounds", "simulate.engine",
    "simulate.ray_address", "simulate.ray_cpus", "simulate.ray_gpus", "simulate.workers",
}  # fmt: skip
MOST_NAMED = 3


def require_same_settings(config: Config, *, may_change: bool) -> None:
    """See that the simulation in the configuration's state folder, if there is one, was begun with the same settings.

    They are written down where it is a new one, or they `may_change`. Raises `ConfigError` for others, and `InputError`
    when what was written can't be read.
    """
    path = config.federation.state / FILE
    settings = dict(_settings(config))
    with reporting_os_errors(path):
        if may_change or not path.exists():
            replace_file(path, json.dumps(settings, indent=1).encode(), durable=False)
            return
        try:
            before = json.loads(path.read_text())
        except ValueError as err:
            raise InputError(f"{path}: not what a simulation wrote ({err})", hint=how_to_begin_anew(config)) from err
    changed = [key for key in sorted(settings.keys() | before.keys()) if settings.get(key) != before.get(key)]
    if changed:
        named = [f"{key} was {_shown(before.get(key))} and is {_shown(settings.get(key))}" for key in changed]
        more = f", and {len(changed) - MOST_NAMED} more" if len(changed) > MOST_NAMED else ""
        raise ConfigError(
            f"{config.federation.state}: this simulation was begun with other settings: "
            f"{', '.join(named[:MOST_NAMED])}{more}",
            hint=f"restore them, or begin anew: {how_to_begin_anew(config)}",
        )


def how_to_begin_anew(config: Config) -> str:
    """Return what to delete for a simulation to start from its first round again."""
    return f"delete {config.federation.state} and {node_home(config, '')}"


def _settings(config: Config) -> Iterator[tuple[str, object]]:
    """Yield what a simulation's outcome follows from, by key; paths are relative, so that folders can be moved."""
    found = config.model_dump(include=SECTIONS)
    if not config.simulate.nodes:  # the data of made-up nodes are guarded by themselves
        found["nodes"] = {node.name: node.model_dump(exclude={"name"}) for node in config.nodes}
    for key, value in _flat(found):
        if key not in FREE and value is not None:
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
