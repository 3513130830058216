from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from fedmerge.config import parse_config
from fedmerge.errors import ConfigError
from fedmerge.merge import METHODS
from fedmerge.screening.robust import RULES, Inputs, gram_of, harden, mixing_of
from fedmerge.sim import simulate
from fedmerge.tensors import Checkpoint
from tests.conftest import TOML, StepTrainer, make_base

Array = npt.NDArray[np.float64]
NUM_NODES, NUM_BAD, NUM_ELEMENTS = 10, 2, 5000


def honest(seed: int = 0, num_nodes: int = NUM_NODES - NUM_BAD) -> Array:
    """Return what good sites send: a signal they share and noise of their own, half as large."""
    draw = np.random.Generator(np.random.PCG64(seed))
    signal = draw.standard_normal(NUM_ELEMENTS)
    return signal + 0.5 * draw.standard_normal((num_nodes, NUM_ELEMENTS))


# What the bad sites send, knowing all that the good ones do: (2, N) from (8, N).
ATTACKS: dict[str, Callable[[Array], Array]] = {
    "huge": lambda good: 1000 * good[:NUM_BAD],
    "sign flip": lambda good: -good[:NUM_BAD],
    "a little is enough": lambda good: np.tile(good.mean(0) - 1.0 * good.std(0), (NUM_BAD, 1)),
    "inner product": lambda good: np.tile(-0.5 * good.mean(0), (NUM_BAD, 1)),
    "random": lambda good: np.random.Generator(np.random.PCG64(9)).standard_normal((NUM_BAD, NUM_ELEMENTS)),
    "one direction": lambda good: np.tile(np.linalg.norm(good[0]) / math.sqrt(NUM_ELEMENTS), (NUM_BAD, NUM_ELEMENTS)),
}


def tensor_maps(rows: Array) -> list[dict[str, Tensor]]:
    """Split each row over two tensors, as a model has several."""
    return [
        {"a": torch.from_numpy(row[:2000].reshape(40, 50).astype(np.float32)), "b": torch.from_numpy(row[2000:])}
        for row in rows
    ]


def merged(rows: Array, rules: list[str], method: str, *, root: Array | None = None, **params: float) -> Array:
    inputs = Inputs(tensor_maps(rows), [1 / len(rows)] * len(rows), [1.0] * len(rows))
    inputs = harden(inputs, rules, NUM_BAD, root=None if root is None else tensor_maps(root[None, :])[0])
    tensors = [
        METHODS[method](torch.stack([delta[name] for delta in inputs.deltas]), torch.tensor(inputs.weights), **params)
        for name in ("a", "b")
    ]
    return np.concatenate([tensor.numpy().reshape(-1).astype(np.float64) for tensor in tensors])


def error(good: Array, found: Array) -> float:
    return float(np.linalg.norm(found - good.mean(0)) / np.linalg.norm(good.mean(0)))


@pytest.mark.parametrize("attack", ATTACKS)
def test_two_of_ten_can_not_steer_the_recommended_chain(attack: str) -> None:
    good = honest()
    rows = np.concatenate([good, ATTACKS[attack](good)])
    assert error(good, merged(rows, ["spectral"], "trimmed_mean", trimmed=0.25)) < 0.15
    assert error(good, merged(rows, ["arc", "nnm"], "trimmed_mean", trimmed=NUM_BAD / NUM_NODES)) < 0.15


def test_they_steer_the_mean() -> None:
    good = honest()
    assert error(good, merged(np.concatenate([good, ATTACKS["huge"](good)]), [], "fedavg")) > 100


