"""Step files: from one version to the next bit for bit, what they cost, and every way one can lie."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fedmerge.errors import InputError, InvalidDelta, ModelMismatch, ResourceError
from fedmerge.models.steps import SteppedModel, inspect_steps, write_steps
from fedmerge.tensors import model_digest, schema_of, tensor_bytes

METADATA = {"fedmerge.steps.v2": ""}
Model = dict[str, torch.Tensor]


def versions() -> tuple[Model, Model]:
    """Return two versions of a model with a tensor of every kind."""
    generator = torch.Generator().manual_seed(5)
    before: Model = {
        f"layer.{name}": torch.randn(70, 90, generator=generator, dtype=torch.float64).to(dtype)
        for name, dtype in {
            "bf16": torch.bfloat16,
            "fp16": torch.float16,
            "fp32": torch.float32,
            "fp64": torch.float64,
        }.items()
    }
    after = {
        name: (tensor.double() + 1e-3 * torch.randn(70, 90, generator=generator)) for name, tensor in before.items()
    }
    after = {name: tensor.to(before[name].dtype) for name, tensor in after.items()}
    same = {"ids": torch.arange(7), "frozen": torch.randn(2000, generator=generator), "empty": torch.zeros(0, 3)}
    return before | same | {"scale": torch.tensor(1.0)}, after | same | {"scale": torch.tensor(float("nan"))}


def test_a_version_arrives_bit_for_bit(tmp_path: Path) -> None:
    before, after = versions()
    write_steps(tmp_path / "steps", before, after, schema_of(before))
    found = SteppedModel(before, tmp_path / "steps", schema_of(before))
    assert list(found) == sorted(before)
    for name, tensor in after.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes(tensor_bytes(found[name])) == bytes(tensor_bytes(tensor)), name
    assert model_digest(found) == model_digest(after)
    # Chains of steps and non-contiguous tensors are no matter.
    turned = {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in after.items()}
    write_steps(tmp_path / "back", turned, before, schema_of(before))
    assert model_digest(SteppedModel(found, tmp_path / "back", schema_of(before))) == model_digest(before)


def test_what_did_not_change_costs_nothing(tmp_path: Path) -> None:
    before, after = versions()
    write_steps(tmp_path / "steps", before, after, schema_of(before))
    assert set(load_file(tmp_path / "steps")) == {f"layer.{d}" for d in ("bf16", "fp16", "fp32", "fp64")} | {"scale"}
    said = inspect_steps(tmp_path / "steps")
    assert said["file_bytes"] == (tmp_path / "steps").stat().st_size
    assert {row["name"]: row["coded_bytes"] for row in said["tensors"]} == {
        name: frame.size for name, frame in load_file(tmp_path / "steps").items()
    }
    write_steps(tmp_path / "none", before, before, schema_of(before))
    assert (tmp_path / "none").stat().st_size < 150
    assert model_digest(SteppedModel(before, tmp_path / "none", schema_of(before))) == model_digest(before)


def test_the_same_versions_give_the_same_bytes(tmp_path: Path) -> None:
    before, after = versions()
    for name in ("a", "b"):
        write_steps(tmp_path / name, before, after, schema_of(before))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_versions_of_another_shape_or_type_are_no_matter_for_a_step(tmp_path: Path) -> None:
    before, after = versions()
    for wrong in (after["layer.bf16"].float(), after["layer.bf16"].reshape(90, 70)):
        with pytest.raises(ModelMismatch, match=r"layer\.bf16"):
            write_steps(tmp_path / "steps", before, after | {"layer.bf16": wrong}, schema_of(before))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ResourceError):
        write_steps(tmp_path / "no-such-folder" / "steps", before, after, schema_of(before))


def test_a_missing_file_is_the_callers_mistake(tmp_path: Path) -> None:
    before, _ = versions()
    with pytest.raises(InputError, match="step file"):
        SteppedModel(before, tmp_path / "steps", schema_of(before))


def no_tensor_of_the_model(frames: dict[str, Any], metadata: dict[str, str]) -> None:
    frames["layer.other"] = frames["layer.bf16"]


def an_integer_tensor(frames: dict[str, Any], metadata: dict[str, str]) -> None:
    frames["ids"] = frames.pop("layer.bf16")


def no_byte_string(frames: dict[str, Any], metadata: dict[str, str]) -> None:
    frames["layer.fp16"] = frames["layer.fp16"].astype(np.float32)


def two_dimensions(frames: dict[str, Any], metadata: dict[str, str]) -> None:
    frames["layer.fp16"] = frames["layer.fp16"].reshape(1, -1)


def larger_than_any_step(frames: dict[str, Any], metadata: dict[str, str]) -> None:
    frames["layer.fp16"] = np.zeros(1_000_000, np.uint8)


def another_version(frames: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["fedmerge.steps.v3"] = metadata.pop("fedmerge.steps.v2")


def another_format(frames: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["fedmerge.delta.v2"] = metadata.pop("fedmerge.steps.v2")


def more_metadata(frames: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["more"] = "of it"


def a_text(frames: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["fedmerge.steps.v2"] = " "


LIES = (
    no_tensor_of_the_model,
    an_integer_tensor,
    no_byte_string,
    two_dimensions,
    larger_than_any_step,
    another_version,
    another_format,
    more_metadata,
    a_text,
)


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_file_that_lies_is_refused_when_it_is_opened(
    tmp_path: Path, lie: Callable[[dict[str, Any], dict[str, str]], None]
) -> None:
    before, after = versions()
    write_steps(tmp_path / "steps", before, after, schema_of(before))
    frames, metadata = dict(load_file(tmp_path / "steps")), dict(METADATA)
    lie(frames, metadata)
    save_file(frames, tmp_path / "steps", metadata=metadata)
    with pytest.raises(InvalidDelta) as caught:
        SteppedModel(before, tmp_path / "steps", schema_of(before))
    assert caught.value.message.startswith("steps: ")
    assert "fetch it again" in (caught.value.hint or "")


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_anywhere_is_refused_or_gives_a_model_of_the_schema(tmp_path: Path, data: st.DataObject) -> None:
    before, after = versions()
    path, whole = tmp_path / "steps", tmp_path / "whole"
    if not whole.exists():
        write_steps(whole, before, after, schema_of(before))
    damaged = bytearray(whole.read_bytes())
    place = data.draw(st.integers(0, len(damaged) - 1))
    match data.draw(st.sampled_from(["flip", "header", "cut", "add"])):
        case "flip":
            damaged[place] ^= 1 << data.draw(st.integers(0, 7))
        case "header":
            damaged[place % 800] = data.draw(st.integers(0, 255))
        case "cut":
            del damaged[place:]
        case "add":
            damaged += b"more"
    path.write_bytes(damaged)
    with contextlib.suppress(InvalidDelta):
        model = SteppedModel(before, path, schema_of(before))
        assert schema_of({name: model[name] for name in model}) == schema_of(before)


def test_steps_from_another_version_give_another_digest(tmp_path: Path) -> None:
    before, after = versions()
    write_steps(tmp_path / "steps", before, after, schema_of(before))
    for name in ("layer.bf16", "layer.fp64"):
        wrong = before | {name: before[name].flip(0)}
        with contextlib.suppress(InvalidDelta):
            assert model_digest(SteppedModel(wrong, tmp_path / "steps", schema_of(before))) != model_digest(after)
