"""Changes of models written as adapters, against what PEFT makes of them, and read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from fedmerge.delta.adapter import read_adapter
from fedmerge.delta.adapter_writer import write_adapter
from tests.unit.test_adapter import Convolutions, Linears


class Tangled(nn.Module):
    """Names of which one ends in another, a tensor of four dimensions, and a buffer that has no change."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 11)
        self.block = nn.ModuleDict({"layer": nn.Linear(11, 6), "conv": nn.Conv2d(2, 3, 2)})
        self.register_buffer("ids", torch.arange(4))


def low_rank(shape: tuple[int, ...], rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)


def model_of(kind: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = kind()
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(base: dict[str, Tensor], only: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Return a change of each float tensor: of rank 3 for matrices, none for those that `only` leaves out."""
    change = {}
    for number, (name, tensor) in enumerate(base.items()):
        if tensor.is_floating_point():
            whole = low_rank(tuple(tensor.shape), 3, number) if tensor.ndim == 2 else torch.randn(tensor.shape)
            change[name] = whole if not only or name in only else torch.zeros(tensor.shape)
    return change


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "matrices": (Linears, ("wide.weight", "square.weight", "block.narrow.weight")),
    "an embedding": (Linears, ("embed.weight", "square.weight")),
    "inputs first": (Convolutions, ("wide.weight", "square.weight")),
    "everything": (Linears, ()),
    "names and shapes": (Tangled, ()),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_it_and_merges_the_change(case: str, tmp_path: Path) -> None:
    model, base = model_of(CASES[case][0])
    change = changed(base, CASES[case][1])
    summary = write_adapter(tmp_path / "adapter", change, base, 5, base_name="somebody/model")
    assert summary.rank == 3
    assert summary.energy == pytest.approx(1, abs=1e-6)
    tuned: Any = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    merged = tuned.merge_and_unload().state_dict()
    for name, tensor in base.items():
        torch.testing.assert_close(merged[name], tensor + change.get(name, 0), atol=2e-5, rtol=0, msg=name)
    delta = read_adapter(tmp_path / "adapter", base)
    for name, tensor in change.items():
        torch.testing.assert_close(delta[name], tensor, atol=2e-5, rtol=0)


def test_ranks_may_differ_and_the_lower_one_is_kept(tmp_path: Path) -> None:
    model, base = model_of(Tangled)
    change = {name: torch.zeros(tensor.shape) for name, tensor in base.items() if tensor.is_floating_point()}
    change |= {"layer.weight": low_rank((11, 6), 1, 1), "block.layer.weight": low_rank((6, 11), 4, 2)}
    assert write_adapter(tmp_path / "adapter", change, base, 8, base_name="x").rank == 4
    assert {n: f.rank for n, f in read_adapter(tmp_path / "adapter", base).factors.items()} == {
        "layer.weight": 1,
        "block.layer.weight": 4,
    }
    tuned: Any = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    merged = tuned.merge_and_unload().state_dict()
    for name in change:
        torch.testing.assert_close(merged[name], base[name] + change[name], atol=2e-5, rtol=0)


def test_a_rank_that_is_too_low_says_what_it_keeps(tmp_path: Path) -> None:
    _, base = model_of(Linears)
    change = {name: torch.zeros(tensor.shape) for name, tensor in base.items()}
    change["wide.weight"], change["square.weight"] = low_rank((40, 16), 6, 1), low_rank((16, 16), 2, 2)
    summary = write_adapter(tmp_path / "adapter", change, base, 2, base_name="x")
    squares = torch.linalg.svdvals(change["wide.weight"].double()).square()
    total = float(squares.sum() + change["square.weight"].double().square().sum())
    lost = float(squares[2:].sum())
    assert summary.rank == 2
    assert summary.energy == pytest.approx(1 - lost / total, rel=1e-5)
    assert summary.least[0] == "wide.weight"
    assert summary.least[1] == pytest.approx(1 - lost / float(squares.sum()), rel=1e-5)
    delta = read_adapter(tmp_path / "adapter", base)
    assert float((delta["wide.weight"] - change["wide.weight"]).double().square().sum()) == pytest.approx(
        lost, rel=1e-4
    )


def test_no_change_is_an_adapter_that_changes_nothing(tmp_path: Path) -> None:
    _, base = model_of(Linears)
    change = {name: torch.zeros(tensor.shape) for name, tensor in base.items()}
    summary = write_adapter(tmp_path / "adapter", change, base, 2, base_name="x")
    assert (summary.rank, summary.energy, summary.least) == (0, 1.0, ("", 1.0))
    assert not any(tensor.any() for tensor in read_adapter(tmp_path / "adapter", base).values())
