"""KnOTS, held against its definition and the properties that make it one."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmerge.merge import METHODS

FP64 = torch.float64
RULES = ["ties", "dare_ties", "mean"]

each_rule = pytest.mark.parametrize("rule", RULES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)


def adapters(*ranks: int, shape: tuple[int, int] = (12, 20)) -> Tensor:
    """Return what LoRA adapters of these ranks add to a weight."""
    return torch.stack(
        [normal(shape[0], rank, seed=i) @ normal(rank, shape[1], seed=50 + i) for i, rank in enumerate(ranks)]
    )


def knots(deltas: Tensor, weights: list[float] | None = None, **params: Any) -> Tensor:
    return METHODS["knots"](deltas, torch.tensor(weights or [1.0] * len(deltas), dtype=FP64), **params)


def assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_knots_is_what_the_paper_says() -> None:
    deltas, weights = adapters(2, 3, 4), [0.5, 0.3, 0.2]
    left, values, right = np.linalg.svd(np.concatenate(list(deltas.numpy()), axis=1), full_matrices=False)
    kept = values > 1e-4
    assert kept.sum() == 9
    signs = np.array([np.sign(column[np.abs(column).argmax()]) for column in left.T[kept]])
    parts = np.split(signs[:, None] * right[kept], 3, axis=1)
    stack = torch.from_numpy(np.stack(parts))
    merged = METHODS["ties"](stack, torch.tensor(weights, dtype=FP64), density=0.3).numpy()
    expected = (left[:, kept] * signs * values[kept]) @ merged
    assert_close(knots(deltas, weights, density=0.3), torch.from_numpy(expected))


def test_the_mean_in_any_basis_is_the_mean() -> None:
    deltas, weights = adapters(2, 3, 4), [0.5, 0.3, 0.2]
    assert_close(knots(deltas, weights, rule="mean"), METHODS["fedavg"](deltas, torch.tensor(weights, dtype=FP64)))


@each_rule
def test_one_node_gets_its_delta_back(rule: str) -> None:
    delta = adapters(3)
    assert_close(knots(delta, rule=rule, density=1.0), delta[0])


@each_rule
def test_twins_get_their_delta_back(rule: str) -> None:
    delta = adapters(3)
    assert_close(knots(delta.repeat(3, 1, 1), rule=rule, density=1.0), delta[0])


def test_the_outcome_stays_in_the_space_of_the_adapters() -> None:
    deltas = adapters(2, 3)
    outside = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=True).U[:, 5:]
    assert_close(outside.T @ knots(deltas), torch.zeros(7, 20, dtype=FP64))


@each_rule
def test_rotating_the_outputs_rotates_the_outcome(rule: str) -> None:
    # Outputs have no basis of their own any more; the inputs keep theirs. Up to the signs of singular vectors, which
    # no basis fixes: TIES does not mind them, and a random mask does not either.
    deltas, rotation = adapters(2, 3, 4), torch.linalg.qr(normal(12, 12, seed=9)).Q
    assert_close(knots(rotation @ deltas, rule=rule, seed=3), rotation @ knots(deltas, rule=rule, seed=3))


@each_rule
def test_the_order_of_nodes_does_not_matter_but_for_masks(rule: str) -> None:
    deltas, weights, order = adapters(2, 3, 4), [0.5, 0.3, 0.2], [2, 0, 1]
    density = 1.0 if rule == "dare_ties" else 0.4
    permuted = knots(deltas[order], [weights[i] for i in order], rule=rule, density=density)
    assert_close(permuted, knots(deltas, weights, rule=rule, density=density))


def test_only_random_masks_need_a_seed() -> None:
    deltas = adapters(2, 3, 4)
    for rule in RULES:
        same = torch.equal(knots(deltas, rule=rule, seed=1), knots(deltas, rule=rule, seed=2))
        assert same == (rule != "dare_ties")


@each_rule
def test_equal_bits_on_any_number_of_threads(rule: str) -> None:
    deltas = adapters(8, 4, 16, shape=(300, 200)).float()
    before = torch.get_num_threads()
    try:
        merged = []
        for num_threads in (1, 2, 4):
            torch.set_num_threads(num_threads)
            merged.append(knots(deltas, rule=rule))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(merged[0], merged[1])
    assert torch.equal(merged[0], merged[2])


def test_convolutions_are_matrices_and_vectors_are_averaged() -> None:
    deltas = normal(3, 6, 4, 3, 3)
    assert torch.equal(knots(deltas), knots(deltas.flatten(2)).view(6, 4, 3, 3))
    vectors = normal(3, 8)
    assert_close(knots(vectors, lambda_=2.0), 2 * vectors.mean(0))
    assert_close(knots(adapters(2, 3), lambda_=0.3), 0.3 * knots(adapters(2, 3)))
