"""The coordinator's side of the transparency log: checkpoints of the ledger, proofs about it, members' cosignatures."""

from __future__ import annotations

import logging

from fedmerge.errors import BadSignature, InvalidProof
from fedmerge.events import CheckpointCosigned
from fedmerge.rounds.journal import Journal
from fedmerge.store.entries import entries_from
from fedmerge.transparency.log import (
    Growth,
    LogCheckpoint,
    check_cosignature,
    consistency_proof,
    inclusion_proof,
    log_leaf,
    log_origin,
    open_by_any,
    sign_checkpoint,
)
from fedmerge.transparency.merkle import MerkleTree
from fedmerge.trust.keys import TrustStore

log = logging.getLogger(__name__)


class LogKeeper:
    """The log of a federation's ledger."""

    def __init__(self, journal: Journal, trust: TrustStore) -> None:
        self._journal = journal
        self._trust = trust
        self._tree = MerkleTree()
        # The size of the log after its newest event that is no cosignature, and the checkpoint signed last.
        self._told_size = 0
        self._newest = b""
        self._newest_size = -1

    def growth(self, old_size: int) -> Growth:
        """Return a checkpoint of the log, with the proof that it continues that of `old_size` events.

        It has all events up to now but for cosignatures, so that members who look one after the other cosign the same
        checkpoint, and not each a longer one. Raises `InvalidProof` when the log never was so long.
        """
        with self._journal.lock:
            now = self._size()
            if not 0 <= old_size <= now:
                raise InvalidProof(f"the log has {now} events, not {old_size}")
            if self._newest_size < max(self._told_size, old_size):
                self._newest_size = now
                self._newest = sign_checkpoint(self._checkpoint(now), self._journal.key)
            return Growth(self._newest, consistency_proof(self._tree, old_size, self._newest_size))

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """Return the proof that event `index` is among the first `size`; raise `InvalidProof` when it is not."""
        now = self._size()
        if not 0 <= index < size <= now:
            raise InvalidProof(f"the log has {now} events; there is no event {index} among the first {size}")
        return inclusion_proof(self._tree, index, size)

    def cosign(self, caller_id: str, note: bytes, cosignature: bytes) -> None:
        """Record a member's cosignature of one of this log's checkpoints. Raises `BadSignature`."""
        member = self._trust.require(caller_id)
        # Also one that was signed just before a hand-over: what counts is that the log has those events.
        checkpoint = open_by_any(note, self._journal.own_keys.values(), where="cosigned checkpoint")
        check_cosignature(note, cosignature, member.key, where="cosignature")
        if checkpoint.size > self._size() or checkpoint != self._checkpoint(checkpoint.size):
            raise BadSignature("the cosigned checkpoint is not one of this log")
        with self._journal.lock:
            if self._journal.state.cosigned.get(caller_id, 0) < checkpoint.size:
                event = CheckpointCosigned(
                    node_id=caller_id, size=checkpoint.size, note=note.decode(), cosignature=cosignature.decode()
                )
                self._journal.append(event)
        log.info("%s cosigned the log of %d events", member.name, checkpoint.size)

    def _size(self) -> int:
        """Take up what the ledger has new, and return the number of events."""
        with self._journal.lock:
            entries = self._journal.ledger.entries
            for entry in entries_from(entries, len(self._tree), len(entries)):
                self._tree.append(log_leaf(entry.hash))
                if not isinstance(entry.event, CheckpointCosigned):
                    self._told_size = len(self._tree)
            return len(self._tree)

    def _checkpoint(self, size: int) -> LogCheckpoint:
        created = self._journal.created
        return LogCheckpoint(log_origin(created.federation, created.run), size, self._tree.root(0, size))
