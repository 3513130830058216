"""A classifier's scores, against their definitions written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmerge_client.train.metrics import classification_metrics


def by_definition(logits: list[list[float]], labels: list[int]) -> dict[str, float]:
    rows = []
    for row, label in zip(logits, labels, strict=True):
        powers = [math.exp(value - max(row)) for value in row]
        best = max(range(len(row)), key=lambda i: row[i])
        rows.append((powers[best] / sum(powers), best, label))
    scores = []
    for kind in {label for _, _, label in rows} | {best for _, best, _ in rows}:
        hits = sum(best == label == kind for _, best, label in rows)
        scores.append(2 * hits / (sum(b == kind for _, b, _ in rows) + sum(t == kind for _, _, t in rows)))
    gap = 0.0
    for i in range(15):
        inside = [(c, b == t) for c, b, t in rows if i / 15 < c <= (i + 1) / 15]
        gap += abs(sum(c for c, _ in inside) - sum(hit for _, hit in inside)) / len(rows)
    return {
        "accuracy": sum(best == label for _, best, label in rows) / len(rows),
        "macro_f1": sum(scores) / len(scores),
        "ece": gap,
    }


@given(st.integers(1, 40), st.integers(2, 6), st.integers(0, 1000))
def test_they_are_their_definitions(num_examples: int, num_classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_examples, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (num_examples,), generator=generator)
    expected = by_definition(logits.tolist(), labels.tolist())
    assert classification_metrics(logits, labels) == pytest.approx(expected, abs=1e-9)


def test_certain_and_right_is_calibrated_certain_and_wrong_is_not() -> None:
    logits, labels = torch.tensor([[50.0, 0.0], [0.0, 50.0]]), torch.tensor([0, 1])
    assert classification_metrics(logits, labels) == {"accuracy": 1.0, "macro_f1": 1.0, "ece": pytest.approx(0)}
    assert classification_metrics(logits, 1 - labels) == {"accuracy": 0.0, "macro_f1": 0.0, "ece": pytest.approx(1)}
