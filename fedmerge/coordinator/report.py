"""How a federation goes, read from its state folder: the retention matrix, and how the deltas of a round interfere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmerge.aggregation.aggregate import open_delta
from fedmerge.config import Config
from fedmerge.delta.task_vector import delta_schema
from fedmerge.errors import InputError
from fedmerge.events import RoundOpened
from fedmerge.merge import Recipe
from fedmerge.merge.measure import Interference, measure
from fedmerge.merge.statistics import task_vector_of
from fedmerge.rounds.journal import own_keys
from fedmerge.rounds.overview import read_evaluations
from fedmerge.rounds.retention import RetentionMatrix, retention_matrix
from fedmerge.rounds.state import FederationState, replay
from fedmerge.statements import MergeRecord, RoundSpec
from fedmerge.store.blobs import BlobStore
from fedmerge.store.database import Database
from fedmerge.store.entries import LedgerEntry
from fedmerge.store.ledger import Ledger
from fedmerge.tensors import Checkpoint
from fedmerge.trust.keys import TrustStore


@dataclass(frozen=True)
class Report:
    """A federation's `retention`, None when nobody scored anything, and the `interference` of its newest round."""

    federation: str
    num_rounds: int
    retention: RetentionMatrix | None
    interference: Interference

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return {
            "federation": self.federation,
            "num_rounds": self.num_rounds,
            "retention": self.retention.to_dict() if self.retention else None,
            "interference": self.interference.to_dict(),
        }


def read_report(config: Config, metric: str = "auto") -> Report:
    """Return what a federation's ledger and deltas say, also while it runs; nodes are called by their trusted names.

    `metric` is one for `retention_matrix`. Raises `InputError` when no round was merged yet, or nobody reported the
    metric that was asked for.
    """
    state_dir = config.federation.state
    if not state_dir.is_dir():
        raise InputError(f"{state_dir}: no federation's state", hint="start one with: fedmerge serve")
    ledger = Ledger(Database(config.database_url()))
    try:
        state = replay(ledger.entries)
        if state.created is None or not state.merges:
            raise InputError(f"{state_dir}: no round was merged yet")
        names = TrustStore(config.federation.trusted).names()
        evaluations = read_evaluations(ledger.entries, state, names)
        asked = metric != "auto" or bool(evaluations)
        return Report(
            federation=state.created.federation,
            num_rounds=len(state.merges),
            retention=retention_matrix(evaluations, metric) if asked else None,
            interference=_interference(ledger.entries, state, config, names),
        )
    finally:
        ledger.close()


def _interference(
    entries: Sequence[LedgerEntry], state: FederationState, config: Config, names: Mapping[str, str]
) -> Interference:
    """Return how the deltas that the newest merge took in stand to each other."""
    own, blobs = own_keys(state), BlobStore(config.federation.state / "blobs")
    record, _ = MergeRecord.open(state.merges[-1].record_envelope(entries).encode(), own, where="merge record")
    opened = next(
        entry.event
        for entry in reversed(entries)
        if isinstance(entry.event, RoundOpened) and entry.event.spec_digest == record.spec_digest
    )
    spec, _ = RoundSpec.open(opened.spec_envelope.encode(), own, where="round spec")
    published = config.federation.state / "models" / f"round-{record.round:04d}"
    schema = delta_schema(Checkpoint(published).schema)
    kind = Recipe.from_dict(spec.merge).statistics
    deltas = {
        names.get(one.node_id, one.node_id[:12]): open_delta(spec, one.node_id, blobs.path(one.payload_root), schema)
        for one in record.contributions
        if one.accepted
    }
    return measure({name: task_vector_of(delta, kind) for name, delta in sorted(deltas.items())})
