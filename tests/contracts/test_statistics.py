"""Methods that weigh by statistics of the nodes' data: their definitions, and what they do where those say nothing."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmerge.errors import ConfigError, InputError
from fedmerge.merge import METHODS, Recipe, merge_deltas
from fedmerge.merge.methods import NEEDS_STATISTICS
from fedmerge.merge.stack import BLOCK_ELEMENTS
from fedmerge.merge.statistics import STATISTICS
from fedmerge.tensors import TensorSpec

FP64 = torch.float64
NORMALIZED = [{}, {"normalize": True}]

each_method = pytest.mark.parametrize("name", NEEDS_STATISTICS)
each_setting = pytest.mark.parametrize("params", NORMALIZED)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = FP64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(dtype)


def gram(inputs: Tensor) -> Tensor:
    return inputs.mT @ inputs / inputs.shape[-2]


def statistics(name: str, num_nodes: int, *shape: int, seed: int = 7) -> Tensor:
    """Return statistics as nodes might have them, for a parameter of `shape`."""
    if name == "fisher":
        return normal(num_nodes, *shape, seed=seed) ** 2
    return gram(normal(num_nodes, 50, shape[1], seed=seed))


def merge(name: str, deltas: Tensor, found: Tensor | None, weights: list[float] | None = None, **params: Any) -> Tensor:
    weighed = torch.tensor(weights or [1.0] * len(deltas), dtype=FP64)
    return METHODS[name](deltas, weighed, statistics=found, **params)


def assert_close(ours: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


# --- all of them


@each_method
@each_setting
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_node_gets_its_delta_back(name: str, params: dict[str, Any], dtype: torch.dtype) -> None:
    delta = normal(1, 6, 5, dtype=dtype)
    merged = merge(name, delta, statistics(name, 1, 6, 5), [0.7], **params)
    expected = delta[0].to(torch.float64 if dtype == FP64 else torch.float32)
    assert torch.equal(merged, expected)


@each_method
@each_setting
def test_twins_get_their_delta_back(name: str, params: dict[str, Any]) -> None:
    delta = normal(6, 5)
    found = statistics(name, 3, 6, 5)
    assert_close(merge(name, delta.repeat(3, 1, 1), found, [0.2, 0.3, 0.5], **params), delta, 1e-14)


@each_method
@each_setting
def test_zero_deltas_merge_to_zero(name: str, params: dict[str, Any]) -> None:
    merged = merge(name, torch.zeros(3, 6, 5), statistics(name, 3, 6, 5), **params)
    assert torch.equal(merged, torch.zeros(6, 5))


@each_method
@each_setting
def test_no_statistics_and_zero_statistics_give_the_mean(name: str, params: dict[str, Any]) -> None:
    deltas, weights = normal(3, 6, 5), [0.2, 0.3, 0.5]
    mean = METHODS["fedavg"](deltas, torch.tensor(weights, dtype=FP64))
    assert torch.equal(merge(name, deltas, None, weights, **params), mean)
    assert_close(merge(name, deltas, torch.zeros_like(statistics(name, 3, 6, 5)), weights, **params), mean, 1e-15)


@each_method
@each_setting
def test_a_node_with_zero_statistics_has_no_say(name: str, params: dict[str, Any]) -> None:
    deltas, found = normal(3, 6, 5), statistics(name, 3, 6, 5)
    found[1] = 0
    expected = merge(name, deltas[[0, 2]], found[[0, 2]], **params)
    assert_close(merge(name, deltas, found, **params), expected, 1e-4)


@each_method
def test_the_scale_of_all_statistics_does_not_matter(name: str) -> None:
    deltas, found = normal(3, 6, 5), statistics(name, 3, 6, 5)
    for scale in (1e-20, 1e20):
        assert_close(merge(name, deltas, found * scale), merge(name, deltas, found))


@each_method
def test_normalised_the_scale_of_one_node_does_not_matter(name: str) -> None:
    deltas, found = normal(3, 6, 5), statistics(name, 3, 6, 5)
    louder = found * torch.tensor([1.0, 1e6, 1e-6]).view(3, 1, 1)
    assert_close(merge(name, deltas, louder, normalize=True), merge(name, deltas, found, normalize=True))
    # Not normalised, the loud node has it all.
    assert_close(merge(name, deltas, louder), deltas[1], 1e-3)


@each_method
@each_setting
def test_a_weight_is_so_many_copies_of_a_node(name: str, params: dict[str, Any]) -> None:
    deltas, found = normal(2, 6, 5), statistics(name, 2, 6, 5)
    copies = merge(name, deltas[[0, 1, 1, 1]], found[[0, 1, 1, 1]], **params)
    assert_close(merge(name, deltas, found, [0.25, 0.75], **params), copies)


@each_method
@each_setting
def test_the_order_of_nodes_does_not_matter(name: str, params: dict[str, Any]) -> None:
    deltas, found, weights, order = normal(4, 6, 5), statistics(name, 4, 6, 5), [0.1, 0.2, 0.3, 0.4], [2, 0, 3, 1]
    permuted = merge(name, deltas[order], found[order], [weights[i] for i in order], **params)
    assert_close(permuted, merge(name, deltas, found, weights, **params))


@each_method
def test_equal_bits_on_any_number_of_threads(name: str) -> None:
    shape = (2 * BLOCK_ELEMENTS // 200, 201)
    deltas, found = normal(3, *shape, dtype=torch.float32), statistics(name, 3, *shape).float()
    before = torch.get_num_threads()
    try:
        merged = []
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            merged.append(merge(name, deltas, found))
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(merged[0], merged[1])
    assert torch.equal(merged[0], merged[2])


@each_method
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_statistics_that_can_not_be_are_refused(name: str, bad: float) -> None:
    deltas, found = normal(3, 6, 5), statistics(name, 3, 6, 5)
    found[1, 2, 2] = bad
    with pytest.raises(InputError, match="finite"):
        merge(name, deltas, found)
    with pytest.raises(InputError, match="shape"):
        merge(name, deltas, found[:2])
    with pytest.raises(InputError, match="negative"):
        merge(name, deltas, statistics(name, 3, 6, 5), [1.0, 1.0, -0.5])


@each_method
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 4), (2, 3, 4), (2, 2, 3, 3), (5, 0), (0, 5)])
def test_any_shape_merges_with_the_statistics_that_it_has(name: str, shape: tuple[int, ...]) -> None:
    kind = NEEDS_STATISTICS[name]
    of_one = STATISTICS[kind].shape(TensorSpec(shape, "F32"))
    found = None if of_one is None else torch.ones(3, *of_one)
    assert merge(name, normal(3, *shape), found).shape == shape


@each_method
def test_the_engine_hands_each_parameter_its_statistics(name: str) -> None:
    kind = NEEDS_STATISTICS[name]
    names = {"a": (6, 5), "b": (4, 3), "c": (7,)}
    deltas = [{key: normal(*shape, seed=i) for key, shape in names.items()} for i in range(3)]
    found = [{key: statistics(name, 3, *names[key])[i] for key in ("a", "b")} for i in range(3)]
    merged = dict(merge_deltas(deltas, [1.0, 2.0, 3.0], Recipe(name), statistics=found))
    for key in names:
        stacked = torch.stack([of_node[key] for of_node in found]) if key in found[0] else None
        expected = merge(name, torch.stack([delta[key] for delta in deltas]), stacked, [1.0, 2.0, 3.0])
        assert torch.equal(merged[key], expected)
    with pytest.raises(InputError, match=f"needs {kind} statistics"):
        merge_deltas(deltas, [1.0, 2.0, 3.0], Recipe(name))
    with pytest.raises(InputError, match=f"needs {kind} statistics"):
        merge_deltas(deltas, [1.0, 2.0, 3.0], Recipe(name), statistics=found[:2])


def test_statistics_are_no_parameter_of_a_recipe() -> None:
    with pytest.raises(ConfigError, match="no parameter 'statistics'"):
        Recipe("fisher", {"statistics": None})


# --- Fisher merging


@given(seed=st.integers(0, 1000), epsilon=st.sampled_from([1e-6, 1e-3, 1.0]))
@settings(deadline=None, max_examples=30)
def test_fisher_is_what_the_paper_says(seed: int, epsilon: float) -> None:
    deltas, found, weights = normal(3, 9, seed=seed), statistics("fisher", 3, 9, seed=seed), [0.2, 0.3, 0.5]
    weighed = torch.tensor(weights, dtype=FP64)[:, None]
    for floor, added in (("absolute", epsilon), ("relative", epsilon * (weighed * found).sum(0).mean())):
        expected = (weighed * (found + added) * deltas).sum(0) / (weighed * (found + added)).sum(0)
        assert_close(merge("fisher", deltas, found, weights, epsilon=epsilon, floor=floor), expected)


def test_fisher_finds_the_optimum_of_quadratics() -> None:
    # Node i loses F_i (theta - theta_i)^2 / 2 per element; the merge is where the sum of their gradients vanishes.
    deltas, found = normal(4, 20), statistics("fisher", 4, 20)
    merged = merge("fisher", deltas, found, epsilon=1e-12)
    assert_close((found * (merged - deltas)).sum(0), torch.zeros(20, dtype=FP64))


def test_an_element_without_information_anywhere_is_the_mean() -> None:
    deltas, found = normal(3, 8), statistics("fisher", 3, 8)
    found[:, 3] = 0
    for params in NORMALIZED:
        assert_close(merge("fisher", deltas, found, **params)[3], deltas[:, 3].mean())


# --- RegMean


def output_error(delta: Tensor, deltas: Tensor, inputs: Tensor) -> float:
    """Return the squared distance of a merged layer's outputs to each node's own, on the node's inputs."""
    return sum(float((x @ (delta - own).T).square().sum()) / len(x) for x, own in zip(inputs, deltas, strict=True))


