"""Error feedback: nothing is lost between what is sent and what is kept, and what is kept arrives later."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import DeltaFile, write_delta
from fedmerge.delta.quantize import QUANTIZERS
from fedmerge.node.feedback import carry_over, unsent, write_residual
from fedmerge.tensors import Checkpoint, TensorMap, schema_of

CHUNK = 4096
HALF_ULP = 2.0**-24  # the relative error of one rounding to fp32


def deltas(seed: int, num_rounds: int) -> list[dict[str, torch.Tensor]]:
    """Make task vectors of two tensors that are thinned, one that travels dense, and one that is frozen."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "bias": torch.randn(7, generator=generator),
            "frozen": torch.zeros(3, 50),
            "heavy": torch.randn(65, 130, generator=generator) ** 3,
            "weight": torch.randn(30, 40, generator=generator),
        }
        for _ in range(num_rounds)
    ]


def exchange(folder: Path, to_send: TensorMap, codec: Codec, seed: int) -> DeltaFile:
    """Send task vectors as a node does, and return what the coordinator reads."""
    schema = schema_of(to_send)
    write_delta(folder / "delta.safetensors", to_send, schema, codec, seed=seed)
    return DeltaFile(folder / "delta.safetensors", schema, codec, seed=seed)


@settings(deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from([0.001, 0.1, 0.7]), st.sampled_from(list(QUANTIZERS)), st.floats(0.05, 1.0)
)
def test_what_is_sent_and_what_is_kept_are_what_there_was(seed: int, density: float, values: str, decay: float) -> None:
    codec = Codec(sparsify="topk", density=density, values=values, block_size=64)
    residual: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        for task_vector in deltas(seed, num_rounds=3):
            to_send = carry_over(task_vector, residual or None, decay)
            sent = exchange(Path(folder), to_send, codec, seed)
            kept = dict(unsent(to_send, sent))
            for name, change in task_vector.items():
                carried = residual[name].double() * decay if residual else torch.zeros_like(change).double()
                wanted = carried + change.double()
                # In fp64 what is left are the roundings to fp32 of decay, product, sum and difference.
                error = (sent[name].double() + kept[name].double() - wanted).abs()
                roundings = 2 * carried.abs() + wanted.abs() + kept[name].double().abs()
                assert (error <= HALF_ULP * (1 + 1e-6) * roundings).all()
                left_out = sent[name] == 0
                assert torch.equal(kept[name][left_out], to_send[name][left_out])
            residual = kept


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_what_was_left_out_arrives_rank_by_rank_weighed_by_its_delay(tmp_path: Path, decay: float) -> None:
    # One task vector, then nothing more: a quarter of the elements goes each round, the largest first, and waiting
    # costs a factor of `decay` a round. With decay 1 all of it arrives, bit for bit.
    weight = torch.randn(2, CHUNK, generator=torch.Generator().manual_seed(0))
    task_vector = {"weight": weight}
    codec = Codec(sparsify="topk", density=0.25, values="fp32")
    residual: TensorMap | None = None
    arrived = torch.zeros_like(weight)
    for round_number in range(4):
        to_send = carry_over(task_vector, residual, decay)
        sent = exchange(tmp_path, to_send, codec, seed=1)
        residual = dict(unsent(to_send, sent))
        arrived += sent["weight"]
        assert torch.count_nonzero(residual["weight"]) == 2 * CHUNK * (3 - round_number) // 4
        task_vector = {"weight": torch.zeros_like(weight)}
    ranks = weight.abs().argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    assert torch.equal(arrived, weight * decay ** (ranks // (CHUNK // 4)))


@pytest.mark.parametrize("num_rounds", [1, 4, 12])
def test_the_sum_of_what_was_sent_lags_by_one_residual(tmp_path: Path, num_rounds: int) -> None:
    codec = Codec(sparsify="topk", density=0.1, values="sign", block_size=64)
    residual: TensorMap | None = None
    total = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in deltas(0, 1)[0].items()}
    for task_vector in deltas(5, num_rounds):
        to_send = carry_over(task_vector, residual, 1.0)
        sent = exchange(tmp_path, to_send, codec, seed=1)
        residual = dict(unsent(to_send, sent))
        for name in total:
            total[name] += sent[name].double() - task_vector[name].double()
    assert residual is not None
    for name, lag in total.items():
        torch.testing.assert_close(lag, -residual[name].double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "shards",
    [
        {"model.safetensors": ["a", "b", "ids"]},
        {"model-1.safetensors": ["a"], "model-2.safetensors": ["ids"], "model-3.safetensors": ["b"]},
    ],
)
def test_a_residual_is_written_like_the_model_over_an_interrupted_one_and_for_its_owner(
    tmp_path: Path, shards: dict[str, list[str]]
) -> None:
    residual = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    (tmp_path / "residual").mkdir()
    (tmp_path / "residual" / "model.safetensors").write_bytes(b"torn")
    write_residual(tmp_path, residual, shards)
    found = Checkpoint(tmp_path / "residual")
    assert set(found) == set(residual)
    assert all(torch.equal(found[name], tensor) for name, tensor in residual.items())
    assert (tmp_path / "residual").stat().st_mode & 0o077 == 0


def test_double_precision_is_carried_as_it_travels() -> None:
    task_vector = {"w": torch.tensor([1 + 2**-40, 2.0], dtype=torch.float64)}
    to_send = carry_over(task_vector, {"w": torch.tensor([0.5, -2.0])}, 0.5)
    assert torch.equal(to_send["w"], torch.tensor([1.25, 1.0]))
    assert to_send["w"].dtype == torch.float32
    assert list(unsent(to_send, {"w": torch.zeros(2)})) == ["w"]
