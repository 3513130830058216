"""What was signed on the way to a version, picked out of a ledger in order."""

from __future__ import annotations

from collections.abc import Collection, Iterable
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
from fedmerge.rounds import FederationState, after
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


def provenance_of(entries: Iterable[LedgerEntry], members: Collection[str] | None = None) -> list[Signed]:
    """Return all that was signed, in order; of enrolments and revocations those of `members`, if they are given."""
    kept: list[Signed] = []
    state = FederationState()
    for entry in entries:
        number = entry.number
        # There are thousands of these, and nothing below asks about them.
        if not isinstance(entry.event, (MemberAdmitted, DeltaAccepted, CheckpointCosigned)):
            state = after(state, entry)
        match entry.event:
            case RoundOpened(spec_envelope=envelope):
                kept.append(Signed(number, RoundSpec.kind, envelope))
            case CheckpointCosigned(note=note, cosignature=cosignature):
                kept.append(Signed(number, COSIGNATURE, note + cosignature))
            case MemberAdmitted(node_id=node_id, envelope=envelope) if members is None or node_id in members:
                kept.append(Signed(number, Enrolment.kind, envelope))
            case MemberRevoked(node_id=node_id, envelope=envelope) if members is None or node_id in members:
                kept.append(Signed(number, Revocation.kind, envelope))
            case DeltaAccepted(statement_envelope=envelope):
                kept.append(Signed(number, DeltaStatement.kind, envelope))
            case DeltaRejected(envelope=envelope):
                kept.append(Signed(number, Rejection.kind, envelope))
            case MergeStarted():
                # Only now: a search that failed led nowhere, and of what nodes reported not all counted.
                proposals = [proposal.proposal_envelope for proposal in state.generations()]
                kept += [Signed(number, Candidates.kind, envelope) for envelope in proposals]
                kept += [Signed(number, MetricsStatement.kind, envelope) for envelope in state.answers.values()]
            case MergeFinished(record_envelope=envelope):
                kept.append(Signed(number, MergeRecord.kind, envelope))
            case HandedOver(handover=handover):
                kept.append(Signed(number, Handover.kind, handover))
            case RolledBack(envelope=envelope):
                kept.append(Signed(number, Rollback.kind, envelope))
            case _:
                pass
    return kept
