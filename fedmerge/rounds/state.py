"""The round as a pure state machine: `after(state, entry)` says what an event changes; `rounds.policy` what is due.

    planned -> open -> sealed -> merging -> publishing -> published -> open (the next round) ...
                 |     |    ^
                 |     v    |
                 |   searching (nodes score candidate merges; once for each generation, if the plan has a search)
                 |
                 \\-> failed -> open (the same round again, when the operator has it tried again)

Nothing here reads a clock or touches a disk: times come in with the ledger's entries, in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from fedmerge.errors import DigestMismatch
from fedmerge.events import (
    CandidatesProposed,
    CandidatesScored,
    CheckpointCosigned,
    DeadlineExtended,
    DeltaAccepted,
    DeltaRejected,
    DeltasScreened,
    FederationCreated,
    HandedOver,
    KeyRotated,
    MemberAdmitted,
    MemberRevoked,
    MergeFinished,
    MergeStarted,
    MetricsReported,
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
from fedmerge.store.entries import LedgerEntry


class Phase(StrEnum):
    """Where the current round stands."""

    PLANNED = "planned"
    OPEN = "open"
    SEALED = "sealed"
    SEARCHING = "searching"
    MERGING = "merging"
    PUBLISHING = "publishing"
    PUBLISHED = "published"
    FAILED = "failed"


@dataclass(frozen=True)
class Merge:
    """A merge: its round, the version that it made, and the number of its event, which has the signed record."""

    round: int
    version: str
    event: int

    def record_envelope(self, entries: Sequence[LedgerEntry]) -> str:
        """Return the merge record's envelope, out of the ledger's events."""
        event = entries[self.event].event
        assert isinstance(event, MergeFinished)
        return event.record_envelope


@dataclass(frozen=True)
class FederationState:
    """All that the ledger says, in the form that the coordinator uses it.

    `attempt` counts how often the current round was opened. `plans` are the rounds that deltas may still come for, but
    for failed attempts.
    `carried` are late deltas by statement digest, of which those in `carried_in` are part of the sealed round and the
    others wait for the next; `delivered` has round and node of all that may still be sent twice, and `rejected`, by
    statement digest, what could not be decoded. `screened` are the verdicts on the sealed round's deltas.

    `proposals` are the round's generations of candidates, `answers` the metrics statements about them that count, by
    candidate and node: a judge's first one before the generation was closed.

    `current` is the merge that made the version to go on from, None for the base, and `published` the one that nodes
    were told of. By the operator, the rounds are paused since `paused_at_s`, the open round's deadline is `extra_s`
    later, the open round is cut short, and one that failed is to be tried again.

    `members` are the keys that are trusted, by id, and `predecessors` has the key that a key replaced. `merge_event` is
    the number of the newest merge's event, `cosigned` the size of log that each member cosigned last. `handovers` are
    those of the coordinator's key, as they travel.
    """

    created: FederationCreated | None = None
    round: int = 0
    attempt: int = 0
    phase: Phase = Phase.PLANNED
    opened: RoundOpened | None = None
    opened_at_s: float = 0.0
    deltas: Mapping[str, LedgerEntry] = field(default_factory=dict)
    sealed_hash: str = ""
    node_ids: tuple[str, ...] = ()
    plans: Mapping[int, RoundOpened] = field(default_factory=dict)
    carried: Mapping[str, LedgerEntry] = field(default_factory=dict)
    carried_in: tuple[str, ...] = ()
    delivered: frozenset[tuple[int, str]] = frozenset()
    rejected: Mapping[str, DeltaRejected] = field(default_factory=dict)
    screened: DeltasScreened | None = None
    proposals: tuple[LedgerEntry, ...] = ()
    answers: Mapping[tuple[str, str], str] = field(default_factory=dict)
    merges: tuple[Merge, ...] = ()
    current: Merge | None = None
    published: Merge | None = None
    failure: str = ""
    members: Mapping[str, MemberAdmitted] = field(default_factory=dict)
    predecessors: Mapping[str, str] = field(default_factory=dict)
    paused_at_s: float | None = None
    extra_s: float = 0.0
    is_cut_short: bool = False
    is_retried: bool = False
    merge_event: int = 0
    cosigned: Mapping[str, int] = field(default_factory=dict)
    handovers: tuple[str, ...] = ()

    def accepted(self, node_id: str) -> DeltaAccepted | None:
        """Return what the node delivered in the current round, be it under a key that this one has replaced since."""
        for key_id in self.keys_of(node_id):
            entry = self.deltas.get(key_id)
            if entry is not None and isinstance(entry.event, DeltaAccepted):
                return entry.event
        return None

    def num_witnesses(self) -> int:
        """Return how many trusted members cosigned a log that has the newest merge in it."""
        return sum(size > self.merge_event for node_id, size in self.cosigned.items() if node_id in self.members)

    def keys_of(self, node_id: str) -> set[str]:
        """Return a key and those that it replaced, one after the other, by id."""
        found = {node_id}
        while node_id in self.predecessors:
            node_id = self.predecessors[node_id]
            found.add(node_id)
        return found

    def late(self, statement_digest: str) -> DeltaAccepted | None:
        """Return a delta that was accepted too late for its round, and is not merged yet."""
        entry = self.carried.get(statement_digest)
        return entry.event if entry is not None and isinstance(entry.event, DeltaAccepted) else None

    def has_delivered(self, round_number: int, node_id: str) -> bool:
        """Whether the node, under this key or one that it replaced, delivered for a round that takes deltas still."""
        return any((round_number, key_id) in self.delivered for key_id in self.keys_of(node_id))

    def staleness(self, round_number: int) -> int | None:
        """Return how many rounds late a delta for a round would be now: 0 in time, None when it is not taken."""
        plan = self.plans.get(round_number)
        if plan is None:
            return None
        if self.phase == Phase.OPEN and round_number == self.round:
            return 0
        merged_in = self.round if self.phase in {Phase.OPEN, Phase.FAILED} else self.round + 1
        late = merged_in - round_number
        return late if 0 < late <= plan.max_staleness else None

    def generations(self) -> list[CandidatesProposed]:
        """Return the round's generations of candidates so far."""
        return [entry.event for entry in self.proposals if isinstance(entry.event, CandidatesProposed)]


