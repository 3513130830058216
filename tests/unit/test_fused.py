"""Compiled, blockwise and on several threads, a merge has the bits of the method's torch form on the whole stack."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmerge.delta.task_vector import UpdatedModel, subtract
from fedmerge.errors import InputError
from fedmerge.merge import METHODS, Recipe, Workers, merge_deltas, merge_models
from fedmerge.merge.fused import FUSED
from fedmerge.merge.methods import BY_ANGLES, PAIRWISE
from fedmerge.models.weights import split_shards, writing_weights
from fedmerge.seeds import derive_seed
from fedmerge.tensors import WEIGHTS, Checkpoint, schema_of

# More than one block of columns, with lines of odd length; one line; a scalar; nothing at all.
SHAPES = {"a.weight": (13, 5501), "norm.weight": (33_001,), "scalar": (), "z.empty": (0, 4)}
WEIGHTS_OF_NODES = [0.393, -0.427, 0.196]

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in FUSED),
    ("task_arithmetic", {"normalize": True, "lambda": 0.3}),
    ("ties", {"trim": "authors", "zero_sum": "majority", "normalizer": "count"}),
    ("ties", {"density": 1.0, "election": "weighted", "normalize": False}),
    ("ties", {"density": 0.5, "election": "count", "aggregation": "max", "lambda": 0.7}),
    ("dare_linear", {"density": 0.3, "rescale": "l1"}),
    ("dare_ties", {"density": 1.0, "rescale": "none"}),
    ("della", {"rescale": "l1", "election": "weighted", "epsilon": 0.15}),
    ("della_linear", {"rescale": "none", "density": 0.3, "epsilon": 0.2}),
    ("della_linear", {"density": 1.0}),
    ("breadcrumbs", {"density": 0.143, "outliers": 0.007}),
    ("breadcrumbs_ties", {"density": 0.95, "outliers": 0.1, "zero_sum": "majority"}),
    ("slerp", {"t": 0.3, "space": "weights"}),
    ("nuslerp", {"axis": "column"}),
    ("karcher", {"space": "weights", "max_iter": 3}),
    ("model_stock", {"clamp": False, "angle": "mean_angle"}),
    ("model_stock", {"filter_wise": True}),
]
each_variant = pytest.mark.parametrize(("method", "params"), VARIANTS)


def weights_for(method: str) -> list[float]:
    """Return weights that the method takes, one negative if it may be."""
    weights = [abs(weight) for weight in WEIGHTS_OF_NODES] if method in BY_ANGLES else WEIGHTS_OF_NODES
    return weights[:2] if method in PAIRWISE else weights


def model(seed: int, dtype: torch.dtype, *, base: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if base is not None:
        # Rounded, so that magnitudes tie with thresholds and votes are drawn.
        made = {name: base[name].float() + (tensor * 4).round() / 64 for name, tensor in made.items()}
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def by_torch(
    method: str, params: dict[str, Any], base: dict[str, Tensor], tuned: list[dict[str, Tensor]], seed: int
) -> dict[str, Tensor]:
    weights = torch.tensor(weights_for(method))
    merged = {}
    for name in sorted(base):
        stack = torch.stack([one[name].float() - base[name].float() for one in tuned])
        before = base[name].float() if method in BY_ANGLES else None
        merged[name] = METHODS[method](stack, weights, base=before, seed=derive_seed(seed, name), **params)
    return merged


@each_variant
@pytest.mark.parametrize(
    ("of_base", "of_tuned"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)], ids=str
)
def test_checkpoints_merge_to_the_bits_of_the_torch_form(
    method: str, params: dict[str, Any], of_base: torch.dtype, of_tuned: torch.dtype
) -> None:
    base = model(0, of_base)
    tuned = [model(seed, of_tuned, base=base) for seed, _ in enumerate(weights_for(method), 1)]
    recipe = Recipe(method, params)
    expected = by_torch(method, dict(recipe.params), base, tuned, seed=5)
    deltas = [subtract(one, base) for one in tuned]
    merged = dict(merge_deltas(deltas, weights_for(method), recipe, base=base, seed=5))
    assert merged.keys() == expected.keys()
    for name in SHAPES:
        assert same_bits(merged[name], expected[name]), name


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("of_base", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("of_tuned", [torch.float16, torch.float32], ids=str)
def test_merged_models_are_base_plus_update_to_the_bit(
    method: str, of_base: torch.dtype, of_tuned: torch.dtype, tmp_path: Path
) -> None:
    base = model(0, of_base)
    tuned = [model(seed, of_tuned, base=base) for seed in (1, 2, 3)]
    ids = torch.arange(7)
    deltas = [subtract(one, base | {"ids": ids}) for one in tuned]
    recipe, schema = Recipe(method), schema_of(base | {"ids": ids})
    with writing_weights(tmp_path, schema, split_shards(schema, 1 << 40)) as writer:
        names = list(merge_models(deltas, WEIGHTS_OF_NODES, recipe, base | {"ids": ids}, writer.write))
    assert names == sorted(schema)
    expected = UpdatedModel(base, [dict(merge_deltas(deltas, WEIGHTS_OF_NODES, recipe))])
    written = load_file(tmp_path / WEIGHTS)
    assert torch.equal(written.pop("ids"), ids)
    for name in SHAPES:
        assert same_bits(written[name], expected[name]), name


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "della", "median", "karcher", "tsv"])
def test_threads_and_memory_change_nothing(method: str, tmp_path: Path) -> None:
    base = {f"{i}.{name}": tensor for i in range(4) for name, tensor in model(i, torch.bfloat16).items()}
    for node in range(3):
        noise = torch.Generator().manual_seed(node)
        (tmp_path / f"{node}").mkdir()
        tensors = {
            name: (one.float() + torch.randn(one.shape, generator=noise) / 64).bfloat16() for name, one in base.items()
        }
        save_file(tensors, tmp_path / f"{node}" / WEIGHTS)
    deltas = [subtract(Checkpoint(tmp_path / f"{node}"), base) for node in range(3)]
    files = []
    for num_threads, memory_budget_bytes in ((1, 1), (3, 1 << 30), (4, 1)):
        workers = Workers(num_threads, memory_budget_bytes)
        out = tmp_path / f"out-{num_threads}"
        out.mkdir()
        with writing_weights(out, schema_of(base), split_shards(schema_of(base), 200_000)) as writer:
            names = merge_models(deltas, [0.4, 0.4, 0.2], Recipe(method), base, writer.write, seed=2, workers=workers)
            assert list(names) == sorted(base)
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
        update = merge_deltas(deltas, [0.4, 0.4, 0.2], Recipe(method), base=base, seed=2, workers=workers)
        assert [name for name, _ in update] == sorted(base)
    assert files[0] == files[1] == files[2]
    assert len(files[0]) > 2


@pytest.mark.parametrize("method", sorted(METHODS.keys() - PAIRWISE))
def test_torch_on_a_device_gives_the_same_bits(method: str) -> None:
    base = {"w": torch.randn(40, 30, generator=torch.Generator().manual_seed(0))}
    deltas = [subtract({"w": base["w"] + torch.randn(40, 30) / 50}, base) for _ in range(3)]
    recipe, options = Recipe(method), {}
    if recipe.statistics is not None:
        found = {"fisher": torch.rand(40, 30), "gram": torch.eye(30)}[recipe.statistics]
        options["statistics"] = [{"w": found}] * 3
    ours, on_device = (
        dict(merge_deltas(deltas, [0.5, 0.3, 0.2], recipe, base=base, workers=Workers(device=device), **options))
        for device in (None, "cpu")
    )
    assert same_bits(ours["w"], on_device["w"])


@pytest.mark.parametrize("method", sorted(FUSED))
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_fine_tune_that_is_not_finite_is_named(method: str, num_threads: int) -> None:
    base = model(0, torch.bfloat16)
    broken = model(1, torch.bfloat16, base=base)
    broken["norm.weight"][[7, 33_000]] = torch.tensor([torch.nan, torch.inf], dtype=torch.bfloat16)
    deltas = [subtract(model(2, torch.bfloat16, base=base), base), subtract(broken, base, where="north")]
    with pytest.raises(InputError, match=r"north: norm\.weight holds 2 NaN or infinite values"):
        list(merge_deltas(deltas, [0.5, 0.5], Recipe(method), workers=Workers(num_threads)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_merged_model_that_is_not_finite_is_refused(dtype: torch.dtype) -> None:
    base = {"w": torch.full((5,), torch.finfo(dtype).max, dtype=dtype)}
    deltas = [subtract({"w": torch.zeros(5, dtype=dtype)}, base)]
    with pytest.raises(InputError, match="w comes out with NaN or infinite values"):
        list(merge_models(deltas, [-1.0], Recipe("task_arithmetic"), base, lambda *_: None))


def test_a_huge_magnitude_range_is_ranked_exactly() -> None:
    # Every upper half of a magnitude that there is, denormals among them.
    values = torch.arange(0, 0x7F800000, 25_013, dtype=torch.int32).view(torch.float32)
    values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    for density in (1e-9, 0.01, 0.37, 0.99):
        recipe = Recipe("ties", {"density": density})
        ((_, merged),) = merge_deltas([{"w": values}], [1.0], recipe)
        assert same_bits(merged, METHODS["ties"](values[None], torch.ones(1), **recipe.params))
