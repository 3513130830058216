"""What a ledger says about its rounds, one row each: for people who want to know how a federation fares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from fedmerge.errors import UntrustedKey
from fedmerge.events import (
    DeadlineExtended,
    DeltaAccepted,
    MergeFinished,
    MetricsReported,
    RolledBack,
    RoundCutShort,
    RoundFailed,
    RoundOpened,
    RoundPublished,
    RoundSealed,
)
from fedmerge.rounds import FederationState, Phase, after
from fedmerge.sign import PublicKey
from fedmerge.statements import MetricsStatement
from fedmerge.store.ledger import LedgerEntry


@dataclass
class RoundRow:
    """One round. Times are in seconds since the epoch; `received_bytes` are those of all its deltas, late ones too.

    `metrics` are means over the nodes that evaluated the round's model. `notes` is what the operator did, and why.
    """

    round: int
    phase: str
    attempt: int
    opened_at_s: float
    sealed_at_s: float | None = None
    published_at_s: float | None = None
    num_deltas: int = 0
    num_late: int = 0
    received_bytes: int = 0
    version: str = ""
    closed_by: str = ""
    failure: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Overview:
    """The rounds so far, and whether they are paused."""

    rounds: list[RoundRow]
    is_paused: bool

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return asdict(self)


def overview(entries: Iterable[LedgerEntry], trusted: Mapping[str, PublicKey]) -> Overview:
    """Return what the ledger says. Metrics of nodes that are not trusted any more are left out."""
    rows: dict[int, RoundRow] = {}
    scores: dict[int, dict[str, dict[str, float]]] = {}
    state = FederationState()
    for entry in entries:
        state = after(state, entry)
        event = entry.event
        if isinstance(event, RoundOpened):
            notes = rows[event.round].notes if event.round in rows else []
            rows[event.round] = RoundRow(event.round, Phase.OPEN, state.attempt, entry.at_s, notes=notes)
        if isinstance(event, MetricsReported):
            _add_scores(scores, event, trusted)
        if not rows:
            continue
        row = rows[state.round]
        row.phase = state.phase
        match event:
            case DeltaAccepted():
                made_for = rows[event.round]
                made_for.received_bytes += event.payload_bytes
                made_for.num_deltas += 1
                made_for.num_late += event.statement_digest in state.carried
            case RoundSealed(closed_by=closed_by):
                row.sealed_at_s, row.closed_by = entry.at_s, closed_by
            case MergeFinished(version=version):
                row.version = version
            case RoundPublished():
                row.published_at_s = entry.at_s
            case RoundFailed(reason=reason):
                row.failure = reason
            case RoundCutShort(reason=reason):
                row.notes.append(f"closed by the operator: {reason}")
            case DeadlineExtended(extra_s=extra_s, reason=reason):
                row.notes.append(f"deadline moved by {extra_s:g} s: {reason}")
            case RolledBack(to_round=to_round, reason=reason):
                row.notes.append(f"rolled back to round {to_round}: {reason}")
            case _:
                pass
    for number, row in rows.items():
        found = list(scores.get(number, {}).values())
        row.metrics = {
            name: fmean(values[name] for values in found if name in values)
            for name in sorted({name for values in found for name in values})
        }
    return Overview(list(rows.values()), is_paused=state.paused_at_s is not None)


def _add_scores(
    scores: dict[int, dict[str, dict[str, float]]], event: MetricsReported, trusted: Mapping[str, PublicKey]
) -> None:
    if event.candidate is not None:
        return
    try:
        statement, _ = MetricsStatement.open(event.envelope.encode(), trusted, where="metrics statement")
    except UntrustedKey:
        return
    if statement.model == "global":
        scores.setdefault(statement.round, {})[statement.node_id] = statement.values
