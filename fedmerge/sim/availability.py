"""When nodes are there, as somebody measured or planned it: a file of one's own."""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedmerge.config import Config
from fedmerge.errors import InputError, did_you_mean
from fedmerge.seeds import fraction

COLUMNS = ("node", "from_s", "to_s")


@dataclass(frozen=True)
class Availability:
    """The spans, in seconds, in which a node is there: from `starts[i]` until `ends[i]`, in order and apart.

    They begin again after `period_s`, unless that is 0.
    """

    starts: tuple[float, ...]
    ends: tuple[float, ...]
    period_s: float = 0.0

    def away_s(self, since_s: float) -> float:
        """Return how long it takes from `since_s` until the node is there; infinity when it never is again."""
        if self.period_s:
            since_s %= self.period_s
        index = bisect_right(self.ends, since_s)
        if index < len(self.starts):
            return max(0.0, self.starts[index] - since_s)
        return self.period_s - since_s + self.starts[0] if self.period_s else math.inf


def availabilities(config: Config, names: Iterable[str]) -> dict[str, Availability]:
    """Return when each of the nodes is there, of those for which `simulate.availability` says it; without it, of none.

    Made-up nodes that the file does not name are there when one of its nodes is, drawn by their names; others always.
    Raises `InputError` for a file that can't be read, and for a name in it that no node has.
    """
    path, names = config.simulate.availability, list(names)
    if path is None:
        return {}
    known = read_availability(path, config.simulate.availability_period_s)
    if not config.simulate.nodes:
        for strange in sorted(set(known) - set(names)):
            raise InputError(f"{path}: no node is called {strange!r}{did_you_mean(strange, names)}")
        return known
    drawn = sorted(known)
    return {
        name: known.get(name)
        or known[drawn[int(fraction("simulate.availability", config.simulate.seed, name) * len(drawn))]]
        for name in names
    }


def read_availability(path: Path, period_s: float) -> dict[str, Availability]:
    """Return each node's spans from a CSV file; raise `InputError`, with the line, when it is not one.

    Spans may come in any order, and overlap.
    """
    spans: dict[str, list[tuple[float, float]]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if missing := set(COLUMNS) - set(rows.fieldnames or ()):
                raise InputError(f"{path}: has no column {min(missing)}", hint=f"columns {', '.join(COLUMNS)}")
            for row in rows:
                spans.setdefault(row["node"] or "", []).append(_span(row, period_s, where=f"{path}:{rows.line_num}"))
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise InputError(f"{path}: can't be read ({getattr(err, 'strerror', None) or 'not a CSV file'})") from err
    if not spans:
        raise InputError(f"{path}: has no rows")
    return {node: _joined(found, period_s) for node, found in spans.items()}


def _span(row: dict[str, str | None], period_s: float, *, where: str) -> tuple[float, float]:
    try:
        start_s, end_s = (float(row[name] or "") for name in COLUMNS[1:])
    except ValueError as err:
        raise InputError(f"{where}: from_s and to_s have to be numbers of seconds") from err
    if not 0 <= start_s < end_s:
        raise InputError(f"{where}: from_s = {start_s:g} is not from 0 to below to_s = {end_s:g}")
    if period_s and end_s > period_s:
        raise InputError(f"{where}: to_s = {end_s:g} is after simulate.availability_period_s = {period_s:g}")
    return start_s, end_s


def _joined(spans: list[tuple[float, float]], period_s: float) -> Availability:
    joined: list[tuple[float, float]] = []
    for start_s, end_s in sorted(spans):
        if joined and start_s <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end_s, joined[-1][1])
        else:
            joined.append((start_s, end_s))
    starts, ends = zip(*joined, strict=True)
    return Availability(starts, ends, period_s)
