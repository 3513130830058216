"""Task vectors: exact arithmetic where fp32 allows it, one rounding, and errors that name the tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fedmerge.delta.task_vector import UpdatedModel, apply_one, delta_schema, subtract
from fedmerge.errors import InputError, ModelMismatch
from fedmerge.tensors import Checkpoint, model_digest, schema_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def model(
    seed: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (70, 1000)
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(shape, generator=generator).to(dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "scalar": torch.randn((), generator=generator).to(dtype),
        "ids": torch.arange(4),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", DTYPES)
def test_the_difference_is_formed_in_fp32_or_fp64(dtype: torch.dtype, base_dtype: torch.dtype) -> None:
    tuned, base = model(1, dtype), model(2, base_dtype)
    wide = torch.float64 in {dtype, base_dtype}
    delta = subtract(tuned, base)
    assert list(delta) == ["empty", "scalar", "weight"]
    for name in delta:
        working = torch.float64 if wide else torch.float32
        assert torch.equal(delta[name], tuned[name].to(working) - base[name].to(working))
        assert delta[name].dtype == working


def test_a_16_bit_fine_tune_comes_back_to_the_bit() -> None:
    base, tuned = model(1, torch.bfloat16), model(2, torch.bfloat16)
    delta = subtract(tuned, base)
    assert torch.equal(apply_one(base["weight"], delta["weight"]), tuned["weight"])


@given(st.lists(st.integers(-(2**20), 2**20), min_size=1, max_size=6))
def test_updates_are_summed_before_they_are_rounded(steps: list[int]) -> None:
    # Each step alone is too small for bf16 next to 256; together they may not be.
    base = {"w": torch.tensor([256.0], dtype=torch.bfloat16)}
    updates = [{"w": torch.tensor([step / 2**20])} for step in steps]
    expected = torch.tensor([256.0 + sum(steps) / 2**20]).to(torch.bfloat16)
    assert torch.equal(UpdatedModel(base, updates)["w"], expected)


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "1 NaN"), (float("inf"), "1 NaN or infinite")])
def test_a_diverged_fine_tune_is_refused_by_name(value: float, words: str) -> None:
    tuned = model(1)
    tuned["weight"][3, 5] = value
    with pytest.raises(InputError, match=f"weight holds {words}"):
        subtract(tuned, model(2))["weight"]


def test_a_sum_beyond_the_range_is_not_taken_for_a_divergence() -> None:
    tuned = {"w": torch.full((4,), 3e38)}
    assert torch.equal(subtract(tuned, {"w": torch.zeros(4)})["w"], tuned["w"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.zeros(2, 2)}, r"weight has shape \[2, 2\]"),
        ({"more": torch.zeros(1)}, "unknown more"),
        ({"weight": None}, "misses weight"),
        ({"weight": torch.zeros(70, 1000, dtype=torch.int64)}, "misses weight"),
    ],
)
def test_another_architecture_is_refused_with_the_first_differences(
    change: dict[str, torch.Tensor | None], words: str
) -> None:
    changed = {name: tensor for name, tensor in (model(1) | change).items() if tensor is not None}
    with pytest.raises(ModelMismatch, match=words):
        subtract(changed, model(2), where="theirs")


def test_integer_buffers_may_be_absent_but_not_different() -> None:
    base, tuned = model(1), model(2)
    del tuned["ids"]
    assert "ids" not in subtract(tuned, base)
    tuned["ids"] = torch.arange(4) + 1
    with pytest.raises(InputError, match="integer tensor ids"):
        subtract(tuned, base)


def test_a_models_digest_depends_on_its_numbers_and_not_on_its_files(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.bfloat16)}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    save_file(tensors, whole / "model.safetensors")
    for number, name in enumerate(tensors):
        save_file({name: tensors[name]}, parts / f"model-{number}.safetensors")
    weight_map = '{"weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}'
    (parts / "model.safetensors.index.json").write_text(weight_map)
    assert model_digest(Checkpoint(whole)) == model_digest(Checkpoint(parts)) == model_digest(tensors)
    changed = tensors | {"a": torch.tensor([1.0, 1.0, 1.0000001])}
    assert model_digest(changed) != model_digest(tensors)
    assert list(delta_schema(schema_of(tensors))) == ["a", "b"]


def test_an_index_never_leads_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(InputError, match="plain file names"):
        Checkpoint(tmp_path)
