"""Steps 7 and 8: admit a delta by its signed statement, take its payload leaf by leaf, and make it count.

An upload is named by the digest of the statement it carries, so that beginning it again, after any break on either
side, finds it where it stood. Nothing is acknowledged before it is on disk. A restart remembers uploads of which a part
is there; one that came in a single piece, and was not committed yet, is sent again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from fedmerge.coordinator.admit import admit
from fedmerge.errors import (
    BadOffset,
    ConflictingSubmission,
    InvalidDelta,
    RoundClosed,
    UnknownUpload,
    UntrustedKey,
)
from fedmerge.events import DeltaAccepted, DeltaRejected
from fedmerge.rounds.journal import Journal, receipt_of
from fedmerge.rounds.state import FederationState, Phase
from fedmerge.statements import DeltaStatement, Rejection, digest_of
from fedmerge.store.blobs import BlobStore, split_leaf_hashes
from fedmerge.store.entries import LedgerEntry
from fedmerge.store.ledger import UploadRow
from fedmerge.trust.keys import TrustStore
from fedmerge.trust.sign import PublicKey

log = logging.getLogger(__name__)

# Names in a payload are the node's; what is signed and kept of them has an end.
MAX_DETAIL_CHARACTERS = 500


@dataclass(frozen=True)
class _Upload:
    row: UploadRow
    statement: DeltaStatement
    signer: PublicKey
    leaves: list[bytes]
    # Two streams of one upload must not append at once, nor two calls commit it.
    lock: threading.Lock

    @property
    def upload_id(self) -> str:
        return self.row.upload_id


class Intake:
    """The uploads of a federation. `decode` raises `InvalidDelta` unless a payload file fits the current round."""

    def __init__(
        self,
        journal: Journal,
        blobs: BlobStore,
        trust: TrustStore,
        *,
        decode: Callable[[DeltaStatement, Path], None],
    ) -> None:
        self._journal = journal
        self._blobs = blobs
        self._trust = trust
        self._decode = decode
        self._uploads: dict[str, _Upload] = {}
        self._kept: set[str] = set()  # those that a restart remembers
        for row in journal.ledger.uploads():
            self._resume(row)
        blobs.drop_stray_parts(set(self._uploads))

    def begin(self, caller_id: str, envelope: bytes, leaf_hashes: bytes) -> tuple[str, int]:
        """Verify a delta statement and return its upload id and how many bytes of the payload are stored already.

        Raises what `admit` raises, `BadSignature`, `UntrustedKey`, `DigestMismatch` or `ConflictingSubmission`.
        """
        statement, signed = DeltaStatement.open(envelope, self._trust.keys(), where="delta statement")
        upload_id = digest_of(signed.payload)
        with self._journal.lock:
            state, spec = self._journal.state, self._journal.spec()
            if spec is None or state.opened is None:
                raise RoundClosed("no round has been opened yet", hint="wait for the first round")
            is_over = not self._takes(state, statement.round)
            delivered = state.has_delivered(statement.round, caller_id)
            if upload_id in state.rejected:
                return upload_id, statement.payload_bytes  # to be told so again
            if (is_over or delivered) and self._accepted(caller_id, upload_id) is not None:
                return upload_id, statement.payload_bytes  # merged or not: its receipt may have been lost on the way
            opened, is_open = state.opened, state.phase == Phase.OPEN
            if not is_over:  # also for a round that is over, where late deltas count
                opened, is_open = state.plans[statement.round], True
                spec = self._journal.plan(statement.round)
            admit(statement, spec, opened.spec_digest, caller_id=caller_id, is_open=is_open)
            if delivered:
                raise ConflictingSubmission(
                    f"node {caller_id[:12]} already delivered another delta for round {spec.round}",
                    hint="one delta counts per node and round; wait for the next round",
                )
            if upload_id not in self._uploads:
                leaves = split_leaf_hashes(leaf_hashes, statement.payload_bytes, statement.payload_root)
                # A node that lost its outbox trains again; its earlier, unfinished upload gives way.
                for other in [other for other in self._uploads.values() if other.row.node_id == caller_id]:
                    self._forget(other)
                row = UploadRow(upload_id, spec.round, caller_id, envelope, leaf_hashes)
                self._blobs.begin_part(upload_id)
                self._uploads[upload_id] = _Upload(row, statement, signed.signer, leaves, threading.Lock())
            return upload_id, self._stored_bytes(self._uploads[upload_id])

    def write_chunk(self, caller_id: str, upload_id: str, offset: int, data: bytes | memoryview) -> int:
        """Store one 1 MiB leaf of a payload and return the bytes now stored.

        Raises `UnknownUpload`, `BadOffset` or `DigestMismatch`; what is stored already stays.
        """
        upload = self._find(caller_id, upload_id)
        total_bytes = upload.statement.payload_bytes
        with upload.lock:
            stored = self._blobs.write_part(upload_id, offset, data, upload.leaves, total_bytes)
            if stored < total_bytes and upload_id not in self._kept:
                self._keep(upload)
        return stored

    def committed_bytes(self, caller_id: str, upload_id: str) -> int:
        """Return the bytes stored of an upload; raise `UnknownUpload` when the caller has none of that id."""
        accepted = None if upload_id in self._uploads else self._accepted(caller_id, upload_id)
        if accepted is not None:
            return accepted[1].payload_bytes
        return self._stored_bytes(self._find(caller_id, upload_id))

    def commit(self, caller_id: str, upload_id: str) -> bytes:
        """Make a complete delta count and return the signed receipt; repeating it returns the same receipt.

        The payload is decoded against the plan first. Raises `InvalidDelta`, with the signed rejection and the same one
        each time, when it does not decode to finite tensors, `BadOffset` when it is incomplete, `UnknownUpload` or
        `RoundClosed`.
        """
        waiting = self._uploads.get(upload_id)
        with waiting.lock if waiting is not None else nullcontext():
            receipt = None if upload_id in self._uploads else self._receipt(caller_id, upload_id)
            if receipt is not None:
                return receipt
            self._require_not_rejected(caller_id, upload_id)
            upload = self._find(caller_id, upload_id)
            self._require_complete(upload)
            try:
                self._decode(upload.statement, self._payload_path(upload))
            except InvalidDelta as err:
                self._reject(upload, err)
                self._require_not_rejected(caller_id, upload_id)
            self._accept(upload)
            receipt = self._receipt(caller_id, upload_id)
            assert receipt is not None
            return receipt

    def forget_closed(self) -> None:
        """Drop the uploads for rounds that take no more deltas."""
        for upload in list(self._uploads.values()):
            if not self._takes(self._journal.state, upload.statement.round):
                self._forget(upload)

    def _takes(self, state: FederationState, round_number: int) -> bool:
        """Whether deltas for a round are taken, for its own merge or a later one, which must be planned."""
        staleness = state.staleness(round_number)
        return staleness is not None and round_number + staleness <= self._journal.plan(round_number).num_rounds

    def _accepted(self, node_id: str, statement_digest: str) -> tuple[LedgerEntry, DeltaAccepted] | None:
        """Return what the node delivered under a statement, be it merged by now or not."""
        number = self._journal.index.deltas.get(statement_digest)
        if number is None:
            return None
        entry = self._journal.ledger.entries[number]
        assert isinstance(entry.event, DeltaAccepted)
        return (entry, entry.event) if entry.event.node_id == node_id else None

    def forget_node(self, node_id: str) -> None:
        """Drop the uploads of a node that is trusted no more."""
        with self._journal.lock:
            for upload in [upload for upload in self._uploads.values() if upload.row.node_id == node_id]:
                self._forget(upload)

    def _accept(self, upload: _Upload) -> None:
        statement = upload.statement
        with self._journal.lock:
            state = self._journal.state
            if not self._takes(state, statement.round):
                raise RoundClosed(f"round {statement.round} was sealed before the delta was committed")
            self._blobs.finish_part(upload.upload_id, statement.payload_root)
            self._journal.append(
                DeltaAccepted(
                    round=statement.round,
                    node_id=statement.node_id,
                    node_key=upload.signer.pem(),
                    statement_digest=upload.upload_id,
                    payload_root=statement.payload_root,
                    payload_bytes=statement.payload_bytes,
                    num_examples=statement.num_examples,
                    statement_envelope=upload.row.envelope.decode(),
                ),
                ends_upload=upload.upload_id if upload.upload_id in self._kept else None,
            )
            self._drop(upload)
            merged_in = statement.round + (state.staleness(statement.round) or 0)
        late = f", late: it counts in round {merged_in}" if merged_in > statement.round else ""
        log.info("round %d: delta of %s accepted%s", statement.round, statement.node_id[:12], late)

    def _reject(self, upload: _Upload, err: InvalidDelta) -> None:
        statement = upload.statement
        rejection = Rejection(
            federation=statement.federation,
            run=statement.run,
            round=statement.round,
            node_id=statement.node_id,
            statement_digest=upload.upload_id,
            reason=err.reason,
            detail=err.message[:MAX_DETAIL_CHARACTERS],
        )
        with self._journal.lock:
            self._journal.append(
                DeltaRejected(
                    round=rejection.round,
                    node_id=rejection.node_id,
                    statement_digest=rejection.statement_digest,
                    reason=rejection.reason,
                    detail=rejection.detail,
                    envelope=rejection.sign(self._journal.key).decode(),
                ),
                ends_upload=upload.upload_id if upload.upload_id in self._kept else None,
            )
            self._drop(upload)
            self._blobs.drop_part(upload.upload_id)
        log.warning("round %d: delta of %s rejected: %s", statement.round, statement.node_id[:12], err.message)

    def _require_not_rejected(self, node_id: str, statement_digest: str) -> None:
        rejected = self._journal.state.rejected.get(statement_digest)
        if rejected is not None and rejected.node_id == node_id:
            envelope = self._journal.as_now(Rejection, rejected.envelope)
            raise InvalidDelta(rejected.detail, rejection=envelope.decode())

    def _receipt(self, node_id: str, statement_digest: str) -> bytes | None:
        # Built from the ledger each time: keys sign the same bytes the same way, so it need not be stored.
        accepted = self._accepted(node_id, statement_digest)
        if accepted is None:
            return None
        return receipt_of(accepted[0], self._journal.created).sign(self._journal.key)

    def _resume(self, row: UploadRow) -> None:
        """Take up an upload that a restart interrupted, unless its signer is no longer trusted."""
        try:
            statement, signed = DeltaStatement.open(row.envelope, self._trust.keys(), where="stored upload")
        except UntrustedKey:
            self._journal.ledger.end_upload(row.upload_id)
            return
        leaves = split_leaf_hashes(row.leaf_hashes, statement.payload_bytes, statement.payload_root)
        self._blobs.recover_part(row.upload_id, leaves)
        self._uploads[row.upload_id] = _Upload(row, statement, signed.signer, leaves, threading.Lock())
        self._kept.add(row.upload_id)

    def _keep(self, upload: _Upload) -> None:
        """Have a restart go on with an upload, unless it was given up meanwhile."""
        with self._journal.lock:
            if upload.upload_id in self._uploads:
                self._journal.ledger.begin_upload(upload.row)
                self._kept.add(upload.upload_id)

    def _find(self, caller_id: str, upload_id: str) -> _Upload:
        upload = self._uploads.get(upload_id)
        if upload is None or upload.row.node_id != caller_id:
            raise UnknownUpload("no such upload of this node", hint="begin the upload again")
        return upload

    def _require_complete(self, upload: _Upload) -> None:
        stored, expected = self._stored_bytes(upload), upload.statement.payload_bytes
        if stored != expected:
            raise BadOffset(f"{stored} of {expected} bytes are stored", hint=f"continue at {stored}")

    def _payload_path(self, upload: _Upload) -> Path:
        # A crash between storing the blob and recording it leaves the blob in place and the part gone.
        root = upload.statement.payload_root
        return self._blobs.path(root) if self._blobs.has(root) else self._blobs.part_path(upload.upload_id)

    def _stored_bytes(self, upload: _Upload) -> int:
        if self._blobs.has(upload.statement.payload_root):
            return upload.statement.payload_bytes
        return self._blobs.part_bytes(upload.upload_id)

    def _forget(self, upload: _Upload) -> None:
        if upload.upload_id in self._kept:
            self._journal.ledger.end_upload(upload.upload_id)
        self._blobs.drop_part(upload.upload_id)
        self._drop(upload)

    def _drop(self, upload: _Upload) -> None:
        del self._uploads[upload.upload_id]
        self._kept.discard(upload.upload_id)
