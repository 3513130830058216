"""LoRA factors merged as factors, against the weighted mean of dense products in fp64."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedmerge.delta.lowrank import Factors
from fedmerge.errors import InputError
from fedmerge.merge.methods.factors import factor_average, fedex, refactor, stack


def draw(num_rows: int, num_columns: int, rank: int, seed: int, scale: float = 1.5) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(num_rows, rank, generator=generator), torch.randn(rank, num_columns, generator=generator), scale
    )


def dense(factors: Factors) -> Tensor:
    return factors.scale * factors.left.double() @ factors.right.double()


def mean_product(nodes: list[Factors], weights: list[float]) -> Tensor:
    return torch.stack([w * dense(one) for one, w in zip(nodes, weights, strict=True)]).sum(0)


@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    shape=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    seed=st.integers(0, 99),
)
def test_stacked_factors_are_the_mean_of_products(ranks: list[int], shape: tuple[int, int], seed: int) -> None:
    # Ranks and scales differ, as they do for nodes with rsLoRA and ranks of their own.
    nodes = [draw(*shape, rank, seed + i, scale=3 / math.sqrt(rank)) for i, rank in enumerate(ranks)]
    weights = [(i + 1) / sum(range(1, len(ranks) + 1)) for i in range(len(ranks))]
    stacked, exact = stack(nodes, weights), mean_product(nodes, weights)
    assert stacked.rank == sum(ranks)
    torch.testing.assert_close(dense(stacked), exact, rtol=1e-5, atol=1e-5)
    again, energy = refactor(stacked, sum(ranks))
    torch.testing.assert_close(dense(again), exact, rtol=1e-5, atol=1e-5)
    assert energy == pytest.approx(1)


@pytest.mark.parametrize("shape", [(20, 9), (9, 20), (14, 14)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_fewer_ranks_keep_the_largest_singular_values(shape: tuple[int, int], rank: int) -> None:
    stacked = stack([draw(*shape, 4, 1), draw(*shape, 4, 2)], [0.3, 0.7])
    cut, energy = refactor(stacked, rank)
    left, values, right = torch.linalg.svd(dense(stacked), full_matrices=False)
    expected = left[:, :rank] * values[:rank] @ right[:rank]
    torch.testing.assert_close(dense(cut), expected, rtol=1e-5, atol=1e-5)
    assert cut.rank == rank
    assert energy == pytest.approx(float(values[:rank].square().sum() / values.square().sum()))


def test_nothing_has_all_its_energy() -> None:
    cut, energy = refactor(Factors(torch.zeros(4, 2), torch.ones(2, 3), 1.0), 1)
    assert energy == 1.0
    assert not dense(cut).any()


def test_mean_factors_and_their_residual_are_the_mean_of_products() -> None:
    nodes, weights = [draw(8, 13, 3, seed) for seed in range(3)], [0.2, 0.5, 0.3]
    mean, residual = fedex(nodes, weights)
    torch.testing.assert_close(dense(mean) + residual.double(), mean_product(nodes, weights), rtol=0, atol=1e-6)
    assert residual.shape == (8, 13)
    assert float(residual.norm()) > 0.5 * float(dense(mean).norm())


def test_averaging_factors_is_something_else_and_says_so() -> None:
    nodes, weights = [draw(8, 13, 3, seed) for seed in range(2)], [0.5, 0.5]
    with pytest.warns(UserWarning, match="not the mean of products"):
        mean = factor_average(nodes, weights)
    torch.testing.assert_close(mean.left, (nodes[0].left + nodes[1].left) / 2)
    assert float((dense(mean) - mean_product(nodes, weights)).norm()) > 0.5 * float(mean_product(nodes, weights).norm())


@pytest.mark.parametrize("frozen", ["left", "right"])
def test_it_is_exact_where_one_factor_is_everywhere_the_same(frozen: str) -> None:
    first = draw(8, 13, 3, 1)
    nodes = [draw(8, 13, 3, seed)._replace(**{frozen: getattr(first, frozen)}) for seed in range(3)]
    weights = [0.2, 0.5, 0.3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean = factor_average(nodes, weights)
    torch.testing.assert_close(dense(mean), mean_product(nodes, weights), rtol=1e-5, atol=1e-5)


def test_what_has_no_mean_is_refused() -> None:
    ranks, scales = [draw(8, 13, 3, 1), draw(8, 13, 2, 1)], [draw(8, 13, 3, 1), draw(8, 13, 3, 1, scale=2.0)]
    for nodes in (ranks, scales):
        for merge in (factor_average, fedex):
            with pytest.raises(InputError, match="several ranks or scales"):
                merge(nodes, [0.5, 0.5])
    for merge in (stack, factor_average, fedex):
        with pytest.raises(InputError, match=r"matrices \[\(8, 13\), \(13, 8\)\]"):
            merge([draw(8, 13, 3, 1), draw(13, 8, 3, 1)], [0.5, 0.5])
        with pytest.raises(InputError, match="1 weights for 2"):
            merge(ranks[:1] * 2, [1.0])
