"""The engine streams a model through a method, and does nothing else; recipes are checked before any work begins."""

import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmerge import merge
from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import DeltaFile, write_delta
from fedmerge.errors import ConfigError, InputError, ModelMismatch
from fedmerge.merge import METHODS, Recipe, parameters
from fedmerge.merge.methods import LINEAR, PAIRWISE
from fedmerge.seeds import derive_seed
from fedmerge.tensors import TensorMap, TensorSpec

SHAPES = {"embed": (300, 16), "a.bias": (16,), "a.weight": (16, 16), "scalar": ()}
# Their shares of the sum round differently in fp32 when they are rounded to it first.
WEIGHTS = [0.393, 0.427, 0.196]

each_method = pytest.mark.parametrize("method", METHODS)
# The engine treats a method of two nodes like any other; the tests below merge three and more.
each_method_of_many = pytest.mark.parametrize("method", [method for method in METHODS if method not in PAIRWISE])


def merge_deltas(
    deltas: Sequence[TensorMap], weights: Sequence[float], recipe: Recipe, **options: Any
) -> Iterator[tuple[str, Tensor]]:
    """Merge as the library does; methods that need statistics get them for no parameter."""
    statistics = None if recipe.statistics is None else [{}] * len(deltas)
    return merge.merge_deltas(deltas, weights, recipe, statistics=statistics, **options)


def delta(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Not in sorted order, as files may be.
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


class Decoded(Mapping[str, Tensor]):
    """A delta whose tensors are made when asked for; counts how often, and how many are alive across all deltas."""

    def __init__(self, tensors: dict[str, Tensor], alive: set[int], log: list[str]) -> None:
        self.tensors, self.alive, self.log = tensors, alive, log
        self.most_alive = 0

    def __getitem__(self, name: str) -> Tensor:
        made = self.tensors[name].clone()
        self.log.append(name)
        self.alive.add(id(made))
        weakref.finalize(made, self.alive.discard, id(made))
        self.most_alive = max(self.most_alive, len(self.alive))
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@each_method_of_many
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_yields_the_method_on_each_stack_to_the_bit(method: str, dtype: torch.dtype) -> None:
    deltas = [delta(seed, dtype) for seed in range(3)]
    merged = list(merge_deltas(deltas, WEIGHTS, Recipe(method), seed=7))
    assert [name for name, _ in merged] == sorted(SHAPES)
    for name, tensor in merged:
        stack, seed = torch.stack([one[name] for one in deltas]), derive_seed(7, name)
        # Whether the caller's weights are fp32 or fp64 makes no difference to fp32 deltas.
        for weights in (torch.tensor(WEIGHTS, dtype=torch.float64), torch.tensor(WEIGHTS, dtype=torch.float32)):
            if dtype != torch.float64 or weights.dtype == torch.float64:
                assert torch.equal(tensor, METHODS[method](stack, weights, seed=seed))


@each_method_of_many
def test_asks_for_one_tensor_at_a_time_and_once(method: str) -> None:
    alive: set[int] = set()
    log: list[str] = []
    deltas = [Decoded(delta(seed), alive, log) for seed in range(8)]
    merged = dict(merge_deltas(deltas, [1 / 8] * 8, Recipe(method)))
    assert log == [name for name in sorted(SHAPES) for _ in range(8)]
    # The one being merged and the one being decoded, whatever the number of nodes.
    assert max(one.most_alive for one in deltas) <= 2
    assert merged.keys() == SHAPES.keys()


@each_method
def test_nothing_is_read_before_the_first_parameter_is_asked_for(method: str) -> None:
    log: list[str] = []
    merged = merge_deltas([Decoded(delta(0), set(), log)], [1.0], Recipe(method))
    assert log == []
    next(merged)
    assert set(log) == {"a.bias"}


@each_method_of_many
def test_merged_tensors_do_not_share_memory(method: str) -> None:
    deltas = [delta(seed) for seed in range(3)]
    kept = dict(merge_deltas(deltas, WEIGHTS, Recipe(method)))
    copies = {name: tensor.clone() for name, tensor in merge_deltas(deltas, WEIGHTS, Recipe(method))}
    assert all(torch.equal(kept[name], copies[name]) for name in SHAPES)
    assert all(torch.equal(deltas[seed][name], delta(seed)[name]) for seed in range(3) for name in SHAPES)


@each_method_of_many
def test_scales_multiply_the_deltas(method: str) -> None:
    deltas, scales = [delta(seed) for seed in range(3)], [1.0, 0.3, 0.55]
    scaled = [{name: tensor * scale for name, tensor in one.items()} for one, scale in zip(deltas, scales, strict=True)]
    ours = dict(merge_deltas(deltas, WEIGHTS, Recipe(method), scales=scales, seed=3))
    expected = dict(merge_deltas(scaled, WEIGHTS, Recipe(method), seed=3))
    assert all(torch.equal(ours[name], expected[name]) for name in SHAPES)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
@pytest.mark.parametrize("method", ["fedavg", "ties"])
def test_one_fp64_delta_makes_the_merge_fp64(method: str, order: list[int]) -> None:
    deltas = [delta(0), delta(1), delta(2, torch.float64)]
    merged = dict(merge_deltas([deltas[i] for i in order], [1 / 3] * 3, Recipe(method)))
    expected = dict(merge_deltas([delta(i, torch.float64) for i in order], [1 / 3] * 3, Recipe(method)))
    for name in SHAPES:
        assert merged[name].dtype == torch.float64
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-6, atol=1e-6)


