"""The federation's memory while it runs: the ledger, the state it adds up to, an index, and a lock around all three."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from fedmerge.events import DeltaAccepted, Event, FederationCreated, MemberAdmitted, MergeFinished, RoundOpened
from fedmerge.rounds.state import FederationState, Merge, after
from fedmerge.statements import MergeRecord, ModelRef, Receipt, RoundSpec, Statement
from fedmerge.statements.handover import follow_line
from fedmerge.store.entries import LedgerEntry
from fedmerge.trust.sign import PublicKey, SigningKey, claimed_signer

if TYPE_CHECKING:
    from fedmerge.store.ledger import Ledger  # needs a database's library, which who only verifies may not have


@dataclass
class Index:
    """What is asked about old events again and again, so that they need not be read for it.

    Of everybody who was ever admitted the organisation, and of everybody who delivered the public key (PEM), by key id;
    of deltas the event that they were accepted by, by statement digest; and the roots of what was published.
    """

    organisations: dict[str, str] = field(default_factory=dict)
    node_keys: dict[str, str] = field(default_factory=dict)
    deltas: dict[str, int] = field(default_factory=dict)
    published: set[str] = field(default_factory=set)

    def add(self, entry: LedgerEntry) -> None:
        """Take up an event."""
        match entry.event:
            case MemberAdmitted(node_id=node_id, organisation=organisation):
                self.organisations[node_id] = organisation
            case DeltaAccepted(node_id=node_id, node_key=node_key, statement_digest=digest):
                self.node_keys[node_id] = node_key
                self.deltas[digest] = entry.number
            case MergeFinished(update_root=root, step_roots=step_roots):
                self.published |= {root, *step_roots}
            case _:
                pass


class Journal:
    """Appends events and keeps `state` and `index` in step with them.

    `key` is the coordinator's; what the ledger holds under its signature, or that of one of `own_keys` that handed over
    to it, is verified again when it is read.
    """

    def __init__(self, ledger: Ledger, key: SigningKey, clock: Callable[[], float]) -> None:
        self.key = key
        self.lock = threading.RLock()
        self.ledger = ledger
        self.state, self.index = FederationState(), Index()
        for entry in ledger.entries:
            self._follow(entry)
        self.on_change: list[Callable[[], None]] = []
        self.clock = clock
        # A key is handed over while no coordinator runs, so these stay.
        self.own_keys = own_keys(self.state) or {key.public.key_id: key.public}
        # A record has a line for each node, and each node asks for it.
        self.as_now = lru_cache(maxsize=4)(self._as_now)
        self.record_envelope = lru_cache(maxsize=2)(self._record_envelope)

    def append(self, *events: Event, ends_upload: str | None = None) -> None:
        """Commit events, one at least, all or none of them, and let the listeners know."""
        with self.lock:
            for entry in self.ledger.append(*events, at_s=self.clock(), ends_upload=ends_upload):
                self._follow(entry)
        for notify in list(self.on_change):
            notify()

    def _follow(self, entry: LedgerEntry) -> None:
        self.state = after(self.state, entry)
        self.index.add(entry)

    @property
    def created(self) -> FederationCreated:
        """The first event; only there once the federation was created."""
        assert self.state.created is not None
        return self.state.created

    def _as_now(self, kind: type[Statement], envelope: str) -> bytes:
        """Return what the coordinator said under its present key: nodes that know that one take no other's word."""
        if claimed_signer(envelope.encode(), where=kind.kind) == self.key.public.key_id:
            return envelope.encode()
        _, signed = kind.open(envelope.encode(), self.own_keys, where=kind.kind)
        return self.key.sign(kind.payload_type(), signed.payload)

    def spec(self) -> RoundSpec | None:
        """The current round's spec; None before the first round."""
        return None if self.state.opened is None else self.spec_in(self.state.opened)

    def plan(self, round_number: int) -> RoundSpec:
        """The spec of the current round, or of an earlier one that did not fail."""
        return self.spec_in(self.state.plans[round_number])

    def spec_in(self, opened: RoundOpened) -> RoundSpec:
        """The spec that an event holds."""
        return RoundSpec.open(opened.spec_envelope.encode(), self.own_keys, where="round spec")[0]

    def record(self) -> MergeRecord | None:
        """The record of the merge that made the present version; None for the base."""
        return None if self.state.current is None else self._record_in(self.state.current)

    def _record_in(self, merge: Merge) -> MergeRecord:
        return MergeRecord.open(self.record_envelope(merge).encode(), self.own_keys, where="merge record")[0]

    def _record_envelope(self, merge: Merge) -> str:
        return merge.record_envelope(self.ledger.entries)

    def model(self) -> ModelRef:
        """The model version to go on from."""
        return self.model_of(self.state.current.round if self.state.current else 0)

    def model_of(self, round_number: int) -> ModelRef:
        """The model version that a round made; 0 is the base."""
        for merge in self.state.merges:
            if merge.round == round_number:
                return self._record_in(merge).model
        base = self.created.base_digest
        return ModelRef(digest=base, base_digest=base, updates=[])


def receipt_of(entry: LedgerEntry, created: FederationCreated) -> Receipt:
    """Return the receipt of a delta, whose acceptance `entry` is; signed, it is the same bytes each time."""
    fact = entry.event
    assert isinstance(fact, DeltaAccepted)
    return Receipt(
        federation=created.federation,
        run=created.run,
        round=fact.round,
        node_id=fact.node_id,
        statement_digest=fact.statement_digest,
        event=entry.number,
        event_hash=entry.hash,
    )


def own_keys(state: FederationState) -> dict[str, PublicKey]:
    """Return the coordinator's keys by id, the present one last; none before there is a federation.

    Raises `InvalidHandover` when one did not hand over to the next.
    """
    if state.created is None:
        return {}
    first = PublicKey.from_pem(state.created.coordinator_key, where="the coordinator's key")
    line = follow_line(first, (("the ledger's hand-over", text) for text in state.handovers))
    return {key.key_id: key for key in line}


def merged_rounds(state: FederationState, entries: Sequence[LedgerEntry], node_id: str) -> list[int]:
    """Return the rounds whose model has a delta that a key signed, or one that it replaced; `state` is of `entries`."""
    own, found = own_keys(state), list[int]()
    for merge in state.merges:
        record, _ = MergeRecord.open(merge.record_envelope(entries).encode(), own, where="merge record")
        accepted = {contribution.node_id for contribution in record.contributions if contribution.accepted}
        if accepted & state.keys_of(node_id):
            found.append(record.round)
    return found
