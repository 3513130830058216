"""Methods on singular vectors, held against their definitions and against the cases that break others."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fedmerge.merge import METHODS
from fedmerge.merge.methods.spectral import ranks_per_node

FP64 = torch.float64
SPECTRAL = ["tsv", "iso_c", "iso_cts", "subspace_boosting"]
ISOTROPIC = ["iso_c", "iso_cts"]

each_spectral = pytest.mark.parametrize("name", SPECTRAL)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)


def of_rank(rank: int, *shape: int, seed: int = 0) -> Tensor:
    return normal(shape[0], rank, seed=seed) @ normal(rank, shape[1], seed=seed + 100)


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def spectrum(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix.flatten(1))


def merge(name: str, deltas: Tensor, weights: list[float] | None = None, **params: Any) -> Tensor:
    return METHODS[name](deltas, torch.tensor(weights or [1.0] * len(deltas), dtype=FP64), **params)


def assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


# --- all of them


@each_spectral
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (1, 9), (9, 1)])
def test_rotating_the_nodes_rotates_the_outcome(name: str, shape: tuple[int, int]) -> None:
    # Rotations change every sign and every basis that a decomposition could hang on to; the twin and the idle node
    # leave it a choice of basis.
    deltas = torch.stack([*normal(2, *shape), normal(2, *shape)[0], torch.zeros(shape, dtype=FP64)])
    left, right = rotation(shape[0], 1), rotation(shape[1], 2)
    assert_close(merge(name, left @ deltas @ right), left @ merge(name, deltas) @ right)


@each_spectral
def test_the_order_of_nodes_does_not_matter_to_matrices(name: str) -> None:
    deltas, weights = normal(4, 12, 20), [0.1, 0.2, 0.3, 0.4]
    permuted = merge(name, deltas[[2, 0, 3, 1]], [weights[i] for i in (2, 0, 3, 1)])
    assert_close(permuted, merge(name, deltas, weights))


@each_spectral
def test_matrices_too_have_equal_bits_on_any_number_of_threads(name: str) -> None:
    deltas = normal(3, 300, 200).float()
    before = torch.get_num_threads()
    try:
        merged = []
        for num_threads in (1, 2, 4):
            torch.set_num_threads(num_threads)
            merged.append(merge(name, deltas))
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(merged[0], merged[1])
    assert torch.equal(merged[0], merged[2])


@each_spectral
def test_convolutions_are_matrices_of_output_units(name: str) -> None:
    deltas = normal(3, 6, 4, 3, 3)
    assert torch.equal(merge(name, deltas), merge(name, deltas.flatten(2)).view(6, 4, 3, 3))


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts"])
def test_vectors_are_averaged(name: str) -> None:
    deltas, weights = normal(3, 8), [0.2, 0.2, 0.4]
    assert_close(merge(name, deltas, weights, lambda_=2.0), merge("fedavg", deltas, weights) * 2)


@each_spectral
def test_the_factor_and_common_weights_scale_matrices(name: str) -> None:
    deltas = normal(3, 6, 8)
    assert_close(merge(name, deltas, lambda_=0.3), merge(name, deltas) * 0.3)
    assert_close(merge(name, deltas, [0.25] * 3), merge(name, deltas) / 4)


@pytest.mark.parametrize("name", ["tsv", "iso_cts"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
def test_a_node_without_change_or_weight_does_not_matter(name: str, weights: list[float]) -> None:
    deltas = normal(3, 12, 20)
    if weights[2]:
        deltas[2] = 0
    assert_close(merge(name, deltas, weights), merge(name, deltas[:2]))


# --- TSV-Merge


def test_tsv_of_nodes_that_do_not_interfere_is_their_sum() -> None:
    # Low ranks in spaces that are orthogonal to one another.
    left, right = rotation(12, 1), rotation(20, 2)
    deltas = torch.stack([left[:, i : i + 4] @ normal(4, 4, seed=i) @ right[i : i + 4] for i in (0, 4, 8)])
    assert_close(merge("tsv", deltas), deltas.sum(0))


def test_tsv_of_twins_is_one_of_them_at_half_the_rank() -> None:
    delta = normal(12, 20)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    assert_close(merge("tsv", delta.repeat(2, 1, 1)), left[:, :6] * values[:6] @ right[:6])


def test_tsv_separates_the_singular_vectors_of_nodes() -> None:
    merged = merge("tsv", normal(3, 12, 20))
    expected = torch.cat([spectrum(delta)[:4] for delta in normal(3, 12, 20)])
    # Orthonormal directions keep each node's leading singular values as they are.
    assert_close(spectrum(merged), expected.sort(descending=True).values)


def test_tsv_of_more_nodes_than_ranks_is_their_mean() -> None:
    deltas = normal(5, 4, 20)
    assert_close(merge("tsv", deltas), deltas.mean(0))


# --- Iso-C and Iso-CTS


@pytest.mark.parametrize("name", ISOTROPIC)
@pytest.mark.parametrize("num_nodes", [1, 2, 5])
def test_isotropic_merges_have_a_flat_spectrum(name: str, num_nodes: int) -> None:
    values = spectrum(merge(name, normal(num_nodes, 12, 20)))
    assert_close(values, values.mean().expand(12))


def test_iso_c_keeps_singular_vectors_and_the_sum_of_values() -> None:
    deltas = normal(3, 12, 20)
    left, values, right = torch.linalg.svd(deltas.sum(0), full_matrices=False)
    assert_close(merge("iso_c", deltas), values.mean() * left @ right)


@pytest.mark.parametrize("name", ISOTROPIC)
def test_isotropic_merges_add_no_directions_that_no_node_has(name: str) -> None:
    deltas = torch.stack([of_rank(2, 12, 20, seed=seed) for seed in (1, 2)])
    merged = merge(name, deltas)
    assert torch.linalg.matrix_rank(merged) == 4
    assert_close(spectrum(merged)[:4], spectrum(merged)[0].expand(4))
    columns = torch.linalg.qr(deltas.sum(0)[:, :4]).Q
    assert_close(columns @ (columns.T @ merged), merged)


def test_iso_c_of_full_rank_fills_the_null_space_at_a_lower_level() -> None:
    delta = of_rank(3, 12, 20)[None]
    merged = merge("iso_c", delta, full_rank=True)
    assert_close(spectrum(merged), (spectrum(delta[0]).sum() / 12).expand(12))


def test_iso_cts_without_specific_directions_is_iso_c() -> None:
    deltas = normal(3, 12, 20)
    assert_close(merge("iso_cts", deltas, common_space_fraction=1.0), merge("iso_c", deltas))


def test_iso_cts_keeps_the_leading_directions_of_the_sum() -> None:
    deltas = normal(2, 12, 20)
    # Of twelve ranks, eight are common: their left vectors are orthogonal to the specific ones, and stay as they are.
    left, _, _ = torch.linalg.svd(deltas.sum(0))
    merged = merge("iso_cts", deltas, common_space_fraction=0.7)
    projected = left[:, :8].T @ merged
    assert_close(projected @ projected.T, spectrum(merged)[0] ** 2 * torch.eye(8, dtype=FP64))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("num_ranks", [1, 5, 22, 48])
@pytest.mark.parametrize("num_nodes", [1, 4, 7])
def test_iso_cts_never_takes_more_directions_than_there_are(num_ranks: int, num_nodes: int, fraction: float) -> None:
    assert 0 <= ranks_per_node(num_ranks, num_nodes, fraction) * num_nodes <= num_ranks


def test_iso_cts_divides_ranks_as_the_authors_do() -> None:
    # 48 ranks, 38 of them common; the ten left are 2.5 for each of four nodes, rounded to even. 22 / 4 would round
    # to 6, and 24 directions do not fit.
    assert ranks_per_node(48, 4, 0.8) == 2
    assert ranks_per_node(18, 4, 0.8) == 1
    assert ranks_per_node(22, 4, 0.0) == 5


# --- Subspace Boosting


@pytest.mark.parametrize(("beta", "place"), [(0.0, 0), (0.01, 0), (0.45, 1), (0.75, 2), (0.95, 3), (1.0, 3)])
def test_boosting_raises_the_values_after_the_leading_share(beta: float, place: int) -> None:
    # Shares of the sum up to each: 0.4, 0.7, 0.9, 1.
    values = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=FP64)
    left, right = rotation(6, 1)[:, :4], rotation(4, 2)
    merged = merge("subspace_boosting", (left * values @ right)[None], beta=beta)
    assert_close(merged, left * values.clamp(min=float(values[place])) @ right)


@pytest.mark.parametrize("on", ["task_arithmetic", "ties"])
def test_boosting_everything_up_to_the_last_value_is_the_merge_itself(on: str) -> None:
    deltas, weights = normal(3, 6, 8), [0.5, 0.2, 0.3]
    assert_close(merge("subspace_boosting", deltas, weights, on=on, beta=1.0), merge(on, deltas, weights))


def test_boosting_takes_the_density_of_ties() -> None:
    deltas = normal(3, 6, 8)
    assert_close(
        merge("subspace_boosting", deltas, on="ties", density=0.7, beta=1.0), merge("ties", deltas, density=0.7)
    )


@pytest.mark.parametrize("on", ["task_arithmetic", "ties"])
def test_boosting_leaves_vectors_as_the_merge_makes_them(on: str) -> None:
    deltas = normal(3, 8)
    assert torch.equal(merge("subspace_boosting", deltas, on=on), merge(on, deltas))


def test_boosting_adds_no_directions() -> None:
    merged = merge("subspace_boosting", of_rank(3, 12, 20)[None], beta=0.0)
    assert torch.linalg.matrix_rank(merged) == 3