def test_masks_differ_between_parameters_and_seeds() -> None:
    twins = {"one": torch.ones(500), "other": torch.ones(500)}
    recipe = Recipe("dare_linear")
    merged = dict(merge_deltas([twins], [1.0], recipe, seed=1))
    assert not torch.equal(merged["one"], merged["other"])
    assert not torch.equal(merged["one"], dict(merge_deltas([twins], [1.0], recipe, seed=2))["one"])


def test_parameters_of_the_recipe_reach_the_method() -> None:
    one = {"w": torch.tensor([1.0, -4.0, 3.0, 2.0])}
    merged = dict(merge_deltas([one], [1.0], Recipe("ties", {"density": 0.5, "lambda": 2.0})))
    assert merged["w"].tolist() == [0, -8, 6, 0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda one: one.pop("scalar"), "task vector 1 misses scalar"),
        (lambda one: one.update(extra=torch.ones(1)), "task vector 1 has unknown extra"),
    ],
)
def test_other_names_are_refused_at_once(change: Callable[[dict[str, Tensor]], Any], problem: str) -> None:
    other = delta(1)
    change(other)
    with pytest.raises(ModelMismatch, match=problem):
        merge_deltas([delta(0), other], [0.5, 0.5], Recipe("fedavg"))


@each_method
def test_other_shapes_and_integers_are_refused(method: str) -> None:
    # A shape that would broadcast is still another shape.
    with pytest.raises(ModelMismatch, match=r"embed has shape \[16\] in task vector 1"):
        list(merge_deltas([delta(0), delta(1) | {"embed": torch.ones(16)}], [0.5, 0.5], Recipe(method)))
    with pytest.raises(InputError, match="int64"):
        list(merge_deltas([delta(0), delta(1) | {"embed": torch.ones(300, 16).long()}], [0.5, 0.5], Recipe(method)))


@each_method
def test_numbers_that_do_not_match_are_refused(method: str) -> None:
    with pytest.raises(InputError, match="no task vectors"):
        merge_deltas([], [], Recipe(method))
    with pytest.raises(InputError, match="2 task vectors came with 1 weights"):
        merge_deltas([delta(0), delta(1)], [1.0], Recipe(method))
    with pytest.raises(InputError, match="3 scales"):
        merge_deltas([delta(0), delta(1)], [0.5, 0.5], Recipe(method), scales=[1.0, 1.0, 1.0])


def test_a_base_without_a_parameter_is_refused() -> None:
    with pytest.raises(ModelMismatch, match=r"misses a\.weight"):
        merge_deltas([delta(0)], [1.0], Recipe("fedavg"), base={"embed": torch.ones(1), "a.bias": torch.ones(1)})


def test_a_method_in_the_space_of_weights_gets_the_base() -> None:
    deltas, base = [delta(0), delta(1)], delta(2)
    recipe = Recipe("karcher", {"space": "weights"})
    merged = dict(merge_deltas(deltas, [0.5, 0.5], recipe, base=base))
    for name in SHAPES:
        pair = torch.stack([one[name] for one in deltas])
        expected = METHODS["karcher"](pair, torch.tensor([0.5, 0.5]), base=base[name], space="weights")
        assert torch.equal(merged[name], expected)
    with pytest.raises(InputError, match="needs the base"):
        list(merge_deltas(deltas, [0.5, 0.5], recipe))


