"""The gRPC end of a node: the calls of a `Link`, a witness's and an auditor's, over one connection.

A transfer that breaks asks how far it got and goes on there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc

from fedmerge.errors import BadOffset, Busy, UnknownUpload, Unreachable, reporting_os_errors
from fedmerge.node.link import RoundView
from fedmerge.statements import EnrolmentRequest, KeyRotation
from fedmerge.transparency.log import Growth
from fedmerge.transparency.merkle import LeafHashes
from fedmerge.trust.keys import token_digest
from fedmerge.trust.sign import PublicKey, SigningKey
from fedmerge.v1 import delta_pb2, log_pb2, model_pb2, round_pb2, session_pb2
from fedmerge.wire import CHUNK_BYTES, PHASE_NAMES, Chunk
from fedmerge_client.connection import CALL_TIMEOUT_S, Connection

COMMIT_TIMEOUT_S = 3600.0
# After this, what is left in a stream of states is old: a new one begins with the present.
BUSY_S = 0.5
# The slowest link a transfer may have before it is cut and resumed.
MIN_BYTES_PER_S = 256 * 1024


class GrpcLink:
    """A node's calls to a coordinator, over a `connection`; implements `fedmerge.node.link.Link`.

    `bundle` is the operator's coordinator.pem: the certificate to pin and the key that must sign round specs. Making
    the link checks the bundle only; the first call connects. The node's folder `home` keeps the hand-overs of the
    coordinator's key and, where it asks for client certificates, those that it issues, unless `own_certificate` are the
    key and certificate to show.
    `connect_patience_s` is how long to wait for a coordinator that was never reached, `patience_s` for one that was.
    `address` may be several, with commas between them: of a coordinator and those that stand by for it. They are tried
    in turn.
    """

    def __init__(
        self,
        address: str,
        bundle: Path,
        key: SigningKey,
        *,
        home: Path | None = None,
        own_certificate: tuple[Path, Path] | None = None,
        connect_patience_s: float = 10.0,
        patience_s: float = 900.0,
    ) -> None:
        self.connection = Connection(
            address,
            bundle,
            key,
            home=home,
            own_certificate=own_certificate,
            connect_patience_s=connect_patience_s,
            patience_s=patience_s,
        )
        self.pin = self.connection.pin
        self._key = key

    @property
    def coordinator(self) -> PublicKey:
        """The coordinator's key, as far as this site has been told."""
        return self.connection.coordinator

    def keep_trying(self, patience_s: float) -> None:
        """Go on for so long without an answer from here on, if that is longer than before."""
        self.connection.keep_trying(patience_s)

    def connect(self) -> None:
        """Open a session now. Raises `UntrustedKey` when the coordinator does not trust the key, or `Unreachable`."""
        self.connection.metadata()

    def enrol(self, token: str) -> bool:
        """Have the coordinator enrol this link's key by a join token; return whether it is trusted now.

        Otherwise it waits for the operator. Raises `InvalidToken` for one that is unknown, used or expired.
        """
        backoff = self.connection.backoff()
        while True:
            try:
                nonce = self.connection.nonce()
                statement = EnrolmentRequest(
                    coordinator_key=self.coordinator.key_id,
                    nonce=nonce,
                    token=token_digest(token),
                    node_id=self._key.public.key_id,
                )
                request = session_pb2.EnrollRequest(
                    token=token, key=self._key.public.spki, envelope=statement.sign(self._key)
                )
                return bool(self.connection.stubs.sessions.Enroll(request, timeout=CALL_TIMEOUT_S).trusted)
            except grpc.RpcError as err:
                self.connection.wait_or_raise(err, backoff)

    def rotate_key(self, new: SigningKey) -> None:
        """Have the coordinator trust `new` in place of this link's key. Raises `RevokedKey` when it did so before."""
        self.connect()  # and so hear which key the coordinator has now
        statement = KeyRotation(
            coordinator_key=self.coordinator.key_id, old_key=self._key.public.key_id, new_key=new.public.pem()
        )
        request = session_pb2.RotateKeyRequest(envelope=statement.sign(self._key), proof=statement.sign(new))
        self.connection.call(lambda stubs: stubs.sessions.RotateKey, request)

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    def watch(self) -> Iterator[RoundView]:
        """Yield the federation's state now and after every change, through any number of reconnections.

        What changed while the caller was busy is skipped: it is told the newest state.
        """
        backoff = self.connection.backoff()
        while True:
            busy = False
            try:
                metadata = self.connection.metadata()  # before the stub is looked up: it may connect anew, or elsewhere
                stream = self.connection.stubs.rounds.WatchRounds(round_pb2.WatchRoundsRequest(), metadata=metadata)
                for answer in stream:
                    backoff, began_s = self.connection.backoff(), time.monotonic()
                    yield _view_of(answer)
                    if answer.finished:
                        return
                    busy = time.monotonic() > began_s + BUSY_S
                    if busy:
                        stream.cancel()
                        break
            except grpc.RpcError as err:
                self.connection.wait_or_raise(err, backoff)
            else:
                if not busy:
                    self.connection.wait_or_raise(Unreachable("the coordinator ended the call"), backoff)

    def fetch(self, root: str, target: Path) -> list[bytes]:
        """Fetch a file into `target`, continuing after the bytes that are there; return the hashes of its leaves.

        They are computed while the next bytes come.
        """
        backoff, hashes = self.connection.backoff(), LeafHashes()
        if target.exists():
            with reporting_os_errors(target):
                hashes.read(target)
        while True:
            try:
                request = model_pb2.FetchArtifactRequest(root=root, offset=hashes.num_bytes)
                metadata = self.connection.metadata()
                with reporting_os_errors(target), target.open("ab") as file:
                    for answer in self.connection.stubs.fetch(request, metadata=metadata):
                        backoff = self.connection.backoff()
                        file.write(answer.data)
                        hashes.update(answer.data)
                return hashes.leaves
            except grpc.RpcError as err:
                if self.connection.wait_or_raise(err, backoff, retried=(BadOffset, Busy)) is BadOffset:
                    target.unlink()
                    hashes = LeafHashes()

    def submit(self, envelope: bytes, payload: Path, leaves: list[bytes], sent: Callable[[int], None]) -> bytes:
        """Upload a payload from wherever it stands, commit it, and return the receipt."""
        payload_bytes = payload.stat().st_size
        begin = delta_pb2.BeginUploadRequest(envelope=envelope, leaf_hashes=b"".join(leaves))
        backoff, furthest = self.connection.backoff(), 0
        while True:
            try:
                upload = self.connection.call(lambda stubs: stubs.deltas.BeginUpload, begin)
                stored = upload.committed_bytes
                sent(stored)
                if stored > furthest:  # a slow link is not a dead one
                    backoff, furthest = self.connection.backoff(), stored
                if stored < payload_bytes:
                    metadata = self.connection.metadata()
                    self.connection.stubs.upload(
                        _chunks(upload.upload_id, payload, stored, sent),
                        metadata=metadata,
                        timeout=max(60.0, (payload_bytes - stored) / MIN_BYTES_PER_S),
                    )
                commit = delta_pb2.CommitDeltaRequest(upload_id=upload.upload_id)
                receipt = self.connection.call(
                    lambda stubs: stubs.deltas.CommitDelta, commit, timeout_s=COMMIT_TIMEOUT_S
                )
                return bytes(receipt.receipt_envelope)
            except (grpc.RpcError, BadOffset, UnknownUpload) as err:
                # Whatever got there stays there: beginning again says from where to go on, or that the round is over.
                self.connection.wait_or_raise(err, backoff, retried=(BadOffset, Busy, UnknownUpload))

    def report_metrics(self, envelope: bytes) -> None:
        """Hand in a signed evaluation."""
        self.connection.call(
            lambda stubs: stubs.rounds.ReportMetrics, round_pb2.ReportMetricsRequest(envelope=envelope)
        )

    def growth(self, old_size: int) -> Growth:
        """Return a checkpoint of the coordinator's log, and the proof that it continues that of `old_size` events."""
        answer = self.connection.call(
            lambda stubs: stubs.log.GetCheckpoint, log_pb2.GetCheckpointRequest(old_size=old_size)
        )
        return Growth(bytes(answer.note), [bytes(each) for each in answer.proof])

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """Return the proof that event `index` is among the first `size`."""
        answer = self.connection.call(
            lambda stubs: stubs.log.GetInclusion, log_pb2.GetInclusionRequest(index=index, size=size)
        )
        return [bytes(each) for each in answer.proof]

    def cosign(self, note: bytes, cosignature: bytes) -> None:
        """Hand in a cosignature."""
        self.connection.call(lambda stubs: stubs.log.Cosign, log_pb2.CosignRequest(note=note, cosignature=cosignature))

    def fetch_export(self, target: Path, rounds: Sequence[int] | None, *, with_deltas: bool) -> None:
        """Fetch an export into the new file `target`. Raises `NotAllowed` unless the key is an auditor's."""
        request = log_pb2.FetchExportRequest(rounds=rounds or (), with_deltas=with_deltas)
        partial, backoff = target.with_name(f".{target.name}.partial"), self.connection.backoff()
        try:
            while True:
                try:
                    metadata = self.connection.metadata()
                    with reporting_os_errors(target), partial.open("wb") as file:
                        for answer in self.connection.stubs.fetch_export(request, metadata=metadata):
                            backoff = self.connection.backoff()
                            file.write(answer.data)
                    with reporting_os_errors(target):
                        partial.rename(target)
                    return
                except grpc.RpcError as err:
                    self.connection.wait_or_raise(err, backoff, retried=(Busy,))
        finally:
            partial.unlink(missing_ok=True)


def _chunks(
    upload_id: str, payload: Path, offset: int, sent: Callable[[int], None]
) -> Iterator[Chunk[delta_pb2.UploadDeltaRequest]]:
    with payload.open("rb") as file:
        file.seek(offset)
        while data := file.read(CHUNK_BYTES):
            yield Chunk(delta_pb2.UploadDeltaRequest(upload_id=upload_id, offset=offset), data)
            offset += len(data)
            sent(offset)


def _view_of(answer: round_pb2.WatchRoundsResponse) -> RoundView:
    return RoundView(
        round=answer.round,
        phase=PHASE_NAMES.get(answer.phase, "planned"),
        spec_envelope=answer.spec_envelope,
        record_envelope=answer.record_envelope,
        candidates_envelope=answer.candidates_envelope,
        num_deltas=answer.num_deltas,
        finished=answer.finished,
        failure=answer.failure,
    )