def test_regmean_is_the_best_linear_layer_there_is() -> None:
    # Strongly correlated inputs, other ones at each node.
    inputs = normal(3, 200, 5) @ normal(3, 5, 12, seed=1) + 0.1 * normal(3, 200, 12, seed=2)
    deltas = normal(3, 7, 12, seed=3)
    merged = merge("regmean", deltas, gram(inputs), off_diagonal=1.0)
    least = output_error(merged, deltas, inputs)
    assert least < 0.8 * output_error(deltas.mean(0), deltas, inputs)
    assert least < output_error(merge("regmean", deltas, gram(inputs)), deltas, inputs)
    for seed in range(20):
        assert least < output_error(merged + 1e-3 * normal(7, 12, seed=seed), deltas, inputs)
    # The same as ordinary least squares over all inputs and the outputs that the nodes' own layers give.
    stacked = torch.cat(list(inputs))
    targets = torch.cat([x @ own.T for x, own in zip(inputs, deltas, strict=True)])
    assert_close(merged, torch.linalg.lstsq(stacked, targets).solution.T, 1e-8)


def test_nodes_whose_inputs_do_not_overlap_keep_their_layers() -> None:
    inputs = torch.zeros(2, 50, 10, dtype=FP64)
    inputs[0, :, :4], inputs[1, :, 4:9] = normal(50, 4), normal(50, 5)
    deltas = normal(2, 6, 10, seed=4)
    merged = merge("regmean", deltas, gram(inputs), off_diagonal=1.0)
    for own, x in zip(deltas, inputs, strict=True):
        assert_close(x @ merged.T, x @ own.T)
    # Nobody has the last input.
    assert_close(merged[:, 9], deltas[:, :, 9].mean(0))