def test_every_linear_method_is_a_method() -> None:
    assert LINEAR.keys() <= METHODS.keys()


# --- recipes


@each_method
def test_a_recipe_survives_json_and_is_complete(method: str) -> None:
    recipe = Recipe(method)
    stored = json.loads(json.dumps(recipe.to_dict()))
    assert Recipe.from_dict(stored) == recipe
    assert recipe.params == {name: parameter.default for name, parameter in parameters(method).items()}
    assert stored["params"].keys() == {name.rstrip("_") for name in parameters(method)}


def test_lambda_is_written_lambda_in_files() -> None:
    recipe = Recipe.from_dict({"method": "ties", "params": {"lambda": 0.5}})
    assert recipe == Recipe("ties", {"lambda_": 0.5})
    assert recipe.to_dict()["params"]["lambda"] == 0.5


@pytest.mark.parametrize(
    ("method", "params", "problem"),
    [
        ("tise", {}, "there is no merge method 'tise'; did you mean 'ties'?"),
        ("ties", {"densty": 0.2}, "has no parameter 'densty'; did you mean 'density'?"),
        ("fedavg", {"density": 0.2}, "has no parameter 'density'"),
        ("ties", {"seed": 1}, "has no parameter 'seed'"),
        ("ties", {"density": 0.0}, "density = 0.0 should be greater than 0"),
        ("ties", {"density": 1.5}, "density = 1.5 should be less than or equal to 1"),
        ("ties", {"density": float("nan")}, "density = nan should be"),
        ("ties", {"density": "0.2"}, "density = '0.2' should be a valid number"),
        ("ties", {"density": True}, "density = True should be a valid number"),
        ("ties", {"lambda": float("inf")}, "lambda = inf should be a finite number"),
        ("ties", {"normalize": 1}, "normalize = 1 should be a valid boolean"),
        ("ties", {"election": "lottery"}, "election = 'lottery' should be 'mass', 'weighted' or 'count'"),
    ],
)
def test_recipes_that_can_not_be_cooked(method: str, params: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe(method, params)
    assert problem in caught.value.message


@pytest.mark.parametrize("data", [{}, {"method": 3}, {"method": "ties", "params": [1]}, {"method": "ties", "x": 1}])
def test_json_that_is_no_recipe(data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not a merge recipe"):
        Recipe.from_dict(data)


@pytest.mark.parametrize(
    ("method", "params"),
    [("della", {"density": 0.05, "epsilon": 0.3}), ("cabs", {"num_kept": 9, "block_length": 4})],
)
def test_values_that_make_no_sense_together_are_refused_before_any_round(method: str, params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Recipe(method, params)


@pytest.mark.parametrize("thinned", ["seeded", "topk", "layerwise_topk", "none"])
@pytest.mark.parametrize("method", ["fedavg", "task_arithmetic", "wise_ft"])
def test_thinned_deltas_are_folded_to_the_bits_of_dense_ones(thinned: str, method: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    schema = {"a": TensorSpec((70, 90), "F32"), "small": TensorSpec((5,), "F32"), "zero": TensorSpec((6, 800), "F32")}
    codec = Codec(values="int8", sparsify=thinned, density=1.0 if thinned == "none" else 0.05)
    files = []
    for seed in range(3):
        vector = {name: torch.randn(spec.shape, generator=generator) for name, spec in schema.items()}
        vector["zero"] *= seed > 0
        write_delta(tmp_path / f"{seed}", vector, schema, codec, seed=seed)
        files.append(DeltaFile(tmp_path / f"{seed}", schema, codec, seed=seed))
    weights, scales = [-0.4, 0.9, 0.5], [1.0, 0.7, 1.0]
    sparse = dict(merge_deltas(files, weights, Recipe(method), scales=scales))
    # The same, held in memory: these go through the compiled form.
    dense = dict(merge_deltas([dict(file) for file in files], weights, Recipe(method), scales=scales))
    for name in schema:
        assert torch.equal(sparse[name].view(torch.int32), dense[name].view(torch.int32))
