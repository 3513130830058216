"""A merge whose scope is the model: methods on all tensors as one vector, as some authors have them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmerge.delta.task_vector import UpdatedModel
from fedmerge.errors import ConfigError, FedmergeError, InputError, ModelMismatch
from fedmerge.merge import METHODS, Recipe, Workers, merge_deltas, merge_models
from fedmerge.merge.methods import BY_SHAPE, NEEDS_BASE, PAIRWISE
from fedmerge.merge.transforms import TRANSFORMS
from fedmerge.seeds import derive_seed

SHAPES = {"a.bias": (7,), "a.weight": (9, 7), "b": (), "c.weight": (4, 3, 2)}
WEIGHTS = [1.0, 2.0, 0.5]
SEED = 5


def task_vectors(num: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(num)
    return [{name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}] + [
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
        for _ in range(num - 1)
    ]


def as_one(model: dict[str, Tensor]) -> Tensor:
    return torch.cat([model[name].reshape(-1) for name in sorted(model)])


@pytest.mark.parametrize("method", sorted(METHODS.keys() - BY_SHAPE - {"fisher"}))
def test_every_method_takes_the_model_as_one_vector(method: str) -> None:
    deltas = task_vectors(2 if method in PAIRWISE else 3)
    base = task_vectors(1)[0]
    weights = WEIGHTS[: len(deltas)]
    recipe = Recipe(method, scope="model")
    expected = METHODS[method](
        torch.stack([as_one(delta) for delta in deltas]),
        torch.tensor(weights, dtype=torch.float64),
        base=as_one(base) if method in NEEDS_BASE else None,
        seed=derive_seed(SEED, "model"),
        **recipe.params,
    )
    merged = dict(merge_deltas(deltas, weights, recipe, base=base, seed=SEED, workers=Workers(2)))
    assert {name: tuple(tensor.shape) for name, tensor in merged.items()} == SHAPES
    torch.testing.assert_close(as_one(merged), expected, rtol=1e-5, atol=1e-7)


def test_a_density_is_a_share_of_the_model() -> None:
    large, small = {"a": torch.full((10, 10), 5.0), "b": torch.ones(100)}, {"a": torch.zeros(10, 10)}
    merged = dict(merge_deltas([large], [1.0], Recipe("ties", {"density": 0.5}, scope="model")))
    assert torch.equal(merged["a"], large["a"])
    assert torch.equal(merged["b"], torch.zeros(100))
    each = dict(merge_deltas([large], [1.0], Recipe("ties", {"density": 0.5})))
    assert [int(tensor.count_nonzero()) for tensor in each.values()] == [50, 50]
    with pytest.raises(ModelMismatch, match="misses b"):
        dict(merge_deltas([large, small], [1, 1], Recipe("ties", scope="model")))


def test_steps_see_the_model_too() -> None:
    deltas = task_vectors(3, torch.float64)
    recipe = replace(Recipe.from_steps([("trim", {"density": 0.3}), ("elect", {"normalize": False})]), scope="model")
    trimmed = torch.stack([TRANSFORMS["trim"](as_one(delta), seed=0, density=0.3) for delta in deltas])
    expected = METHODS["elect"](trimmed, torch.ones(3), normalize=False)
    merged = dict(merge_deltas(deltas, [1.0] * 3, recipe))
    assert merged["b"].dtype == torch.float64
    torch.testing.assert_close(as_one(merged), expected, rtol=1e-12, atol=0)


def test_a_model_is_written_as_it_is_updated() -> None:
    deltas, base = task_vectors(3, torch.bfloat16), task_vectors(1, torch.bfloat16)[0]
    base["steps"] = torch.tensor([3])
    recipe = Recipe("pcb", scope="model")
    merged = dict(merge_deltas(deltas, WEIGHTS, recipe, scales=[1.0, 0.5, 1.0]))
    written = {name: torch.empty_like(tensor) for name, tensor in base.items()}

    def write(name: str, start: int, values: Tensor) -> None:
        written[name].view(-1)[start : start + values.numel()] = values

    assert [*merge_models(deltas, WEIGHTS, recipe, base, write, scales=[1.0, 0.5, 1.0])] == sorted(base)
    for name, tensor in UpdatedModel(base, [merged]).items():
        assert torch.equal(written[name], tensor)


def test_a_recipe_records_its_scope() -> None:
    recipe = Recipe("ties", {"density": 0.5}, scope="model")
    assert recipe.to_dict()["scope"] == "model"
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    steps = replace(Recipe.from_steps([("dare", {}), ("elect", {}), ("ema", {})]), scope="model")
    assert Recipe.from_dict(steps.to_dict()) == steps
    assert "scope" not in Recipe("ties").to_dict()


@pytest.mark.parametrize(
    ("method", "params", "scope", "problem"),
    [
        ("ties", {}, "models", "scope: unknown 'models'"),
        ("ties", {}, ["model"], "scope: unknown"),
        ("tsv", {}, "model", "tsv works tensor by tensor"),
        ("ties", {"density": [0.1, 0.2]}, "model", "ties: density varies"),
    ],
)
def test_what_does_not_go_with_a_scope_is_refused(
    method: str, params: dict[str, Any], scope: Any, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        Recipe.from_dict({"method": method, "params": params, "scope": scope})


@pytest.mark.parametrize(
    ("deltas", "weights", "problem"),
    [
        ([{"w": torch.ones(4)}, {"w": torch.ones(2, 2)}], [1, 1], r"w has shape \[2, 2\] in task vector 1, not \[4\]"),
        ([{"w": torch.ones(4)}] * 2, [1, {"w": 2}], "weight of fine-tune 1 varies"),
        ([{"w": torch.tensor([1.0, float("nan")])}] * 2, [1, 1], "NaN or infinite"),
    ],
)
def test_what_can_not_be_one_vector_is_refused(deltas: Any, weights: Any, problem: str) -> None:
    base = {name: torch.ones(tensor.shape) for name, tensor in deltas[0].items()}
    with pytest.raises(FedmergeError, match=problem):
        list(merge_models(deltas, weights, Recipe("ties", scope="model"), base, lambda *_: None))


def test_fisher_weighs_all_tensors_by_one_norm() -> None:
    deltas = task_vectors(3)
    statistics = [{name: tensor.square() for name, tensor in one.items()} for one in task_vectors(4)[1:]]
    recipe = Recipe("fisher", {"normalize": True}, scope="model")
    stacks = (torch.stack([as_one(one) for one in part]) for part in (deltas, statistics))
    expected = METHODS["fisher"](next(stacks), torch.ones(3), statistics=next(stacks), **recipe.params)
    merged = dict(merge_deltas(deltas, [1.0] * 3, recipe, statistics=statistics))
    torch.testing.assert_close(as_one(merged), expected)
    part = [{name: one[name] for name in SHAPES if name != "b"} for one in statistics]
    with pytest.raises(InputError, match="statistics 0 have no b"):
        dict(merge_deltas(deltas, [1.0] * 3, recipe, statistics=part))
