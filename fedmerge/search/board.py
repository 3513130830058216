"""What the judges said: one score per judge and candidate, and which candidate is best.

A judge is whoever evaluates candidates on data of its own: a node, or the command of a local merge. Scores are better
when they are higher. Only judges who scored every candidate so far have a say, so that all candidates are compared on
the same data: who misses one is out for the rest of the search, and what it said before no longer counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from fedmerge.errors import InputError

# One candidate's scores by judge.
Answers: TypeAlias = Mapping[str, float]


class Board:
    """The answers to every candidate so far, in the order in which they were proposed."""

    def __init__(self) -> None:
        self.rows: list[Answers] = []

    def add(self, answers: Sequence[Answers]) -> None:
        """Add the answers to a generation. Raises `InputError` when no judge is left who scored every candidate."""
        self.rows.extend(dict(row) for row in answers)
        if not self.panel:
            raise InputError("nobody scored every candidate", hint="judges need test data, and the same metric")

    @property
    def panel(self) -> list[str]:
        """The judges who scored every candidate so far, and one at least with a finite score; sorted."""
        everywhere = set.intersection(*(set(row) for row in self.rows)) if self.rows else set()
        return sorted(judge for judge in everywhere if any(math.isfinite(row[judge]) for row in self.rows))

    def mean(self, number: int) -> float:
        """Return a candidate's mean score over the panel; `number` counts from 0, or from the end if negative."""
        row, panel = self.rows[number], self.panel
        return math.fsum(row[judge] for judge in panel) / len(panel)

    def best(self) -> int:
        """Return the number of the best candidate; of equals the last: the larger soup, the further generation."""
        means = [self.mean(number) for number in range(len(self.rows))]
        return max(range(len(means)), key=lambda number: (means[number], number))


def score_of(metrics: Mapping[str, float], metric: str) -> float | None:
    """Return what a judge's `metrics` say as one number, higher is better; None when they do not say.

    `metric` is one of their names, with a minus sign before it if lower is better, or "auto": `accuracy`, or else
    `-loss`. What is not finite counts as worst.

    >>> score_of({"loss": 2.0, "perplexity": 7.4}, "auto")
    -2.0
    """
    if metric == "auto":
        metric = "accuracy" if "accuracy" in metrics else "-loss"
    name = metric.removeprefix("-")
    if name not in metrics:
        return None
    value = -metrics[name] if metric.startswith("-") else metrics[name]
    return float(value) if math.isfinite(value) else -math.inf
