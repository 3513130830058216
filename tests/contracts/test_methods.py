"""What every merge method promises, whatever it computes; then, per family, its definition on small examples."""

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import Tensor

from fedmerge.delta.task_vector import subtract
from fedmerge.draws import bernoulli_mask
from fedmerge.errors import InputError
from fedmerge.merge import METHODS, Recipe, merge_deltas, parameters
from fedmerge.merge.methods import NEEDS_FACTORS, NEEDS_STATISTICS, PAIRWISE
from fedmerge.merge.stack import BLOCK_ELEMENTS
from fedmerge.seeds import derive_seed

SHAPES = [(), (1,), (0,), (7,), (3, 4), (2, 3, 4), (2, 3, 2, 2), (5, 0)]
DARE = {"dare_linear", "dare_ties"}
RANDOM = DARE | {"della", "della_linear"}
# Parameters with which a method drops nothing: those of any method, and those of one.
DENSE = {"density": 1.0, "selected": 1.0, "trimmed": 0.0, "lambda_": 1.0}
DENSE_FOR: dict[str, dict[str, Any]] = {
    "cabs": {"num_kept": 256},
    "consensus": {"min_nodes": 1},
    "wise_ft": {"alpha": 1.0},
}
# Scores are scaled by minimum and maximum, so that the least entry of a task vector never counts.
NOT_THE_IDENTITY = {"pcb"}
# The last of equal magnitudes wins; who comes first takes what others then can't; time has a direction.
ORDERED = {"magmax", "cabs", "ema", "lawa", "swa"}
# tanh(delta_i * sum of deltas)
NOT_HOMOGENEOUS = {"pcb"}

# These change the singular values of one node's matrix too, as they are meant to; vectors have none.
RESHAPES_THE_SPECTRUM = {"iso_c", "iso_cts", "subspace_boosting"}
# Nobody keeps what another one kept; entries compete; each node has its share of the directions; flat spectra.
DIFFERS_FOR_DUPLICATES = {"cabs", "pcb", "tsv", *RESHAPES_THE_SPECTRUM}
# These take one node's matrix apart and put it together again, which rounds.
RECOMPOSES = {"knots"}

each_method = pytest.mark.parametrize("name", METHODS)


def every_method_but(exceptions: set[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name in METHODS if name not in exceptions])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * 1e-3


def dense(name: str) -> dict[str, Any]:
    """Return the parameters with which a method drops nothing."""
    return {key: value for key, value in DENSE.items() if key in parameters(name)} | DENSE_FOR.get(name, {})


def taken(name: str, stack: Tensor) -> Tensor:
    """Return as many deltas or weights of a stack as the method takes."""
    return stack[:2] if name in PAIRWISE else stack


