"""Statistics beside a task vector: which there must be, how they travel, and what is no statistic at all."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import DeltaFile, write_delta
from fedmerge.errors import InputError, InvalidDelta, ModelMismatch
from fedmerge.merge.statistics import (
    MAX_INPUTS,
    STATISTICS,
    first_problem,
    side_tensors,
    statistics_of,
    statistics_schema,
    task_vector_of,
)
from fedmerge.tensors import Schema, TensorMap, TensorSpec

SCHEMA: Schema = {
    "bias": TensorSpec((6,), "F32"),
    "convolution": TensorSpec((4, 2, 3, 3), "F32"),
    "empty": TensorSpec((3, 0), "F32"),
    "ids": TensorSpec((5,), "I64"),
    "scalar": TensorSpec((), "F32"),
    "weight": TensorSpec((6, 40), "BF16"),
    "wide": TensorSpec((1, MAX_INPUTS + 1), "F32"),
}
FLOATS = {name: spec for name, spec in SCHEMA.items() if spec.is_float}
# Thins everything that it may thin, and leaves two bits of the rest.
HARSH = Codec(sparsify="seeded", density=0.01, values="lloyd2", small_elements=0)

each_kind = pytest.mark.parametrize("kind", STATISTICS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def task_vector() -> dict[str, Tensor]:
    return {name: normal(*spec.shape) for name, spec in FLOATS.items()}


def found(kind: str) -> dict[str, Tensor]:
    """Return statistics of a node that has looked at everything but the bias."""
    if kind == "gram":
        inputs = normal(100, 40) @ normal(40, 40, seed=1)
        return {"weight": inputs.T @ inputs / 100}
    if kind == "moments":
        return {"weight": normal(2, 6).square()}
    return {name: normal(*spec.shape).square() for name, spec in FLOATS.items() if name != "bias"}


def test_fisher_information_goes_with_every_float_tensor() -> None:
    expected = {f"fisher:{name}": TensorSpec(spec.shape, "BF16") for name, spec in FLOATS.items()}
    assert statistics_schema("fisher", SCHEMA) == expected


def test_gram_matrices_go_with_what_may_be_a_linear_layer_as_triangles() -> None:
    assert statistics_schema("gram", SCHEMA) == {"gram:weight": TensorSpec((40 * 41 // 2,), "F32")}


def test_without_a_kind_there_are_none() -> None:
    assert statistics_schema(None, SCHEMA) == {}
    sent = task_vector()
    assert task_vector_of(sent, None) is sent


def test_a_model_with_such_names_is_refused() -> None:
    with pytest.raises(ModelMismatch, match="gram:x"):
        statistics_schema("gram", {"gram:x": TensorSpec((2, 2), "F32")})
    assert len(statistics_schema("fisher", {"gram:x": TensorSpec((2, 2), "F32")})) == 1


def travelled(path: Path, statistics: TensorMap, kind: str) -> DeltaFile:
    write_delta(path, task_vector(), SCHEMA, HARSH, seed=5, side=side_tensors(statistics, kind, SCHEMA))
    return DeltaFile(path, SCHEMA, HARSH, seed=5, side=statistics_schema(kind, SCHEMA))


@each_kind
def test_statistics_survive_a_codec_that_thins_the_task_vector(kind: str, tmp_path: Path) -> None:
    statistics = found(kind)
    received = travelled(tmp_path / "delta", statistics, kind)
    ours = dict(statistics_of(received, kind))
    assert ours.keys() == {name.partition(":")[2] for name in statistics_schema(kind, SCHEMA)}
    for name, tensor in ours.items():
        expected = statistics.get(name, torch.zeros(tensor.shape))
        torch.testing.assert_close(tensor, expected, rtol=2**-8 if kind == "fisher" else 0, atol=0)
    if kind == "gram":
        assert torch.equal(ours["weight"], ours["weight"].T)
    assert first_problem(ours, kind) is None
    # The task vector is what it would have been by itself.
    write_delta(tmp_path / "alone", task_vector(), SCHEMA, HARSH, seed=5)
    alone = DeltaFile(tmp_path / "alone", SCHEMA, HARSH, seed=5)
    vector = task_vector_of(received, kind)
    assert list(vector) == list(alone)
    assert all(torch.equal(vector[name], alone[name]) for name in alone)
    with pytest.raises(KeyError):
        vector[next(iter(statistics_schema(kind, SCHEMA)))]


@each_kind
def test_a_file_without_its_statistics_or_with_more_is_refused(kind: str, tmp_path: Path) -> None:
    side = statistics_schema(kind, SCHEMA)
    write_delta(tmp_path / "without", task_vector(), SCHEMA, HARSH, seed=5)
    with pytest.raises(InvalidDelta, match=f"{kind}:.* missing"):
        DeltaFile(tmp_path / "without", SCHEMA, HARSH, seed=5, side=side)
    received = travelled(tmp_path / "with", found(kind), kind)
    with pytest.raises(InvalidDelta, match=f"{kind}:.* not a tensor of this model|more than this model can need"):
        DeltaFile(received.path, SCHEMA, HARSH, seed=5)


def test_an_idle_node_sends_no_bytes_for_its_statistics(tmp_path: Path) -> None:
    received = travelled(tmp_path / "delta", {}, "fisher")
    assert received.stats.encodings["zero"] == len(FLOATS) + 1  # and the empty tensor


@pytest.mark.parametrize("bad", [-1e-6, torch.nan, torch.inf])
def test_fisher_information_is_finite_and_not_negative(bad: float) -> None:
    statistics = {"bias": torch.tensor([0.0, 1.0, bad, 2.0, bad, 0.0])}
    assert first_problem(statistics, "fisher") == "fisher statistics of bias: 2 values are negative or not finite"
    with pytest.raises(InputError, match="of bias"):
        side_tensors(statistics, "fisher", SCHEMA)


@pytest.mark.parametrize(
    ("matrix", "problem"),
    [
        ([[1.0, torch.nan], [torch.nan, 1.0]], "not finite"),
        ([[1.0, 0.0], [0.0, -1e-6]], "negative"),
        ([[1.0, 1e-9], [1e-9, 0.0]], "always zero"),
        ([[1.0, 1.1], [1.1, 1.0]], "semidefinite"),
        ([[1e-12, 1.0], [1.0, 1e12]], None),
        ([[0.0, 0.0], [0.0, 0.0]], None),
    ],
)
def test_gram_matrices_are_positive_semidefinite(matrix: list[list[float]], problem: str | None) -> None:
    message = first_problem({"weight": torch.tensor(matrix)}, "gram")
    assert (message is None) == (problem is None)
    assert problem is None or problem in str(message)


@pytest.mark.parametrize("num_rows", [1, 5, 500])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_gram_matrix_rounded_to_fp32_still_is_one(num_rows: int, scale: float) -> None:
    inputs = scale * normal(num_rows, 300)
    assert first_problem({"weight": inputs.T @ inputs / num_rows}, "gram") is None


@pytest.mark.parametrize(
    ("kind", "statistics", "problem"),
    [
        ("fisher", {"nothing": torch.ones(2)}, "nothing"),
        ("fisher", {"bias": torch.ones(7)}, r"\[7\], not \[6\]"),
        ("gram", {"bias": torch.ones(6, 6)}, "bias"),
        ("gram", {"weight": torch.ones(40, 41)}, r"\[40, 41\], not \[40, 40\]"),
    ],
)
def test_statistics_of_other_parameters_or_shapes_are_refused(
    kind: str, statistics: dict[str, Tensor], problem: str
) -> None:
    with pytest.raises(ModelMismatch, match=problem):
        side_tensors(statistics, kind, SCHEMA)
