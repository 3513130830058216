"""Products with one order of additions, and the nearest matrices of a rank, against numpy and LAPACK."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import DeltaFile, write_delta
from fedmerge.delta.lowrank import Factors, LowRankDelta, product, truncate
from fedmerge.errors import ConfigError, InvalidDelta
from fedmerge.tensors import TensorSpec, schema_of
from tests.unit.test_frame import Written

SEED = 11


def random_factors(shape: tuple[int, int], rank: int, scale: float = 1.0, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
    return Factors(left, right, scale)


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    rank=st.integers(1, 9),
    scale=st.floats(1e-3, 100),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_a_product_is_added_in_the_order_of_the_rank(
    shape: tuple[int, int], rank: int, scale: float, seed: int
) -> None:
    factors = random_factors(shape, rank, scale, seed)
    expected = np.empty(shape, np.float32)
    for i in range(shape[0]):
        for j in range(shape[1]):
            total = 0.0
            for k in range(rank):
                total += float(factors.left[i, k]) * float(factors.right[k, j])
            expected[i, j] = np.float32(total * scale)
    assert product(factors).numpy().tobytes() == expected.tobytes()


def test_a_product_is_the_same_in_any_memory_layout_and_close_to_the_exact_one() -> None:
    factors = random_factors((70, 130), 16, 0.3)
    turned = Factors(factors.left.T.contiguous().T, factors.right.T.contiguous().T, 0.3)
    assert torch.equal(product(factors), product(turned))
    exact = 0.3 * factors.left.double() @ factors.right.double()
    torch.testing.assert_close(product(factors).double(), exact, rtol=2.0**-23, atol=1e-12)


@pytest.mark.parametrize("shape", [(30, 80), (80, 30), (1, 7), (300, 200)])
@pytest.mark.parametrize("rank", [1, 4, 25])
def test_no_matrix_of_that_rank_is_much_nearer(shape: tuple[int, int], rank: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    factors, energy = truncate(matrix, rank, SEED)
    values = torch.linalg.svdvals(matrix.double())
    least = float(values[rank:].square().sum())  # Eckart and Young
    error = float((product(factors).double() - matrix).square().sum())
    assert least - 1e-6 <= error <= 1.03 * least + 1e-6
    total = float(matrix.double().square().sum())
    assert math.isclose(energy, 1 - error / total, abs_tol=1e-5)
    assert factors.rank == min(rank, *shape)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_a_matrix_of_low_rank_comes_back_whatever_its_size(size: float) -> None:
    matrix = product(random_factors((400, 300), 3)) * size
    factors, energy = truncate(matrix, 8, SEED)
    assert factors.rank == 3  # and no more is sent
    assert energy > 1 - 1e-6
    assert float(((product(factors) - matrix) / size).norm()) < 1e-4 * float((matrix / size).norm())


# In delta files


def lora_delta(*, dtype: torch.dtype = torch.float32) -> LowRankDelta:
    """Factors of two ranks, a bias that is trained whole, and a tensor that is not trained."""

    def factors(shape: tuple[int, int], rank: int, scale: float) -> Factors:
        left, right, _ = random_factors(shape, rank, seed=rank)
        return Factors(left.to(dtype).float(), right.to(dtype).float(), scale)

    bias = torch.randn(7, generator=torch.Generator().manual_seed(3))
    shapes = {"a": (60, 50), "b": (48, 33), "bias": (7,), "frozen": (20, 20), "small": (2, 3)}
    schema = {name: TensorSpec(shape, "F32") for name, shape in shapes.items()}
    known = {"a": factors((60, 50), 4, 2.0), "b": factors((48, 33), 2, math.sqrt(2)), "small": factors((2, 3), 1, 1.0)}
    return LowRankDelta({**schema, "ids": TensorSpec((5,), "I64")}, known, {"bias": bias})


@pytest.mark.parametrize(
    ("dtype", "values"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")]
)
def test_factors_travel_exactly_in_the_narrowest_type_that_holds_them(
    dtype: torch.dtype, values: str, tmp_path: Path
) -> None:
    delta = lora_delta(dtype=dtype)
    codec = Codec(sparsify="lowrank", rank=4, values="fp32")
    stats = write_delta(tmp_path / "d", delta, delta.schema, codec, seed=SEED)
    assert stats.encodings == {
        "fp32": 1,
        f"lowrank1+{values}": 1,
        f"lowrank2+{values}": 1,
        f"lowrank4+{values}": 1,
        "zero": 1,
    }
    decoded = DeltaFile(tmp_path / "d", delta.schema, codec, seed=SEED)
    for name in delta:
        assert torch.equal(decoded[name], delta[name]), name
    assert stats.notes(codec) == []
    width = 4 if values == "fp32" else 2
    assert stats.payload_bytes < width * (4 * 110 + 2 * 81 + 5) + 2500


def test_factors_travel_in_the_plans_own_type(tmp_path: Path) -> None:
    delta = lora_delta()
    codec = Codec(sparsify="lowrank", rank=4, factors="int8", block_size=32)
    write_delta(tmp_path / "d", delta, delta.schema, codec, seed=SEED)
    decoded = DeltaFile(tmp_path / "d", delta.schema, codec, seed=SEED)
    error = float((decoded["a"] - delta["a"]).norm() / delta["a"].norm())
    assert 1e-5 < error < 0.02


def test_a_full_delta_and_factors_beyond_the_rank_are_cut_to_it(tmp_path: Path) -> None:
    delta = lora_delta()
    codec = Codec(sparsify="lowrank", rank=2)
    stats = write_delta(tmp_path / "d", delta, delta.schema, codec, seed=SEED)
    # Two factors of the small one would be as long as itself, but it has some; those of a are too many.
    assert stats.encodings == {"int8": 1, "lowrank1+fp32": 1, "lowrank2+fp32": 2, "zero": 1}
    values = torch.linalg.svdvals(delta["a"].double()).square()
    share = float(values[:2].sum() / values.sum())
    (note,) = stats.notes(codec)
    assert note == (
        f"1 matrices were cut to rank 2, which keeps {share:.1%} of their energy on average, "
        f"{share:.1%} at the least (a)"
    )
    decoded = DeltaFile(tmp_path / "d", delta.schema, codec, seed=SEED)
    error = float((decoded["a"] - delta["a"]).double().square().sum())
    assert math.isclose(error, float(values[2:].sum()), rel_tol=1e-4)
    full = dict(delta)
    stats = write_delta(tmp_path / "full", full, schema_of(full), codec, seed=SEED)
    assert stats.encodings == {"int8": 2, "lowrank2+fp32": 2, "zero": 1}  # the small one is not worth two factors


def test_a_codec_without_lowrank_sends_the_product(tmp_path: Path) -> None:
    delta, codec = lora_delta(), Codec(values="fp32")
    write_delta(tmp_path / "d", delta, delta.schema, codec, seed=SEED)
    write_delta(tmp_path / "dense", dict(delta), delta.schema, codec, seed=SEED)
    assert (tmp_path / "d").read_bytes() == (tmp_path / "dense").read_bytes()


@pytest.mark.parametrize(
    ("encoding", "match"),
    [
        ("lowrank5+fp32", "a: encoding is 'lowrank5"),
        ("lowrank0+fp32", "a: encoding is 'lowrank0"),
        ("lowrank04+fp32", "a: encoding is 'lowrank04"),
        ("lowrank4+int8", "a: encoding is 'lowrank4"),
        ("lowrank+fp32", "a: encoding is 'lowrank\\+"),
        ("lowrank99999999+fp32", "a: encoding is 'lowrank9"),
        ("lowrank3+fp32", "a to small: section"),
        ("lowrank4+bf16", "a to small: section"),
        ("int8", "a: encoding is 'int8'"),
    ],
)
def test_a_frame_can_not_claim_another_rank(encoding: str, match: str, tmp_path: Path) -> None:
    written = Written(tmp_path / "d", Codec(sparsify="lowrank", rank=4), lora_delta())
    written.header["tensors"]["a"][-1] = encoding
    written.rewrite()
    with pytest.raises(InvalidDelta, match=match):
        written.decode()


def test_a_vector_has_no_rank_and_a_matrix_none_above_its_sides(tmp_path: Path) -> None:
    written = Written(tmp_path / "d", Codec(sparsify="lowrank", rank=50), lora_delta())
    for name, rank in (("bias", 1), ("small", 3)):
        pristine = list(written.header["tensors"][name])
        written.header["tensors"][name] = [*written.delta[name].shape, f"lowrank{rank}+fp32"]
        written.rewrite()
        with pytest.raises(InvalidDelta, match=f"{name}: encoding is 'lowrank{rank}"):
            written.decode()
        written.header["tensors"][name] = pristine


@pytest.mark.parametrize("scale", [math.inf, math.nan, 1e300])
def test_a_product_must_be_finite(scale: float, tmp_path: Path) -> None:
    written = Written(tmp_path / "d", Codec(sparsify="lowrank", rank=4), lora_delta())
    assert written.header["frames"][0][0] == 8
    written.frames = np.array([scale], "<f8").tobytes() + written.frames[8:]
    written.rewrite()
    with pytest.raises(InvalidDelta, match="a: 3000 values are NaN or infinite"):
        written.decode()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sparsify": "lowrank"}, "codec.rank: 0 does not go with sparsify = 'lowrank'"),
        ({"rank": 4}, "codec.rank: 4 does not go with sparsify = 'none'"),
        ({"sparsify": "lowrank", "rank": 5000}, "codec.rank: 5000 is not between"),
        ({"sparsify": "lowrank", "rank": 4, "density": 0.5}, "codec.density: 0.5 has no effect"),
        ({"sparsify": "lowrank", "rank": 4, "factors": "exakt"}, "did you mean 'exact'?"),
    ],
)
def test_a_codec_says_what_is_wrong_with_its_rank(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Codec.from_dict(table)
    assert message in caught.value.message