def test_without_off_diagonals_it_is_a_mean_by_input() -> None:
    deltas, found, weights = normal(3, 6, 5), statistics("regmean", 3, 6, 5), [0.2, 0.3, 0.5]
    scale = torch.tensor(weights, dtype=FP64)[:, None] * found.diagonal(dim1=1, dim2=2)
    expected = (deltas * scale[:, None]).sum(0) / scale.sum(0)
    assert_close(merge("regmean", deltas, found, weights, off_diagonal=0.0), expected)


@pytest.mark.parametrize("rank", [1, 3])
def test_directions_without_inputs_are_the_mean(rank: int) -> None:
    # Fewer examples than inputs: the Gram matrices are singular, and so is their sum.
    inputs, deltas = normal(2, rank, 12), normal(2, 6, 12, seed=5)
    merged = merge("regmean", deltas, gram(inputs), off_diagonal=1.0)
    for own, x in zip(deltas, inputs, strict=True):
        assert_close(x @ merged.T, x @ own.T, 1e-6)
    scale = gram(inputs).sum(0).diagonal().sqrt()
    unseen = torch.linalg.svd(torch.cat(list(inputs)) / scale, full_matrices=True).Vh[2 * rank :]
    assert_close((merged - deltas.mean(0)) * scale @ unseen.T, torch.zeros(6, 12 - 2 * rank, dtype=FP64), 1e-8)


def test_units_of_the_inputs_do_not_matter() -> None:
    inputs, deltas = normal(2, 40, 8), normal(2, 6, 8, seed=6)
    units = torch.logspace(-6, 6, 8, dtype=FP64)
    merged = merge("regmean", deltas, gram(inputs), off_diagonal=1.0)
    assert_close(merge("regmean", deltas / units, gram(inputs * units), off_diagonal=1.0) * units, merged, 1e-8)
