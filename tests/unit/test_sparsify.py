"""Sparsifiers against a Philox written out from its paper, and against the statistics they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.sparsify import SPARSIFIERS, travels_dense

SEEDS = st.integers(0, 2**64 - 1)
DENSITIES = st.floats(0.001, 0.999) | st.just(1.0)
WORD = 2**64 - 1


def philox_words(seed: int, num_words: int) -> list[int]:
    """Philox-4x64-10 in integers, from the paper's description; the counter starts at 1, as numpy's does."""
    words: list[int] = []
    counter = 0
    while len(words) < num_words:
        counter += 1
        x, key = [counter & WORD, counter >> 64, 0, 0], [seed, 0]
        for _ in range(10):
            high0, low0 = divmod(0xD2E7470EE14C6C93 * x[0], 2**64)
            high1, low1 = divmod(0xCA5A826395121157 * x[2], 2**64)
            x = [high1 ^ x[1] ^ key[0], low1, high0 ^ x[3] ^ key[1], low0]
            key = [(key[0] + 0x9E3779B97F4A7C15) & WORD, (key[1] + 0xBB67AE8584CAA73B) & WORD]
        words += x
    return words[:num_words]


def reference_mask(seed: int, num_elements: int, density: float) -> list[bool]:
    draws = [half for word in philox_words(seed, (num_elements + 1) // 2) for half in (word & 0xFFFFFFFF, word >> 32)]
    return [draw < round(density * 2**32) for draw in draws[:num_elements]]


@given(seed=SEEDS, num_elements=st.integers(0, 70), density=st.floats(0.001, 0.999))
@settings(deadline=None)
def test_seeded_keeps_what_a_second_implementation_keeps(seed: int, num_elements: int, density: float) -> None:
    values = torch.arange(1, num_elements + 1, dtype=torch.float32)
    mask = reference_mask(seed, num_elements, density)
    kept = SPARSIFIERS["seeded"].sparsify(values, seed, density)
    assert kept.tolist() == [value for value, keep in zip(values.tolist(), mask, strict=True) if keep]
    dense = SPARSIFIERS["seeded"].scatter(kept, num_elements, seed, density)
    gain = np.float32(1 / density)
    expected = [np.float32(value) * gain if keep else 0 for value, keep in zip(values.tolist(), mask, strict=True)]
    assert dense.tolist() == expected


@given(name=st.sampled_from(sorted(SPARSIFIERS)), seed=SEEDS, num_elements=st.integers(0, 500), density=DENSITIES)
@settings(deadline=None)
def test_the_count_is_known_without_the_values(name: str, seed: int, num_elements: int, density: float) -> None:
    sparsifier = SPARSIFIERS[name]
    kept = sparsifier.sparsify(torch.ones(num_elements), seed, density)
    assert kept.numel() == sparsifier.num_kept(num_elements, seed, density)
    assert sparsifier.scatter(kept, num_elements, seed, density).shape == (num_elements,)


def test_none_is_the_identity() -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    kept = SPARSIFIERS["none"].sparsify(values, 1, 1.0)
    assert torch.equal(SPARSIFIERS["none"].scatter(kept, 100, 1, 1.0), values)


def test_density_one_keeps_everything() -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    kept = SPARSIFIERS["seeded"].sparsify(values, 7, 1.0)
    assert torch.equal(SPARSIFIERS["seeded"].scatter(kept, 100, 7, 1.0), values)


@pytest.mark.parametrize("density", [0.5, 0.1, 0.02])
def test_seeded_is_unbiased_with_the_variance_of_a_bernoulli_mask(density: float) -> None:
    values = torch.linspace(-2, 3, 400)
    num_seeds = 2000
    sparsifier = SPARSIFIERS["seeded"]
    total, total_squares = torch.zeros(400, dtype=torch.float64), torch.zeros(400, dtype=torch.float64)
    for seed in range(num_seeds):
        dense = sparsifier.scatter(sparsifier.sparsify(values, seed, density), 400, seed, density).double()
        total += dense
        total_squares += dense**2
    variance = values.double() ** 2 * (1 / density - 1)
    standard_error = torch.sqrt(variance / num_seeds)
    # 400 elements: a deviation of more than 5 standard errors somewhere has a probability below 1e-3.
    assert (torch.abs(total / num_seeds - values) <= 5 * standard_error).all()
    measured = (total_squares / num_seeds - (total / num_seeds) ** 2).sum()
    assert math.isclose(float(measured), float(variance.sum()), rel_tol=0.05)


def test_masks_of_two_seeds_are_independent() -> None:
    seeded, ones = SPARSIFIERS["seeded"], torch.ones(100_000)
    first, second = (seeded.scatter(seeded.sparsify(ones, seed, 0.1), 100_000, seed, 0.1) > 0 for seed in (11, 12))
    overlap = float((first & second).double().mean())
    assert abs(overlap - 0.01) < 5 * math.sqrt(0.01 * 0.99 / 100_000)


@pytest.mark.parametrize(
    ("shape", "dense"),
    [((), True), ((0,), True), ((4095,), True), ((4096,), False), ((2, 3), False), ((1, 1), False)],
)
def test_only_small_vectors_travel_dense(shape: tuple[int, ...], dense: bool) -> None:
    assert travels_dense(shape, 4096) is dense
