"""The state machine under any order of deliveries, ticks and commands: what a federation promises always holds."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedmerge.errors import DigestMismatch
from fedmerge.events import (
    DeadlineExtended,
    DeltaAccepted,
    Event,
    FederationCreated,
    MergeFinished,
    MergeStarted,
    RetryOrdered,
    RolledBack,
    RoundCutShort,
    RoundFailed,
    RoundOpened,
    RoundPublished,
    RoundSealed,
    RoundsPaused,
    RoundsResumed,
)
from fedmerge.rounds.policy import Action, RoundPolicy, next_action, next_due_s, nodes_there, standing
from fedmerge.rounds.state import FederationState, Phase, after, replay
from fedmerge.store.entries import LedgerEntry

NODES = [letter * 64 for letter in "abcde"]
ZERO = "0" * 64


class Rounds(RuleBasedStateMachine):
    """A coordinator without files does what is due; nodes deliver for any round at any time; operators interfere."""

    def __init__(self) -> None:
        super().__init__()
        self.state = FederationState()
        self.entries: list[LedgerEntry] = []
        self.now_s = 0.0
        self.accepted: dict[str, DeltaAccepted] = {}
        self.given_up: set[str] = set()
        self.merged: Counter[str] = Counter()

    @initialize(
        policy=st.builds(
            RoundPolicy,
            num_rounds=st.just(8),
            min_nodes=st.integers(1, 3),
            deadline_s=st.just(50.0),
            grace_s=st.sampled_from([0.0, 5.0, "auto"]),
            fraction=st.sampled_from([0.0, 0.5, 1.0]),
            sample=st.sampled_from([None, 2, 0.6]),
            max_staleness=st.integers(0, 2),
            async_buffer=st.sampled_from([None, None, 3]),
        )
    )
    def begin(self, policy: RoundPolicy) -> None:
        self.policy = policy
        self.append(
            FederationCreated(federation="f", run="r", base_digest=ZERO, schema_digest=ZERO, coordinator_key="pem")
        )

    def append(self, event: Event) -> None:
        entry = LedgerEntry(len(self.entries), self.now_s, event, ZERO)
        self.state = after(self.state, entry)
        self.entries.append(entry)

    # What nodes do

    @rule(nodes=st.sets(st.sampled_from(NODES), min_size=1), back=st.sampled_from([0, 0, 0, 1, 2, 3]))
    def deliver(self, nodes: set[str], back: int) -> None:
        """Deliver for the current round or an earlier one."""
        for node in sorted(nodes):
            self.deliver_one(node, back)

    def deliver_one(self, node: str, back: int) -> None:
        """Deliver a node's delta, if the plan asks for it; what is late, the ledger itself refuses."""
        opened = self.state.plans.get(self.state.round - back)
        if opened is not None and opened.sample and node not in opened.sample:
            return
        number = self.state.round - back
        event = DeltaAccepted(
            round=max(number, 0),
            node_id=node,
            node_key="pem",
            statement_digest=f"{number % 7:01d}{self.state.attempt % 10:01d}{len(self.entries):06d}{node[8:]}",
            payload_root=ZERO,
            payload_bytes=1,
            num_examples=1,
            statement_envelope="{}",
        )
        plan = self.state.plans.get(number)
        before, staleness = self.state, self.state.staleness(number)
        taken = staleness is not None and not before.has_delivered(number, node)
        try:
            self.append(event)
        except DigestMismatch:
            assert not taken
            assert self.state is before
            return
        assert taken
        assert plan is not None
        assert 0 <= staleness <= plan.max_staleness  # type: ignore[operator]
        self.accepted[event.statement_digest] = event

    @rule(late=st.sampled_from(NODES), num_steps=st.integers(1, 5))
    def a_round_that_one_node_is_late_for(self, late: str, num_steps: int) -> None:
        """It delivers while the others' deltas are merged, or in the next round."""
        self.deliver(set(NODES) - {late}, 0)
        self.now_s += 50.0
        number = self.state.round
        for _ in range(num_steps):
            self.act()
        self.deliver_one(late, self.state.round - number)
        self.act_on_all_that_is_due()

    @rule()
    def a_round_in_good_time(self) -> None:
        self.act_on_all_that_is_due()
        self.deliver(set(NODES), 0)
        self.act_on_all_that_is_due()

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    # What the coordinator does

    @rule()
    def act_on_all_that_is_due(self) -> None:
        while next_action(self.state, self.policy, NODES, self.now_s) not in {Action.WAIT, Action.FINISH}:
            self.act()

    @rule()
    def act(self) -> None:
        due = next_action(self.state, self.policy, NODES, self.now_s)
        number = self.state.round
        if self.state.paused_at_s is not None:
            assert due not in {Action.OPEN, Action.SEAL, Action.FAIL}
        match due:
            case Action.OPEN:
                number = number if self.state.phase == Phase.FAILED else number + 1
                sample = [] if self.policy.sample is None else self.policy.sampled(NODES, number)
                self.append(
                    RoundOpened(
                        round=number,
                        spec_digest=ZERO,
                        spec_envelope="{}",
                        sample=sample,
                        max_staleness=self.policy.max_staleness,
                    )
                )
            case Action.SEAL:
                self.seal()
            case Action.FAIL:
                self.fail("too few")
            case Action.MERGE if self.state.phase == Phase.SEALED:
                self.append(MergeStarted(round=number))
            case Action.MERGE:
                self.merge()
            case Action.PUBLISH:
                self.append(RoundPublished(round=number, version=ZERO))
            case _:
                pass

    def seal(self) -> None:
        state, found = self.state, standing(self.state, self.policy, NODES, self.now_s)
        assert found.closed_by is not None
        there = nodes_there(state, self.policy)
        assert len(there) >= self.policy.min_nodes
        if found.closed_by not in {"operator", "buffer"} and self.policy.async_buffer is None:
            expected = state.opened.sample or NODES if state.opened else NODES
            assert len(there) >= self.policy.fraction * len(expected)
        self.append(
            RoundSealed(
                round=state.round,
                node_ids=sorted(state.deltas),
                carried=sorted(state.carried),
                closed_by=found.closed_by,
                quorum=found.quorum,
                grace_s=found.grace_s,
            )
        )

    def merge(self) -> None:
        """Merge what was sealed: whatever came since is not among it."""
        state, at_the_seal = self.state, FederationState()
        for entry in self.entries:
            at_the_seal = after(at_the_seal, entry)
            if isinstance(entry.event, RoundSealed) and entry.event.round == state.round:
                frozen = at_the_seal
        facts = [state.accepted(node_id) for node_id in state.node_ids] + [*map(state.late, state.carried_in)]
        digests = [fact.statement_digest for fact in facts if fact is not None]
        assert len(digests) == len(facts)
        entries = [*frozen.deltas.values(), *frozen.carried.values()]
        assert set(digests) == {entry.event.statement_digest for entry in entries}  # type: ignore[union-attr]
        for fact in facts:
            assert fact is not None
            assert 0 <= state.round - fact.round <= self.policy.max_staleness
        self.append(MergeFinished(round=state.round, version=ZERO, update_root=ZERO, record_envelope="{}"))
        self.merged.update(digests)

    def fail(self, reason: str) -> None:
        """Give the round up: what was delivered in time for it is not merged, and every node is told that it failed."""
        self.given_up |= {fact.statement_digest for node in self.state.deltas if (fact := self.state.accepted(node))}
        self.append(RoundFailed(round=self.state.round, reason=reason))

    @precondition(lambda self: self.state.phase in {Phase.SEALED, Phase.MERGING})
    @rule()
    def screening_refuses(self) -> None:
        self.fail("screened out")

    # What operators do

    @rule()
    def pause_or_resume(self) -> None:
        if self.state.paused_at_s is None:
            self.append(RoundsPaused(reason="r"))
        else:
            self.append(RoundsResumed(reason="r"))

    @precondition(lambda self: self.state.phase == Phase.OPEN)
    @rule(extra_s=st.floats(-60, 60))
    def extend(self, extra_s: float) -> None:
        self.append(DeadlineExtended(round=self.state.round, extra_s=extra_s, reason="r"))

    @precondition(
        lambda self: (
            self.state.phase == Phase.OPEN and len(nodes_there(self.state, self.policy)) >= self.policy.min_nodes
        )
    )
    @rule()
    def close(self) -> None:
        self.append(RoundCutShort(round=self.state.round, reason="r"))

    @precondition(lambda self: self.state.phase == Phase.FAILED and not self.state.is_retried)
    @rule()
    def retry(self) -> None:
        self.append(RetryOrdered(round=self.state.round, reason="r"))

    @precondition(
        lambda self: len(self.state.merges) > 1 and self.state.phase in {Phase.OPEN, Phase.PUBLISHED, Phase.FAILED}
    )
    @rule(choice=st.integers(0, 4))
    def roll_back(self, choice: int) -> None:
        rounds = [0, *(merge.round for merge in self.state.merges)]
        if self.state.phase == Phase.OPEN:
            self.fail("rolled back")
        self.given_up |= set(self.state.carried) - set(self.merged)
        to_round = rounds[choice % len(rounds)]
        self.append(RolledBack(round=self.state.round, to_round=to_round, version=ZERO, reason="r", envelope="{}"))

    # What is promised

    @invariant()
    def who_waits_knows_until_when(self) -> None:
        def due_at(at_s: float) -> bool:
            return next_action(self.state, self.policy, NODES, at_s) not in {Action.WAIT, Action.FINISH}

        if due_at(self.now_s):
            return
        until_s = next_due_s(self.state, self.policy, NODES, self.now_s)
        if until_s is None:
            assert not any(due_at(self.now_s + ahead_s) for ahead_s in (1.0, 10.0, 1e6))
        else:
            assert due_at(until_s)
            assert not due_at(self.now_s + 0.99 * (until_s - self.now_s))

    @invariant()
    def no_round_is_published_twice(self) -> None:
        events = [entry.event for entry in self.entries]
        for kind in (MergeFinished, RoundPublished):
            numbers = [event.round for event in events if isinstance(event, kind)]
            assert numbers == sorted(set(numbers))

    @invariant()
    def no_delta_counts_twice_and_none_that_was_acknowledged_is_lost(self) -> None:
        assert not self.merged or max(self.merged.values()) == 1
        held = {fact.statement_digest for node in self.state.deltas if (fact := self.state.accepted(node))}
        held |= set(self.state.carried)
        for digest in self.accepted:
            assert digest in held or digest in self.merged or digest in self.given_up
        assert not self.given_up & self.merged.keys()

    @invariant()
    def the_ledger_alone_says_all_of_it(self) -> None:
        assert replay(self.entries) == self.state


TestRounds = Rounds.TestCase
TestRounds.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