_LEGAL: dict[type, set[Phase]] = {
    FederationCreated: {Phase.PLANNED},
    RoundOpened: {Phase.PLANNED, Phase.PUBLISHED, Phase.FAILED},
    DeltaAccepted: set(Phase) - {Phase.PLANNED},
    DeltaRejected: set(Phase) - {Phase.PLANNED},
    RoundSealed: {Phase.OPEN},
    DeltasScreened: {Phase.SEALED, Phase.MERGING},
    CandidatesProposed: {Phase.SEALED},
    CandidatesScored: {Phase.SEARCHING},
    MergeStarted: {Phase.SEALED},
    MergeFinished: {Phase.MERGING},
    RoundPublished: {Phase.PUBLISHING},
    RoundFailed: {Phase.OPEN, Phase.SEALED, Phase.MERGING},
    RoundsPaused: set(Phase),
    RoundsResumed: set(Phase),
    RoundCutShort: {Phase.OPEN},
    DeadlineExtended: {Phase.OPEN},
    RetryOrdered: {Phase.FAILED},
    RolledBack: {Phase.PUBLISHED, Phase.FAILED},
    MetricsReported: set(Phase),
    MemberAdmitted: set(Phase),
    MemberRevoked: set(Phase),
    KeyRotated: set(Phase),
    HandedOver: set(Phase),
    CheckpointCosigned: set(Phase),
}


