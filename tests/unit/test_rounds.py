"""The state machine: when a round closes, and that no order of events can break it."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.errors import DigestMismatch
from fedmerge.events import (
    CandidatesProposed,
    CandidatesScored,
    DeltaAccepted,
    DeltaRejected,
    Event,
    FederationCreated,
    KeyRotated,
    MergeFinished,
    MergeStarted,
    MetricsReported,
    RoundFailed,
    RoundOpened,
    RoundPublished,
    RoundSealed,
)
from fedmerge.rounds.policy import Action, RoundPolicy, next_action, standing
from fedmerge.rounds.state import FederationState, Phase, after, replay
from fedmerge.store.entries import LedgerEntry

NODES = [letter * 64 for letter in "abcd"]
ZERO = "0" * 64
POLICY = RoundPolicy(num_rounds=2, min_nodes=2, deadline_s=100.0, grace_s=10.0)
CREATED = FederationCreated(federation="f", run="r", base_digest=ZERO, schema_digest=ZERO, coordinator_key="pem")


def opened(number: int = 1, sample: list[str] | None = None, max_staleness: int = 0) -> RoundOpened:
    return RoundOpened(
        round=number, spec_digest=ZERO, spec_envelope="{}", sample=sample or [], max_staleness=max_staleness
    )


def delta(node_id: str, number: int = 1) -> DeltaAccepted:
    return DeltaAccepted(
        round=number,
        node_id=node_id,
        node_key="pem",
        statement_digest=f"{number:04d}{node_id[4:]}",
        payload_root=ZERO,
        payload_bytes=1,
        num_examples=1,
        statement_envelope="{}",
    )


def sealed(node_ids: list[str], number: int = 1) -> RoundSealed:
    return RoundSealed(round=number, node_ids=node_ids, closed_by="everyone", quorum=1, grace_s=0.0)


def finished(number: int = 1) -> MergeFinished:
    return MergeFinished(round=number, version=ZERO, update_root=ZERO, record_envelope="{}")


def history(*facts: tuple[float, Event]) -> FederationState:
    return replay(LedgerEntry(i, at_s, fact, ZERO) for i, (at_s, fact) in enumerate(facts))


def test_a_round_seals_once_every_trusted_node_has_delivered() -> None:
    state = history((0, CREATED), (0, opened()), (1, delta(NODES[0])), (2, delta(NODES[1])))
    assert next_action(state, POLICY, NODES[:2], 2.0) == Action.SEAL
    assert next_action(state, POLICY, NODES[:3], 2.0) == Action.WAIT


def test_a_late_delta_that_can_not_be_decoded_is_remembered_for_as_long_as_it_would_be_taken() -> None:
    refused = DeltaRejected(
        round=1, node_id=NODES[2], statement_digest="1" * 64, reason="INVALID_DELTA", detail="why", envelope="{}"
    )
    facts = [CREATED, opened(max_staleness=1), delta(NODES[0]), sealed(NODES[:1]), refused, MergeStarted(round=1)]
    facts += [finished(), RoundPublished(round=1, version=ZERO)]
    assert history(*((0, fact) for fact in facts)).rejected == {"1" * 64: refused}
    facts.append(opened(2, max_staleness=1))
    assert history(*((0, fact) for fact in facts)).rejected == {"1" * 64: refused}
    facts += [delta(NODES[0], 2), sealed(NODES[:1], 2), MergeStarted(round=2), finished(2)]
    facts += [RoundPublished(round=2, version=ZERO), opened(3)]
    assert history(*((0, fact) for fact in facts)).rejected == {}


def test_a_node_that_replaced_its_key_has_delivered_all_the_same() -> None:
    first, second, third = NODES[:3]
    rotations = [
        (2.5, KeyRotated(node_id=a, new_node_id=b, envelope="{}")) for a, b in ((first, second), (second, third))
    ]
    state = history((0, CREATED), (0, opened()), (1, delta(first)), (2, delta(NODES[3])), *rotations)
    assert state.accepted(third) == delta(first)
    assert next_action(state, POLICY, [third, NODES[3]], 3.0) == Action.SEAL


def test_grace_runs_from_the_delta_that_made_the_quorum() -> None:
    state = history((0, CREATED), (0, opened()), (1, delta(NODES[0])), (20, delta(NODES[1])), (25, delta(NODES[2])))
    assert next_action(state, POLICY, NODES, 29.9) == Action.WAIT
    assert next_action(state, POLICY, NODES, 30.0) == Action.SEAL


@pytest.mark.parametrize(("num_deltas", "expected"), [(0, Action.FAIL), (1, Action.FAIL), (2, Action.SEAL)])
def test_at_the_deadline_a_round_seals_with_a_quorum_and_fails_without(num_deltas: int, expected: Action) -> None:
    deltas = [(99.0, delta(node)) for node in NODES[:num_deltas]]
    state = history((0, CREATED), (0, opened()), *deltas)
    assert next_action(state, POLICY, NODES, 99.9) == Action.WAIT
    assert next_action(state, POLICY, NODES, 100.0) == expected


@pytest.mark.parametrize(("fraction", "num_trusted", "quorum"), [(0, 9, 2), (0.3, 10, 3), (0.31, 10, 4), (1, 4, 4)])
def test_the_quorum_is_a_share_of_the_expected_nodes_but_min_nodes_at_least(
    fraction: float, num_trusted: int, quorum: int
) -> None:
    policy = RoundPolicy(num_rounds=1, min_nodes=2, deadline_s=100.0, grace_s=0.0, fraction=fraction)
    trusted = [f"{number:064x}" for number in range(num_trusted)]
    for num_deltas in (quorum - 1, quorum):
        state = history((0, CREATED), (0, opened()), *((1.0, delta(node)) for node in trusted[:num_deltas]))
        assert next_action(state, policy, trusted, 1.0) == (Action.WAIT if num_deltas < quorum else Action.SEAL)
        assert next_action(state, policy, trusted, 100.0) == (Action.FAIL if num_deltas < quorum else Action.SEAL)
        assert standing(state, policy, trusted, 1.0).quorum == quorum


@pytest.mark.parametrize(
    ("arrivals_s", "grace_s"),
    [
        # One delta: as long again as it took. Two: the gap, and 3 times its half. Then by hand.
        ([3600], 3600),
        ([3600, 3660], 60 + 3 * 30),
        ([10, 20, 30, 70], 10 + 3 * 10),  # gaps 10 10 40; median 25, deviations 15 5 5 45
        ([5, 5, 5], 0),
    ],
)
def test_measured_grace_follows_the_arrivals_and_is_counted_from_the_newest(
    arrivals_s: list[float], grace_s: float
) -> None:
    policy = RoundPolicy(num_rounds=1, min_nodes=1, deadline_s=10_000.0, grace_s="auto")
    nodes = [f"{number:064x}" for number in range(len(arrivals_s) + 1)]
    order = list(zip(arrivals_s, map(delta, nodes), strict=False))
    for deltas in (order, order[::-1]):
        state = history((0, CREATED), (0, opened()), *deltas)
        close_s = max(arrivals_s) + grace_s
        assert standing(state, policy, nodes, close_s).grace_s == grace_s
        assert next_action(state, policy, nodes, close_s) == Action.SEAL
        if grace_s:
            assert next_action(state, policy, nodes, close_s - 0.1) == Action.WAIT
    late = RoundPolicy(num_rounds=1, min_nodes=1, deadline_s=max(arrivals_s) + 1, grace_s="auto")
    assert next_action(state, late, nodes, max(arrivals_s) + 1) == Action.SEAL


def test_a_round_that_asks_a_sample_waits_for_those_nodes_only() -> None:
    state = history((0, CREATED), (0, opened(sample=NODES[1:3])), (1, delta(NODES[1])), (2, delta(NODES[2])))
    assert next_action(state, POLICY, NODES, 2.0) == Action.SEAL


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**64 - 1), st.randoms())
def test_a_sample_is_drawn_by_its_seed_and_not_by_the_order_of_the_nodes(
    sample: int, min_nodes: int, seed: int, random: Random
) -> None:
    nodes = [f"{number:064x}" for number in range(10)]
    policy = RoundPolicy(num_rounds=1, min_nodes=min_nodes, deadline_s=1.0, grace_s=0.0, sample=sample)
    drawn = policy.sampled(nodes, seed)
    assert drawn == policy.sampled(random.sample(nodes, 10), seed) == sorted(set(drawn))
    assert len(drawn) == min(10, max(sample, min_nodes))
    # A node that is not trusted any more gives its place, if it had one, to one other.
    assert len(set(drawn) - set(policy.sampled(nodes[1:], seed))) <= 1


def test_samples_are_fair() -> None:
    nodes = [f"{number:064x}" for number in range(10)]
    policy = RoundPolicy(num_rounds=1, min_nodes=1, deadline_s=1.0, grace_s=0.0, sample=0.3)
    times = Counter(node for seed in range(2000) for node in policy.sampled(nodes, seed))
    # 600 each, with a standard deviation of sqrt(2000 x .3 x .7) = 20.5.
    assert all(abs(count - 600) < 5 * 20.5 for count in times.values())
    assert times.total() == 6000


def published(number: int, *late: str) -> list[tuple[float, Event]]:
    """Seal, merge and publish a round."""
    steps = [
        sealed([], number).model_copy(update={"carried": list(late)}),
        MergeStarted(round=number),
        finished(number),
        RoundPublished(round=number, version=ZERO),
    ]
    return [(0.0, step) for step in steps]


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_a_late_delta_waits_for_the_next_merge_but_no_longer_than_its_round_promised(max_staleness: int) -> None:
    facts: list[tuple[float, Event]] = [(0.0, CREATED), (0.0, opened(1, max_staleness=max_staleness)), *published(1)]
    for number in (2, 3, 4):
        late = number - 1
        if late > max_staleness:
            assert history(*facts, (0.0, opened(number))).staleness(1) is None
            with pytest.raises(DigestMismatch, match="late"):
                history(*facts, (0.0, opened(number)), (0.0, delta(NODES[0])))
        else:
            state = history(*facts, (0.0, opened(number)), (0.0, delta(NODES[0])))
            assert (state.staleness(1), dict(state.deltas), len(state.carried)) == (late, {}, 1)
            # Merged, it is gone; when the merge fails, it is there for the next attempt.
            digest = delta(NODES[0]).statement_digest
            merged = [(0.0, opened(number)), (0.0, delta(NODES[0])), *published(number, digest)]
            assert not history(*facts, *merged, (0.0, opened(number + 1))).carried
            failed = [*merged[:4], (0.0, RoundFailed(round=number, reason="x")), (0.0, opened(number))]
            assert list(history(*facts, *failed).carried) == [digest]
        facts += [(0.0, opened(number)), *published(number)]


def test_no_delta_counts_twice_in_time_and_late() -> None:
    once = [(0.0, CREATED), (0.0, opened(max_staleness=2)), (1.0, delta(NODES[0])), *published(1)]
    for later in ([], [(0.0, opened(2, max_staleness=2))]):
        with pytest.raises(DigestMismatch, match="was there before"):
            history(*once, *later, (2.0, delta(NODES[0])))


def test_a_delta_of_an_attempt_that_failed_is_not_taken_late() -> None:
    state = history((0, CREATED), (0, opened(max_staleness=3)), (1, RoundFailed(round=1, reason="x")))
    assert state.staleness(1) is None


def test_a_buffer_closes_a_round_once_it_is_full_of_enough_different_nodes() -> None:
    policy = RoundPolicy(num_rounds=3, min_nodes=2, deadline_s=100.0, grace_s=0.0, max_staleness=2, async_buffer=3)
    start = [(0.0, CREATED), (0.0, opened(max_staleness=2)), *published(1), (0.0, opened(2, max_staleness=2))]
    late, fresh = (1.0, delta(NODES[0])), [(2.0, delta(node, 2)) for node in NODES]
    expected = [
        ([late, fresh[0]], Action.WAIT, Action.FAIL),  # two deltas, of one node
        ([late, fresh[1]], Action.WAIT, Action.SEAL),
        ([late, fresh[0], fresh[1]], Action.SEAL, Action.SEAL),
        (fresh[:3], Action.SEAL, Action.SEAL),
    ]
    for deltas, now, at_the_deadline in expected:
        for order in (deltas, deltas[::-1]):
            state = history(*start, *order)
            assert next_action(state, policy, NODES, 2.0) == now
            assert next_action(state, policy, NODES, 100.0) == at_the_deadline


def proposed(*digests: str, judges: list[str]) -> CandidatesProposed:
    return CandidatesProposed(
        round=1, digests=list(digests), judges=judges, roots=[ZERO], num_bytes=1, proposal_envelope="{}"
    )


def scored(node_id: str, candidate: str | None, envelope: str = "{}") -> MetricsReported:
    return MetricsReported(round=1, node_id=node_id, candidate=candidate, envelope=envelope)


def test_a_generation_is_scored_once_every_judge_said_something_of_every_candidate_or_time_is_up() -> None:
    x, y = "e" * 64, "f" * 64
    closed: list[tuple[float, Event]] = [(0.0, CREATED), (0.0, opened()), (1.0, sealed(NODES[:2]))]
    asked: list[tuple[float, Event]] = [*closed, (2.0, proposed(x, y, judges=NODES[:2]))]
    said: list[tuple[float, Event]] = [
        (3.0, scored(NODES[0], x)),
        (3.0, scored(NODES[0], y)),
        (3.0, scored(NODES[1], x)),
    ]
    policy = RoundPolicy(num_rounds=1, min_nodes=2, deadline_s=100.0, grace_s=10.0, scoring_s=50.0)
    assert next_action(history(*closed), policy, NODES, 2.0) == Action.MERGE
    assert next_action(history(*asked, *said), policy, NODES, 51.9) == Action.WAIT
    assert next_action(history(*asked, *said), policy, NODES, 52.0) == Action.SCORE
    assert next_action(history(*asked, *said, (4.0, scored(NODES[1], y))), policy, NODES, 4.0) == Action.SCORE


def test_of_what_nodes_report_counts_what_a_judge_said_first_and_in_time() -> None:
    x, y = "e" * 64, "f" * 64
    late: list[tuple[float, Event]] = [(5, CandidatesScored(round=1)), (5, scored(NODES[1], x))]
    state = history(
        (0, CREATED),
        (0, opened()),
        (1, sealed(NODES[:2])),
        (2, scored(NODES[0], x, "too early")),
        (2, proposed(x, judges=NODES[:2])),
        (3, scored(NODES[0], x, "counts")),
        (3, scored(NODES[0], x, "a second thought")),
        (3, scored(NODES[2], x, "not asked")),
        (3, scored(NODES[1], y, "not a candidate")),
        (3, scored(NODES[1], None, "of another model")),
        *late,
    )
    assert state.phase == Phase.SEALED
    assert state.answers == {(x, NODES[0]): "counts"}


def test_a_round_that_nobody_is_trusted_for_waits_for_its_quorum() -> None:
    state = history((0, CREATED), (0, opened()))
    assert next_action(state, POLICY, [], 1.0) == Action.WAIT


def test_rounds_follow_each_other_to_the_last() -> None:
    one = [(0, CREATED), (0, opened()), (1, delta(NODES[0])), (1, delta(NODES[1]))]
    merged = [(2, sealed(NODES[:2])), (2, MergeStarted(round=1)), (3, finished())]
    published = [(4, RoundPublished(round=1, version=ZERO))]
    expected = [
        (one + merged[:1], Action.MERGE),
        (one + merged[:2], Action.MERGE),
        (one + merged, Action.PUBLISH),
        (one + merged + published, Action.OPEN),
        (one + merged + published + [(5, opened(2))], Action.WAIT),
    ]
    for facts, action in expected:
        assert next_action(history(*facts), POLICY, NODES, 5.0) == action
    last = RoundPolicy(num_rounds=1, min_nodes=2, deadline_s=100.0, grace_s=10.0)
    assert next_action(history(*one, *merged, *published), last, NODES, 5.0) == Action.FINISH


def test_a_new_round_starts_without_the_last_ones_deltas() -> None:
    state = history(
        (0, CREATED), (0, opened()), (1, delta(NODES[0])), (2, RoundFailed(round=1, reason="x")), (3, opened())
    )
    assert (state.phase, dict(state.deltas), state.failure) == (Phase.OPEN, {}, "")


facts = st.sampled_from(
    [
        CREATED,
        opened(),
        *map(delta, NODES),
        sealed(NODES[:1]),
        proposed("e" * 64, judges=NODES[:1]),
        scored(NODES[0], "e" * 64),
        CandidatesScored(round=1),
        MergeStarted(round=1),
        finished(),
        RoundPublished(round=1, version=ZERO),
        RoundFailed(round=1, reason="x"),
    ]
)
NEXT = {
    Phase.PLANNED: {Phase.PLANNED, Phase.OPEN},
    Phase.OPEN: {Phase.OPEN, Phase.SEALED, Phase.FAILED},
    Phase.SEALED: {Phase.SEALED, Phase.SEARCHING, Phase.MERGING, Phase.FAILED},
    Phase.SEARCHING: {Phase.SEARCHING, Phase.SEALED},
    Phase.MERGING: {Phase.PUBLISHING, Phase.FAILED},
    Phase.PUBLISHING: {Phase.PUBLISHED},
    Phase.PUBLISHED: {Phase.OPEN},
    Phase.FAILED: {Phase.OPEN},
}


@given(st.lists(facts, max_size=30))
def test_no_order_of_events_takes_a_forbidden_step(order: list[Event]) -> None:
    state = FederationState()
    for number, fact in enumerate(order):
        before = state
        try:
            state = after(state, LedgerEntry(number, float(number), fact, ZERO))
        except DigestMismatch:
            assert state is before
            continue
        assert state.phase in NEXT[before.phase] | ({before.phase} if isinstance(fact, MetricsReported) else set())
        assert before.phase == Phase.OPEN or not isinstance(fact, DeltaAccepted)
