"""What a ledger says about its rounds, one row each: for people who want to know how a federation fares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from fedmerge.errors import InputError, UntrustedKey
from fedmerge.events import (
    DeadlineExtended,
    DeltaAccepted,
    DeltaRejected,
    DeltasScreened,
    MergeFinished,
    MetricsReported,
    RolledBack,
    RoundCutShort,
    RoundFailed,
    RoundOpened,
    RoundPublished,
    RoundSealed,
)
from fedmerge.rounds.retention import Evaluation, RetentionMatrix, retention_matrix
from fedmerge.rounds.state import FederationState, Phase, after
from fedmerge.statements import MetricsStatement
from fedmerge.store.entries import LedgerEntry
from fedmerge.trust.sign import PublicKey


@dataclass
class RoundRow:
    """One round. Times are in seconds since the epoch; `received_bytes` are those of all its deltas, late ones too.

    `metrics` are means over the nodes that evaluated the round's model. `notes` is what the operator did, and why,
    `refused` why screening left deltas out, and `rejected` why deltas could not be decoded, by node.
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
    refused: dict[str, str] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Overview:
    """The rounds so far, whether they are paused, and what their merges kept of what nodes knew.

    `num_witnesses` is how many members cosigned a log with the newest merge in it. `retention` is None where nobody
    scored models of their own by accuracy or loss.
    """

    rounds: list[RoundRow]
    is_paused: bool
    num_witnesses: int
    retention: RetentionMatrix | None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return asdict(self)


def overview(
    entries: Sequence[LedgerEntry], trusted: Mapping[str, PublicKey], names: Mapping[str, str] | None = None
) -> Overview:
    """Return what the ledger says, with nodes called by their `names`, by key id.

    Metrics of nodes that are not trusted any more are left out, but for those in the retention matrix.
    """
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
            case DeltaRejected():
                rows[event.round].rejected[event.node_id] = event.detail
            case RoundSealed(closed_by=closed_by):
                row.sealed_at_s, row.closed_by = entry.at_s, closed_by
            case DeltasScreened(verdicts=verdicts):
                row.refused = {verdict.node_id: verdict.detail for verdict in verdicts if not verdict.accepted}
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
    evaluations = read_evaluations(entries, state, names or {})
    try:
        retention = retention_matrix(evaluations) if any(one.model == "own" for one in evaluations) else None
    except InputError:  # nodes reported other figures
        retention = None
    return Overview(list(rows.values()), state.paused_at_s is not None, state.num_witnesses(), retention)


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


def read_evaluations(
    entries: Sequence[LedgerEntry], state: FederationState, names: Mapping[str, str]
) -> list[Evaluation]:
    """Return what nodes that delivered something reported of published versions and of their own fine-tunes.

    `state` is what the ledger's `entries` add up to, `names` are what to call nodes, by key id; the others go by the
    beginning of that.
    """
    versions = {merge.round: merge.version for merge in state.merges}
    if state.created is not None:
        versions[0] = state.created.base_digest
    facts = [entry.event for entry in entries]
    # The keys that they delivered with: some may have left the trusted ones since.
    keys = {
        fact.node_id: PublicKey.from_pem(fact.node_key, where=f"node {fact.node_id[:12]}")
        for fact in facts
        if isinstance(fact, DeltaAccepted)
    }
    found = []
    for fact in facts:
        if isinstance(fact, MetricsReported) and fact.node_id in keys and fact.candidate is None:
            said, _ = MetricsStatement.open(fact.envelope.encode(), keys, where="metrics statement")
            if said.model == "own" or versions.get(said.round) == said.digest:
                name = names.get(said.node_id, said.node_id[:12])
                found.append(Evaluation(name, said.round, said.model, said.values))
    return [one for one in found if one.round in versions]