def after(state: FederationState, entry: LedgerEntry) -> FederationState:
    """Return the state once `entry` has happened.

    Raises `DigestMismatch` when the event can't happen in this state: then no coordinator wrote this ledger.
    """
    event = entry.event
    if state.phase not in _LEGAL[type(event)]:
        raise DigestMismatch(f"ledger event {entry.number}: {event.kind} can't happen while the round is {state.phase}")
    match event:
        case FederationCreated():
            return replace(state, created=event)
        case RoundOpened():
            taken = _takes_late(state, event.round)
            return replace(
                state,
                round=event.round,
                attempt=state.attempt + 1 if event.round == state.round else 1,
                plans={number: plan for number, plan in state.plans.items() if number in taken} | {event.round: event},
                phase=Phase.OPEN,
                opened=event,
                opened_at_s=entry.at_s,
                deltas={},
                node_ids=(),
                carried=_still_carried(state),
                carried_in=(),
                delivered=frozenset(pair for pair in state.delivered if pair[0] in taken),
                rejected={digest: each for digest, each in state.rejected.items() if each.round in taken},
                sealed_hash="",
                screened=None,
                proposals=(),
                answers={},
                failure="",
                extra_s=0.0,
                is_cut_short=False,
                is_retried=False,
            )
        case DeltaAccepted():
            return _with_delta(state, entry, event)
        case RoundSealed():
            return replace(
                state,
                phase=Phase.SEALED,
                node_ids=tuple(event.node_ids),
                carried_in=tuple(event.carried),
                sealed_hash=entry.hash,
            )
        case DeltasScreened():
            return replace(state, screened=event)
        case CandidatesProposed():
            return replace(state, phase=Phase.SEARCHING, proposals=(*state.proposals, entry))
        case CandidatesScored():
            return replace(state, phase=Phase.SEALED)
        case MetricsReported():
            return _with_answer(state, event)
        case MemberAdmitted():
            return replace(state, members={**state.members, event.node_id: event})
        case MemberRevoked():
            return _without_member(state, event.node_id)
        case CheckpointCosigned():
            return replace(state, cosigned={**state.cosigned, event.node_id: event.size})
        case KeyRotated():
            members = {key_id: member for key_id, member in state.members.items() if key_id != event.node_id}
            predecessors = {**state.predecessors, event.new_node_id: event.node_id}
            return replace(state, members=members, predecessors=predecessors)
        case HandedOver():
            return replace(state, handovers=(*state.handovers, event.handover))
        case MergeStarted():
            return replace(state, phase=Phase.MERGING)
        case MergeFinished():
            merge = Merge(event.round, event.version, entry.number)
            return replace(
                state,
                phase=Phase.PUBLISHING,
                merges=(*state.merges, merge),
                current=merge,
                merge_event=entry.number,
            )
        case RoundPublished():
            return replace(state, phase=Phase.PUBLISHED, published=state.current)
        case RoundFailed():
            return replace(
                state,
                phase=Phase.FAILED,
                failure=event.reason,
                plans={number: plan for number, plan in state.plans.items() if number != state.round},
                delivered=frozenset(pair for pair in state.delivered if pair[0] != state.round),
                rejected={digest: each for digest, each in state.rejected.items() if each.round != state.round},
            )
        case DeltaRejected():
            return replace(state, rejected={**state.rejected, event.statement_digest: event})
        case RoundsPaused() | RoundsResumed():
            return _paused(state, entry, event)
        case RoundCutShort():
            return replace(state, is_cut_short=True)
        case DeadlineExtended():
            return replace(state, extra_s=state.extra_s + event.extra_s)
        case RetryOrdered():
            return replace(state, is_retried=True)
        case RolledBack():
            return _rolled_back(state, entry, event)