@pytest.mark.parametrize("rule", ["multi_krum", "centered_clip", "geometric_median"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_each_rule_bounds_every_attack(rule: str, attack: str) -> None:
    good = honest()
    assert error(good, merged(np.concatenate([good, ATTACKS[attack](good)]), [rule], "fedavg")) < 0.25


def test_bulyan_bounds_every_attack() -> None:
    good = honest(num_nodes=9)
    # Of the seven it chooses it averages three per entry, so their own noise alone is 0.5 / sqrt(3).
    for attack in ATTACKS.values():
        rows = np.concatenate([good, attack(good)])
        assert error(good, merged(rows, ["bulyan"], "mean_around_median", trimmed=NUM_BAD / 7)) < 0.35


def brute_krum(rows: Array, num_bad: int) -> int:
    """The definition, on the vectors themselves."""
    scores = []
    for index, row in enumerate(rows):
        others = [float(((row - other) ** 2).sum()) for place, other in enumerate(rows) if place != index]
        scores.append(sum(sorted(others)[: len(rows) - num_bad - 2]))
    return scores.index(min(scores))


def test_krum_is_its_definition() -> None:
    for seed in range(5):
        rows = np.concatenate([honest(seed=seed), 3 * honest(seed=seed + 10)[:NUM_BAD]])
        mixing = mixing_of(gram_of(tensor_maps(rows)), ["krum"], NUM_BAD)
        assert mixing.tolist() == [[float(index == brute_krum(rows, NUM_BAD)) for index in range(len(rows))]]


def test_nnm_is_its_definition() -> None:
    rows = honest()
    mixing = mixing_of(gram_of(tensor_maps(rows)), ["nnm"], NUM_BAD)
    for index, row in enumerate(rows):
        order = sorted(range(len(rows)), key=lambda other: float(((row - rows[other]) ** 2).sum()))
        expected = rows[order[: len(rows) - NUM_BAD]].mean(0)
        np.testing.assert_allclose(mixing[index] @ rows, expected, rtol=1e-5, atol=1e-6)


def brute_spectral(rows: Array, num_bad: int) -> list[int]:
    """The definition, with the exponential of the covariance of the vectors themselves."""
    lengths = np.linalg.norm(rows, axis=1)
    raised = rows * np.maximum(1.0, np.median(lengths) / lengths)[:, None]
    off = torch.from_numpy(raised - raised.mean(0))
    covariance = off.T @ off
    weights = torch.matrix_exp(4 * covariance / torch.linalg.matrix_norm(covariance, 2))
    scores = torch.einsum("nd,de,ne->n", off, weights, off)
    return sorted(scores.argsort()[: len(rows) - num_bad].tolist())


def test_spectral_is_its_definition() -> None:
    for seed in range(5):
        rows = honest(seed=seed, num_nodes=NUM_NODES) * np.linspace(0.3, 1.5, NUM_NODES)[:, None]
        rows[:, 20:] = 0
        mixing = mixing_of(gram_of(tensor_maps(rows)), ["spectral"], NUM_BAD)
        np.testing.assert_array_equal(mixing, np.eye(NUM_NODES)[brute_spectral(rows[:, :20], NUM_BAD)])


@pytest.mark.parametrize("size", [0.01, 0.5, 3.0])
def test_spectral_finds_those_who_pull_one_way_whatever_their_length(size: float) -> None:
    """Twins in disguise: against the mean, with noise of their own that is as long as that."""
    good = honest()
    noise = np.random.Generator(np.random.PCG64(3)).standard_normal((NUM_BAD, NUM_ELEMENTS))
    rows = np.concatenate([good, size * (noise - good.mean(0))])
    kept = mixing_of(gram_of(tensor_maps(rows)), ["spectral"], NUM_BAD).argmax(axis=1)
    assert kept.tolist() == list(range(len(good)))


def test_spectral_of_what_does_not_differ() -> None:
    for rows in (np.zeros((4, NUM_ELEMENTS)), np.ones((4, NUM_ELEMENTS))):
        mixing = mixing_of(gram_of(tensor_maps(rows)), ["spectral"], 1)
        assert mixing.sum(axis=1).tolist() == [1.0] * 3


def test_arc_clips_as_many_as_it_says() -> None:
    rows = honest() * np.linspace(1, 3, NUM_NODES - NUM_BAD)[:, None]
    mixing = mixing_of(gram_of(tensor_maps(rows)), ["arc"], NUM_BAD)
    lengths = np.linalg.norm(mixing @ rows, axis=1)
    # 2 * (2 / 8) * (8 - 2) = 3 of 8
    assert np.count_nonzero(np.diagonal(mixing) < 1) == 3
    np.testing.assert_allclose(lengths[-4:], np.sort(np.linalg.norm(rows, axis=1))[-4], rtol=1e-5)


def test_centered_clip_is_its_definition() -> None:
    rows = np.concatenate([honest(), ATTACKS["huge"](honest())])
    center = np.zeros(NUM_ELEMENTS)
    for _ in range(5):
        moves = rows - center
        lengths = np.linalg.norm(moves, axis=1)
        center = center + (moves * np.minimum(1, np.median(lengths) / lengths)[:, None]).mean(0)
    mixing = mixing_of(gram_of(tensor_maps(rows)), ["centered_clip"], NUM_BAD)
    np.testing.assert_allclose((mixing @ rows)[0], center, rtol=1e-3, atol=1e-4)


def test_geometric_median_has_the_least_sum_of_distances() -> None:
    rows = np.concatenate([honest(), ATTACKS["sign flip"](honest())])
    point = (mixing_of(gram_of(tensor_maps(rows)), ["geometric_median"], NUM_BAD) @ rows)[0]
    least = np.linalg.norm(rows - point, axis=1).sum()
    for step in np.random.Generator(np.random.PCG64(1)).standard_normal((20, NUM_ELEMENTS)):
        assert np.linalg.norm(rows - point - 0.02 * step, axis=1).sum() >= least


@pytest.mark.parametrize("rule", RULES)
def test_who_is_first_makes_no_difference(rule: str) -> None:
    rows = np.concatenate([honest(), honest(seed=3)])
    order = np.random.Generator(np.random.PCG64(2)).permutation(len(rows))
    root = [honest(seed=5)[0]] if RULES[rule].needs_root else []

    def combined(rows: Array) -> Array:
        gram = gram_of(tensor_maps(np.array([*rows, *root])))
        return mixing_of(gram, [rule], NUM_BAD, has_root=bool(root)) @ rows

    first, second = combined(rows), combined(rows[order])
    if len(first) == len(rows):
        first = first[order]
    np.testing.assert_allclose(np.sort(second, axis=0), np.sort(first, axis=0), rtol=1e-4, atol=1e-5)


def test_equal_deltas_stay() -> None:
    rows = np.tile(honest()[:1], (NUM_NODES, 1))
    for rule in RULES:
        if RULES[rule].min_nodes(NUM_BAD) <= NUM_NODES:
            found = merged(rows, [rule], "fedavg", root=rows[0] if RULES[rule].needs_root else None)
            np.testing.assert_allclose(found, rows[0], rtol=1e-4, atol=1e-5)


def test_zero_deltas_stay() -> None:
    for rule in RULES:
        if RULES[rule].min_nodes(NUM_BAD) <= NUM_NODES:
            root = honest()[0] if RULES[rule].needs_root else None
            assert not merged(np.zeros((NUM_NODES, NUM_ELEMENTS)), [rule], "fedavg", root=root).any()


@pytest.mark.parametrize(
    ("rule", "least"),
    [("arc", 5), ("nnm", 5), ("spectral", 7), ("krum", 7), ("multi_krum", 7), ("bulyan", 11), ("centered_clip", 5)],
)
def test_too_few_nodes_are_refused(tmp_path: Path, rule: str, least: int) -> None:
    make_base(tmp_path / "base")
    for num_nodes, refused in ((least - 1, True), (least, False)):
        extra = f'[screen]\nrobust = ["{rule}"]\nmax_bad = 2\n'
        text = TOML.format(num_rounds=1, min_nodes=num_nodes, rounds="", server="", extra=extra)
        if refused:
            with pytest.raises(ConfigError, match=f"screen.robust: {rule} against 2 bad nodes needs at least {least}"):
                parse_config(text, folder=tmp_path, where="fedmerge.toml")
        else:
            parse_config(text, folder=tmp_path, where="fedmerge.toml")


def test_a_federation_with_a_liar(tmp_path: Path) -> None:
    """The liar is not so long that its norm alone gives it away, and still does not show in the model."""
    make_base(tmp_path / "base")
    text = TOML.format(num_rounds=1, min_nodes=5, rounds="", server="", extra="[screen]\nduplicates = 'accept'\n")
    config = parse_config(text, folder=tmp_path, where="fedmerge.toml")
    assert config.robust_rules() == ("spectral",)
    trainers = {f"good-{seed}": StepTrainer(seed=7, scale=0.01) for seed in range(4)}
    trainers["liar"] = StepTrainer(seed=8, scale=-0.08)
    result = simulate(config, tmp_path / "base", trainers)
    base, model = Checkpoint(tmp_path / "base"), Checkpoint(result.model_dir)
    for name in ("matrix", "vector"):
        step = trainers["good-0"].step(name, base[name])
        assert (model[name] - base[name] - step).norm() < 0.02 * step.norm()


def test_too_few_left_after_screening() -> None:
    deltas = tensor_maps(honest()[:4])
    with pytest.raises(ConfigError, match="nnm against 2 bad nodes needs at least 5 nodes, not 4"):
        harden(Inputs(deltas, [0.25] * 4, [1.0] * 4), ["nnm"], 2)


def test_chains_are_products() -> None:
    gram = gram_of(tensor_maps(honest()))
    for first, second in itertools.permutations(["arc", "nnm", "multi_krum"], 2):
        one = mixing_of(gram, [first], 1)
        two = mixing_of(one @ gram @ one.T, [second], 1)
        np.testing.assert_allclose(mixing_of(gram, [first, second], 1), two @ one, rtol=1e-6, atol=1e-7)


def test_fltrust_is_its_definition() -> None:
    rows = np.concatenate([honest()[:3], ATTACKS["sign flip"](honest()), 1000 * honest(seed=4)[:2]])
    root = honest(seed=0)[7]
    cosines = rows @ root / np.linalg.norm(rows, axis=1) / np.linalg.norm(root)
    assert (cosines < 0).any()
    trust = np.maximum(cosines, 0)
    expected = sum(t * row * np.linalg.norm(root) / np.linalg.norm(row) for t, row in zip(trust, rows, strict=True))
    found = merged(rows, ["fltrust"], "fedavg", root=root)
    np.testing.assert_allclose(found, expected / trust.sum(), rtol=1e-4, atol=1e-5)


def test_a_majority_of_liars_does_not_beat_a_root_of_trust() -> None:
    good = honest()
    rows = np.concatenate([good[:2], *(ATTACKS["sign flip"](good) for _ in range(4))])
    assert error(good, merged(rows, ["fltrust"], "fedavg", root=good[5])) < 0.5
    assert error(good, merged(rows, ["geometric_median"], "fedavg")) > 1


def test_whom_nobody_trusts_changes_nothing() -> None:
    good = honest()
    assert not merged(ATTACKS["sign flip"](good), ["fltrust"], "fedavg", root=good[5]).any()


def test_rules_before_fltrust_see_no_root() -> None:
    rows, root = honest(), honest(seed=5)[0]
    gram = gram_of(tensor_maps(np.array([*rows, root])))
    mixed = mixing_of(gram[:-1, :-1], ["nnm"], NUM_BAD) @ rows
    both = mixing_of(gram, ["nnm", "fltrust"], NUM_BAD, has_root=True) @ rows
    np.testing.assert_allclose(both[0], merged(mixed, ["fltrust"], "fedavg", root=root), rtol=1e-4, atol=1e-5)


def test_from_five_nodes_on_a_plan_is_robust_by_itself(tmp_path: Path) -> None:
    make_base(tmp_path / "base")

    def plan(min_nodes: int, extra: str = "") -> tuple[str, float | None, tuple[str, ...], int]:
        text = TOML.format(num_rounds=1, min_nodes=min_nodes, rounds="", server="", extra=extra)
        config = parse_config(text, folder=tmp_path, where="fedmerge.toml")
        recipe, policy = config.recipe(), config.screen_policy()
        return recipe.method, recipe.params.get("trimmed"), policy.robust, policy.max_bad

    plain: tuple[str, None, tuple[str, ...], int] = ("fedavg", None, (), 1)
    assert plan(4) == plain
    for min_nodes, num_bad in ((5, 1), (8, 1), (9, 2), (49, 2)):
        method, trimmed, rules, found = plan(min_nodes)
        assert (method, rules, found) == ("trimmed_mean", ("spectral",), num_bad)
        assert trimmed is not None
        assert math.floor(trimmed * (min_nodes - num_bad)) == num_bad
    assert plan(10, "[screen]\nmax_bad = 3")[1:] == (pytest.approx(3 / 7, abs=1e-3), ("spectral",), 3)
    # What was chosen stays: thinned deltas would be trimmed away, and a search wants each node by itself.
    for extra in (
        "[merge]\nmethod = 'fedavg'",
        "[screen]\nrobust = []",
        "[delta]\nsparsify = 'topk'\ndensity = 0.1",
        "[delta]\ncodec = 'auto'",
        "[search]\nstrategy = 'cma_es'",
    ):
        assert plan(9, extra) == plain
    with pytest.raises(ConfigError, match="spectral against 5 bad nodes needs at least 16 nodes"):
        plan(9, "[screen]\nmax_bad = 5")
    with pytest.raises(ConfigError, match="fltrust needs a root of trust"):
        plan(2, "[screen]\nrobust = ['fltrust']")
