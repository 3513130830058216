"""Screening: what is rejected, with which reason, and what the others then weigh."""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmerge.errors import ConfigError, InputError, InvalidDelta, RoundFailed
from fedmerge.screening.checks import Known, Owner, ScreenPolicy
from fedmerge.screening.overlap import overlaps
from fedmerge.screening.shares import capped_shares
from fedmerge.screening.verdicts import Verdict, adapted_clip_norm, inspect, screen
from fedmerge.tensors import Schema, TensorSpec

SCHEMA: Schema = {
    "a": TensorSpec((3, 2), "BF16"),
    "b": TensorSpec((4,), "F32"),
    "position_ids": TensorSpec((9,), "I64"),
}
# Deltas that are this alike would be taken for copies.
POLICY = ScreenPolicy(duplicates="accept")


def delta(norm: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a delta of ten equal entries with this L2 norm."""
    value = norm / math.sqrt(10)
    return {"a": torch.full((3, 2), value, dtype=dtype), "b": torch.full((4,), value, dtype=dtype)}


def run(
    deltas: Mapping[str, Mapping[str, Tensor]],
    policy: ScreenPolicy = POLICY,
    num_examples: Mapping[str, int] | None = None,
) -> dict[str, Verdict]:
    alike = replace(policy, duplicates="accept")
    verdicts = screen(deltas, num_examples or dict.fromkeys(deltas, 100), SCHEMA, alike)
    return {verdict.node_id: verdict for verdict in verdicts}


def test_verdicts_are_sorted_and_complete() -> None:
    verdicts = screen({"z": delta(1), "a": delta(2)}, {"a": 30, "z": 10, "absent": 5}, SCHEMA, POLICY)
    assert [verdict.node_id for verdict in verdicts] == ["a", "z"]
    assert all(verdict.accepted and not verdict.reason and not verdict.detail for verdict in verdicts)
    assert [verdict.num_examples for verdict in verdicts] == [30, 10]
    assert [verdict.weight for verdict in verdicts] == [0.75, 0.25]
    assert [verdict.scale for verdict in verdicts] == [1, 1]
    assert [verdict.norm for verdict in verdicts] == pytest.approx([2, 1])
    assert json.loads(json.dumps(verdicts[0].to_dict()))["node_id"] == "a"


class Unreadable(dict[str, Tensor]):
    """A delta that must not be read again."""

    def __getitem__(self, name: str) -> Tensor:
        raise InvalidDelta(f"{name} was read")


def test_what_was_inspected_on_arrival_is_not_read_again() -> None:
    broken = delta(1)
    broken["b"][3] = math.nan
    deltas = {"long": delta(900), "odd": {"a": delta(1)["a"]}, "nan": broken, "one": delta(1), "two": delta(2)}
    deltas["zeros"] = {"a": torch.zeros(3, 2), "b": delta(1)["b"]}
    counts = dict.fromkeys(deltas, 10) | {"two": 0}
    inspected = {key: inspect(each, SCHEMA) for key, each in deltas.items()}
    gone = {key: Unreadable(each) for key, each in deltas.items()}
    expected = screen(deltas, counts, SCHEMA, POLICY)
    assert len({verdict.reason for verdict in expected}) > 3
    assert screen(gone, counts, SCHEMA, POLICY, inspected=inspected) == expected
    del inspected["one"]
    (again,) = (each for each in screen(gone, counts, SCHEMA, POLICY, inspected=inspected) if each.node_id == "one")
    assert again.reason == "INVALID_DELTA"


def test_no_deltas_no_verdicts() -> None:
    assert screen({}, {}, SCHEMA, POLICY) == []


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ({"a": torch.zeros(3, 2)}, "misses tensor b"),
        (delta(1) | {"c": torch.zeros(1)}, "unknown tensor c"),
        (delta(1) | {"position_ids": torch.zeros(9)}, "unknown tensor position_ids"),
        (delta(1) | {"a": torch.zeros(2, 3)}, r"a is float32\[2, 3\], not floating-point \[3, 2\]"),
        (delta(1) | {"b": torch.zeros(4, dtype=torch.int64)}, r"b is int64\[4\]"),
    ],
)
def test_another_architecture_is_rejected(broken: dict[str, Tensor], named: str) -> None:
    verdicts = run({"good": delta(1), "bad": broken})
    assert (verdicts["bad"].accepted, verdicts["bad"].reason, verdicts["bad"].weight) == (False, "SCHEMA", 0)
    assert re.search(named, verdicts["bad"].detail)
    assert verdicts["good"].weight == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_values_that_are_not_finite_are_named_and_counted(value: float, dtype: torch.dtype) -> None:
    broken = delta(1, dtype)
    broken["b"][1] = value
    broken["b"][3] = value
    verdict = run({"bad": broken, "good": delta(1)})["bad"]
    assert (verdict.accepted, verdict.reason, verdict.norm) == (False, "NON_FINITE", None)
    assert verdict.detail == "b holds 2 NaN or infinite values"


def test_not_finite_values_are_counted_in_large_tensors() -> None:
    schema: Schema = {"w": TensorSpec((400_001,), "F32")}
    wide = torch.ones(400_001)
    wide[[0, 65_535, 65_536, 400_000]] = math.nan
    (verdict,) = screen({"n": {"w": wide}}, {"n": 1}, schema, POLICY)
    assert verdict.detail == "w holds 4 NaN or infinite values"


@pytest.mark.parametrize("huge", [3e38, 1e-30])
def test_norms_do_not_overflow_or_vanish_in_fp32(huge: float) -> None:
    schema: Schema = {"w": TensorSpec((100_000,), "F32")}
    (verdict,) = screen({"n": {"w": torch.full((100_000,), huge)}}, {"n": 1}, schema, POLICY)
    assert verdict.accepted
    assert verdict.norm == pytest.approx(huge * math.sqrt(100_000), rel=1e-6)


def test_a_norm_beyond_fp64_is_not_finite_either() -> None:
    schema: Schema = {"w": TensorSpec((4,), "F64")}
    big = {"w": torch.full((4,), 1e154, dtype=torch.float64)}
    (verdict,) = screen({"n": big}, {"n": 1}, schema, POLICY)
    assert (verdict.accepted, verdict.reason) == (False, "NON_FINITE")
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_a_delta_far_longer_than_the_median_is_rejected() -> None:
    deltas = {"a": delta(1), "b": delta(1.2), "c": delta(0.9), "long": delta(12), "longest": delta(1e6)}
    verdicts = run(deltas)
    assert [node for node, verdict in verdicts.items() if verdict.accepted] == ["a", "b", "c", "long"]
    rejected = verdicts["longest"]
    assert rejected.reason == "NORM"
    assert rejected.norm == pytest.approx(1e6)
    assert "1e+06" in rejected.detail
    assert "limit of 10" in rejected.detail


def test_exactly_at_the_limit_is_accepted() -> None:
    assert all(verdict.accepted for verdict in run({"a": delta(1), "b": delta(1), "c": delta(9.999)}).values())
    assert not run({"a": delta(1), "b": delta(1), "c": delta(10.001)})["c"].accepted


def test_two_norms_are_too_few_to_compare() -> None:
    strict = ScreenPolicy(max_norm_ratio=1.5)
    deltas = {"a": delta(1), "b": delta(1000)}
    assert all(verdict.accepted for verdict in run(deltas, strict).values())
    # A third that is rejected for something else does not make them three.
    broken = delta(1) | {"a": torch.full((3, 2), math.nan)}
    assert run(deltas | {"c": broken}, strict)["b"].accepted
    assert run(deltas | {"c": delta(1)}, strict, {"a": 1, "b": 1, "c": 0})["b"].accepted
    assert not run(deltas | {"c": delta(1)}, strict)["b"].accepted


def test_zero_deltas_are_accepted_and_set_no_measure() -> None:
    verdicts = run({"a": delta(0), "b": delta(0), "c": delta(1)}, ScreenPolicy(clip_norm_ratio=1))
    assert all(verdict.accepted and verdict.scale == 1 for verdict in verdicts.values())


def test_clipping_scales_to_a_multiple_of_the_median() -> None:
    deltas = {"a": delta(1), "b": delta(2), "c": delta(8), "long": delta(1000)}
    verdicts = run(deltas, ScreenPolicy(clip_norm_ratio=1.5))
    assert not verdicts["long"].accepted
    # The median of the accepted is 2, not the 5 it would be with the rejected one.
    assert [verdicts[node].scale for node in "abc"] == pytest.approx([1, 1, 3 / 8])


def test_nobody_weighs_more_than_so_many_times_the_median() -> None:
    deltas, num_examples = dict.fromkeys("abc", delta(1)), {"a": 100, "b": 200, "c": 10**9}
    verdicts = run(deltas, num_examples=num_examples)
    assert [verdicts[node].weight for node in "abc"] == pytest.approx([1 / 9, 2 / 9, 6 / 9])
    assert verdicts["c"].num_examples == 10**9
    equal = run(deltas, ScreenPolicy(weighting="equal"), num_examples)
    assert [equal[node].weight for node in "abc"] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("count", [0, -5])
def test_who_trained_on_nothing_weighs_nothing(count: int) -> None:
    deltas, num_examples = {"a": delta(1), "b": delta(1)}, {"a": 10, "b": count}
    verdicts = run(deltas, num_examples=num_examples)
    assert (verdicts["b"].accepted, verdicts["b"].reason) == (False, "EXAMPLES")
    assert verdicts["a"].weight == 1
    assert run(deltas, ScreenPolicy(weighting="equal"), num_examples)["b"].accepted


def test_a_delta_that_can_not_be_decoded_is_rejected() -> None:
    class Damaged(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            raise InvalidDelta(f"{name}: frame is 3 bytes short")

        def __iter__(self) -> Iterator[str]:
            return iter(("a", "b"))

        def __len__(self) -> int:
            return 2

    verdicts = run({"good": delta(1), "bad": Damaged()})
    assert (verdicts["bad"].reason, verdicts["bad"].detail) == ("INVALID_DELTA", "a: frame is 3 bytes short")
    assert verdicts["good"].accepted


def test_a_node_without_a_count_is_an_error_of_the_caller() -> None:
    with pytest.raises(InputError, match="node b"):
        screen({"a": delta(1), "b": delta(1)}, {"a": 1}, SCHEMA, POLICY)


@given(
    honest=st.lists(st.tuples(st.floats(0.5, 2), st.integers(1, 10**6)), min_size=3, max_size=6),
    attack=st.sampled_from(["nan", "long", "shape", "empty"]),
    claim=st.integers(1, 2**62),
    policy=st.sampled_from([POLICY, replace(POLICY, clip_norm_ratio=1.2), replace(POLICY, weighting="equal")]),
)
@settings(deadline=None)
def test_a_rejected_node_leaves_no_trace(
    honest: list[tuple[float, int]], attack: str, claim: int, policy: ScreenPolicy
) -> None:
    deltas = {f"n{i}": delta(norm) for i, (norm, _) in enumerate(honest)}
    num_examples = {f"n{i}": count for i, (_, count) in enumerate(honest)}
    without = screen(deltas, num_examples, SCHEMA, policy)
    attacks: dict[str, dict[str, Tensor]] = {
        "nan": delta(math.nan),
        "long": delta(1e9),
        "shape": {"a": torch.zeros(1), "b": torch.zeros(4)},
        "empty": {},
    }
    with_it = screen(deltas | {"evil": attacks[attack]}, num_examples | {"evil": claim}, SCHEMA, policy)
    assert [verdict for verdict in with_it if verdict.node_id != "evil"] == without
    assert not with_it[0].accepted
    assert sum(verdict.weight for verdict in without) == pytest.approx(1)


@pytest.mark.parametrize(
    "data",
    [
        {"max_norm_ratio": 0.5},
        {"max_norm_ratio": math.nan},
        {"max_weight_ratio": math.inf},
        {"clip_norm_ratio": 0},
        {"weighting": "loudest"},
        {"max_norm_ration": 10},
        {"max_norm_ratio": "10"},
        {"clip_quantile": 0},
        {"clip_quantile": 0.5, "clip_norm_ratio": 1},
        {"max_overlap": 1.1},
        {"max_weight_node": 0},
        {"max_weight_org": math.nan},
        {"duplicates": "keep"},
        {"min_gain": math.inf},
    ],
)
def test_policies_that_can_not_be_followed(data: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="screen"):
        ScreenPolicy.from_dict(data)


def vector(*entries: float) -> dict[str, Tensor]:
    return {"w": torch.tensor(entries, dtype=torch.float32)}


VECTOR: Schema = {"w": TensorSpec((8,), "F32")}


def judge(
    deltas: Mapping[str, Mapping[str, Tensor]], policy: ScreenPolicy, known: Known | None = None
) -> dict[str, Verdict]:
    verdicts = screen(deltas, dict.fromkeys(deltas, 100), VECTOR, policy, known)
    return {verdict.node_id: verdict for verdict in verdicts}


def test_what_leaves_the_model_as_it_is() -> None:
    deltas = {"lazy": vector(1, 0, 0, 0, 0, 0, 0, 2), "busy": vector(1, 2, 3, 4, 0, 0, 0, 1)}
    verdict = judge(deltas, ScreenPolicy(max_unchanged=0.5))["lazy"]
    assert (verdict.reason, verdict.value, verdict.limit) == ("UNCHANGED", 0.75, 0.5)
    assert "leaves 75.0% unchanged" in verdict.detail
    assert all(verdict.accepted for verdict in judge(deltas, ScreenPolicy(max_unchanged=0.75)).values())


def test_of_equal_deltas_one_counts() -> None:
    one, other = vector(1, 2, 3, 4, 5, 6, 7, 8), vector(8, 7, 6, 5, 4, 3, 2, 1)  # of one length
    verdicts = judge({"a": one, "b": other, "c": one, "d": one}, ScreenPolicy())
    assert [verdict.reason for verdict in verdicts.values()] == ["", "", "DUPLICATE", "DUPLICATE"]
    assert verdicts["d"].detail == "the delta is that of node a, entry for entry"
    assert sum(verdict.weight for verdict in verdicts.values()) == 1
    assert all(v.accepted for v in judge({"a": one, "c": one}, ScreenPolicy(duplicates="accept")).values())
    # Nodes that did nothing copied nobody, and a node may say the same in two rounds.
    assert all(v.accepted for v in judge({"a": vector(*[0] * 8), "b": vector(*[0] * 8)}, ScreenPolicy()).values())
    same_node = Known(owners={"a": Owner("a", "x"), "a+1": Owner("a", "x")})
    assert all(v.accepted for v in judge({"a": one, "a+1": one}, ScreenPolicy(max_overlap=0.5), same_node).values())


def test_a_copy_with_noise_is_a_copy() -> None:
    original = vector(1, -2, 3, -4, 5, -6, 7, 0)
    copy = vector(3, -1, 9, -4, 5, -6, -0.1, 0)  # one sign of seven differs
    other = vector(-1, 2, 3, -4, -5, 6, 0, 1)
    verdicts = judge({"a": original, "b": other, "c": copy}, ScreenPolicy(max_overlap=0.8))
    assert [verdict.reason for verdict in verdicts.values()] == ["", "", "COPYCAT"]
    assert (verdicts["c"].value, verdicts["c"].limit) == (6 / 7, 0.8)
    assert all(v.accepted for v in judge({"a": original, "c": copy}, ScreenPolicy(max_overlap=0.9)).values())


@given(st.integers(0, 2**32), st.integers(2, 5), st.sampled_from([0.0, 0.3, 0.9]))
@settings(deadline=None, max_examples=20)
def test_overlaps_are_their_definition(seed: int, num_deltas: int, zeros: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_deltas, 120, generator=draw) * (torch.rand(num_deltas, 120, generator=draw) >= zeros)
    deltas = [{"a": row[:50].reshape(5, 10).double(), "b": row[50:]} for row in rows]
    found = overlaps(deltas)
    for (i, one), (j, other) in itertools.product(enumerate(rows.tolist()), repeat=2):
        agreeing = sum(x * y > 0 for x, y in zip(one, other, strict=True))
        fewest = min(sum(x != 0 for x in one), sum(y != 0 for y in other))
        assert found[i, j] == (agreeing / fewest if fewest else 0)


def test_the_coordinators_own_score_of_a_delta() -> None:
    deltas = {name: vector(*range(i, i + 8)) for i, name in enumerate("abcd", start=1)}
    known = Known(gains={"a": 0.02, "b": -0.3, "c": None, "d": -0.01})
    verdicts = judge(deltas, ScreenPolicy(min_gain=-0.05), known)
    assert [verdict.reason for verdict in verdicts.values()] == ["", "GAIN", "GAIN", ""]
    assert (verdicts["b"].value, verdicts["b"].limit, verdicts["a"].gain) == (-0.3, -0.05, 0.02)
    assert "changes the model's score by -0.3 on the coordinator's data; it should be -0.05 or more" in str(verdicts)
    assert (verdicts["c"].value, verdicts["c"].gain) == (None, None)


def test_numbers_and_limits_of_verdicts() -> None:
    verdicts = run({"a": delta(1), "b": delta(2), "c": delta(3), "long": delta(1000)}, ScreenPolicy(max_norm_ratio=4))
    assert (verdicts["long"].value, verdicts["long"].limit) == (pytest.approx(1000), pytest.approx(4 * 2.5))
    bad = run({"bad": delta(1) | {"b": torch.tensor([1, math.nan, math.inf, 0])}})["bad"]
    assert (bad.value, bad.limit) == (2, 0)
    nobody = run({"n": delta(1)}, num_examples={"n": 0})["n"]
    assert (nobody.value, nobody.limit) == (0, 1)


def test_the_clipping_norm_follows_a_quantile_over_the_rounds() -> None:
    policy = ScreenPolicy(clip_quantile=0.5, duplicates="accept")
    norms = [float(2 + i) for i in range(5)]
    deltas = {f"n{i}": delta(norm) for i, norm in enumerate(norms)}
    first = run(deltas, policy)
    assert [verdict.scale for verdict in first.values()] == pytest.approx([1, 1, 1, 4 / 5, 4 / 6])
    # C <- C exp(-eta (b - gamma)), Andrew et al., algorithm 1: b is the share that was not clipped.
    clip, expected = 1.0, 1.0
    for _ in range(60):
        share = sum(norm <= expected for norm in norms) / len(norms)
        expected *= math.exp(-0.2 * (share - 0.5))
        clip = adapted_clip_norm(clip, norms, policy)
        assert clip == pytest.approx(expected, rel=1e-4)
    assert 3 < clip < 5
    verdicts = screen(deltas, dict.fromkeys(deltas, 1), SCHEMA, policy, Known(clip_norm=clip))
    assert [verdict.scale for verdict in verdicts] == pytest.approx([min(1, clip / norm) for norm in norms])


def by_bisection(
    counts: Mapping[str, float], organisations: Mapping[str, str], max_node: float, max_org: float
) -> dict[str, float]:
    """The water level at which all shares sum to 1, found by halving; within a capped organisation by halving again."""

    def solve(total: Callable[[float], float], goal: float) -> float:
        low, high = 0.0, 1e9
        for _ in range(200):
            low, high = (low, middle) if total(middle := (low + high) / 2) > goal else (middle, high)
        return low

    def shares(level: float, org: str) -> dict[str, float]:
        return {node: min(max_node, level * counts[node]) for node in counts if organisations[node] == org}

    names = sorted(set(organisations.values()))
    level = solve(lambda x: sum(min(max_org, sum(shares(x, org).values())) for org in names), 1)
    found: dict[str, float] = {}
    for org in names:
        full = sum(shares(level, org).values()) > max_org
        own = solve(lambda x, org=org: sum(shares(x, org).values()), max_org) if full else level  # type: ignore[misc]
        found |= shares(own, org)
    return found


@given(
    counts=st.lists(st.floats(0.01, 1000), min_size=1, max_size=8),
    orgs=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    max_node=st.floats(0.1, 1),
    max_org=st.floats(0.2, 1),
)
@settings(deadline=None, max_examples=60)
def test_capped_shares_are_a_water_level(counts: list[float], orgs: list[int], max_node: float, max_org: float) -> None:
    nodes = {f"n{i}": count for i, count in enumerate(counts)}
    organisations = {node: f"o{org}" for node, org in zip(nodes, orgs, strict=False)}
    shares = capped_shares(nodes, organisations, max_node=max_node, max_org=max_org)
    sizes = [list(organisations.values()).count(org) for org in set(organisations.values())]
    most = sum(min(max_org, size * max_node) for size in sizes)
    if shares is None:
        assert most < 1
        return
    assert most > 1 - 2e-3
    assert math.fsum(shares.values()) == pytest.approx(1)
    backwards = capped_shares(dict(reversed(nodes.items())), organisations, max_node=max_node, max_org=max_org)
    assert backwards == shares
    if most > 1.001:
        expected = by_bisection(nodes, organisations, max_node, max_org)
        assert shares == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert all(share <= max_node for share in shares.values())


def test_a_node_with_two_deltas_and_an_organisation_have_one_cap() -> None:
    owners = {"a": Owner("a", "Large"), "a+1": Owner("a", "Large"), "b": Owner("b", "Large"), "c": Owner("c", "Small")}
    known = Known(owners=owners)
    deltas = {key: delta(i) for i, key in enumerate([*owners, "d"], start=1)}
    counts = {"a": 300, "a+1": 100, "b": 100, "c": 50, "d": 50}
    policy = ScreenPolicy(max_weight_ratio=100, max_weight_org=0.5, max_weight_node=0.3, duplicates="accept")
    weights = {each.node_id: each.weight for each in screen(deltas, counts, SCHEMA, policy, known)}
    # Of 600, a has 4/6 of its organisation's 5/6: capped to .3, and b gets the rest of .5.
    assert weights == pytest.approx({"a": 0.225, "a+1": 0.075, "b": 0.2, "c": 0.25, "d": 0.25})
    with pytest.raises(RoundFailed, match=r"2 nodes of 1 organisations .* at most 0\.3 a node and 0\.5 an"):
        screen({key: deltas[key] for key in ("a", "a+1", "b")}, counts, SCHEMA, policy, known)


def test_the_root_of_trust_has_no_weight() -> None:
    verdicts = run({"a": delta(1), "b": delta(2), "r": delta(3)}, ScreenPolicy(root="r"))
    assert verdicts["r"].accepted
    assert [verdicts[node].weight for node in "abr"] == [0.5, 0.5, 0]


def test_a_policy_survives_json() -> None:
    policy = ScreenPolicy(max_norm_ratio=5, clip_norm_ratio=2, weighting="equal", max_weight_ratio=1)
    assert ScreenPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert ScreenPolicy.from_dict({}) == ScreenPolicy()