def _without_member(state: FederationState, node_id: str) -> FederationState:
    """Forget a revoked key, with what it delivered under this key or an earlier one to a round that can do without."""
    revoked = state.keys_of(node_id)
    state = replace(state, members={key_id: each for key_id, each in state.members.items() if key_id not in revoked})
    kept = {
        digest: entry
        for digest, entry in state.carried.items()
        if not (isinstance(entry.event, DeltaAccepted) and entry.event.node_id in revoked)
    }
    if state.phase == Phase.OPEN:
        deltas = {key_id: entry for key_id, entry in state.deltas.items() if key_id not in revoked}
        return replace(state, deltas=deltas, carried=kept)
    if state.phase == Phase.SEALED and not state.proposals:
        node_ids = tuple(key_id for key_id in state.node_ids if key_id not in revoked)
        carried_in = tuple(digest for digest in state.carried_in if digest in kept)
        return replace(state, node_ids=node_ids, carried_in=carried_in, carried=kept)
    # What is being merged stays in; what waits for the next merge does not.
    merged = {digest: entry for digest, entry in state.carried.items() if digest in state.carried_in}
    return replace(state, carried=kept | merged)


def _with_delta(state: FederationState, entry: LedgerEntry, event: DeltaAccepted) -> FederationState:
    staleness = state.staleness(event.round)
    if staleness is None or state.has_delivered(event.round, event.node_id):
        raise DigestMismatch(
            f"ledger event {entry.number}: a delta of round {event.round} is late, or was there before "
            f"(round {state.round} is {state.phase})"
        )
    delivered = state.delivered | {(event.round, event.node_id)}
    if staleness == 0:
        return replace(state, delivered=delivered, deltas={**state.deltas, event.node_id: entry})
    return replace(state, delivered=delivered, carried={**state.carried, event.statement_digest: entry})


def _paused(state: FederationState, entry: LedgerEntry, event: RoundsPaused | RoundsResumed) -> FederationState:
    if isinstance(event, RoundsPaused) == (state.paused_at_s is not None):
        raise DigestMismatch(f"ledger event {entry.number}: the rounds are paused already, or are not paused")
    if state.paused_at_s is None:
        return replace(state, paused_at_s=entry.at_s)
    # A clock that was set back makes no deadline earlier.
    paused_s = max(0.0, entry.at_s - state.paused_at_s) if state.phase == Phase.OPEN else 0.0
    return replace(state, paused_at_s=None, extra_s=state.extra_s + paused_s)


def _rolled_back(state: FederationState, entry: LedgerEntry, event: RolledBack) -> FederationState:
    merge = next((merge for merge in state.merges if merge.round == event.to_round), None)
    if merge is None and event.to_round != 0:
        raise DigestMismatch(f"ledger event {entry.number}: round {event.to_round} has no version to go back to")
    return replace(
        state,
        current=merge,
        published=merge,
        is_retried=state.phase == Phase.FAILED,
        plans={},
        carried={},
        carried_in=(),
    )


def _still_carried(state: FederationState) -> dict[str, LedgerEntry]:
    """Return the late deltas that were not merged: all of them, if the round that they were part of failed."""
    merged = state.carried_in if state.phase == Phase.PUBLISHED else ()
    return {digest: entry for digest, entry in state.carried.items() if digest not in merged}


def _takes_late(state: FederationState, round_number: int) -> set[int]:
    """Return the rounds of which deltas may still come when a round opens."""
    return {number for number, plan in state.plans.items() if number + plan.max_staleness >= round_number}


def _with_answer(state: FederationState, event: MetricsReported) -> FederationState:
    generation = state.generations()[-1] if state.phase == Phase.SEARCHING else None
    if (
        generation is None
        or event.candidate not in generation.digests
        or event.node_id not in generation.judges
        or (event.candidate, event.node_id) in state.answers
    ):
        return state
    return replace(state, answers={**state.answers, (event.candidate, event.node_id): event.envelope})


def replay(entries: Iterable[LedgerEntry]) -> FederationState:
    """Return the state that a ledger adds up to."""
    state = FederationState()
    for entry in entries:
        state = after(state, entry)
    return state
