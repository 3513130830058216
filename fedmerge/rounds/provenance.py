"""What was signed on the way to a version, picked out of a ledger in order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fedmerge.events import (
    CheckpointCosigned,
    DeltaAccepted,
    DeltaRejected,
    HandedOver,
    MemberAdmitted,
    MemberRevoked,
    MergeFinished,
    MergeStarted,
    RolledBack,
    RoundOpened,
)
from fedmerge.rounds.state import FederationState, after
from fedmerge.statements import (
    Candidates,
    DeltaStatement,
    Enrolment,
    Handover,
    MergeRecord,
    MetricsStatement,
    Rejection,
    Revocation,
    Rollback,
    RoundSpec,
)
from fedmerge.store.entries import LedgerEntry

COSIGNATURE = "cosignature"


class Signed(NamedTuple):
    """A signed statement: the number of the event that brought it, its kind, and the envelope, note or hand-over."""

    event: int
    kind: str
    envelope: str


class Signings:
    """Picks what was signed out of the events of a ledger, one after the other."""

    def __init__(self) -> None:
        self._state = FederationState()

    def of(self, entry: LedgerEntry) -> list[Signed]:
        """Return what an event brought."""
        number = entry.number
        # There are thousands of these, and nothing below asks about them.
        if not isinstance(entry.event, (MemberAdmitted, DeltaAccepted, CheckpointCosigned)):
            self._state = after(self._state, entry)
        match entry.event:
            case RoundOpened(spec_envelope=envelope):
                return [Signed(number, RoundSpec.kind, envelope)]
            case CheckpointCosigned(note=note, cosignature=cosignature):
                return [Signed(number, COSIGNATURE, note + cosignature)]
            case MemberAdmitted(envelope=envelope):
                return [Signed(number, Enrolment.kind, envelope)]
            case MemberRevoked(envelope=envelope):
                return [Signed(number, Revocation.kind, envelope)]
            case DeltaAccepted(statement_envelope=envelope):
                return [Signed(number, DeltaStatement.kind, envelope)]
            case DeltaRejected(envelope=envelope):
                return [Signed(number, Rejection.kind, envelope)]
            case MergeStarted():
                # Only now: a search that failed led nowhere, and of what nodes reported not all counted.
                proposals = [proposal.proposal_envelope for proposal in self._state.generations()]
                answers = [Signed(number, MetricsStatement.kind, each) for each in self._state.answers.values()]
                return [Signed(number, Candidates.kind, each) for each in proposals] + answers
            case MergeFinished(record_envelope=envelope):
                return [Signed(number, MergeRecord.kind, envelope)]
            case HandedOver(handover=handover):
                return [Signed(number, Handover.kind, handover)]
            case RolledBack(envelope=envelope):
                return [Signed(number, Rollback.kind, envelope)]
            case _:
                return []


def provenance_of(entries: Iterable[LedgerEntry]) -> list[Signed]:
    """Return all that was signed, in order."""
    signings = Signings()
    return [signed for entry in entries for signed in signings.of(entry)]
