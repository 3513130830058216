"""The choice of an encoding: when a mask would make too much noise, and what a reader takes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.delta.codec import Codec
from fedmerge.delta.encoding import noise_ratio
from fedmerge.delta.frame import DeltaFile, write_delta
from fedmerge.errors import ConfigError, InputError, InvalidDelta
from fedmerge.tensors import schema_of
from tests.unit.test_frame import Written

SEED = 5
PLAN = Codec(sparsify="seeded", density=0.01, values="lloyd2", block_size=64, max_noise_ratio=0.1)


def a_model() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a base and a task vector: one layer that moved little, one that moved much, one made from zero."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(80, 100, generator=generator) for name in ("calm", "head", "wild")}
    base |= {"bias": torch.randn(100, generator=generator)}
    sizes = {"bias": 1.0, "calm": 0.002, "head": 0.001, "wild": 0.02}
    delta = {name: size * torch.randn(base[name].shape, generator=generator) for name, size in sizes.items()}
    base["head"] = torch.zeros(80, 100)
    return base, delta


def test_a_tensor_with_too_much_noise_travels_dense(tmp_path: Path) -> None:
    base, delta = a_model()
    stats = write_delta(tmp_path / "d", delta, schema_of(delta), PLAN, seed=SEED, base=base)
    assert stats.encodings == {"lloyd2": 1, "lloyd3": 2, "seeded+lloyd2": 1}
    # Its size, times the standard deviation of what a mask of density p makes of 1: sqrt(1/p - 1).
    ratio = float(delta["wild"].norm() / base["wild"].norm()) * math.sqrt(99)
    assert stats.choices["wild"].noise_ratio == pytest.approx(ratio)
    assert stats.choices.keys() == {"head", "wild"}
    assert stats.choices["head"].noise_ratio == math.inf
    assert stats.notes(PLAN) == [
        "2 tensors travel dense as lloyd3: a mask of density 0.01 would add noise of up to inf times the weights "
        "(head), above 0.1"
    ]
    decoded = DeltaFile(tmp_path / "d", schema_of(delta), PLAN, seed=SEED)
    dense = Codec(values="lloyd3", block_size=64)
    write_delta(tmp_path / "dense", delta, schema_of(delta), dense, seed=SEED)
    reference = DeltaFile(tmp_path / "dense", schema_of(delta), dense, seed=SEED)
    for name in ("head", "wild"):
        assert torch.equal(decoded[name], reference[name])
    assert 50 < int(decoded["calm"].count_nonzero()) < 110


@given(density=st.floats(1e-4, 0.999), size=st.floats(1e-6, 10), seed=st.integers(0, 100))
@settings(deadline=None)
def test_the_ratio_is_the_noise_a_mask_makes(density: float, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, values = torch.randn(500, generator=generator), size * torch.randn(500, generator=generator)
    # A kept value gains 1/p - 1 of itself, with probability p; one that is not loses itself.
    squares = values.double().square().sum() * (density * (1 / density - 1) ** 2 + (1 - density))
    expected = math.sqrt(float(squares) / float(base.double().square().sum()))
    assert noise_ratio(values, base, density) == pytest.approx(expected, rel=1e-9)


def test_weights_of_zero_take_any_noise_of_nothing() -> None:
    assert noise_ratio(torch.zeros(3), torch.zeros(3), 0.1) == 0.0
    assert noise_ratio(torch.ones(3), torch.zeros(3), 0.1) == math.inf
    assert noise_ratio(torch.ones(3), torch.ones(3), 1.0) == 0.0


def test_without_a_base_nothing_is_judged(tmp_path: Path) -> None:
    _, delta = a_model()
    stats = write_delta(tmp_path / "d", delta, schema_of(delta), PLAN, seed=SEED)
    assert stats.encodings == {"lloyd2": 1, "seeded+lloyd2": 3}


def test_without_a_fallback_it_is_refused_with_the_figures(tmp_path: Path) -> None:
    base, delta = a_model()
    codec = Codec.from_dict(PLAN.to_dict() | {"fallback": "none"})
    del base["head"], delta["head"]
    ratio = float(delta["wild"].norm() / base["wild"].norm()) * math.sqrt(99)
    with pytest.raises(InputError) as caught:
        write_delta(tmp_path / "d", delta, schema_of(delta), codec, seed=SEED, base=base)
    assert caught.value.message.endswith(
        f"wild: a mask of density 0.01 would add noise of {ratio:.3g} times the weights, above max_noise_ratio = 0.1"
    )
    assert "raise the density" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "codec",
    [
        Codec.from_dict(PLAN.to_dict() | {"fallback": "none"}),
        Codec.from_dict(PLAN.to_dict() | {"fallback": "int4"}),
        Codec(sparsify="topk", density=0.01, values="lloyd2", block_size=64),
    ],
)
def test_a_reader_takes_the_plans_own_fallback_alone(codec: Codec, tmp_path: Path) -> None:
    _, delta = a_model()
    written = Written(tmp_path / "d", codec, delta)
    written.header["tensors"]["wild"].append("lloyd3")
    written.rewrite()
    with pytest.raises(InvalidDelta, match=r"wild: encoding is .lloyd3., not .(seeded|topk)\+lloyd2."):
        written.decode()


def test_a_small_vector_has_no_fallback(tmp_path: Path) -> None:
    _, delta = a_model()
    written = Written(tmp_path / "d", PLAN, delta)
    written.header["tensors"]["bias"].append("lloyd3")
    written.rewrite()
    with pytest.raises(InvalidDelta, match="bias: encoding is 'lloyd3', not 'lloyd2'"):
        written.decode()


def test_tied_weights_and_integer_buffers_travel(tmp_path: Path) -> None:
    base, delta = a_model()
    base |= {"tied": base["calm"], "ids": torch.arange(5)}  # one storage under two names
    delta["tied"] = delta["calm"]
    codec = Codec(sparsify="layerwise_topk", density=0.1, values="fp32")
    schema = schema_of(base)
    write_delta(tmp_path / "d", delta, schema, codec, seed=SEED, base=base)
    decoded = DeltaFile(tmp_path / "d", schema, codec, seed=SEED)
    assert set(decoded) == set(delta)
    assert torch.equal(decoded["tied"], decoded["calm"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"max_noise_ratio": -1.0}, "codec.max_noise_ratio: -1.0 is not between"),
        ({"max_noise_ratio": math.nan}, "codec.max_noise_ratio: nan is not between"),
        ({"max_noise_ratio": "0.1"}, "codec.max_noise_ratio: '0.1' is not of type float"),
        ({"fallback": "loyd3"}, "codec.fallback: unknown name 'loyd3'; did you mean 'lloyd3'?"),
    ],
)
def test_a_codec_says_what_is_wrong_with_its_gate(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Codec.from_dict(table)
    assert message in caught.value.message
