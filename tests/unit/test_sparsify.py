"""Sparsifiers against a Philox written out from its paper, and against the statistics they promise."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedmerge.delta.sparsify import SPARSIFIERS, Kept, travels_dense
from fedmerge.errors import InvalidDelta

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


def reference_mask(seed: int, num_elements: int, density: float) -> dict[int, int]:
    """The kept indices, and the size of the stratum that each was drawn from."""
    threshold = round(density * 2**32)
    starts = [i * 2**32 // threshold for i in range(num_elements + 1)]
    starts = [start for start in starts if start < num_elements]
    words = philox_words(seed, len(starts) // 2 + 1)
    draws = [half for word in words for half in (word & 0xFFFFFFFF, word >> 32)]
    ends = [*starts[1:], num_elements]
    return {
        start + draw * (end - start) // 2**32: end - start
        for start, end, draw in zip(starts, ends[: len(starts)], draws[: len(starts)], strict=True)
    }


@given(seed=SEEDS, num_elements=st.integers(0, 300), density=st.floats(0.001, 1.0))
@settings(deadline=None)
def test_seeded_keeps_what_a_second_implementation_keeps(seed: int, num_elements: int, density: float) -> None:
    values = torch.arange(1, num_elements + 1, dtype=torch.float32)
    mask = reference_mask(seed, num_elements, density)
    kept = SPARSIFIERS["seeded"].sparsify(values, seed, density)
    assert kept.indices == {}
    assert kept.values.tolist() == [index + 1 for index in mask]
    dense = SPARSIFIERS["seeded"].scatter(kept, num_elements, seed, density)
    assert dense.tolist() == [(index + 1) * mask.get(index, 0) for index in range(num_elements)]


@given(name=st.sampled_from(sorted(SPARSIFIERS)), seed=SEEDS, num_elements=st.integers(0, 500), density=DENSITIES)
@settings(deadline=None)
def test_the_count_is_known_without_the_values(name: str, seed: int, num_elements: int, density: float) -> None:
    sparsifier = SPARSIFIERS[name]
    kept = sparsifier.sparsify(torch.ones(num_elements), seed, density)
    assert kept.values.numel() == sparsifier.num_kept(num_elements, density)
    sizes = {kind: section.size for kind, section in kept.indices.items()}
    assert sizes == sparsifier.index_bytes(num_elements, density)
    assert sparsifier.scatter(kept, num_elements, seed, density).shape == (num_elements,)


def test_none_is_the_identity() -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    kept = SPARSIFIERS["none"].sparsify(values, 1, 1.0)
    assert torch.equal(SPARSIFIERS["none"].scatter(kept, 100, 1, 1.0), values)


@pytest.mark.parametrize("name", SPARSIFIERS)
def test_density_one_keeps_everything(name: str) -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    kept = SPARSIFIERS[name].sparsify(values, 7, 1.0)
    assert torch.equal(SPARSIFIERS[name].scatter(kept, 5000, 7, 1.0), values)


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


# Top-k


def reference_topk(values: list[float], density: float) -> list[int]:
    """Indices by sorting each chunk: the largest magnitude first, then the lowest index."""
    chosen: list[int] = []
    for start in range(0, len(values), 4096):
        chunk = range(start, min(start + 4096, len(values)))
        num_kept = max(1, math.floor(density * len(chunk) + 0.5))
        chosen += sorted(sorted(chunk, key=lambda i: (-abs(values[i]), i))[:num_kept])
    return chosen


@st.composite
def tensors(draw: st.DrawFn) -> npt.NDArray[np.float32]:
    """Up to three chunks, from few distinct magnitudes, so that most choices are ties, to all different ones."""
    num_elements = draw(st.sampled_from([0, 1, 2, 4095, 4096, 4097, 8192]) | st.integers(0, 9000))
    num_magnitudes = draw(st.sampled_from([1, 2, 5, 1 << 23]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    signs = rng.choice(np.float32([-1, 1]), num_elements)
    return (rng.integers(0, num_magnitudes, num_elements).astype(np.float32) * signs).astype(np.float32)


@given(values=tensors(), density=st.floats(1e-6, 1) | st.sampled_from([1 / 4096, 1 / 64, 1 / 40, 0.1, 0.5]))
@settings(deadline=None, max_examples=60)
def test_topk_keeps_the_largest_of_each_chunk_and_of_equals_the_first(
    values: npt.NDArray[np.float32], density: float
) -> None:
    topk = SPARSIFIERS["topk"]
    chosen = reference_topk(values.tolist(), density)
    kept = topk.sparsify(torch.from_numpy(values.copy()), 0, density)
    np.testing.assert_array_equal(kept.values.numpy(), values[chosen])
    assert kept.values.numel() == topk.num_kept(values.size, density)
    assert {kind: section.size for kind, section in kept.indices.items()} == topk.index_bytes(values.size, density)
    expected = np.zeros_like(values)
    expected[chosen] = values[chosen]
    np.testing.assert_array_equal(topk.scatter(kept, values.size, 0, density).numpy(), expected)


@given(values=tensors(), density=st.floats(1e-6, 1) | st.sampled_from([1 / 4096, 1 / 64, 1 / 40, 0.1, 0.5]))
@settings(deadline=None, max_examples=60)
def test_layerwise_topk_keeps_the_largest_of_all_and_of_equals_the_first(
    values: npt.NDArray[np.float32], density: float
) -> None:
    topk = SPARSIFIERS["layerwise_topk"]
    num_kept = max(1, math.floor(density * values.size + 0.5)) if values.size else 0
    chosen = np.sort(np.argsort(-np.abs(values), kind="stable")[:num_kept])
    kept = topk.sparsify(torch.from_numpy(values.copy()), 0, density)
    np.testing.assert_array_equal(kept.values.numpy(), values[chosen])
    assert topk.num_kept(values.size, density) == num_kept
    assert {kind: section.size for kind, section in kept.indices.items()} == topk.index_bytes(values.size, density)
    expected = np.zeros_like(values)
    expected[chosen] = values[chosen]
    np.testing.assert_array_equal(topk.scatter(kept, values.size, 0, density).numpy(), expected)


@given(
    values=arrays(np.float32, st.integers(1, 300), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    density=st.floats(1e-6, 1),
)
@settings(deadline=None)
def test_layerwise_topk_orders_any_magnitudes(values: npt.NDArray[np.float32], density: float) -> None:
    kept = SPARSIFIERS["layerwise_topk"].sparsify(torch.from_numpy(values.copy()), 0, density)
    num_kept = kept.values.numel()
    np.testing.assert_array_equal(np.sort(np.abs(kept.values.numpy())), np.sort(np.abs(values))[-num_kept:])


def test_one_threshold_has_less_error_than_one_for_each_chunk() -> None:
    scales = torch.tensor([0.1, 1.0, 3.0, 0.3]).repeat_interleave(4096)
    values = torch.randn(4 * 4096, generator=torch.Generator().manual_seed(0)) * scales
    error = {}
    for name in ("topk", "layerwise_topk"):
        kept = SPARSIFIERS[name].sparsify(values, 0, 1 / 64)
        assert kept.values.numel() == 256
        error[name] = float((SPARSIFIERS[name].scatter(kept, values.numel(), 0, 1 / 64) - values).norm())
    largest = values.abs().sort(descending=True).values
    assert math.isclose(error["layerwise_topk"], float(largest[256:].norm()), rel_tol=1e-5)
    assert error["layerwise_topk"] < 0.95 * error["topk"]


def test_counts_and_gaps_stand_side_by_side() -> None:
    values = torch.zeros(3 * 4096 + 100)
    values[4096:8192] = 1.0
    values[[8192 + 0x123, 8192 + 0x125, 3 * 4096 + 99]] = 2.0
    density = 4099 / values.numel()
    sections = SPARSIFIERS["layerwise_topk"].sparsify(values, 0, density).indices
    assert list(sections) == ["counts_low", "counts_high", "gaps_low", "gaps_high"]
    assert sections["counts_low"].tolist() == [0, 0, 2, 1]
    assert sections["counts_high"].tolist() == [0, 0x10, 0, 0]
    assert sections["gaps_low"].tolist() == [0] * 4096 + [0x23, 0x01, 99]
    assert sections["gaps_high"].tolist() == [0] * 2048 + [0x01, 0x00]


@pytest.mark.parametrize(
    ("kind", "chunk", "change", "match"),
    [
        ("counts_low", 0, 1, "the counts of its chunks sum to 6, not 5"),
        ("counts_high", 1, 255, "the counts of its chunks sum to 65285, not 5"),
        ("gaps_low", 0, 1, "the indices of 1 chunks go past their end"),
        ("gaps_low", 2, 1, "the indices of 1 chunks go past their end"),
    ],
)
def test_counts_must_sum_and_indices_stay_in_their_chunk(kind: str, chunk: int, change: int, match: str) -> None:
    topk, num_elements = SPARSIFIERS["layerwise_topk"], 2 * 4096 + 100
    values = torch.zeros(num_elements)
    values[[0, 4095, 4096, 8191, 8291]] = 1.0
    density = 5 / num_elements
    kept = topk.sparsify(values, 0, density)
    assert torch.equal(topk.scatter(kept, num_elements, 0, density), values)
    section = kept.indices[kind].copy()
    section[chunk] += change
    with pytest.raises(InvalidDelta, match=match):
        topk.scatter(Kept({**kept.indices, kind: section}, kept.values), num_elements, 0, density)


def test_counts_moved_between_chunks_leave_one() -> None:
    topk, num_elements = SPARSIFIERS["layerwise_topk"], 2 * 4096
    kept = topk.sparsify(torch.cat([torch.ones(4096), torch.zeros(4096)]), 0, 0.5)
    kept.indices["counts_low"][:], kept.indices["counts_high"][:] = [255, 1], [15, 0]
    assert int(topk.scatter(kept, num_elements, 0, 0.5).sum()) == 4096
    kept.indices["counts_low"][:], kept.indices["counts_high"][:] = [1, 255], [16, 255]
    with pytest.raises(InvalidDelta, match="sum to 69632, not 4096"):
        topk.scatter(kept, num_elements, 0, 0.5)


def test_topk_leaves_nothing_larger_behind_and_has_the_least_error() -> None:
    values = torch.randn(16 * 4096, generator=torch.Generator().manual_seed(0))
    topk = SPARSIFIERS["topk"]
    dense = topk.scatter(topk.sparsify(values, 0, 1 / 64), values.numel(), 0, 1 / 64).view(16, 4096)
    rows = values.view(16, 4096)
    assert ((dense != 0).sum(dim=1) == 64).all()
    for row, kept in zip(rows, dense, strict=True):
        assert row[kept == 0].abs().max() <= row[kept != 0].abs().min()
        assert torch.equal(row[kept != 0], kept[kept != 0])


@pytest.mark.parametrize("density", [0.001, 1 / 64, 0.1])
@pytest.mark.parametrize("num_elements", [1, 100, 4096, 4097, 20_000])
@pytest.mark.parametrize("name", ["topk", "layerwise_topk"])
def test_index_bytes_of_any_content_are_refused_or_are_indices(name: str, num_elements: int, density: float) -> None:
    topk = SPARSIFIERS[name]
    rng = np.random.default_rng(num_elements)
    values = torch.ones(topk.num_kept(num_elements, density))
    outcomes = {True: 0, False: 0}
    for trial in range(300):
        # Small symbols most of the time, since most large gaps lead past the end.
        high = [1, 2, 16, 256][trial % 4]
        sizes = topk.index_bytes(num_elements, density)
        sections = {kind: rng.integers(0, high, size).astype(np.uint8) for kind, size in sizes.items()}
        if name == "layerwise_topk" and trial % 8:  # counts that sum, most of the time, or no gap would be looked at
            chunk_sizes = [min(4096, num_elements - start) for start in range(0, num_elements, 4096)]
            counts = rng.multinomial(values.numel(), np.array(chunk_sizes) / num_elements)
            sections |= {"counts_low": counts.astype(np.uint8), "counts_high": (counts >> 8).astype(np.uint8)}
        try:
            dense = topk.scatter(Kept(sections, values), num_elements, 0, density)
        except InvalidDelta:
            outcomes[False] += 1
            continue
        assert dense.shape == (num_elements,)
        assert int(dense.sum()) == values.numel()  # all indices are different and inside
        outcomes[True] += 1
    assert outcomes[True] > 20
    assert outcomes[False] > 20


def test_gaps_are_split_at_the_fourth_bit_or_the_eighth() -> None:
    values = torch.zeros(2 * 4096 + 100)
    values[[0x123, 0xFFF, 4096 + 0x9, 4096 + 0x20A]] = 1.0
    sparse = SPARSIFIERS["topk"].sparsify(values, 0, 2 / 4096).indices
    # Gaps 0x123, 0xEDB, 0x009, 0x200, and 0 for the first of a last chunk of zeros.
    assert sparse["gaps_low"].tolist() == [0xB3, 0x09, 0x00]
    assert sparse["gaps_high"].tolist() == [0x12, 0xED, 0x00, 0x20, 0x00]
    values = torch.zeros(4096)
    values[2048:3072] = 1.0
    dense = SPARSIFIERS["topk"].sparsify(values, 0, 1 / 4).indices
    assert dense["gaps_low"].tolist() == [0] * 1024
    assert dense["gaps_high"].tolist() == [0x08] + [0] * 511


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_an_index_past_the_end_of_its_chunk_is_refused(chunk: int) -> None:
    topk, density, num_elements = SPARSIFIERS["topk"], 2 / 4096, 2 * 4096 + 100
    values = torch.zeros(num_elements)
    values[[0, 4095, 4096, 8191, 8291]] = 1.0  # up to the ends
    kept = topk.sparsify(values, 0, density)
    assert torch.equal(topk.scatter(kept, num_elements, 0, density), values)
    kept.indices["gaps_low"][chunk] += 1  # the first gap of the chunk: its indices move up by one
    with pytest.raises(InvalidDelta, match="the indices of 1 chunks go past their end"):
        topk.scatter(kept, num_elements, 0, density)


@pytest.mark.parametrize(("num_kept", "most_percent"), [(4, 8), (20, 4), (41, 3), (64, 3), (123, 4), (410, 3)])
def test_indices_come_close_to_the_count_of_their_choices(num_kept: int, most_percent: float) -> None:
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    sections = SPARSIFIERS["topk"].sparsify(values, 0, num_kept / 4096).indices
    parameters = zstandard.ZstdCompressionParameters.from_level(3, min_match=7, hash_log=6, chain_log=6)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    coded_bytes = sum(min(section.size, len(compressor.compress(section.data))) for section in sections.values())
    bound_bits = math.log2(math.comb(4096, num_kept)) * 256
    assert 0.99 * bound_bits < 8 * coded_bytes < bound_bits * (1 + most_percent / 100)


@pytest.mark.parametrize(
    ("shape", "dense"),
    [((), True), ((0,), True), ((4095,), True), ((4096,), False), ((2, 3), False), ((1, 1), False)],
)
def test_only_small_vectors_travel_dense(shape: tuple[int, ...], dense: bool) -> None:
    assert travels_dense(shape, 4096) is dense
