"""Many simulations for a grid of settings: one directory for each point, and a table of what came of them.

They share the base model and the nodes' data. What is finished is not done again: a point keeps its row beside the
digest of its configuration, and one that was interrupted goes on where it was.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmerge.config import Config, load_config
from fedmerge.errors import ConfigError, MissingExtra, RoundFailed, reporting_os_errors
from fedmerge.files import replace_file
from fedmerge.sim.adversary import require_feasible
from fedmerge.sim.results import FederationResult
from fedmerge.sim.run import simulate
from fedmerge.sim.virtual import partition_of, with_virtual_nodes

if TYPE_CHECKING:
    import pandas as pd

MAX_POINTS = 1000
# What each point has in its own directory.
OWN = {"state": "state", "key": "coordinator.key", "trusted": "trusted"}
PLAIN = re.compile(r"[A-Za-z0-9_.,=+-]{1,150}")


@dataclass(frozen=True)
class Point:
    """A choice of values, as TOML text by SECTION.KEY, and the configuration with them, in a `directory` of its own."""

    settings: dict[str, str]
    config: Config
    directory: Path


@dataclass(frozen=True)
class SweepResult:
    """One row for each point, in the grid's order: what was chosen, and what came of it. `csv_path` has them too."""

    rows: list[dict[str, Any]]
    csv_path: Path

    def to_frame(self) -> pd.DataFrame:
        """Return the rows as a data frame. Raises `MissingExtra` without pandas."""
        try:
            import pandas as pd
        except ModuleNotFoundError as err:
            raise MissingExtra("a data frame needs pandas", hint='pip install "fedmerge[plots]"') from err
        return pd.DataFrame(self.rows)


def sweep(
    path: Path | str,
    grid: Mapping[str, Sequence[object]],
    run: Callable[[Config], FederationResult] = simulate,
    *,
    on_point: Callable[[Point], None] = lambda point: None,
) -> SweepResult:
    """Simulate the federation of a fedmerge.toml once for each combination of values, by SECTION.KEY, in `grid`.

    `run` simulates one, for example `lambda config: simulate(config, base_dir, trainers)`; `on_point` is told before.
    The directories, and results.csv, are in `sweep/` beside the coordinator's state. A point whose rounds fail has its
    failure in its row. Raises `ConfigError`, before anything runs, for a point that is not a valid configuration.
    """
    points = list(points_of(Path(path), grid))
    rows = []
    for point in points:
        on_point(point)
        rows.append(_row(point, run))
    result = SweepResult(rows, points[0].directory.parent / "results.csv")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with reporting_os_errors(result.csv_path), result.csv_path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return result


def points_of(path: Path, grid: Mapping[str, Sequence[object]]) -> Iterator[Point]:
    """Yield the points of a grid, the last key's values changing fastest. Raises `ConfigError`, as `sweep` does."""
    num_points = 1
    for values in grid.values():
        num_points *= len(values)
    if not 0 < num_points <= MAX_POINTS:
        raise ConfigError(f"the sweep has {num_points} points, not 1 to {MAX_POINTS}", hint="give fewer values")
    own = sorted({f"federation.{name}" for name in OWN} & grid.keys())
    if own:
        raise ConfigError(f"a sweep can't vary {own[0]}: each simulation has one of its own", hint="leave it out")
    root = load_config(path).federation.state.parent / "sweep"
    for values in itertools.product(*grid.values()):
        settings = {key: _toml(value) for key, value in zip(grid, values, strict=True)}
        yield _point(settings, load_config(path, overrides=settings), root)


def _point(settings: dict[str, str], config: Config, root: Path) -> Point:
    name = ",".join(f"{key}={value}" for key, value in settings.items())
    if not PLAIN.fullmatch(name):
        name = hashlib.sha256(name.encode()).hexdigest()[:16]
    directory = root / name
    federation = config.federation.model_copy(update={name: directory / file for name, file in OWN.items()})
    shared = hashlib.sha256(partition_of(config).encode()).hexdigest()[:12]
    config = with_virtual_nodes(config.model_copy(update={"federation": federation}), root / f"data-{shared}")
    if config.nodes:
        require_feasible(config, [node.name for node in config.nodes])
    return Point(settings, config, directory)


def _row(point: Point, run: Callable[[Config], FederationResult]) -> dict[str, Any]:
    kept = point.directory / "result.json"
    digest = hashlib.sha256(point.config.model_dump_json().encode()).hexdigest()
    with reporting_os_errors(kept):
        known = json.loads(kept.read_text()) if kept.exists() else {}
    if known.get("config") == digest:
        row: dict[str, Any] = known["row"]
        return row
    try:
        row = point.settings | outcome_of(run(point.config))
    except RoundFailed as err:  # the next time it is tried again
        return point.settings | {"failure": err.message}
    replace_file(kept, json.dumps({"config": digest, "row": row}, indent=2).encode())
    return row


def outcome_of(result: FederationResult) -> dict[str, Any]:
    """Return what a federation came to in one row: its last round's metrics, deltas and bytes in all, and hours."""
    last, bad = result.rounds[-1], [node for node in result.nodes if node.is_bad]
    of_bad = {
        "bad_deltas": sum(node.num_deltas for node in bad),
        "bad_merged": sum(node.num_merged for node in bad),
    }
    return {
        "rounds": result.num_rounds,
        **last.metrics,
        "deltas": sum(each.num_deltas for each in result.rounds),
        "merged": sum(each.num_merged for each in result.rounds),
        **(of_bad if bad else {}),
        "sent_bytes": sum(each.sent_bytes for each in result.rounds),
        "fetched_bytes": result.fetched_bytes,
        "hours": round(last.published_s / 3600, 6),
        "version": result.version,
    }


def _toml(value: object) -> str:
    """Return a value as the text that a command line would have for it."""
    return value if isinstance(value, str) else json.dumps(value)
