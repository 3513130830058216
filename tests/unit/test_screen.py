"""Screening: what is rejected, with which reason, and what the others then weigh."""

import json
import math
import re
from collections.abc import Iterator, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmerge.errors import ConfigError, InputError, InvalidDelta
from fedmerge.screen import ScreenPolicy, Verdict, screen
from fedmerge.tensors import Schema, TensorSpec

SCHEMA: Schema = {
    "a": TensorSpec((3, 2), "BF16"),
    "b": TensorSpec((4,), "F32"),
    "position_ids": TensorSpec((9,), "I64"),
}
POLICY = ScreenPolicy()


def delta(norm: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a delta of ten equal entries with this L2 norm."""
    value = norm / math.sqrt(10)
    return {"a": torch.full((3, 2), value, dtype=dtype), "b": torch.full((4,), value, dtype=dtype)}


def run(
    deltas: Mapping[str, Mapping[str, Tensor]],
    policy: ScreenPolicy = POLICY,
    num_examples: Mapping[str, int] | None = None,
) -> dict[str, Verdict]:
    verdicts = screen(deltas, num_examples or dict.fromkeys(deltas, 100), SCHEMA, policy)
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
    policy=st.sampled_from([POLICY, ScreenPolicy(clip_norm_ratio=1.2), ScreenPolicy(weighting="equal")]),
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
    ],
)
def test_policies_that_can_not_be_followed(data: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="screen"):
        ScreenPolicy.from_dict(data)


def test_a_policy_survives_json() -> None:
    policy = ScreenPolicy(max_norm_ratio=5, clip_norm_ratio=2, weighting="equal", max_weight_ratio=1)
    assert ScreenPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert ScreenPolicy.from_dict({}) == ScreenPolicy()
