"""Values that vary over a model, held against numpy's interpolation and against merging each tensor by hand."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.errors import ConfigError
from fedmerge.merge import METHODS, Recipe, merge_deltas
from fedmerge.merge.layers import at, depths, layer_of
from fedmerge.merge.recipe import Plan
from fedmerge.seeds import derive_seed

NUM_LAYERS = 4
PARTS = ("mlp.up_proj.weight", "self_attn.q_proj.weight", "norm.bias")
NAMES = ["model.embed_tokens.weight", "lm_head.weight"] + [
    f"model.layers.{layer}.{part}" for layer in range(NUM_LAYERS) for part in PARTS
]


def delta(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(6, 5, generator=generator) for name in NAMES}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.up_proj.weight", ("model.layers", 12)),
        ("bert.encoder.layer.0.output.dense.weight", ("bert.encoder.layer", 0)),
        ("transformer.h.3.attn.c_attn.weight", ("transformer.h", 3)),
        ("h.3.attn.c_attn.weight", ("h", 3)),
        ("encoder.block.7.layer.1.DenseReluDense.wi.weight", ("encoder.block", 7)),
        ("visual.transformer.resblocks.5.mlp.c_fc.weight", ("visual.transformer.resblocks", 5)),
        ("model.layers.2.mlp.experts.6.w1.weight", ("model.layers", 2)),
        ("blocks.9", ("blocks", 9)),
        ("model.embed_tokens.weight", None),
        ("bert.embeddings.LayerNorm.weight", None),
        ("heads.3.weight", None),
        ("layers.x.weight", None),
    ],
)
def test_layers_are_found_in_names(name: str, layer: tuple[str, int] | None) -> None:
    assert layer_of(name) == layer


@given(st.integers(1, 50), st.lists(st.floats(-100, 100), min_size=1, max_size=9))
def test_a_list_is_interpolated_over_depth(num_layers: int, values: list[float]) -> None:
    names = [f"layers.{layer}.w" for layer in range(num_layers)]
    found = [at(values, name, depth) for name, depth in depths(names).items()]
    places = np.linspace(0, 1, num_layers) if num_layers > 1 else [1.0]
    assert found == pytest.approx(np.interp(places, np.linspace(0, 1, len(values)), values), abs=1e-9)
    assert found[-1] == values[-1]


def test_stacks_have_depths_of_their_own_and_what_is_outside_has_the_first_value() -> None:
    names = ["enc.layers.0.w", "enc.layers.1.w", "dec.layers.5.w", "dec.layers.7.w", "dec.layers.9.w", "head.w"]
    assert [float(depth) for depth in depths(names).values()] == [0, 1, 0, 0.5, 1, 0]
    assert at([3.0, 5.0], "head.w", depths(names)["head.w"]) == 3.0


@pytest.mark.parametrize("method", ["ties", "dare_linear", "task_arithmetic"])
def test_a_merge_by_layers_is_each_tensor_merged_with_its_own_numbers(method: str) -> None:
    deltas = [delta(0), delta(1), delta(2)]
    params: dict[str, Any] = {"lambda": {"model.layers.*": [1.0, 2.0, 0.5], "lm_*": 3, "default": 0.25}}
    if method != "task_arithmetic":
        params["density"] = {"*.mlp.*": 0.4, "*.norm.*": [0.95, 0.41], "default": 0.2}
    weights = [[0.0, 3.0], 1.0, {"*q_proj*": 2.0, "default": 0.5}]
    merged = dict(merge_deltas(deltas, weights, Recipe(method, params), seed=5))
    for name in NAMES:
        layer = int(name.split(".")[2]) if "layers" in name else None
        factor = 0.25 if "embed" in name else 3.0 if layer is None else [1.0, 5 / 3, 1.5, 0.5][layer]
        scalars: dict[str, Any] = {"lambda_": factor}
        if method != "task_arithmetic":
            density = 0.4 if "mlp" in name else 0.95 - 0.18 * (layer or 0) if "norm" in name else 0.2
            scalars["density"] = density
        weight = [float(layer or 0), 1.0, 2.0 if "q_proj" in name else 0.5]
        stack = torch.stack([one[name] for one in deltas])
        expected = METHODS[method](stack, torch.tensor(weight), seed=derive_seed(5, name), **scalars)
        torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-7)


def test_of_the_patterns_that_fit_the_first_counts() -> None:
    value = {"*q_proj*": 1.0, "*self_attn*": 2.0, "default": 3.0}
    found = {name: at(value, name, depth) for name, depth in depths(NAMES).items()}
    assert {name for name in NAMES if found[name] == 1.0} == {name for name in NAMES if "q_proj" in name}
    assert 2.0 not in found.values()


def test_a_recipe_on_record_holds_the_default_of_a_table_that_has_none() -> None:
    recipe = Recipe("ties", {"density": {"*.mlp.*": [0.4, 1]}, "election": {"*norm*": "count"}})
    stored = json.loads(json.dumps(recipe.to_dict()))
    assert stored["params"]["density"] == {"*.mlp.*": [0.4, 1.0], "default": 0.2}
    assert stored["params"]["election"] == {"*norm*": "count", "default": "mass"}
    assert Recipe.from_dict(stored) == recipe


def test_names_choose_switches_too() -> None:
    recipe = Recipe("task_arithmetic", {"normalize": {"*norm*": True}})
    merged = dict(merge_deltas([delta(0), delta(0)], [1.0, 1.0], recipe))
    for name in NAMES:
        torch.testing.assert_close(merged[name], delta(0)[name] * (1 if "norm" in name else 2))


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"density": [0.2, 2.0]}, "density[1] = 2.0 should be less than or equal to 1"),
        ({"density": {"*.mlp.*": 0.0}}, "density['*.mlp.*'] = 0.0 should be greater than 0"),
        ({"density": {"*.mlp.*": [0.5, "x"]}}, "density['*.mlp.*'][1] = 'x' should be a valid number"),
        ({"density": {"*.mlp.*": {"*": 0.5}}}, "density['*.mlp.*'] = {'*': 0.5} should be a valid number"),
        ({"density": [[0.5]]}, "density[0] = [0.5] should be a valid number"),
        ({"density": []}, "density = [] should be a valid number"),
        ({"density": {}}, "density = {} should be a valid number"),
        ({"density": {3: 0.5}}, "density = {3: 0.5} should be a valid number"),
        ({"density": {"each": [0.5, 0.2]}}, "density = {'each': [0.5, 0.2]} should be a valid number"),
        ({"normalize": [True, False]}, "normalize = [True, False] should be a valid boolean"),
    ],
)
def test_values_of_the_wrong_form(params: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe("ties", params)
    assert problem in caught.value.message


def test_numbers_that_make_no_sense_together_anywhere() -> None:
    with pytest.raises(ConfigError, match=r"DELLA with density 0\.05"):
        Recipe("della", {"density": [0.5, 0.05], "epsilon": 0.2})


def test_a_pattern_that_fits_nothing_is_a_slip_of_the_pen() -> None:
    recipe = Recipe("ties", {"density": {"*.mpl.*": 0.5}})
    with pytest.raises(ConfigError) as caught:
        merge_deltas([delta(0)], [1.0], recipe)
    assert caught.value.message == ("ties: density: the pattern '*.mpl.*' fits no tensor; did you mean 'mlp'?")
    assert "tensors have names such as model.layers." in (caught.value.hint or "")
    with pytest.raises(ConfigError, match="weight of fine-tune 1: the pattern 'layers' fits no tensor"):
        Plan(Recipe("ties"), [1.0, {"layers": 2.0}], NAMES)
