"""Searches: what they propose is fixed by settings, seed and scores; what they settle on holds against plain forms."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.errors import ConfigError, InputError, MissingExtra
from fedmerge.merge import Recipe
from fedmerge.search import Board, Candidate, Search, SearchSettings, score_of

MEAN = Recipe("fedavg")


def run(search: Search, score: Callable[[Candidate], float]) -> Candidate:
    while search.generation:
        search.tell([{"me": score(candidate)} for candidate in search.generation])
    return search.best()


def plain_greedy_soup(num_models: int, score: Callable[[frozenset[int]], float]) -> frozenset[int]:
    """The recipe as the paper prints it: sort, then keep what does not lower the score; of equals the last first."""
    ranked = sorted(range(num_models), key=lambda model: score(frozenset([model])))[::-1]
    soup = frozenset([ranked[0]])
    for model in ranked[1:]:
        if score(soup | {model}) >= score(soup):
            soup |= {model}
    return soup


@given(st.integers(1, 5), st.data())
def test_greedy_soup_is_the_papers(num_models: int, data: st.DataObject) -> None:
    subsets = [frozenset(s) for n in range(1, num_models + 1) for s in itertools.combinations(range(num_models), n)]
    # Few different scores, so that ties are common.
    scores = {subset: data.draw(st.integers(0, 4)) / 4 for subset in subsets}

    def members(candidate: Candidate) -> frozenset[int]:
        return frozenset(index for index, factor in enumerate(candidate.factors) if factor)

    search = Search(SearchSettings("greedy_soup"), MEAN, num_models, seed=0)
    best = run(search, lambda candidate: scores[members(candidate)])
    assert members(best) == plain_greedy_soup(num_models, scores.__getitem__)
    assert len(search.candidates) == 2 * num_models - 1
    assert {factor for candidate in search.candidates for factor in candidate.factors} <= {0.0, 1.0}


def test_cma_es_finds_the_optimum_of_a_quadratic() -> None:
    optimum = {"factors": (0.25, 1.5, 2.5), "density": 0.7}

    def score(candidate: Candidate) -> float:
        distance = math.dist(candidate.factors, optimum["factors"])  # type: ignore[arg-type]
        return -(distance**2) - 10 * (candidate.params["density"] - 0.7) ** 2

    settings = SearchSettings("cma_es", evaluations=250, vary={"density": (0.1, 0.9)})
    best = run(Search(settings, Recipe("ties", {"density": 0.2}), 3, seed=1), score)
    assert math.dist(best.factors, (0.25, 1.5, 2.5)) < 0.02
    assert abs(best.params["density"] - 0.7) < 0.01
    assert best.recipe(Recipe("ties", {"normalize": False})).params["normalize"] is False


@pytest.mark.parametrize("strategy", ["greedy_soup", "cma_es"])
def test_the_same_scores_lead_to_the_same_candidates_again(strategy: str) -> None:
    def score(candidate: Candidate) -> float:
        return -sum((factor - 0.6) ** 2 for factor in candidate.factors)

    settings = SearchSettings(strategy, evaluations=40)
    whole = Search(settings, MEAN, 3, seed=5)
    generations = []
    while whole.generation:
        generations.append(list(whole.generation))
        whole.tell([{"me": score(candidate)} for candidate in whole.generation])
    for stop in range(len(generations)):
        resumed = Search(SearchSettings.from_dict(settings.to_dict()), MEAN, 3, seed=5)
        for generation in generations[:stop]:
            resumed.tell([{"me": score(candidate)} for candidate in generation])
        assert resumed.generation == generations[stop]
    if strategy == "cma_es":
        assert generations[0][0].factors == (1.0, 1.0, 1.0)  # the merge without a search is among the candidates
        assert Search(settings, MEAN, 3, seed=6).generation != generations[0]
        assert 40 <= len(whole.candidates) < 40 + len(generations[1])


def test_factors_over_depth_are_found_part_by_part() -> None:
    optimum = [(0.2, 1.4, 0.9), (1.8, 0.5, 1.1)]

    def score(candidate: Candidate) -> float:
        flat = [part for factor in candidate.factors for part in factor]  # type: ignore[union-attr]
        return -math.dist(flat, [part for factor in optimum for part in factor])

    search = Search(SearchSettings("cma_es", evaluations=400, layers=3), MEAN, 2, seed=1)
    assert search.generation[0].factors == ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    best = run(search, score)
    assert -score(best) < 0.05
    assert Candidate.from_dict(best.to_dict()) == best
    assert best.weights([0.5, 2.0]) == [[0.5 * f for f in best.factors[0]], [2.0 * f for f in best.factors[1]]]  # type: ignore[union-attr]


def test_a_factor_goes_on_weights_that_vary() -> None:
    candidate = Candidate((0.5, 2.0))
    assert candidate.weights([{"*.bias": [1.0, 3.0], "default": 1.0}, 1.5]) == [
        {"*.bias": [0.5, 1.5], "default": 0.5},
        3.0,
    ]


def test_candidates_stay_in_their_ranges() -> None:
    settings = SearchSettings("cma_es", evaluations=120, step=1.0, vary={"lambda": (0.5, 1.5)})
    search = Search(settings, Recipe("task_arithmetic"), 4, seed=2)
    run(search, lambda candidate: sum(candidate.factors) - candidate.params["lambda"])
    for candidate in search.candidates:
        assert all(0 <= factor <= 4 for factor in candidate.factors)
        assert any(candidate.factors)
        assert 0.5 <= candidate.params["lambda"] <= 1.5


def test_who_misses_a_candidate_has_no_say_any_more() -> None:
    board = Board()
    board.add([{"a": 1.0, "b": 0.0, "c": 0.0}, {"a": 0.0, "b": 0.5, "c": 0.4}])
    assert (board.panel, board.best()) == (["a", "b", "c"], 0)
    board.add([{"b": 0.1, "c": 0.1}])
    assert (board.panel, board.best()) == (["b", "c"], 1)
    assert board.mean(1) == pytest.approx(0.45)
    with pytest.raises(InputError, match="nobody scored every candidate"):
        board.add([{"a": 1.0}])


def test_of_equal_candidates_the_last_is_best() -> None:
    board = Board()
    board.add([{"a": 0.5}, {"a": 0.7}, {"a": 0.7}, {"a": 0.1}])
    assert board.best() == 2


@pytest.mark.parametrize(
    ("metrics", "metric", "expected"),
    [
        ({"accuracy": 0.5, "loss": 2.0}, "auto", 0.5),
        ({"loss": 2.0}, "auto", -2.0),
        ({"loss": 2.0, "f1": 0.3}, "f1", 0.3),
        ({"perplexity": 8.0}, "-perplexity", -8.0),
        ({"perplexity": 8.0}, "auto", None),
        ({}, "auto", None),
        ({"loss": math.nan}, "auto", -math.inf),
        ({"accuracy": math.inf}, "auto", -math.inf),
    ],
)
def test_a_score_is_one_number_and_higher_is_better(
    metrics: dict[str, float], metric: str, expected: float | None
) -> None:
    assert score_of(metrics, metric) == expected


def test_a_candidate_that_diverges_does_not_stop_a_search() -> None:
    settings = SearchSettings("cma_es", evaluations=60)
    best = run(Search(settings, MEAN, 2, seed=0), lambda c: -math.inf if c.factors[0] > 1.2 else -c.factors[1])
    assert best.factors[0] <= 1.2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"strategy": "greedy_sop"}, "did you mean 'greedy_soup'"),
        ({"strategy": "cma_es", "population": 1}, "population"),
        ({"strategy": "cma_es", "populaton": 8}, "did you mean 'population'"),
        ({"strategy": "greedy_soup", "layers": 2}, "one factor for each model"),
        ({"strategy": "cma_es", "layers": 0}, "layers"),
        ({"strategy": "greedy_soup", "vary": {"density": [0.1, 0.9]}}, "nothing to vary"),
        ({"strategy": "cma_es", "vary": {"densty": [0.1, 0.9]}}, "densty"),
        ({"strategy": "cma_es", "vary": {"density": [0.1, 1.5]}}, "density = 1.5"),
        ({"strategy": "cma_es", "vary": {"density": [0.5, 0.9]}}, "around its start"),
        ({"strategy": "cma_es", "vary": {"density": [0.9, 0.1]}}, "lower one first"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Search(SearchSettings.from_dict(settings), Recipe("ties", {"density": 0.2}), 2, seed=0)


def test_without_its_library_cma_es_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(MissingExtra) as caught:
        Search(SearchSettings("cma_es"), MEAN, 2, seed=0)
    assert caught.value.hint == 'pip install "fedmerge[search]"'
