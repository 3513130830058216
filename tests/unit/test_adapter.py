"""LoRA adapters as PEFT writes them, against what PEFT itself makes of them."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedmerge.delta.adapter import is_adapter, open_tuned, read_adapter
from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import DeltaFile, write_delta
from fedmerge.delta.lowrank import LowRankDelta
from fedmerge.errors import InputError, ModelMismatch
from fedmerge.tensors import Checkpoint


class Linears(nn.Module):
    """Layers that keep weights as (outputs, inputs): square, wider and narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.wide = nn.Linear(16, 40)
        self.square = nn.Linear(16, 16)
        self.block = nn.ModuleDict({"narrow": nn.Linear(40, 16), "norm": nn.LayerNorm(16)})


class Convolutions(nn.Module):
    """GPT-2's layers, which keep them as (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = Conv1D(40, 16)
        self.square = Conv1D(16, 16)


class Mixed(nn.Module):
    """Both; the one flag of an adapter is that of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = Conv1D(40, 16)
        self.last = nn.Linear(16, 5)
        self.square = nn.Linear(16, 16)


def make_adapter(folder: Path, model: nn.Module, **settings: Any) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    """Write a base and an adapter with random factors; return the base, and what PEFT merges them into."""
    torch.manual_seed(0)
    (folder / "base").mkdir(parents=True)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "base/model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, LoraConfig(**settings))  # type: ignore[arg-type]
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        tuned.save_pretrained(str(folder / "adapter"))
        merged = tuned.merge_and_unload()
    return Checkpoint(folder / "base"), dict(merged.state_dict())


ADAPTERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (Linears, {"r": 4, "lora_alpha": 7, "target_modules": ["wide", "square", "narrow"]}),
    "rsLoRA": (Linears, {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": ["wide", "square", "narrow"]}),
    "mixed ranks": (
        Linears,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["wide", "square", "narrow"],
            "rank_pattern": {"wide": 2, r"block\.nar.*": 7},
            "alpha_pattern": {"narrow": 3},
        },
    ),
    "whole tensors": (
        Linears,
        {"target_modules": ["wide", "embed"], "modules_to_save": ["norm"], "bias": "lora_only"},
    ),
    "Conv1D": (Convolutions, {"r": 3, "use_rslora": True, "target_modules": ["wide", "square"]}),
    "Conv1D and Linear": (Mixed, {"r": 3, "target_modules": ["wide", "last"]}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_base_plus_delta_is_what_peft_merges(name: str, tmp_path: Path) -> None:
    model, settings = ADAPTERS[name]
    base, merged = make_adapter(tmp_path, model(), **settings)
    tuned, delta = open_tuned(tmp_path / "adapter", base)
    assert isinstance(delta, LowRankDelta)
    assert set(tuned) == set(merged) == set(delta)
    assert {target.split(".")[-2] for target in delta.factors} == set(settings["target_modules"])
    for target in merged:
        assert float((tuned[target] - merged[target]).abs().max()) < 1e-6, target
        torch.testing.assert_close(delta[target], merged[target] - base[target], rtol=0, atol=1e-6)


def test_an_adapter_travels_exactly_at_the_size_of_its_factors(tmp_path: Path) -> None:
    model, settings = ADAPTERS["mixed ranks"]
    base, _ = make_adapter(tmp_path, model(), **settings)
    delta = read_adapter(tmp_path / "adapter", base)
    assert {target: factors.rank for target, factors in delta.factors.items()} == {
        "block.narrow.weight": 7,
        "square.weight": 4,
        "wide.weight": 2,
    }
    codec = Codec(sparsify="lowrank", rank=8)
    stats = write_delta(tmp_path / "delta", delta, base.schema, codec, seed=0)
    decoded = DeltaFile(tmp_path / "delta", base.schema, codec, seed=0)
    for target in delta:
        assert torch.equal(decoded[target], delta[target])
    factor_bytes = 4 * sum(factors.left.numel() + factors.right.numel() for factors in delta.factors.values())
    assert stats.payload_bytes < factor_bytes + 400 * len(delta)  # and its header


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_factors_are_multiplied_in_full(dtype: torch.dtype, tmp_path: Path) -> None:
    base, _ = make_adapter(tmp_path, Linears(), r=4, lora_alpha=6, target_modules=["wide"])
    path = tmp_path / "adapter/adapter_model.safetensors"
    factors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(factors, path)
    a, b = (factors[f"base_model.model.wide.lora_{side}.weight"].double() for side in "AB")
    expected = 1.5 * b @ a
    found = read_adapter(tmp_path / "adapter", base)["wide.weight"]
    assert float((found - expected).abs().max()) <= 2.0**-24 * float(expected.abs().max())


def test_a_base_without_a_head_lacks_its_prefix(tmp_path: Path) -> None:
    base, merged = make_adapter(tmp_path, nn.ModuleDict({"net": Linears()}), target_modules=["wide"])
    bare = {name.removeprefix("net."): base[name] for name in base}
    delta = read_adapter(tmp_path / "adapter", bare)
    expected = merged["net.wide.weight"] - base["net.wide.weight"]
    torch.testing.assert_close(delta["wide.weight"], expected, rtol=0, atol=1e-6)


def test_tied_weights_and_integer_buffers(tmp_path: Path) -> None:
    base, _ = make_adapter(tmp_path, Linears(), target_modules=["wide"])
    tied = {**base, "tied.weight": base["wide.weight"], "ids": torch.arange(3)}
    delta = read_adapter(tmp_path / "adapter", tied)
    assert "ids" not in delta
    # Under the name that the adapter gives it alone, as a loader that ties the two would read it.
    assert delta["wide.weight"].any()
    assert not delta["tied.weight"].any()
    untied = {name: tensor for name, tensor in tied.items() if name != "wide.weight"}
    with pytest.raises(InputError) as caught:
        read_adapter(tmp_path / "adapter", untied)
    assert "wide.weight: the base has no such tensor" in caught.value.message
    assert "ties this tensor" in (caught.value.hint or "")


# What is refused

Files = tuple[dict[str, Any], dict[str, torch.Tensor]]
A, B = (f"base_model.model.wide.lora_{side}.weight" for side in "AB")


def _config(**changes: Any) -> Callable[[Files], None]:
    return lambda files: files[0].update(changes)


def _tensors(**changes: torch.Tensor | None) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        for side, tensor in changes.items():
            name = {"A": A, "B": B}.get(side, side)
            files[1].pop(name, None)
            if tensor is not None:
                files[1][name] = tensor

    return change


LIES: dict[str, tuple[Callable[[Files], None], str]] = {
    "another kind": (_config(peft_type="IA3"), "adapter_config.json: peft_type"),
    "DoRA": (_config(use_dora=True), "adapter_config.json: use_dora"),
    "lora_bias": (_config(lora_bias=True), "adapter_config.json: lora_bias"),
    "no rank": (_config(r=0), "adapter_config.json: r"),
    "alpha": (_config(lora_alpha=math.inf), "adapter_config.json: lora_alpha"),
    "another rank": (_config(r=5), "wide: factors of rank 4 and 4, where adapter_config.json says 5"),
    "a pattern": (_config(rank_pattern={"(": 4}), "adapter_config.json is not an adapter's configuration"),
    "pattern's rank": (_config(rank_pattern={"wide": 2}), "wide: factors of rank 4 and 4, where"),
    "ranks of two factors": (_tensors(B=torch.zeros(40, 3)), "wide: factors of rank 4 and 3"),
    "shape": (_tensors(B=torch.zeros(41, 4)), "wide: factors for [41, 16] do not fit the base's [40, 16]"),
    "one factor": (_tensors(A=None), "wide: has lora_B.weight, not one A and one B"),
    "dimensions": (_tensors(A=torch.zeros(4, 16, 1, 1)), "wide: factors and weights of shapes [4, 16, 1, 1] and"),
    "NaN": (_tensors(A=torch.full((4, 16), math.nan)), "wide.lora_A.weight: holds something else than finite"),
    "integers": (_tensors(A=torch.zeros(4, 16, dtype=torch.int8)), "wide.lora_A.weight: holds something else"),
    "another model": (
        _tensors(**{"base_model.model.wild.lora_A.weight": torch.zeros(4, 16)}),
        "wild.weight: the base has no such tensor; did you mean 'wide.weight'?",
    ),
    "no prefix": (_tensors(**{"wide.weight": torch.zeros(40, 16)}), "wide.weight: does not begin with"),
    "whole tensor": (
        _tensors(**{"base_model.model.block.norm.weight": torch.zeros(17)}),
        "block.norm.weight: has shape [17], not the base's [16]",
    ),
    "trained twice": (
        _tensors(**{"base_model.model.wide.weight": torch.ones(40, 16)}),
        "wide: its own weights are not the base's",
    ),
    "two names": (
        _tensors(
            **{
                "base_model.model.block.norm.weight": torch.zeros(16),
                "base_model.model.block.norm.base_layer.weight": torch.zeros(16),
            }
        ),
        "block.norm.weight: is in the adapter twice",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_adapter_that_does_not_fit_is_refused_by_name(lie: str, tmp_path: Path) -> None:
    base, _ = make_adapter(tmp_path, Linears(), r=4, target_modules=["wide"])
    config_path, weights_path = tmp_path / "adapter/adapter_config.json", tmp_path / "adapter/adapter_model.safetensors"
    files = json.loads(config_path.read_text()), load_file(weights_path)
    change, expected = LIES[lie]
    change(files)
    config_path.write_text(json.dumps(files[0]))
    save_file(files[1], weights_path)
    with pytest.raises(InputError) as caught:
        read_adapter(tmp_path / "adapter", base, where="north")
    assert caught.value.message.startswith("north: ")
    assert expected in caught.value.message


def test_a_square_layer_needs_a_flag_that_can_be_trusted(tmp_path: Path) -> None:
    base, _ = make_adapter(tmp_path, Mixed(), target_modules=["wide", "square"])
    with pytest.raises(InputError, match=r"square: is square, and fan_in_fan_out, which is wrong for wide"):
        read_adapter(tmp_path / "adapter", base)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_are_none_are_refused(name: str, tmp_path: Path) -> None:
    base, _ = make_adapter(tmp_path, Linears(), target_modules=["wide"])
    path = tmp_path / "adapter" / name
    for content in (b"", b"[]", b"[" * 100_000, b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=name):
            read_adapter(tmp_path / "adapter", base)
    path.unlink()
    with pytest.raises(InputError, match=name):
        read_adapter(tmp_path / "adapter", base)


def test_a_whole_model_is_opened_as_before(tmp_path: Path) -> None:
    base, merged = make_adapter(tmp_path, Linears(), target_modules=["wide"])
    assert is_adapter(tmp_path / "adapter")
    assert not is_adapter(tmp_path / "base")
    (tmp_path / "tuned").mkdir()
    save_file(merged, tmp_path / "tuned/model.safetensors")
    tuned, delta = open_tuned(tmp_path / "tuned", base)
    assert torch.equal(tuned["wide.weight"], merged["wide.weight"])
    assert torch.equal(delta["wide.weight"], merged["wide.weight"] - base["wide.weight"])
    save_file({"other": torch.zeros(3)}, tmp_path / "tuned/model.safetensors")
    with pytest.raises(ModelMismatch, match="north"):
        open_tuned(tmp_path / "tuned", base, where="north")
