"""The element-wise methods by the book: each against its definition, written again in float64 numpy from the paper."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmerge.draws import bernoulli_mask, uniform
from fedmerge.errors import ConfigError, ModelMismatch
from fedmerge.merge import METHODS, emr_site, tall_mask
from fedmerge.merge.stack import BLOCK_ELEMENTS
from fedmerge.seeds import derive_seed
from tests.contracts.test_methods import normal, stacks, ties_by_the_book, weight_lists

Array = npt.NDArray[np.float64]

by_the_book = settings(max_examples=200, deadline=None)


def descending(values: Array) -> list[int]:
    """Return the indices of `values` by falling magnitude, of equal ones the lower first."""
    return sorted(range(len(values)), key=lambda j: (-abs(values[j]), j))


def double(deltas: Tensor) -> Array:
    return deltas.double().numpy()


# --- draws


def test_a_draw_depends_on_seed_and_index_only() -> None:
    draws = uniform(5, 1001)
    assert torch.equal(draws[:8], uniform(5, 8))
    assert not torch.equal(draws, uniform(6, 1001))
    assert draws.dtype == torch.float64
    assert ((draws >= 0) & (draws < 1)).all()


@pytest.mark.parametrize("density", [0.125, 0.5, 0.75])
def test_draws_are_those_of_the_masks(density: float) -> None:
    assert torch.equal(uniform(9, 501) < density, bernoulli_mask(9, 501, density))


def test_draws_are_uniform() -> None:
    num_draws = 100_000
    counts = torch.histc(uniform(1, num_draws), bins=10, min=0, max=1)
    assert (counts - num_draws / 10).abs().max() < 5 * math.sqrt(num_draws * 0.1 * 0.9)


# --- DELLA


def della_probabilities(delta: Array, density: float, epsilon: float) -> Array:
    """The probability of each entry of a matrix, line by line."""
    kept = np.full(delta.shape, density)
    num_columns = delta.shape[1]
    for line, probabilities in zip(delta, kept, strict=True):
        for place, j in enumerate(reversed(descending(line))):
            if num_columns > 1:
                probabilities[j] = (density - epsilon) + 2 * epsilon * place / (num_columns - 1)
    return kept


@pytest.mark.parametrize("shape", [(60,), (12, 5), (6, 2, 5), (60, 1), (1, 60)])
def test_della_is_what_the_paper_says(shape: tuple[int, ...]) -> None:
    # Whoever knows seed and row can redo a merge: this pins how the masks are keyed, too.
    deltas, weights = (normal(3, *shape) * 4e3).round() / 8, [0.5, 0.3, 0.2]
    thinned = []
    for node, delta in enumerate(double(deltas)):
        matrix = delta.reshape(len(delta) if delta.ndim > 1 else 1, -1)
        probabilities = della_probabilities(matrix, 0.6, 0.3).reshape(-1)
        kept = uniform(derive_seed(77, node), 60).numpy() < probabilities
        thinned.append(np.where(kept, delta.reshape(-1) / probabilities, 0))
    params = {"seed": 77, "density": 0.6, "epsilon": 0.3}
    linear = METHODS["della_linear"](deltas, torch.tensor(weights), **params)
    np.testing.assert_allclose(linear.view(-1).numpy(), np.average(thinned, axis=0, weights=weights), atol=1e-5)
    elected = METHODS["della"](deltas, torch.tensor(weights), **params)
    expected = ties_by_the_book(np.array(thinned), weights, 1.0)
    np.testing.assert_allclose(elected.view(-1).numpy(), expected, rtol=1e-5)


def test_della_is_task_arithmetic_in_expectation() -> None:
    deltas, weights, num_seeds = normal(3, 4, 10, dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2]), 2000
    merge = METHODS["della_linear"]
    draws = torch.stack([merge(deltas, weights, seed=seed, density=0.5, epsilon=0.3) for seed in range(num_seeds)])
    probabilities = torch.from_numpy(np.array([della_probabilities(delta.numpy(), 0.5, 0.3) for delta in deltas]))
    # Variance of one draw: sum_i (w_i tau_i)^2 (1 - p_i) / p_i. Forty elements within 5 standard errors.
    weighted = weights[:, None, None] * deltas
    standard_error = (weighted**2 * (1 - probabilities) / probabilities).sum(0).div(num_seeds).sqrt()
    error = (draws.mean(0) - METHODS["task_arithmetic"](deltas, weights)) / standard_error
    assert error.abs().max() < 5


def test_della_keeps_the_large_more_often() -> None:
    delta = torch.arange(1.0, 10_001.0)[None]
    kept = METHODS["della_linear"](delta, torch.ones(1), seed=3, density=0.5, epsilon=0.4, rescale="none") > 0
    shares = kept.double().view(4, 2500).mean(1)
    expected = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    assert (shares - expected).abs().max() < 0.05
    matched = METHODS["della_linear"](delta, torch.ones(1), seed=3, density=0.5, epsilon=0.4, rescale="l1")
    torch.testing.assert_close(matched.sum(), delta.sum())


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.1), (0.05, 0.1), (0.9, 0.2)])
@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della_needs_probabilities(name: str, density: float, epsilon: float) -> None:
    with pytest.raises(ConfigError, match="probabilities from"):
        METHODS[name](normal(2, 5), torch.ones(2), density=density, epsilon=epsilon)


# --- Breadcrumbs


def middle_by_the_book(deltas: Array, density: float, outliers: float) -> Array:
    kept = np.zeros_like(deltas)
    num_elements = deltas.shape[1]
    num_kept = max(1, math.floor(density * num_elements))
    bottom = max(0, num_elements - num_kept - math.floor(outliers * num_elements))
    for row, out in zip(deltas, kept, strict=True):
        ascending = descending(row)[::-1]
        chosen = ascending[bottom : bottom + num_kept]
        out[chosen] = row[chosen]
    return kept


@given(deltas=stacks, density=st.floats(0.01, 1), outliers=st.floats(0, 0.99), data=st.data())
@by_the_book
def test_breadcrumbs_is_what_the_paper_says(
    deltas: Tensor, density: float, outliers: float, data: st.DataObject
) -> None:
    weights = data.draw(weight_lists(len(deltas)))
    kept = middle_by_the_book(double(deltas), density, outliers)
    params = {"density": density, "outliers": outliers}
    merged = METHODS["breadcrumbs"](deltas, torch.tensor(weights), **params)
    np.testing.assert_allclose(merged.numpy(), np.array(weights) @ kept, atol=1e-6)
    elected = METHODS["breadcrumbs_ties"](deltas, torch.tensor(weights), **params)
    np.testing.assert_allclose(elected.numpy(), ties_by_the_book(kept, weights, 1.0), rtol=1e-6)


def test_breadcrumbs_on_more_than_one_block() -> None:
    deltas = (normal(2, 2 * BLOCK_ELEMENTS + 333) * 1e5).round() / 8  # rounded, so that both thresholds are tied
    merged = METHODS["breadcrumbs"](deltas, torch.ones(2), density=0.5, outliers=0.05)
    np.testing.assert_allclose(merged.numpy(), middle_by_the_book(double(deltas), 0.5, 0.05).sum(0), atol=1e-6)


# --- MagMax, SCE, CABS


@given(deltas=stacks)
@by_the_book
def test_magmax_takes_the_largest_and_the_last(deltas: Tensor) -> None:
    expected = [max(enumerate(column), key=lambda entry: (abs(entry[1]), entry[0]))[1] for column in double(deltas).T]
    merged = METHODS["magmax"](deltas, torch.ones(len(deltas)))
    assert (merged * 2).tolist() == expected


def sce_by_the_book(deltas: Array, selected: float) -> Array:
    variance = deltas.var(axis=0)
    if selected < 1:
        kept = descending(variance)[: math.floor(selected * np.count_nonzero(variance))]
        mask = np.zeros(len(variance))
        mask[kept] = 1
        deltas = deltas * mask
    squares = (deltas**2).mean(axis=1)
    shares = squares / squares.sum() if squares.any() else np.full(len(deltas), 1 / len(deltas))
    merged = np.zeros(len(variance))
    for j, column in enumerate(deltas.T):
        agreeing = [i for i, entry in enumerate(column) if np.sign(entry) == np.sign(column.sum()) != 0]
        if agreeing:
            merged[j] = sum(shares[i] * column[i] for i in agreeing) / sum(shares[i] for i in agreeing)
    return merged


@given(deltas=stacks, selected=st.floats(0.01, 1))
@by_the_book
def test_sce_is_what_the_paper_says(deltas: Tensor, selected: float) -> None:
    merged = METHODS["sce"](deltas, torch.ones(len(deltas)), selected=selected)
    np.testing.assert_allclose(merged.numpy(), sce_by_the_book(double(deltas), selected), rtol=1e-5, atol=1e-7)


def test_sce_with_the_absolute_guard_forgets_the_weights_of_small_deltas() -> None:
    deltas = torch.tensor([[3e-4, 0.0], [1e-4, 1e-4]])
    merged = METHODS["sce"](deltas, torch.ones(2), selected=1.0)
    torch.testing.assert_close(merged, torch.tensor([(9 * 3 + 2 * 1) / 11 * 1e-4, 1e-4]))
    guarded = METHODS["sce"](deltas, torch.ones(2), selected=1.0, guard="absolute")
    torch.testing.assert_close(guarded, torch.tensor([2e-4, 1e-4]))


def cabs_by_the_book(deltas: Array, n: int, m: int, tail: str, overlap: bool) -> tuple[Array, Array]:
    """Return the masked task vectors and the masks."""
    masks = np.zeros(deltas.shape, dtype=bool)
    num_elements = deltas.shape[1]
    for i, row in enumerate(deltas):
        for start in range(0, num_elements, m):
            block = range(start, min(start + m, num_elements))
            quota = n if len(block) == m else n * len(block) // m * (tail == "share")
            free = [j for j in block if not masks[:i, j].any()]
            taken = [j for j in block if masks[:i, j].any()] if overlap else []
            order = sorted(free, key=lambda j: (-abs(row[j]), j)) + sorted(taken, key=lambda j: (-abs(row[j]), j))
            masks[i, order[:quota]] = True
    return deltas * masks, masks


@pytest.mark.parametrize("tail", ["share", "drop"])
@pytest.mark.parametrize("overlap", [False, True])
@given(deltas=stacks, n=st.integers(1, 5), data=st.data())
@by_the_book
def test_cabs_is_what_the_paper_says(tail: str, overlap: bool, deltas: Tensor, n: int, data: st.DataObject) -> None:
    weights, m = data.draw(weight_lists(len(deltas))), data.draw(st.integers(n, 2 * n))
    params = {"num_kept": n, "block_length": m, "tail": tail, "overlap": overlap}
    merged = METHODS["cabs"](deltas, torch.tensor(weights), **params)
    masked, masks = cabs_by_the_book(double(deltas), n, m, tail, overlap)
    np.testing.assert_allclose(merged.numpy(), np.array(weights) @ masked, atol=1e-6)
    assert overlap or masks.sum(axis=0).max() <= 1


def test_cabs_on_more_than_one_block() -> None:
    deltas = (normal(3, BLOCK_ELEMENTS + 1000) * 1e5).round() / 8
    merged = METHODS["cabs"](deltas, torch.ones(3), num_kept=30, block_length=100)
    masked, _ = cabs_by_the_book(double(deltas), 30, 100, "share", False)
    np.testing.assert_allclose(merged.numpy(), masked.sum(0), atol=1e-6)


def test_cabs_can_not_keep_more_than_a_block() -> None:
    with pytest.raises(ConfigError, match="10 entries of 8"):
        METHODS["cabs"](normal(2, 5), torch.ones(2), num_kept=10, block_length=8)


# --- PCB


def pcb_by_the_book(deltas: Array, ratio: float) -> Array:
    num_nodes, d = deltas.shape

    def min_max(values: Array) -> Array:
        spread = np.ptp(values)
        return (values - values.min()) / spread if spread else np.zeros(d)

    clipped, scores = np.zeros_like(deltas), np.zeros_like(deltas)
    for i, row in enumerate(deltas):
        ordered = np.sort(np.abs(row))
        magnitudes = np.clip(np.abs(row), ordered[int(d * 1e-4)], ordered[max(0, int(d * (1 - 1e-4) - 1))])
        clipped[i] = np.sign(row) * magnitudes
        scores[i] = np.exp(num_nodes * min_max(magnitudes) ** 2) * np.tanh(row * deltas.sum(axis=0))
        floor = np.sort(scores[i])[int(d * (1 - ratio))]
        scores[i] = min_max(np.maximum(scores[i], floor))
    return (scores * clipped).sum(axis=0) / np.maximum(scores.sum(axis=0), 1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e3])  # task vectors of a thousandth, and of one
@pytest.mark.parametrize("num_nodes", [1, 2, 5])
@pytest.mark.parametrize(("num_elements", "ratio"), [(40, 0.1), (333, 0.05), (333, 0.2), (25_000, 0.1), (3, 1.0)])
def test_pcb_is_what_the_paper_says(scale: float, num_nodes: int, num_elements: int, ratio: float) -> None:
    deltas = normal(num_nodes, num_elements, dtype=torch.float64) * scale
    merged = METHODS["pcb"](deltas, torch.ones(num_nodes), ratio=ratio)
    np.testing.assert_allclose(merged.numpy(), pcb_by_the_book(deltas.numpy(), ratio), rtol=1e-9, atol=1e-12 * scale)


def test_pcb_of_one_entry_is_the_mean_of_those_that_agree() -> None:
    deltas = torch.tensor([[4.0], [-1.0], [2.0]])
    assert METHODS["pcb"](deltas, torch.ones(3)).tolist() == [3]
    assert METHODS["pcb"](deltas[:, 0], torch.ones(3), lambda_=0.5).item() == 1.5


def test_pcb_of_a_thousand_nodes_does_not_overflow() -> None:
    merged = METHODS["pcb"](normal(1000, 50), torch.ones(1000))
    assert merged.isfinite().all()
    assert merged.any()


# --- Consensus


@given(deltas=stacks, threshold=st.sampled_from([0.25, 0.5, 1.0]), min_nodes=st.integers(1, 4), data=st.data())
@by_the_book
def test_consensus_is_what_the_paper_says(
    deltas: Tensor, threshold: float, min_nodes: int, data: st.DataObject
) -> None:
    weights = data.draw(weight_lists(len(deltas)))
    values = double(deltas)
    num_nodes = (np.abs(values) > threshold * np.abs(values.sum(axis=0) - values)).sum(axis=0)
    merged = METHODS["consensus"](deltas, torch.tensor(weights), threshold=threshold, min_nodes=min_nodes)
    np.testing.assert_allclose(merged.numpy(), (num_nodes >= min_nodes) * (np.array(weights) @ values), atol=1e-6)


def test_consensus_may_mask_the_ties_sum() -> None:
    deltas, weights = normal(4, 200), torch.full((4,), 0.25)
    total = METHODS["ties"](deltas, torch.ones(4), normalize=False)
    num_nodes = torch.stack([tall_mask(delta, total, 0.4) for delta in deltas]).sum(0)
    merged = METHODS["consensus"](deltas, weights, multitask="ties")
    torch.testing.assert_close(merged, total * (num_nodes >= 2) / 4)
    assert 0 < torch.count_nonzero(merged) < torch.count_nonzero(total)


# --- EMR


@given(deltas=stacks)
@by_the_book
def test_emr_is_what_the_paper_says(deltas: Tensor) -> None:
    values = double(deltas)
    signs = np.where(values.sum(axis=0) > 0, 1, -1)
    expected = signs * np.where(values * signs > 0, np.abs(values), 0).max(axis=0)
    unified = METHODS["emr"](deltas, torch.ones(len(deltas)))
    assert np.array_equal(unified.numpy(), expected)
    for delta, own in zip(deltas, values, strict=True):
        site = emr_site({"w": delta}, {"w": unified})
        mask = own * expected > 0
        assert np.array_equal(site.masks["w"].numpy(), mask)
        left = np.abs(mask * expected).sum()
        assert site.rescaler == pytest.approx(np.abs(own).sum() / left if left else 0)


def models(*shapes: tuple[int, ...], num_nodes: int) -> list[dict[str, Tensor]]:
    return [{f"{i}": normal(*shape, seed=10 * node + i) for i, shape in enumerate(shapes)} for node in range(num_nodes)]


def unify(sites: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: METHODS["emr"](torch.stack([s[name] for s in sites]), torch.ones(len(sites))) for name in sites[0]}


def test_a_lone_site_recovers_its_own_model() -> None:
    (own,) = models((5, 7), (3,), num_nodes=1)
    site = emr_site(own, unify([own]))
    assert site.rescaler == 1
    assert all(torch.equal(site.recover(name, own[name]), own[name]) for name in own)


@pytest.mark.parametrize("rescale", ["sum", "tensor_means"])
def test_a_recovered_model_has_the_magnitude_and_signs_of_the_sites(rescale: Any) -> None:
    sites = models((50, 7), (3,), num_nodes=4)
    unified = unify(sites)
    for own in sites:
        site = emr_site(own, unified, rescale=rescale)
        recovered = {name: site.recover(name, unified[name]) for name in own}
        assert all((recovered[name] * own[name] >= 0).all() for name in own)

        def size(model: dict[str, Tensor]) -> float:
            norms = (t.double().abs().sum() if rescale == "sum" else t.double().abs().mean() for t in model.values())
            return math.fsum(float(norm) for norm in norms)

        assert size(recovered) == pytest.approx(size(own), rel=1e-5)
        # It is nearer to the site's own model than the unified one is.
        assert (recovered["0"] - own["0"]).norm() < (unified["0"] - own["0"]).norm()


def test_a_site_that_agrees_with_nothing_gets_nothing() -> None:
    unified = {"w": torch.tensor([1.0, 2.0])}
    site = emr_site({"w": torch.tensor([-1.0, 0.0])}, unified)
    assert site.rescaler == 0
    assert not site.recover("w", unified["w"]).any()


def test_a_site_and_the_unified_model_have_the_same_tensors() -> None:
    with pytest.raises(ModelMismatch, match="only the site's task vector has b"):
        emr_site({"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2)})
    with pytest.raises(ModelMismatch, match=r"a has shape \[2\] at the site, \[3\] unified"):
        emr_site({"a": torch.ones(2)}, {"a": torch.ones(3)})


# --- median and trimmed mean


@given(deltas=stacks)
@by_the_book
def test_median_is_the_median(deltas: Tensor) -> None:
    merged = METHODS["median"](deltas, torch.ones(len(deltas)))
    np.testing.assert_array_equal(merged.numpy(), np.median(double(deltas), axis=0))


@pytest.mark.parametrize(("num_nodes", "trimmed", "num_left"), [(4, 0.2, 4), (5, 0.2, 3), (5, 0.49, 1), (10, 0.3, 4)])
def test_trimmed_mean_leaves_out_both_ends(num_nodes: int, trimmed: float, num_left: int) -> None:
    deltas = normal(num_nodes, BLOCK_ELEMENTS + 10)
    merged = METHODS["trimmed_mean"](deltas, torch.ones(num_nodes), trimmed=trimmed)
    cut = (num_nodes - num_left) // 2
    expected = np.sort(double(deltas), axis=0)[cut : cut + num_left].mean(axis=0)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("name", "params"), [("median", {}), ("trimmed_mean", {"trimmed": 0.4})])
def test_a_minority_can_not_move_a_robust_mean_out_of_the_others_range(name: str, params: dict[str, Any]) -> None:
    honest = normal(3, 100)
    for wild in (1e30, -1e30):
        deltas = torch.cat([honest, torch.full((2, 100), wild)])
        # Nor does a weight that it claims.
        merged = METHODS[name](deltas, torch.tensor([1.0, 1.0, 1.0, 100.0, 100.0]), **params)
        assert (merged <= honest.max(0).values).all()
        assert (merged >= honest.min(0).values).all()
