"""The sum of a version's updates against the updates themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import write_delta
from fedmerge.delta.task_vector import UpdatedModel, delta_schema
from fedmerge.models.sums import RunningSum
from fedmerge.models.versions import open_model, write_model
from fedmerge.statements import ModelRef, UpdateRef
from fedmerge.tensors import Checkpoint, TensorMap

INT8, BF16 = Codec(values="int8"), Codec(values="bf16")


class Chain:
    """A base, and a version more with each update that is added."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        (folder / "base").mkdir(parents=True)
        weights = {"weight": torch.linspace(-3, 5, 2100).view(70, 30).to(dtype), "bias": torch.ones(1, dtype=dtype)}
        save_file(weights | {"steps": torch.arange(3)}, folder / "base" / "model.safetensors")
        self.folder, self.base, self.updates = folder, Checkpoint(folder / "base"), list[UpdateRef]()
        self.schema = delta_schema(self.base.schema)

    def add(self, seed: int, codec: Codec) -> None:
        number, generator = len(self.updates) + 1, torch.Generator().manual_seed(seed)
        scale = 10.0 ** (seed % 7 - 5)
        change = {name: scale * torch.randn(spec.shape, generator=generator) for name, spec in self.schema.items()}
        write_delta(self.folder / f"{number}", change, self.schema, codec, seed=seed)
        size = (self.folder / f"{number}").stat().st_size
        ref = UpdateRef(round=number, root=f"{number:064x}", num_bytes=size, codec=codec.to_dict(), seed=str(seed))
        self.updates.append(ref)

    def model(self, number: int, running: RunningSum | None = None) -> UpdatedModel:
        ref = ModelRef(digest="0" * 64, base_digest="1" * 64, updates=self.updates[:number])
        return open_model(ref, self.base, lambda update: self.folder / f"{update.round}", running)


def same(one: TensorMap, other: TensorMap) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name].contiguous().view(torch.uint8), other[name].view(torch.uint8)) for name in one)


@given(
    seeds=st.lists(st.integers(0, 2**32), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_a_version_has_the_same_bits_by_whatever_sum(
    tmp_path_factory: pytest.TempPathFactory, seeds: list[int], dtype: torch.dtype, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("chain")
    chain, running = Chain(folder, dtype), RunningSum(folder / "sum")
    for seed in seeds:
        chain.add(seed, data.draw(st.sampled_from([INT8, BF16])))
    for number in sorted(data.draw(st.sets(st.integers(1, len(seeds))))):
        with running.keeping(chain.updates[:number], chain.model(number, running)) as model:
            assert same(model, chain.model(number))
        assert running.open(chain.updates)[0] == number
        assert len(list((folder / "sum").iterdir())) == 1
    for number in range(1, len(seeds) + 1):
        assert same(chain.model(number, running), chain.model(number))


def test_a_sum_stands_for_these_updates_and_no_others(tmp_path: Path) -> None:
    chain, running = Chain(tmp_path, torch.float32), RunningSum(tmp_path / "sum")
    for seed in (1, 2, 3):
        chain.add(seed, INT8)
    with running.keeping(chain.updates[:2], chain.model(2)) as model:
        write_model(model, chain.base, tmp_path / "model")
    first, second, third = chain.updates
    assert running.open([first, second, third])[0] == 2
    for other in (
        [first],
        [second, first],
        [first, third],
        [first, second.model_copy(update={"seed": "5"})],
        [first, second.model_copy(update={"codec": BF16.to_dict()})],
    ):
        assert running.open(other) == (0, None)


def test_a_sum_that_was_not_finished_leaves_the_one_before(tmp_path: Path) -> None:
    chain, running = Chain(tmp_path, torch.float32), RunningSum(tmp_path / "sum")
    chain.add(1, INT8)
    chain.add(2, INT8)
    with running.keeping(chain.updates[:1], chain.model(1)) as model:
        list(model.values())

    def stop_half_way() -> None:
        with running.keeping(chain.updates, chain.model(2)) as model:
            assert model["weight"].shape == (70, 30)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert running.open(chain.updates)[0] == 1
    assert len(list((tmp_path / "sum").iterdir())) == 1
    running.clear()
    assert running.open(chain.updates) == (0, None)
    assert same(chain.model(2, running), chain.model(2))