def nodes(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return the deltas and weights of three nodes, or of two if the method takes no more."""
    return taken(name, normal(3, *shape, dtype=dtype)), taken(name, torch.tensor([0.5, 0.3, 0.2]))


# Multiples of 1/8 up to 8: their sums are exact in fp32, so no order of additions can turn an election.
eighths = st.integers(-64, 64).map(lambda value: value / 8)
stacks = npst.arrays(np.float32, st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 12)), elements=eighths).map(
    torch.from_numpy
)


def weight_lists(num_nodes: int) -> st.SearchStrategy[list[float]]:
    return st.lists(st.sampled_from([0.25, 0.5, 1.0]), min_size=num_nodes, max_size=num_nodes)


@each_method
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_returns_the_shape_in_working_precision(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    merged = METHODS[name](*nodes(name, *shape, dtype=dtype))
    assert merged.shape == shape
    assert merged.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@each_method
def test_sixteen_bit_deltas_are_merged_in_fp32(name: str) -> None:
    deltas, weights = nodes(name, 40, 5, dtype=torch.bfloat16)
    assert torch.equal(METHODS[name](deltas, weights, seed=1), METHODS[name](deltas.float(), weights, seed=1))


@every_method_but(NOT_THE_IDENTITY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_node_that_drops_nothing_gets_its_delta_back(name: str, dtype: torch.dtype) -> None:
    delta = normal(1, 231, dtype=dtype) if name in RESHAPES_THE_SPECTRUM | RECOMPOSES else normal(1, 33, 7, dtype=dtype)
    assert torch.equal(METHODS[name](delta, torch.ones(1), **dense(name)), delta[0])


@each_method
def test_duplicates_merge_to_what_they_are(name: str) -> None:
    delta = normal(33, 7)
    deltas = taken(name, delta.expand(3, 33, 7).contiguous())
    merged = METHODS[name](deltas, torch.full((len(deltas),), 1 / len(deltas)), **dense(name))
    assert merged.isfinite().all()
    if name not in DIFFERS_FOR_DUPLICATES:
        torch.testing.assert_close(merged, delta, rtol=1e-5, atol=1e-9)


def engine_options(name: str, *shape: int) -> dict[str, Any]:
    """Return what the engine needs beside the task vectors of "w"."""
    kind = NEEDS_STATISTICS.get(name)
    found = {"fisher": torch.ones(shape), "gram": torch.eye(shape[-1]), None: torch.empty(0)}[kind]
    return {"statistics": [{"w": found, "v": found}] * 2} if kind else {}


@each_method
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_partner_whose_model_is_not_finite_is_named(name: str, bad: float) -> None:
    base = {"w": torch.zeros(6, 5, dtype=torch.bfloat16)}
    broken = {"w": base["w"].clone()}
    broken["w"][3, 2] = bad
    deltas = [subtract({"w": base["w"] + 1}, base, where="north"), subtract(broken, base, where="south")]
    with pytest.raises(InputError, match=r"south: w holds 1 NaN or infinite values"):
        list(merge_deltas(deltas, [0.5, 0.5], Recipe(name), base=base, **engine_options(name, 6, 5)))


@each_method
def test_the_order_in_which_tensors_come_changes_no_bit(name: str) -> None:
    deltas = [{"w": normal(9, 5, seed=node), "v": normal(9, 5, seed=node + 9)} for node in range(2)]
    turned = [dict(reversed(delta.items())) for delta in deltas]
    base = {"w": normal(9, 5, seed=7) * 50, "v": normal(9, 5, seed=8) * 50}
    merged, again = (
        list(merge_deltas(maps, [0.6, 0.4], Recipe(name), base=base, seed=3, **engine_options(name, 9, 5)))
        for maps in (deltas, turned)
    )
    assert [key for key, _ in merged] == [key for key, _ in again] == ["v", "w"]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(merged, again, strict=True))


@each_method
@pytest.mark.parametrize("num_nodes", [1, 2, 5])
def test_zero_deltas_merge_to_zero(name: str, num_nodes: int) -> None:
    deltas, weights = torch.zeros(num_nodes, 6, 5), torch.full((num_nodes,), 1 / num_nodes)
    merged = METHODS[name](taken(name, deltas), taken(name, weights))
    assert torch.equal(merged, torch.zeros(6, 5))


@each_method
def test_equal_seeds_give_equal_bits_on_any_number_of_threads(name: str) -> None:
    deltas, weights = nodes(name, 2 * BLOCK_ELEMENTS + 17)
    before = torch.get_num_threads()
    try:
        merged = []
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            merged.append(METHODS[name](deltas, weights, seed=11))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(merged[0], merged[1])
    assert torch.equal(merged[0], merged[2])


@each_method
def test_the_seed_matters_to_random_methods_only(name: str) -> None:
    deltas, weights = nodes(name, 200)
    one, other = METHODS[name](deltas, weights, seed=1), METHODS[name](deltas, weights, seed=2)
    assert torch.equal(one, other) == (name not in RANDOM)


@each_method
def test_inputs_are_left_alone_and_may_be_strided(name: str) -> None:
    deltas, weights = normal(6, 20, 30), taken(name, torch.tensor([0.5, 0.3, 0.2]))
    strided = taken(name, deltas.transpose(1, 2)[::2])
    copy = strided.clone(memory_format=torch.contiguous_format)
    assert torch.equal(METHODS[name](strided, weights, seed=4), METHODS[name](copy, weights, seed=4))
    assert torch.equal(strided, copy)


@every_method_but(ORDERED)
@given(deltas=stacks, data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_order_of_nodes_does_not_matter(name: str, deltas: Tensor, data: st.DataObject) -> None:
    deltas = taken(name, deltas)
    num_nodes = len(deltas)
    order = data.draw(st.permutations(range(num_nodes)))
    weights = torch.tensor(data.draw(weight_lists(num_nodes)))
    merged = METHODS[name](deltas, weights, **dense(name))
    permuted = METHODS[name](deltas[order], weights[order], **dense(name))
    torch.testing.assert_close(permuted, merged, atol=1e-5, rtol=0)


@every_method_but(NOT_HOMOGENEOUS)
@given(deltas=stacks, exponent=st.integers(-20, 20))
@settings(max_examples=40, deadline=None)
def test_scaling_the_deltas_scales_the_outcome(name: str, deltas: Tensor, exponent: int) -> None:
    deltas = taken(name, deltas)
    weights, factor = torch.full((len(deltas),), 1 / len(deltas)), 2.0**exponent
    assert torch.equal(METHODS[name](deltas * factor, weights, seed=3), METHODS[name](deltas, weights, seed=3) * factor)


@pytest.mark.parametrize("name", [name for name in METHODS if "lambda_" in parameters(name)])
def test_lambda_scales_the_outcome(name: str) -> None:
    deltas, weights = normal(3, 50), torch.tensor([0.5, 0.3, 0.2])
    torch.testing.assert_close(
        METHODS[name](deltas, weights, lambda_=0.3), METHODS[name](deltas, weights, lambda_=1.0) * 0.3
    )


@each_method
def test_what_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="weights"):
        METHODS[name](normal(3, 5), torch.ones(2))
    with pytest.raises(InputError, match="finite"):
        METHODS[name](normal(2, 5), torch.tensor([1.0, math.nan]))
    with pytest.raises(InputError):
        METHODS[name](torch.empty(0, 5), torch.ones(0))
    with pytest.raises(InputError, match="int64"):
        METHODS[name](torch.ones(2, 5, dtype=torch.int64), torch.ones(2))


@each_method
def test_the_signature_is_the_configuration(name: str) -> None:
    arguments = inspect.signature(METHODS[name]).parameters
    assert list(arguments)[:4] == ["deltas", "weights", "base", "seed"]
    assert all(argument.kind is argument.KEYWORD_ONLY for argument in list(arguments.values())[2:])
    own = list(arguments)[4:]
    if name in NEEDS_STATISTICS:
        assert own.pop(0) == "statistics"
    if name in NEEDS_FACTORS:
        assert own.pop(0) == "factors"
    assert list(parameters(name)) == own
    for key, parameter in parameters(name).items():
        assert parameter.default == arguments[key].default
        assert parameter.doc.endswith(".")


# --- averages


@given(stacks, st.data())
def test_contributor_mean_leaves_out_who_sent_nothing(deltas: Tensor, data: st.DataObject) -> None:
    weights = data.draw(weight_lists(len(deltas)))
    sparse = deltas * (deltas.abs() > 4)
    merged = METHODS["contributor_mean"](sparse, torch.tensor(weights))
    for column, value in zip(sparse.T.tolist(), merged.tolist(), strict=True):
        sent = [(weight, entry) for weight, entry in zip(weights, column, strict=True) if entry]
        expected = sum(w * x for w, x in sent) / sum(w for w, _ in sent) if sent else 0.0
        assert value == pytest.approx(expected, rel=1e-6)


def test_contributor_mean_of_dense_deltas_is_fedavg() -> None:
    deltas, weights = nodes("fedavg", 50, 3, dtype=torch.float64)
    merged = METHODS["contributor_mean"](deltas, weights)
    torch.testing.assert_close(merged, METHODS["fedavg"](deltas, weights), rtol=1e-12, atol=0)
    with pytest.raises(InputError, match="must not be negative"):
        METHODS["contributor_mean"](deltas, torch.tensor([1.0, 1.0, -0.5]))
    with pytest.raises(InputError, match="sum to 0"):
        METHODS["contributor_mean"](deltas, torch.zeros(3))


@given(deltas=stacks, data=st.data())
@settings(deadline=None)
def test_fedavg_is_the_weighted_mean(deltas: Tensor, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.01, 1000), min_size=len(deltas), max_size=len(deltas)))
    merged = METHODS["fedavg"](deltas, torch.tensor(weights))
    expected = np.average(deltas.double().numpy(), axis=0, weights=weights)
    np.testing.assert_allclose(merged.numpy(), expected, atol=1e-5, rtol=1e-6)
    # A mean stays between the nodes' values.
    assert (merged <= deltas.max(0).values + 1e-5).all()
    assert (merged >= deltas.min(0).values - 1e-5).all()


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1e-9, 0.0]])
def test_weights_that_vanish_can_not_be_normalised(weights: list[float]) -> None:
    for merge in (
        METHODS["fedavg"],
        lambda deltas, w: METHODS["task_arithmetic"](deltas, w, normalize=True),
        lambda deltas, w: METHODS["dare_linear"](deltas, w, normalize=True),
    ):
        with pytest.raises(InputError, match="normalised"):
            merge(normal(2, 3), torch.tensor(weights))


def test_task_arithmetic_sums_and_unlearns() -> None:
    deltas = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    task_arithmetic = METHODS["task_arithmetic"]
    assert task_arithmetic(deltas, torch.ones(2)).tolist() == [11, 22]
    assert task_arithmetic(deltas, torch.tensor([1.0, -1.0])).tolist() == [-9, -18]
    assert task_arithmetic(deltas, torch.ones(2), lambda_=0.5).tolist() == [5.5, 11]
    assert task_arithmetic(deltas, torch.tensor([1.0, 3.0]), normalize=True).tolist() == [7.75, 15.5]


# --- TIES


def ties_by_the_book(deltas: np.ndarray, weights: list[float], density: float) -> np.ndarray:
    """TIES element by element: sort, elect by mass with zero as plus, mean of the agreeing by their weights."""
    num_nodes, num_elements = deltas.shape
    trimmed = np.zeros_like(deltas)
    for i in range(num_nodes):
        order = sorted(range(num_elements), key=lambda j: (-abs(deltas[i, j]), j))
        kept = order[: max(1, math.floor(density * num_elements))]
        trimmed[i, kept] = deltas[i, kept]
    merged = np.zeros(num_elements)
    for j in range(num_elements):
        sign = 1 if trimmed[:, j].sum() >= 0 else -1
        agreeing = [i for i in range(num_nodes) if trimmed[i, j] * sign > 0]
        if agreeing:
            merged[j] = sum(weights[i] * trimmed[i, j] for i in agreeing) / sum(weights[i] for i in agreeing)
    return merged


@given(deltas=stacks, density=st.floats(0.01, 1.0), data=st.data())
@settings(max_examples=300, deadline=None)
def test_ties_is_what_the_paper_says(deltas: Tensor, density: float, data: st.DataObject) -> None:
    # Values in eighths tie in magnitude and cancel in sums all the time.
    weights = data.draw(weight_lists(len(deltas)))
    merged = METHODS["ties"](deltas, torch.tensor(weights), density=density)
    np.testing.assert_allclose(merged.numpy(), ties_by_the_book(deltas.numpy(), weights, density), rtol=1e-6)


def test_ties_on_more_than_one_block() -> None:
    deltas = (normal(3, 2 * BLOCK_ELEMENTS + 333) * 1e5).round() / 8  # rounded, so that thresholds are tied
    merged = METHODS["ties"](deltas, torch.tensor([0.5, 0.3, 0.2]), density=0.2)
    expected = ties_by_the_book(deltas.numpy(), [0.5, 0.3, 0.2], 0.2)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(("density", "num_kept"), [(1e-9, 1), (0.25, 1), (0.49, 1), (0.5, 2), (0.99, 3), (1.0, 4)])
def test_trim_keeps_the_floor_of_the_share_and_at_least_one(density: float, num_kept: int) -> None:
    delta = torch.tensor([[-4.0, 1.0, 3.0, -2.0]])
    merged = METHODS["ties"](delta, torch.ones(1), density=density)
    assert torch.count_nonzero(merged) == num_kept
    assert merged.abs().sum() == sum([4, 3, 2, 1][:num_kept])


@pytest.mark.parametrize("num_elements", [10, 3 * BLOCK_ELEMENTS])
def test_of_equal_magnitudes_the_first_are_kept(num_elements: int) -> None:
    delta = torch.ones(1, num_elements)
    delta[:, ::3] = -1
    merged = METHODS["ties"](delta, torch.ones(1), density=0.5)
    assert torch.equal(merged[: num_elements // 2], delta[0, : num_elements // 2])
    assert not merged[num_elements // 2 :].any()


def test_the_authors_trim_keeps_one_more_and_its_ties() -> None:
    delta = torch.tensor([[5.0, 4.0, 3.0, -3.0, 2.0, 1.0]])
    # Half of six are three; the fourth largest, at -3, is kept as well, and with it whatever ties with it.
    assert METHODS["ties"](delta, torch.ones(1), density=0.5, trim="authors").tolist() == [5, 4, 3, -3, 0, 0]
    assert METHODS["ties"](delta, torch.ones(1), density=0.34, trim="authors").tolist() == [5, 4, 3, -3, 0, 0]
    assert METHODS["ties"](delta, torch.ones(1), density=1.0, trim="authors").tolist() == delta[0].tolist()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        # Columns: one large against two small; a draw; agreement.
        ({}, [3, 2, 5]),
        ({"election": "count"}, [-1, 2, 5]),
        ({"election": "weighted"}, [-1, 2, 5]),
        ({"normalizer": "count"}, [0.6, 0.8, 3]),
        ({"normalize": False}, [0.6, 0.8, 6]),
        ({"aggregation": "max"}, [0.6, 0.8, 4]),
    ],
)
def test_the_switches_of_the_disjoint_merge(params: dict[str, Any], expected: list[float]) -> None:
    deltas = torch.tensor([[3.0, -2.0, 0.0], [-1.0, 2.0, 5.0], [-1.0, 0.0, 5.0]])
    weights = torch.tensor([0.2, 0.4, 0.8])
    merged = METHODS["ties"](deltas, weights, density=1.0, **params)
    torch.testing.assert_close(merged, torch.tensor(expected, dtype=torch.float32))


def test_a_negative_weight_turns_a_node_around_where_votes_are_weighted() -> None:
    deltas, weights = torch.tensor([[3.0], [1.0]]), torch.tensor([-1.0, 1.0])
    merge = METHODS["ties"]
    assert merge(deltas, weights, density=1.0, normalize=False, election="weighted").tolist() == [-3]
    assert merge(deltas, weights, density=1.0, normalize=False).tolist() == [-2]


def test_a_draw_may_follow_the_majority() -> None:
    deltas = torch.tensor([[-1.0, -1.0, 2.0], [-1.0, -1.0, -2.0]])
    assert METHODS["ties"](deltas, torch.ones(2), density=1.0).tolist() == [-1, -1, 2]
    assert METHODS["ties"](deltas, torch.ones(2), density=1.0, zero_sum="majority").tolist() == [-1, -1, -2]
    assert METHODS["ties"](-deltas, torch.ones(2), density=1.0, zero_sum="majority").tolist() == [1, 1, 2]


# --- DARE


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_is_task_arithmetic_in_expectation(density: float) -> None:
    deltas, weights, num_seeds = normal(3, 40, dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2]), 2000
    merge = METHODS["dare_linear"]
    draws = torch.stack([merge(deltas, weights, seed=seed, density=density) for seed in range(num_seeds)])
    # Variance of one draw: sum_i (w_i tau_i)^2 (1 - d) / d. Forty elements within 5 standard errors.
    standard_error = ((weights[:, None] * deltas) ** 2).sum(0).mul((1 - density) / density / num_seeds).sqrt()
    error = (draws.mean(0) - METHODS["task_arithmetic"](deltas, weights)) / standard_error
    assert error.abs().max() < 5
    # And the spread is the predicted one: neither mask nor seed repeats itself.
    assert 0.8 < draws.var(0).div(standard_error**2 * num_seeds).mean() < 1.2


@pytest.mark.parametrize("name", sorted(DARE))
def test_dare_keeps_its_share_and_rescales_it(name: str) -> None:
    delta = torch.ones(1, 10_000)
    merged = METHODS[name](delta, torch.ones(1), density=0.25, seed=9)
    num_kept = int(torch.count_nonzero(merged))
    assert abs(num_kept - 2500) < 5 * math.sqrt(10_000 * 0.25 * 0.75)
    assert set(merged.unique().tolist()) == {0.0, 4.0}
    left = METHODS[name](delta, torch.ones(1), density=0.25, seed=9, rescale="none")
    assert set(left.unique().tolist()) == {0.0, 1.0}
    matched = METHODS[name](delta, torch.ones(1), density=0.25, seed=9, rescale="l1")
    torch.testing.assert_close(matched.sum(), torch.tensor(10_000.0))


def test_dare_masks_differ_between_nodes() -> None:
    apart = torch.tensor([1.0, 100.0])[:, None].expand(2, 5000)
    kept = METHODS["dare_linear"](apart, torch.ones(2), density=0.5, rescale="none")
    shares = [(kept == value).double().mean().item() for value in (0, 1, 100, 101)]
    assert all(abs(share - 0.25) < 0.05 for share in shares)


@pytest.mark.parametrize(("name", "tail"), [("dare_linear", "task_arithmetic"), ("dare_ties", "ties")])
def test_dare_masks_can_be_drawn_again(name: str, tail: str) -> None:
    # Whoever knows seed and row can redo a merge: this pins how the masks are keyed.
    deltas, weights = normal(3, 20, 25), torch.tensor([0.5, 0.3, 0.2])
    masks = torch.stack([bernoulli_mask(derive_seed(77, row), 500, 0.3) for row in range(3)]).view(deltas.shape)
    expected = METHODS[tail](torch.where(masks, deltas / 0.3, 0), weights, **dense(tail))
    torch.testing.assert_close(METHODS[name](deltas, weights, seed=77, density=0.3), expected)
