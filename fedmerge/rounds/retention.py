"""What merging keeps of what each node knew: the retention matrix, task by round, and forgetting.

Each node's own data are a task. In every round a node scores the model it begins with, its own fine-tune of that and
the merged model, on its own test data, and signs the scores. Retention is merged over own (as in TALL masks, arXiv
2405.07813, where it is called normalised accuracy), forgetting the best score of earlier merged models less the last
one's (arXiv 1801.10112).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from fedmerge.errors import InputError


class Evaluation(NamedTuple):
    """What a `node` said of a `model` on its own test data: "global", that of a round's end, or "own".

    Round 0 of "global" is the base model.
    """

    node: str
    round: int
    model: str
    values: dict[str, float]


@dataclass(frozen=True)
class TaskRetention:
    """One node's rows: the metric's values of the base, and by round those of its own and of the merged model.

    `retention` is merged over own, or own over merged where lower is better: 1 where nothing is lost. `gain` is the
    share of what the own fine-tune of round 1 brought over the base that the merged model has. `forgetting` is in the
    metric's unit, above 0 where an earlier merged model was better than the last. None where nobody said.
    """

    node: str
    base: float | None
    own: tuple[float | None, ...]
    merged: tuple[float | None, ...]
    retention: tuple[float | None, ...]
    gain: tuple[float | None, ...]
    forgetting: float | None


@dataclass(frozen=True)
class RetentionMatrix:
    """The rows of all nodes, and of each round the `mean` retention over those that said; `metric` is its name."""

    metric: str
    lower_is_better: bool
    num_rounds: int
    tasks: tuple[TaskRetention, ...]
    mean: tuple[float | None, ...]

    @property
    def described(self) -> str:
        """The metric, and which score is over which."""
        return f"{self.metric}, " + ("own over merged: lower is better" if self.lower_is_better else "merged over own")

    def to_dict(self) -> dict[str, Any]:
        """Return the matrix as JSON types."""
        return asdict(self)


def retention_matrix(evaluations: Iterable[Evaluation], metric: str = "auto") -> RetentionMatrix:
    """Return the retention matrix of a `metric`, with a minus sign before its name if lower is better.

    "auto" is `accuracy`, or else `-loss`. Of two evaluations of one model the later counts. Rows are in the order of
    the nodes' names. Raises `InputError` when no evaluation has the metric.
    """
    found = list(evaluations)
    names = {name for one in found for name in one.values}
    if metric == "auto":
        metric = "accuracy" if "accuracy" in names else "-loss"
    name, lower = metric.removeprefix("-"), metric.startswith("-")
    if name not in names:
        raise InputError(
            f"no node reported {name!r}",
            hint=f"they reported {', '.join(sorted(names)) or 'nothing: has none test data?'}",
        )
    values = {(one.node, one.round, one.model): one.values[name] for one in found if name in one.values}
    num_rounds = max(one.round for one in found)
    tasks = tuple(
        _task(
            node,
            values.get((node, 0, "global")),
            [values.get((node, number, "own")) for number in range(1, num_rounds + 1)],
            [values.get((node, number, "global")) for number in range(1, num_rounds + 1)],
            lower,
        )
        for node in sorted({node for node, _, _ in values})
    )
    return RetentionMatrix(
        metric=name,
        lower_is_better=lower,
        num_rounds=num_rounds,
        tasks=tasks,
        mean=tuple(_mean([task.retention[number] for task in tasks]) for number in range(num_rounds)),
    )


def _task(
    node: str, base: float | None, own: list[float | None], merged: list[float | None], lower: bool
) -> TaskRetention:
    kept = [_ratio(a, b) if lower else _ratio(b, a) for a, b in zip(own, merged, strict=True)]
    first = next((value for value in own if value is not None), None)
    gain = [
        None if base is None or first is None or value is None else _ratio(value - base, first - base)
        for value in merged
    ]
    said = [value for value in merged if value is not None]
    best = (min if lower else max)(said[:-1], default=None)
    forgotten = None if best is None else said[-1] - best if lower else best - said[-1]
    return TaskRetention(node, base, tuple(own), tuple(merged), tuple(kept), tuple(gain), forgotten)


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
