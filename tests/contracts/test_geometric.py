"""Methods of lengths and angles, held against their definitions on explicit vectors."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmerge.errors import InputError, ModelMismatch
from fedmerge.merge import METHODS, parameters
from fedmerge.merge.methods import NEEDS_BASE, PAIRWISE

FP64 = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = FP64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(dtype)


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def angle(one: Tensor, other: Tensor) -> float:
    one, other = unit(one.flatten()), unit(other.flatten())
    # Not by the cosine: that is rounded to more than 1 where they are the same.
    return 2 * math.atan2(float((one - other).norm()), float((one + other).norm()))


def merge(name: str, deltas: Tensor, weights: list[float] | None = None, **params: Any) -> Tensor:
    return METHODS[name](deltas, torch.tensor(weights or [1.0] * len(deltas), dtype=FP64), **params)


# --- the space that is merged in


@pytest.mark.parametrize("name", sorted(NEEDS_BASE))
def test_merging_in_the_space_of_weights_moves_the_origin(name: str) -> None:
    base, deltas = normal(6, 5, seed=1), normal(2, 6, 5, seed=2)
    merged = merge(name, deltas, [0.3, 0.7], base=base, space="weights")
    # Task vectors from a base of zero are the models themselves.
    torch.testing.assert_close(base + merged, merge(name, base + deltas, [0.3, 0.7]), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(merged, merge(name, deltas, [0.3, 0.7]))


@pytest.mark.parametrize("name", sorted(NEEDS_BASE))
def test_a_base_that_is_missing_or_of_another_shape_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="needs the base") as caught:
        merge(name, normal(2, 6), space="weights")
    assert caught.value.hint is not None
    with pytest.raises(ModelMismatch, match=r"\[3\]"):
        merge(name, normal(2, 6), base=normal(3), space="weights")


def test_all_methods_with_a_space_may_need_the_base() -> None:
    assert {name for name in METHODS if "space" in parameters(name)} <= NEEDS_BASE


@pytest.mark.parametrize("name", sorted(PAIRWISE))
def test_methods_of_two_nodes_refuse_three(name: str) -> None:
    with pytest.raises(InputError, match="two task vectors, not 3") as caught:
        merge(name, normal(3, 6))
    assert "karcher" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["multislerp", "rda", "karcher", "geometric_median"])
def test_negative_weights_have_no_mean(name: str) -> None:
    with pytest.raises(InputError, match="negative"):
        merge(name, normal(2, 6), [1.0, -0.5])


# --- SLERP


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_goes_along_the_arc(t: float) -> None:
    ends = torch.stack([unit(normal(40, seed=1)), unit(normal(40, seed=2))]) * 3
    point = merge("slerp", ends, t=t)
    assert point.norm().item() == pytest.approx(3, rel=1e-12)
    whole = angle(*ends)
    assert angle(ends[1], point) == pytest.approx((1 - t) * whole, abs=1e-6)
    assert angle(ends[0], point) == pytest.approx(t * whole, abs=1e-6)


@pytest.mark.parametrize("factor", [2.0, -1.0, -0.5])
def test_slerp_on_a_line_is_linear(factor: float) -> None:
    start = normal(4, 5)
    deltas = torch.stack([start, factor * start])
    torch.testing.assert_close(merge("slerp", deltas, t=0.3), start * (0.7 + 0.3 * factor), rtol=1e-12, atol=1e-12)
    merged = merge("nuslerp", deltas, [0.7, 0.3])
    torch.testing.assert_close(merged, start * (0.7 + 0.3 * factor), rtol=1e-12, atol=1e-12)


def test_slerp_is_linear_for_cosines_above_the_threshold() -> None:
    for cosine, is_linear in [(0.9996, True), (0.9994, False), (-0.9996, True), (-0.9994, False)]:
        deltas = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]], dtype=FP64)
        assert torch.allclose(merge("slerp", deltas), deltas.mean(0), rtol=0, atol=1e-9) == is_linear


def test_almost_opposite_nodes_do_not_throw_the_outcome_far_off() -> None:
    for name in ("slerp", "nuslerp"):
        for aside in (1e-9, 1e-6, 1e-3):
            deltas = torch.tensor([[1.0, 0.0], [-3.0, aside]], dtype=FP64)
            assert merge(name, deltas).norm() <= 3
    # In the other direction they are no trouble.
    close = torch.tensor([[1.0, 0.0], [3.0, 1e-9]], dtype=FP64)
    torch.testing.assert_close(merge("nuslerp", close), close.mean(0), rtol=1e-9, atol=1e-9)


def test_nuslerp_takes_its_place_on_the_arc_from_the_weights() -> None:
    deltas = normal(2, 4, 6)
    torch.testing.assert_close(merge("nuslerp", deltas, [1.0, 3.0]), merge("slerp", deltas, t=0.75))
    torch.testing.assert_close(merge("nuslerp", deltas, [1.0, -1.0]), merge("slerp", deltas, t=0.5))


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 2)])
def test_nuslerp_by_rows_and_columns_merges_each_by_itself(shape: tuple[int, ...]) -> None:
    deltas, weights = normal(2, *shape), [0.4, 0.6]
    by_row, by_column = (merge("nuslerp", deltas, weights, axis=axis) for axis in ("row", "column"))
    for index in np.ndindex(shape[:-1]):
        torch.testing.assert_close(by_row[index], merge("nuslerp", deltas[:, *index], weights))
    for index in np.ndindex(shape[1:]):
        where = (slice(None), *index)
        torch.testing.assert_close(by_column[where], merge("nuslerp", deltas[:, *where], weights))


@pytest.mark.parametrize("axis", ["row", "column"])
def test_vectors_scalars_and_empty_tensors_have_rows_and_columns_too(axis: str) -> None:
    deltas = normal(2, 7)
    torch.testing.assert_close(merge("nuslerp", deltas, axis=axis), merge("nuslerp", deltas))
    assert merge("nuslerp", normal(2), axis=axis).shape == ()
    assert merge("nuslerp", normal(2, 5, 0), axis=axis).shape == (5, 0)


# --- means of directions


@pytest.mark.parametrize("name", ["multislerp", "rda", "karcher"])
def test_means_of_directions_have_the_mean_length(name: str) -> None:
    deltas, weights = normal(4, 30) * torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=FP64), [0.4, 0.3, 0.2, 0.1]
    lengths = deltas.norm(dim=1).tolist()
    assert merge(name, deltas, weights).norm().item() == pytest.approx(np.average(lengths, weights=weights), rel=1e-12)


@pytest.mark.parametrize("name", ["multislerp", "rda", "karcher"])
def test_nodes_of_one_direction_have_the_arithmetic_mean(name: str) -> None:
    delta = normal(5, 4)
    merged = merge(name, torch.stack([delta, 3 * delta, delta]), [0.5, 0.25, 0.25])
    torch.testing.assert_close(merged, 1.5 * delta, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["multislerp", "rda", "karcher"])
def test_directions_that_cancel_out_leave_the_arithmetic_mean(name: str) -> None:
    delta = normal(5, 4)
    torch.testing.assert_close(merge(name, torch.stack([3 * delta, -delta])), delta, rtol=1e-12, atol=1e-12)
    opposed = torch.stack([delta, -delta, 2 * delta, -delta])
    torch.testing.assert_close(merge(name, opposed), delta / 4, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["multislerp", "rda", "karcher"])
def test_a_node_that_changed_nothing_shortens_but_does_not_turn(name: str) -> None:
    deltas = normal(2, 20)
    with_idle = torch.cat([deltas, torch.zeros(1, 20, dtype=FP64)])
    torch.testing.assert_close(merge(name, with_idle), merge(name, deltas) * 2 / 3, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["multislerp", "rda"])
def test_the_mean_direction_is_that_of_the_unit_vectors(name: str) -> None:
    deltas, weights = normal(3, 4, 5) * torch.tensor([1.0, 20.0, 0.1], dtype=FP64)[:, None, None], [1.0, 2.0, 5.0]
    units = [unit(delta) for delta in deltas]
    direction = unit(sum((w * u for w, u in zip(weights, units, strict=True)), torch.zeros(4, 5, dtype=FP64)))
    torch.testing.assert_close(unit(merge(name, deltas, weights)), direction, rtol=1e-12, atol=1e-12)


def test_the_karcher_mean_has_no_mean_tangent() -> None:
    # Within a right angle of one another the mean is the only such point.
    deltas, weights = normal(4, 30).abs() + 0.2, [0.4, 0.3, 0.2, 0.1]
    mean = unit(merge("karcher", deltas, weights, tol=1e-9, max_iter=50))
    pull = torch.zeros(30, dtype=FP64)
    for delta, weight in zip(deltas, weights, strict=True):
        aside = unit(delta) - (unit(delta) @ mean) * mean
        pull += weight * angle(delta, mean) * unit(aside)
    assert pull.norm() < 1e-7
    # The mean of the unit vectors is another point.
    assert angle(mean, merge("rda", deltas, weights)) > 1e-3


def test_the_karcher_mean_of_two_is_on_their_arc() -> None:
    deltas = torch.stack([unit(normal(40, seed=1)), unit(normal(40, seed=2))])
    expected = merge("slerp", deltas, t=0.8)
    torch.testing.assert_close(merge("karcher", deltas, [0.2, 0.8], tol=1e-9), expected, rtol=1e-9, atol=1e-9)


def test_an_antipode_of_the_karcher_mean_does_not_break_it() -> None:
    delta = normal(40)
    for noise in (0.0, 1e-12, 1e-7):
        deltas = torch.stack([delta, delta, -delta + noise * normal(40, seed=1)])
        torch.testing.assert_close(merge("karcher", deltas), delta, rtol=1e-5, atol=1e-5)


# --- Model Stock


def test_model_stock_of_two_is_the_papers_formula() -> None:
    deltas = normal(2, 50) + 0.7 * normal(50, seed=5)
    cosine = math.cos(angle(*deltas))
    torch.testing.assert_close(merge("model_stock", deltas), deltas.mean(0) * 2 * cosine / (1 + cosine))


def test_model_stock_is_where_the_perpendicular_from_the_base_meets_the_plane_of_equal_fine_tunes() -> None:
    # Task vectors of one length around a centre, each off it in a direction of its own: all angles are equal.
    centre, num_nodes = 2.0, 4
    deltas = torch.cat([torch.full((num_nodes, 1), centre), torch.eye(num_nodes)], dim=1).to(FP64)
    cosine = centre**2 / (centre**2 + 1)
    ratio = num_nodes * cosine / (1 + (num_nodes - 1) * cosine)
    for angles in ("mean_cosine", "mean_angle"):
        merged = merge("model_stock", deltas, angle=angles)
        torch.testing.assert_close(merged, deltas.mean(0) * ratio)


def test_model_stock_keeps_between_base_and_mean_unless_told_otherwise() -> None:
    apart = torch.tensor([[1.0, 0.0], [-0.6, 0.8]], dtype=FP64)
    assert merge("model_stock", apart).tolist() == [0, 0]
    torch.testing.assert_close(merge("model_stock", apart, clamp=False), apart.mean(0) * -1.2 / 0.4)
    unrelated = torch.eye(3, dtype=FP64)
    assert not merge("model_stock", unrelated).any()
    # One divided by nothing: the angle at which the mean is the base.
    antipodes = torch.tensor([[1.0], [-2.0]], dtype=FP64)
    assert not merge("model_stock", antipodes, clamp=False).any()


def test_model_stock_does_not_depend_on_the_scale() -> None:
    deltas = normal(3, 50) + normal(50, seed=5)
    torch.testing.assert_close(
        merge("model_stock", deltas * 1e-9), merge("model_stock", deltas) * 1e-9, atol=0, rtol=1e-9
    )


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 2)])
def test_model_stock_by_filter_merges_each_output_unit_by_itself(shape: tuple[int, ...]) -> None:
    deltas = normal(3, *shape) + normal(*shape, seed=5)
    merged = merge("model_stock", deltas, filter_wise=True)
    for unit_index in range(shape[0]):
        torch.testing.assert_close(merged[unit_index], merge("model_stock", deltas[:, unit_index]))


def test_the_mean_angle_and_the_mean_cosine_differ() -> None:
    deltas = normal(3, 10) + 2 * normal(10, seed=5)
    angles = [angle(deltas[i], deltas[j]) for i, j in [(0, 1), (0, 2), (1, 2)]]
    cosine = math.cos(sum(angles) / 3)
    merged = merge("model_stock", deltas, angle="mean_angle")
    torch.testing.assert_close(merged, deltas.mean(0) * 3 * cosine / (1 + 2 * cosine))
    assert not torch.equal(merged, merge("model_stock", deltas))


# --- the geometric median


def sum_of_distances(point: Tensor, deltas: Tensor, weights: list[float]) -> float:
    return sum(w * float((delta - point).norm()) for w, delta in zip(weights, deltas, strict=True))


def test_no_point_is_nearer_to_all_than_the_geometric_median() -> None:
    deltas, weights = normal(5, 12), [0.1, 0.2, 0.3, 0.2, 0.2]
    median = merge("geometric_median", deltas, weights)
    # At the least sum of distances, the weighted unit vectors to the nodes balance.
    pull = sum((w * unit(d - median) for w, d in zip(weights, deltas, strict=True)), torch.zeros(12, dtype=FP64))
    assert pull.norm() < 1e-6
    least = sum_of_distances(median, deltas, weights)
    for seed in range(20):
        assert least <= sum_of_distances(median + 0.01 * normal(12, seed=seed), deltas, weights)


def test_the_geometric_median_on_a_line_is_the_median() -> None:
    merged = merge("geometric_median", torch.tensor([[1.0], [2.0], [7.0]], dtype=FP64))
    assert merged.item() == pytest.approx(2, abs=1e-4)
    heavy = merge("geometric_median", torch.tensor([[1.0], [2.0], [7.0]], dtype=FP64), [1.0, 1.0, 5.0])
    assert heavy.item() == pytest.approx(7, abs=1e-4)


def test_a_minority_can_not_move_the_geometric_median_far() -> None:
    honest = normal(5, 30)
    radius = max(float((one - honest.mean(0)).norm()) for one in honest)
    for size in (1e2, 1e5):
        attacked = torch.cat([honest, size * normal(30, seed=8).repeat(2, 1)])
        assert (merge("geometric_median", attacked) - honest.mean(0)).norm() < 3 * radius
        assert (merge("fedavg", attacked) - honest.mean(0)).norm() > 10 * radius
