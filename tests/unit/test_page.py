"""The page of a simulation: well-formed, self-contained, and its curves are where the numbers are."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.sim.page import page, ticks
from fedmerge.sim.results import FederationResult, RoundResult


def result(rounds: list[RoundResult]) -> FederationResult:
    return FederationResult(Path("model"), "ab" * 32, len(rounds), rounds, [], 1, 1)


def body(text: str) -> ET.Element:
    return ET.fromstring(text[text.index("<body>") : text.index("</html>")])


def test_curves_follow_the_numbers_and_nothing_is_loaded() -> None:
    rounds = [
        RoundResult(
            number, 0.0, 3600.0 * number, 3, 1_000_000 * number, num_merged=2, metrics={"loss": loss, "<b>": 1.0}
        )
        for number, loss in enumerate([2.0, 1.0, 0.5, 0.25], start=1)
    ]
    text = page(result(rounds), "<script>alert(1)</script>")
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    found = body(text)
    charts = {chart.attrib["aria-label"]: chart for chart in found.iter("svg")}
    assert set(charts) == {
        f"{metric} against {axis}" for metric in ("loss", "<b>") for axis in ("round", "MB sent by all nodes", "hours")
    }
    dots = [
        (float(dot.attrib["cx"]), float(dot.attrib["cy"]))
        for dot in charts["loss against MB sent by all nodes"].iter("circle")
    ]
    # Bytes so far are 1, 3, 6 and 10 MB; downwards is larger in SVG.
    gaps = [later[0] - earlier[0] for earlier, later in pairwise(dots)]
    assert gaps[1] / gaps[0] == pytest.approx(3 / 2, abs=0.01)
    assert gaps[2] / gaps[0] == pytest.approx(4 / 2, abs=0.01)
    falls = [later[1] - earlier[1] for earlier, later in pairwise(dots)]
    assert falls[0] / falls[1] == pytest.approx(2, abs=0.02)
    rows = [[cell.text for cell in row] for row in found.iter("tr")]
    assert rows[-1] == ["4", "4.000", "3", "2", "4.000", "10.000", "0.25", "1"]


def test_rounds_that_took_no_time_are_there_and_have_no_hours() -> None:
    rounds = [RoundResult(number, 0.0, 0.0, 3, 1_000_000, metrics={"loss": 1.0 / number}) for number in (1, 2)]
    text = page(result(rounds), "at once")
    assert "2 rounds, 6 deltas" in text
    charts = [chart.attrib["aria-label"] for chart in body(text).iter("svg")]
    assert charts == ["loss against round", "loss against MB sent by all nodes"]


def test_one_round_and_none_with_metrics() -> None:
    assert "0.5" in page(result([RoundResult(1, 0.0, 0.1, 1, 10, metrics={"loss": 0.5})]), "one")
    assert "<svg" not in page(result([RoundResult(1, 0.0, 0.1, 1, 10)]), "none")


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_ticks_span_the_values_and_are_few(low: float, spread: float) -> None:
    marks = ticks(low, low + spread)
    assert 2 <= len(marks) <= 8
    slack = 1e-6 * max(1.0, abs(low), spread)
    assert marks[0] <= low + slack
    assert marks[-1] >= low + spread - slack
    assert marks == sorted(set(marks))
