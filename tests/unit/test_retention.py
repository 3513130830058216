"""The retention matrix, against ratios worked out by hand."""

from __future__ import annotations

import json

import pytest

from fedmerge.errors import InputError
from fedmerge.rounds.retention import Evaluation, retention_matrix

SCORES = {
    ("north", 0, "global"): 0.2,
    ("north", 1, "own"): 0.8,
    ("north", 1, "global"): 0.6,
    ("north", 2, "own"): 0.9,
    ("north", 2, "global"): 0.72,
    ("north", 3, "own"): 0.9,
    ("north", 3, "global"): 0.63,
    ("south", 0, "global"): 0.5,
    ("south", 1, "own"): 0.5,
    ("south", 1, "global"): 0.4,
    ("south", 3, "global"): 0.7,
}


def evaluations(name: str = "accuracy", *, other: str = "loss") -> list[Evaluation]:
    return [Evaluation(*key, {name: value, other: 1 - value}) for key, value in SCORES.items()]


def test_it_is_merged_over_own_by_task_and_round() -> None:
    found = retention_matrix(reversed(evaluations()))
    assert (found.metric, found.lower_is_better, found.num_rounds) == ("accuracy", False, 3)
    north, south = found.tasks
    assert (north.node, north.base, south.node, south.base) == ("north", 0.2, "south", 0.5)
    assert north.own == (0.8, 0.9, 0.9)
    assert north.retention == pytest.approx((0.75, 0.8, 0.7))
    assert north.gain == pytest.approx((4 / 6, 5.2 / 6, 4.3 / 6))
    assert north.forgetting == pytest.approx(0.72 - 0.63)
    # It was not there in round 2, sent nothing in round 3, and learnt nothing in round 1.
    assert south.merged == (0.4, None, 0.7)
    assert south.retention == (pytest.approx(0.8), None, None)
    assert south.gain == (None, None, None)
    assert south.forgetting == pytest.approx(0.4 - 0.7)
    assert found.mean == pytest.approx((0.775, 0.8, 0.7))
    assert json.loads(json.dumps(found.to_dict()))["tasks"][0]["retention"] == list(north.retention)


def test_where_lower_is_better_it_is_own_over_merged() -> None:
    found = retention_matrix(evaluations("nats", other="more"), "-nats")
    assert found.lower_is_better
    north = found.tasks[0]
    assert north.retention == pytest.approx((0.8 / 0.6, 0.9 / 0.72, 0.9 / 0.63))
    assert north.gain == pytest.approx((4 / 6, 5.2 / 6, 4.3 / 6))
    assert north.forgetting == pytest.approx(0.63 - 0.6)


def test_which_metric_counts() -> None:
    assert retention_matrix(evaluations("perplexity")).metric == "loss"
    assert retention_matrix(evaluations(), "-loss").metric == "loss"
    with pytest.raises(InputError, match="no node reported 'f1'") as caught:
        retention_matrix(evaluations(), "f1")
    assert "they reported accuracy, loss" in caught.value.hint
    with pytest.raises(InputError, match="no node reported 'loss'"):
        retention_matrix([])


def test_the_later_of_two_counts_and_one_round_forgets_nothing() -> None:
    twice = [Evaluation("a", 1, "global", {"accuracy": value}) for value in (0.1, 0.4)]
    found = retention_matrix([*twice, Evaluation("a", 1, "own", {"accuracy": 0.5})]).tasks[0]
    assert found.retention == pytest.approx((0.8,))
    assert found.forgetting is None
    nothing = retention_matrix([*twice, Evaluation("a", 1, "own", {"accuracy": 0.0})]).tasks[0]
    assert nothing.retention == (None,)
