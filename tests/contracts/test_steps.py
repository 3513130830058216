"""Recipes of several steps, held bit for bit to the methods that they spell out; averages over time, by definition."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedmerge.errors import ConfigError
from fedmerge.merge import METHODS, Recipe, merge_deltas
from fedmerge.merge.methods.trajectory import OVER_ROUNDS
from fedmerge.merge.recipe import Plan
from fedmerge.merge.transforms import TRANSFORMS
from fedmerge.seeds import derive_seed

SHAPES = {"model.layers.0.w": (40, 12), "model.layers.1.w": (40, 12), "b": (70,), "scalar": ()}
WEIGHTS = [0.5, 0.3, 0.2]
SPELT_OUT: list[tuple[str, dict[str, Any], str, str, dict[str, Any]]] = [
    ("trim", {"density": 0.3}, "elect", "ties", {}),
    ("trim", {"density": 0.3, "trim": "authors"}, "elect", "ties", {"zero_sum": "majority", "normalizer": "count"}),
    ("dare", {"density": 0.3}, "elect", "dare_ties", {}),
    ("dare", {"density": 0.3, "rescale": "l1"}, "elect", "dare_ties", {"election": "weighted", "normalize": False}),
    ("dare", {"density": 0.3}, "task_arithmetic", "dare_linear", {"lambda": 0.7}),
    ("magprune", {"density": 0.4, "epsilon": 0.2}, "elect", "della", {"lambda": 1.5}),
    ("magprune", {"density": 0.4, "rescale": "l1"}, "task_arithmetic", "della_linear", {"normalize": True}),
    ("breadcrumbs_mask", {"density": 0.5, "outliers": 0.1}, "elect", "breadcrumbs_ties", {}),
    ("breadcrumbs_mask", {"density": 0.5, "outliers": 0.1}, "task_arithmetic", "breadcrumbs", {}),
]  # fmt: skip


def delta(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def merged(recipe: Recipe, *deltas: dict[str, Tensor], seed: int = 0, weights: Any = None) -> dict[str, Tensor]:
    return dict(merge_deltas(deltas, weights or WEIGHTS[: len(deltas)], recipe, seed=seed))


@pytest.mark.parametrize("case", SPELT_OUT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_named_method_is_its_steps_bit_for_bit(
    case: tuple[str, dict[str, Any], str, str, dict[str, Any]], dtype: torch.dtype
) -> None:
    transform, thin, method, named, params = case
    deltas = [delta(index, dtype) for index in range(3)]
    for seed in (0, 7, 1 << 62):
        chain = merged(Recipe.from_steps([(transform, thin), (method, params)]), *deltas, seed=seed)
        whole = merged(Recipe(named, thin | params), *deltas, seed=seed)
        for name in SHAPES:
            assert torch.equal(chain[name], whole[name])
            assert chain[name].dtype == whole[name].dtype


@pytest.mark.parametrize("seed", [0, 3])
def test_the_same_seed_gives_functions_and_steps_the_same_masks(seed: int) -> None:
    stack = torch.stack([delta(index)["b"] for index in range(3)])
    thinned = [TRANSFORMS["dare"](row, seed=derive_seed(seed, index), density=0.4) for index, row in enumerate(stack)]
    weights = torch.tensor(WEIGHTS)
    expected = METHODS["dare_ties"](stack, weights, seed=seed, density=0.4)
    assert torch.equal(METHODS["elect"](torch.stack(thinned), weights), expected)


def test_two_random_steps_draw_different_masks() -> None:
    ones = {"w": torch.ones(4000)}
    recipe = Recipe.from_steps([("dare", {"density": 0.5}), ("dare", {"density": 0.5}), ("fedavg", {})])
    kept = merged(recipe, ones, weights=[1.0])["w"]
    assert set(kept.tolist()) == {0.0, 4.0}
    assert 0.2 < (kept > 0).double().mean() < 0.3


def test_a_transform_may_differ_between_fine_tunes_and_layers() -> None:
    each = {"each": [0.2, {"model.layers.*": [1.0, 0.5], "default": 0.4}, 1.0]}
    chain = merged(Recipe.from_steps([("trim", {"density": each}), ("task_arithmetic", {})]), *map(delta, range(3)))
    for name in SHAPES:
        second = {"model.layers.0.w": 1.0, "model.layers.1.w": 0.5}.get(name, 0.4)
        parts = [
            TRANSFORMS["trim"](delta(index)[name], density=density) for index, density in enumerate((0.2, second, 1.0))
        ]
        expected = METHODS["task_arithmetic"](torch.stack(parts), torch.tensor(WEIGHTS))
        assert torch.equal(chain[name], expected)
    with pytest.raises(ConfigError, match="trim: density: has 3 values for 2 fine-tunes"):
        merged(Recipe.from_steps([("trim", {"density": each}), ("elect", {})]), delta(0), delta(1))


def test_an_analogy_is_a_sum_with_a_negative_weight() -> None:
    king, man, woman = (delta(index) for index in range(3))
    queen = merged(Recipe("task_arithmetic"), king, man, woman, weights=[1.0, -1.0, 1.0])
    for name in SHAPES:
        torch.testing.assert_close(queen[name], king[name] - man[name] + woman[name])


def test_clip_shortens_what_is_too_long_and_nothing_else() -> None:
    long = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    assert TRANSFORMS["clip"](long, max_norm=2.5).tolist() == [[1.5, 0.0], [0.0, -2.0]]
    assert torch.equal(TRANSFORMS["clip"](long, max_norm=5.0), long)
    assert TRANSFORMS["clip"](torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (3, 4)])
def test_a_transform_returns_the_shape_in_working_precision(name: str, shape: tuple[int, ...]) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        one = torch.ones(shape, dtype=dtype)
        before = one.clone()
        out = TRANSFORMS[name](one, seed=3)
        assert out.shape == shape
        assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(one, before)


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        (["dare", "elekt"], "there is no step 'elekt'; did you mean 'elect'?"),
        (["dare", "trim"], "no step merges: dare, trim"),
        ([], "no step merges: there is none"),
        (["scale", "fedavg"], "no step merges: scale, fedavg"),
        (["fedavg", "dare"], "dare acts on each task vector: it goes before fedavg"),
        (["dare", "ties", "fedavg"], "ties has merged already, so fedavg finds nothing to merge"),
    ],
)  # fmt: skip
def test_steps_that_make_no_chain(steps: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_steps([(name, {}) for name in steps])
    assert caught.value.message == problem
    assert caught.value.hint or "goes before" in problem


def test_a_chain_survives_json_and_is_complete() -> None:
    recipe = Recipe.from_steps([("dare", {"density": [0.2, 0.4]}), ("elect", {"lambda": 0.5}), ("ema", {})])
    stored = json.loads(json.dumps(recipe.to_dict()))
    assert Recipe.from_dict(stored) == recipe
    assert [step["method"] for step in stored["steps"]] == ["dare", "elect", "ema"]
    assert stored["steps"][0]["params"] == {"density": [0.2, 0.4], "rescale": "paper"}
    assert stored["steps"][1]["params"]["lambda"] == 0.5
    assert stored["steps"][2]["params"] == {"decay": 0.9}


@pytest.mark.parametrize("data", [{"steps": []}, {"steps": 3}, {"steps": [3]}, {"steps": [{"method": "ties"}], "x": 1}])
def test_json_that_is_no_chain(data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Recipe.from_dict(data)


# --- over time

runs = st.lists(st.lists(st.floats(-8, 8), min_size=3, max_size=3), min_size=1, max_size=9)


def published(name: str, steps: list[list[float]], **params: Any) -> Iterator[np.ndarray[Any, Any]]:
    """Yield where the published model is, seen from the base, after each round that led on by a step."""
    state: dict[str, Tensor] = {}
    place = torch.zeros(3, dtype=torch.float64)
    for step in steps:
        moved, state = OVER_ROUNDS[name](torch.tensor(step, dtype=torch.float64), state, **params)
        place = place + moved
        yield place.numpy()


def by_definition(name: str, run: np.ndarray[Any, Any], **params: Any) -> np.ndarray[Any, Any]:
    """Return the average of the models `run` (R, N) as the papers have it."""
    rounds = len(run)
    match name:
        case "ema":
            total, mass = np.zeros(3), 0.0
            for model in run:
                total = params["decay"] * total + (1 - params["decay"]) * model
                mass = params["decay"] * mass + (1 - params["decay"])
            return total / mass
        case "lawa":
            return run[max(0, rounds - params["latest"]) :].mean(axis=0)
        case _:
            return run[min(params["start"], rounds) - 1 :].mean(axis=0)


AVERAGES = [("ema", {"decay": 0.75}), ("ema", {"decay": 0.0}), ("lawa", {"latest": 3}), ("lawa", {"latest": 1}),
            ("swa", {"start": 1}), ("swa", {"start": 4})]  # fmt: skip


@pytest.mark.parametrize(("name", "params"), AVERAGES)
@given(runs)
def test_after_each_round_the_average_of_all_is_published(
    name: str, params: dict[str, Any], steps: list[list[float]]
) -> None:
    models = np.cumsum(np.array(steps), axis=0)
    for index, place in enumerate(published(name, steps, **params)):
        np.testing.assert_allclose(place, by_definition(name, models[: index + 1], **params), atol=1e-9)


@pytest.mark.parametrize(("name", "params"), AVERAGES)
@given(runs)
def test_checkpoints_in_order_of_time_average_as_rounds_do(
    name: str, params: dict[str, Any], steps: list[list[float]]
) -> None:
    models = torch.tensor(np.cumsum(np.array(steps), axis=0))
    average = METHODS[name](models, torch.ones(len(steps)), **params)
    *_, place = published(name, steps, **params)
    np.testing.assert_allclose(average.numpy(), place, atol=1e-9)


@given(runs)
def test_wise_ft_publishes_between_the_base_and_what_a_round_led_to(steps: list[list[float]]) -> None:
    place = np.zeros(3)
    for step, found in zip(steps, published("wise_ft", steps, alpha=0.25), strict=True):
        place = 0.25 * (place + np.array(step))
        np.testing.assert_allclose(found, place, atol=1e-9)


@pytest.mark.parametrize("name", OVER_ROUNDS)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4)])
def test_a_step_over_rounds_keeps_shape_and_dtype_and_what_it_is_given(name: str, shape: tuple[int, ...]) -> None:
    step = torch.full(shape, 0.5)
    state: dict[str, Tensor] = {}
    for _ in range(3):
        moved, after = OVER_ROUNDS[name](step, state)
        assert (moved.shape, moved.dtype) == (shape, torch.float32)
        assert torch.equal(step, torch.full(shape, 0.5))
        state = after


def test_state_of_each_step_over_rounds_is_its_own() -> None:
    recipe = Recipe.from_steps([("fedavg", {}), ("ema", {"decay": 0.5}), ("ema", {"decay": 0.5})])
    plan, place, state = Plan(recipe, [1.0], ["w"]), torch.zeros(2, dtype=torch.float64), {}
    steps = [torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([4.0, -1.0], dtype=torch.float64)]
    for step in steps:
        moved, state = plan.follow("w", step, state)
        place = place + moved
    inner = [steps[0], (steps[0] / 2 + steps[0] + steps[1]) / 1.5]
    torch.testing.assert_close(place, (inner[0] / 2 + inner[1]) / 1.5)
