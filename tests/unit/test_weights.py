"""Weight files that are filled in any order are those that safetensors and transformers read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmerge.errors import ResourceError
from fedmerge.models.weights import split_shards, writing_weights
from fedmerge.tensors import INDEX, WEIGHTS, Checkpoint, schema_of

TENSORS = {
    "a.bias": torch.arange(5, dtype=torch.float16),
    "b": torch.arange(6, dtype=torch.float64).view(2, 3),
    "c.größe": torch.ones((), dtype=torch.bfloat16),
    "d": torch.zeros(0, 3),
    "e": torch.tensor([True, False, True]),
    "f": torch.randn(1000),
}
SCHEMA = schema_of(TENSORS)


def test_a_file_is_what_safetensors_writes(tmp_path: Path) -> None:
    with writing_weights(tmp_path, SCHEMA, {WEIGHTS: list(TENSORS)}) as writer:
        for name in reversed(TENSORS):
            flat = TENSORS[name].view(-1)
            writer.write(name, flat.numel() // 2, flat[flat.numel() // 2 :])
            writer.write(name, 0, flat[: flat.numel() // 2])
    read = load_file(tmp_path / WEIGHTS)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / WEIGHTS).stat().st_size == (tmp_path / "theirs.safetensors").stat().st_size


def test_shards_are_no_larger_than_asked(tmp_path: Path) -> None:
    shards = split_shards(SCHEMA, 60)
    assert [name for names in shards.values() for name in names] == list(TENSORS)
    assert next(iter(shards)) == f"model-00001-of-{len(shards):05d}.safetensors"
    for names in shards.values():
        assert len(names) == 1 or sum(TENSORS[name].nbytes for name in names) <= 60
    with writing_weights(tmp_path, SCHEMA, shards) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, 0, tensor)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    found = Checkpoint(tmp_path)
    assert found.shards().keys() == shards.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert split_shards(SCHEMA, 1 << 20) == {WEIGHTS: list(TENSORS)}


def test_what_is_left_out_or_too_long_is_noticed(tmp_path: Path) -> None:
    def write_all_but_the_first() -> None:
        with writing_weights(tmp_path, SCHEMA, {WEIGHTS: list(TENSORS)}) as writer:
            with pytest.raises(ValueError, match="no room"):
                writer.write("f", 999, torch.ones(2))
            for name in list(TENSORS)[1:]:
                writer.write(name, 0, TENSORS[name])

    with pytest.raises(ValueError, match=r"10 bytes of a\.bias were not written"):
        write_all_but_the_first()


def test_a_folder_that_takes_nothing_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ResourceError, match="could not write"),
        writing_weights(tmp_path / "absent", SCHEMA, {WEIGHTS: list(TENSORS)}),
    ):
        pass
