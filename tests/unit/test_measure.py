"""Interference between task vectors, against the definitions written out in numpy over whole flattened models."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmerge.errors import InputError, ModelMismatch
from fedmerge.merge.measure import advice, layer_group, measure

SHAPES = {
    "model.layers.2.mlp.weight": (300, 400),  # more than one block
    "model.layers.10.mlp.weight": (7, 11),
    "model.layers.10.norm.weight": (11,),
    "lm_head.weight": (3, 5),
    "scale": (),
}


def random_vector(seed: int, *, length: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A task vector a third of whose entries are zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (length * torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 1 / 3)).to(
            dtype
        )
        for name, shape in SHAPES.items()
    }


def flat(vector: dict[str, Tensor], prefix: str = "") -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    parts = [tensor.double().numpy().ravel() for name, tensor in vector.items() if name.startswith(prefix)]
    return np.concatenate(parts)


def expected(a: dict[str, Tensor], b: dict[str, Tensor], prefix: str = "") -> tuple[float, float, float]:
    """Cosine, sign conflict and weighted sign conflict."""
    x, y = flat(a, prefix), flat(b, prefix)
    both, opposed = (x != 0) & (y != 0), np.sign(x) == -np.sign(y)
    weight = np.abs(x * y)
    cosine = x @ y / (np.linalg.norm(x) * np.linalg.norm(y))
    return float(cosine), float((opposed & both).sum() / both.sum()), float(weight[opposed].sum() / weight.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_agrees_with_the_definitions(dtype: torch.dtype) -> None:
    vectors = {name: random_vector(i, length=i + 1, dtype=dtype) for i, name in enumerate("abc")}
    shared = random_vector(9)
    vectors["c"] = {name: (tensor + 2 * shared[name]).to(dtype) for name, tensor in vectors["c"].items()}
    vectors["d"] = {name: (tensor - shared[name]).to(dtype) for name, tensor in vectors["a"].items()}
    found = measure(vectors)

    assert found.num_elements == sum(math.prod(shape) for shape in SHAPES.values())
    assert list(found.pairs) == list(combinations("abcd", 2))
    rows = {pair: expected(vectors[pair[0]], vectors[pair[1]]) for pair in found.pairs}
    for pair, agreement in found.pairs.items():
        measured = (agreement.cosine, agreement.conflict, agreement.weighted_conflict)
        assert measured == pytest.approx(rows[pair], rel=1e-9, abs=1e-12)
    means = np.mean(list(rows.values()), axis=0)
    assert [found.agreement.cosine, found.agreement.conflict, found.agreement.weighted_conflict] == pytest.approx(means)

    norms = {name: float(np.linalg.norm(flat(vector))) for name, vector in vectors.items()}
    for model in found.models:
        assert model.norm == pytest.approx(norms[model.name])
        assert model.share == pytest.approx(norms[model.name] / sum(norms.values()))
        assert model.unchanged == pytest.approx(float((flat(vectors[model.name]) == 0).mean()), abs=1e-12)
    mean = np.mean([flat(vector) for vector in vectors.values()], axis=0)
    assert found.mean_length == pytest.approx(float(np.linalg.norm(mean)) / np.mean(list(norms.values())))

    assert [layer.name for layer in found.layers] == ["lm_head", "model.layers.2", "model.layers.10", "scale"]
    for layer in found.layers:
        names = [name for name in SHAPES if name == layer.name or name.startswith(f"{layer.name}.")]
        assert layer.num_elements == sum(math.prod(SHAPES[name]) for name in names)
        shares = [np.linalg.norm(flat(v, layer.name)) ** 2 / norms[name] ** 2 for name, v in vectors.items()]
        assert layer.norm_share == pytest.approx(np.mean(shares))
        if layer.name != "scale":  # a single entry, zero in some
            each = [expected(vectors[a], vectors[b], layer.name) for a, b in combinations("abcd", 2)]
            got = layer.agreement
            assert [got.cosine, got.conflict, got.weighted_conflict] == pytest.approx(np.mean(each, axis=0))
    assert sum(layer.norm_share for layer in found.layers) == pytest.approx(1)


def test_does_not_depend_on_the_order_or_length_of_the_vectors() -> None:
    vectors = {"a": random_vector(1), "b": random_vector(2)}
    longer = {"b": {name: 4 * tensor for name, tensor in vectors["b"].items()}, "a": vectors["a"]}
    assert measure(vectors).pairs["a", "b"] == measure(longer).pairs["b", "a"]


def test_equal_opposite_and_orthogonal_vectors() -> None:
    one = {"w": torch.tensor([1.0, -2.0, 0.0])}
    minus = {"w": -one["w"]}
    other = {"w": torch.tensor([0.0, 0.0, 3.0])}
    found = measure({"one": one, "same": one, "minus": minus, "other": other})
    same, opposite, apart = (found.pairs["one", name] for name in ("same", "minus", "other"))
    assert (same.cosine, same.conflict, same.weighted_conflict) == (pytest.approx(1), 0, 0)
    assert (opposite.cosine, opposite.conflict, opposite.weighted_conflict) == (pytest.approx(-1), 1, 1)
    assert (apart.cosine, apart.conflict, apart.weighted_conflict) == (0.0, None, None)
    assert measure({"one": one, "same": one}).mean_length == pytest.approx(1)
    assert measure({"one": one, "minus": minus}).mean_length == 0
    assert measure({str(i): {"w": torch.eye(4)[i]} for i in range(4)}).mean_length == pytest.approx(1 / math.sqrt(4))


def test_vectors_that_changed_nothing_have_no_angle() -> None:
    zero = {"w": torch.zeros(5)}
    found = measure({"a": zero, "b": zero})
    assert found.agreement.cosine is found.mean_length is None
    assert [(model.norm, model.share, model.unchanged) for model in found.models] == [(0, 0, 1), (0, 0, 1)]
    assert advice(found, dtype="BF16") == ["a does not differ from the base", "b does not differ from the base"]
    assert measure({"a": random_vector(0)}).pairs == {}
    assert measure({"a": {"w": torch.zeros(0)}, "b": {"w": torch.zeros(0)}}).num_elements == 0


def spread(cosine: float, *, num_models: int = 3, num_elements: int = 6) -> dict[str, dict[str, Tensor]]:
    """Unit vectors with the same cosine between any two."""
    gram = np.full((num_models, num_models), cosine) + (1 - cosine) * np.eye(num_models)
    rows = np.zeros((num_models, num_elements))
    rows[:, :num_models] = np.linalg.cholesky(gram)
    return {f"m{i}": {"w": torch.from_numpy(row)} for i, row in enumerate(rows)}


@pytest.mark.parametrize(
    ("cosine", "said"),
    [(0.95, "nearly the same"), (0.85, None), (0.5, None), (0.15, None), (0.05, "hardly"), (-0.3, "hardly")],
)
def test_advice_on_angles(cosine: float, said: str | None) -> None:
    found = measure(spread(cosine))
    assert found.agreement.cosine == pytest.approx(cosine)
    # |sum|^2 = K + K (K - 1) c
    assert found.mean_length == pytest.approx(math.sqrt((1 + 2 * cosine) / 3))
    notes = advice(found, dtype="F32")
    assert (len(notes) == 1 and said in notes[0]) if said else notes == []


def test_advice_on_lengths_and_on_bf16() -> None:
    vectors = spread(0.5)
    vectors["m1"]["w"] = vectors["m1"]["w"] * 2.9
    assert advice(measure(vectors), dtype="F32") == []
    vectors["m1"]["w"] = vectors["m1"]["w"] * 1.1
    assert [note.split(" times")[0] for note in advice(measure(vectors), dtype="F32")] == ["m1 moved 3.2"]
    few = {"a": {"w": torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])}, "b": {"w": torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])}}
    assert advice(measure(few), dtype="F32") == []
    assert [note.split(":")[0] for note in advice(measure(few), dtype="BF16")] == [
        "a left 60% of its entries as they were"
    ]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.12.mlp.up_proj.weight", "model.layers.12"),
        ("bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.0"),
        ("layer1.0.conv2.weight", "layer1.0"),
        ("model.layers.3.experts.17.w1.weight", "model.layers.3"),
        ("0.weight", "0"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("experts.3", "experts"),
        ("weight", "weight"),
    ],
)
def test_layers_are_named_up_to_their_number(name: str, group: str) -> None:
    assert layer_group(name) == group


def test_refuses_what_can_not_be_compared() -> None:
    one = random_vector(0)
    with pytest.raises(InputError, match="no task vectors"):
        measure({})
    with pytest.raises(ModelMismatch, match="b: scale is not in all"):
        measure({"a": one, "b": {name: tensor for name, tensor in one.items() if name != "scale"}})
    with pytest.raises(ModelMismatch, match=r"b: scale has shape \[1\], not \[\]"):
        measure({"a": one, "b": one | {"scale": torch.zeros(1)}})
    with pytest.raises(InputError, match="scale holds NaN"):
        measure({"a": one, "b": one | {"scale": torch.tensor(math.nan)}})
