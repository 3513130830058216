"""The gRPC end of a node: sessions, retries with back-off, and transfers that go on from where they stood.

Errors come out as the classes that the coordinator raised. A call that finds nobody is tried again, with full jitter,
until `patience_s` has passed without an answer (or as long as a round's plan allows); a transfer that breaks asks how
far it got and continues there.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import grpc
from grpc_status import rpc_status

from fedmerge.certificates import Pair
from fedmerge.errors import (
    BadOffset,
    Busy,
    CertificateExpired,
    FedmergeError,
    NoSession,
    Refused,
    UnknownUpload,
    Unreachable,
    UntrustedCertificate,
    reporting_os_errors,
)
from fedmerge.handover import Pin
from fedmerge.link import RoundView
from fedmerge.merkle import LeafHashes
from fedmerge.sign import PublicKey, SigningKey
from fedmerge.statements import EnrolmentRequest, KeyRotation, SessionProof
from fedmerge.translog import Growth
from fedmerge.trust import token_digest
from fedmerge.v1 import (
    delta_pb2,
    delta_pb2_grpc,
    log_pb2,
    log_pb2_grpc,
    model_pb2,
    round_pb2,
    round_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)
from fedmerge.wire import (
    CHUNK_BYTES,
    EXPORTED,
    FETCHED,
    MAX_MESSAGE_BYTES,
    PHASE_NAMES,
    SESSION_HEADER,
    UPLOADED,
    Chunk,
    error_of,
)
from fedmerge_client.backoff import Backoff
from fedmerge_client.credentials import Credentials

Answer = TypeVar("Answer")

CALL_TIMEOUT_S = 60.0
COMMIT_TIMEOUT_S = 3600.0
# After this, what is left in a stream of states is old: a new one begins with the present.
BUSY_S = 0.5
# The slowest link a transfer may have before it is cut and resumed.
MIN_BYTES_PER_S = 256 * 1024

# What gRPC says of a certificate that is another's: of another authority, of one by the same name, for another host.
NOT_OURS = ("CERTIFICATE_VERIFY_FAILED", "certificate signature failure", "Hostname Verification")

CHANNEL_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Two links of one process must not share a connection: a node's session belongs to its own.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]


class GrpcLink:
    """A node's connection to a coordinator; implements `fedmerge.link.Link`.

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
        self._credentials = Credentials(bundle, key.public.key_id, home, own_certificate)
        self.pin = Pin(self._credentials.coordinator, home / "log" if home is not None else None)
        self._address = address
        self._addresses = address.split(",")
        self._turn = 0
        self._key = key
        self._patience_s = patience_s
        self._token: str | None = None
        self._reached = False
        self._connect_patience_s = connect_patience_s
        self._open_channel()

    @property
    def coordinator(self) -> PublicKey:
        """The coordinator's key, as far as this site has been told."""
        return self.pin.current

    def _open_channel(self) -> None:
        self._token = None
        options = [*CHANNEL_OPTIONS, *self._credentials.options]
        credentials = self._credentials.channel(dt.datetime.now(dt.UTC))
        address = self._addresses[self._turn % len(self._addresses)]
        self._channel = grpc.secure_channel(address, credentials, options=options)
        self._sessions = session_pb2_grpc.SessionServiceStub(self._channel)
        self._rounds = round_pb2_grpc.RoundServiceStub(self._channel)
        self._deltas = delta_pb2_grpc.DeltaServiceStub(self._channel)
        self._log = log_pb2_grpc.LogServiceStub(self._channel)
        # The generated code would copy chunks.
        self._upload = self._channel.stream_unary(
            "/fedmerge.v1.DeltaService/UploadDelta", UPLOADED.to_bytes, delta_pb2.UploadDeltaResponse.FromString
        )
        self._fetch = self._channel.unary_stream(
            "/fedmerge.v1.ModelService/FetchArtifact",
            model_pb2.FetchArtifactRequest.SerializeToString,
            FETCHED.from_bytes,
        )
        self._fetch_export = self._channel.unary_stream(
            "/fedmerge.v1.LogService/FetchExport", log_pb2.FetchExportRequest.SerializeToString, EXPORTED.from_bytes
        )

    def keep_trying(self, patience_s: float) -> None:
        """Go on for so long without an answer from here on, if that is longer than before."""
        self._patience_s = max(self._patience_s, patience_s)

    def connect(self) -> None:
        """Open a session now. Raises `UntrustedKey` when the coordinator does not trust the key, or `Unreachable`."""
        self._metadata()

    def enrol(self, token: str) -> bool:
        """Have the coordinator enrol this link's key by a join token; return whether it is trusted now.

        Otherwise it waits for the operator. Raises `InvalidToken` for one that is unknown, used or expired.
        """
        backoff = self._backoff()
        while True:
            try:
                nonce = self._nonce()
                statement = EnrolmentRequest(
                    coordinator_key=self.coordinator.key_id,
                    nonce=nonce,
                    token=token_digest(token),
                    node_id=self._key.public.key_id,
                )
                request = session_pb2.EnrollRequest(
                    token=token, key=self._key.public.spki, envelope=statement.sign(self._key)
                )
                return bool(self._sessions.Enroll(request, timeout=CALL_TIMEOUT_S).trusted)
            except grpc.RpcError as err:
                self._wait_or_raise(err, backoff)

    def rotate_key(self, new: SigningKey) -> None:
        """Have the coordinator trust `new` in place of this link's key. Raises `RevokedKey` when it did so before."""
        self.connect()  # and so hear which key the coordinator has now
        statement = KeyRotation(
            coordinator_key=self.coordinator.key_id, old_key=self._key.public.key_id, new_key=new.public.pem()
        )
        request = session_pb2.RotateKeyRequest(envelope=statement.sign(self._key), proof=statement.sign(new))
        self._call(lambda: self._sessions.RotateKey, request)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def watch(self) -> Iterator[RoundView]:
        """Yield the federation's state now and after every change, through any number of reconnections.

        What changed while the caller was busy is skipped: it is told the newest state.
        """
        backoff = self._backoff()
        while True:
            busy = False
            try:
                metadata = self._metadata()  # before the stub is looked up: it may connect anew, or elsewhere
                stream = self._rounds.WatchRounds(round_pb2.WatchRoundsRequest(), metadata=metadata)
                for answer in stream:
                    backoff, began_s = self._backoff(), time.monotonic()
                    yield _view_of(answer)
                    if answer.finished:
                        return
                    busy = time.monotonic() > began_s + BUSY_S
                    if busy:
                        stream.cancel()
                        break
            except grpc.RpcError as err:
                self._wait_or_raise(err, backoff)
            else:
                if not busy:
                    self._wait_or_raise(Unreachable("the coordinator ended the call"), backoff)

    def fetch(self, root: str, target: Path) -> list[bytes]:
        """Fetch a file into `target`, continuing after the bytes that are there; return the hashes of its leaves.

        They are computed while the next bytes come.
        """
        backoff, hashes = self._backoff(), LeafHashes()
        if target.exists():
            with reporting_os_errors(target):
                hashes.read(target)
        while True:
            try:
                request = model_pb2.FetchArtifactRequest(root=root, offset=hashes.num_bytes)
                metadata = self._metadata()
                with reporting_os_errors(target), target.open("ab") as file:
                    for answer in self._fetch(request, metadata=metadata):
                        backoff = self._backoff()
                        file.write(answer.data)
                        hashes.update(answer.data)
                return hashes.leaves
            except grpc.RpcError as err:
                if self._wait_or_raise(err, backoff, retried=(BadOffset, Busy)) is BadOffset:
                    target.unlink()
                    hashes = LeafHashes()

    def submit(self, envelope: bytes, payload: Path, leaves: list[bytes], sent: Callable[[int], None]) -> bytes:
        """Upload a payload from wherever it stands, commit it, and return the receipt."""
        payload_bytes = payload.stat().st_size
        begin = delta_pb2.BeginUploadRequest(envelope=envelope, leaf_hashes=b"".join(leaves))
        backoff, furthest = self._backoff(), 0
        while True:
            try:
                upload = self._call(lambda: self._deltas.BeginUpload, begin)
                stored = upload.committed_bytes
                sent(stored)
                if stored > furthest:  # a slow link is not a dead one
                    backoff, furthest = self._backoff(), stored
                if stored < payload_bytes:
                    metadata = self._metadata()
                    self._upload(
                        _chunks(upload.upload_id, payload, stored, sent),
                        metadata=metadata,
                        timeout=max(60.0, (payload_bytes - stored) / MIN_BYTES_PER_S),
                    )
                commit = delta_pb2.CommitDeltaRequest(upload_id=upload.upload_id)
                receipt = self._call(lambda: self._deltas.CommitDelta, commit, timeout_s=COMMIT_TIMEOUT_S)
                return bytes(receipt.receipt_envelope)
            except (grpc.RpcError, BadOffset, UnknownUpload) as err:
                # Whatever got there stays there: beginning again says from where to go on, or that the round is over.
                self._wait_or_raise(err, backoff, retried=(BadOffset, Busy, UnknownUpload))

    def report_metrics(self, envelope: bytes) -> None:
        """Hand in a signed evaluation."""
        self._call(lambda: self._rounds.ReportMetrics, round_pb2.ReportMetricsRequest(envelope=envelope))

    def growth(self, old_size: int) -> Growth:
        """Return a checkpoint of the coordinator's log, and the proof that it continues that of `old_size` events."""
        answer = self._call(lambda: self._log.GetCheckpoint, log_pb2.GetCheckpointRequest(old_size=old_size))
        return Growth(bytes(answer.note), [bytes(each) for each in answer.proof])

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """Return the proof that event `index` is among the first `size`."""
        answer = self._call(lambda: self._log.GetInclusion, log_pb2.GetInclusionRequest(index=index, size=size))
        return [bytes(each) for each in answer.proof]

    def cosign(self, note: bytes, cosignature: bytes) -> None:
        """Hand in a cosignature."""
        self._call(lambda: self._log.Cosign, log_pb2.CosignRequest(note=note, cosignature=cosignature))

    def fetch_export(self, target: Path, rounds: Sequence[int] | None, *, with_deltas: bool) -> None:
        """Fetch an export into the new file `target`. Raises `NotAllowed` unless the key is an auditor's."""
        request = log_pb2.FetchExportRequest(rounds=rounds or (), with_deltas=with_deltas)
        partial, backoff = target.with_name(f".{target.name}.partial"), self._backoff()
        try:
            while True:
                try:
                    metadata = self._metadata()
                    with reporting_os_errors(target), partial.open("wb") as file:
                        for answer in self._fetch_export(request, metadata=metadata):
                            backoff = self._backoff()
                            file.write(answer.data)
                    with reporting_os_errors(target):
                        partial.rename(target)
                    return
                except grpc.RpcError as err:
                    self._wait_or_raise(err, backoff, retried=(Busy,))
        finally:
            partial.unlink(missing_ok=True)

    def _call(
        self, method: Callable[[], Callable[..., Answer]], request: object, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> Answer:
        backoff = self._backoff()
        while True:
            try:
                metadata = self._metadata()  # which may connect anew, so that the method is another's
                return method()(request, metadata=metadata, timeout=timeout_s)
            except grpc.RpcError as err:
                self._wait_or_raise(err, backoff, retried=(Busy,))

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        if self._credentials.is_due(dt.datetime.now(dt.UTC)):
            self._renew_certificate()
        return self._session_metadata()

    def _session_metadata(self) -> tuple[tuple[str, str], ...]:
        if self._token is None:
            self._token = self._open_session()
        return ((SESSION_HEADER, self._token),)

    def _renew_certificate(self) -> None:
        """Have the coordinator issue a certificate for a new TLS key, and connect anew with it."""
        pair, backoff = self._credentials.request(), self._backoff()
        while True:
            try:
                request = session_pb2.IssueCertificateRequest(request=pair.certificate)
                answer = self._sessions.IssueCertificate(
                    request, metadata=self._session_metadata(), timeout=CALL_TIMEOUT_S
                )
                break
            except grpc.RpcError as err:
                self._wait_or_raise(err, backoff)
        self._credentials.keep(Pair(pair.key, bytes(answer.certificate)))
        self._channel.close()
        self._open_channel()

    def _open_session(self) -> str:
        backoff = self._backoff()
        while True:
            try:
                nonce = self._nonce()
                proof = SessionProof(coordinator_key=self.coordinator.key_id, nonce=nonce)
                request = session_pb2.OpenSessionRequest(envelope=proof.sign(self._key))
                token = self._sessions.OpenSession(request, timeout=CALL_TIMEOUT_S).token
            except grpc.RpcError as err:
                self._wait_or_raise(err, backoff)
            else:
                self._reached = True
                return token

    def _nonce(self) -> str:
        begun = self._sessions.BeginSession(session_pb2.BeginSessionRequest(), timeout=CALL_TIMEOUT_S)
        self.pin.follow(begun.handovers)
        return bytes(begun.nonce).hex()

    def _backoff(self) -> Backoff:
        return Backoff(self._patience_s if self._reached else self._connect_patience_s)

    def _wait_or_raise(
        self,
        err: grpc.RpcError | FedmergeError,
        backoff: Backoff,
        *,
        retried: tuple[type[FedmergeError], ...] = (),
    ) -> type[FedmergeError]:
        """Sleep before another try and return the kind of error; raise it when another try would not help."""
        error = _as_error(err)
        if isinstance(error, NoSession):
            self._token = None
        elif isinstance(error, CertificateExpired) and self._credentials.is_due(dt.datetime.now(dt.UTC)):
            self._open_channel()  # by the ticket, for a new certificate
        elif isinstance(error, Unreachable) and self._try_next_address():
            return type(error)
        elif not isinstance(error, (Unreachable, *retried)):
            raise error from None
        asked_s = error.retry_after_s if isinstance(error, Busy) else None
        if not backoff.wait(at_least_s=asked_s or 0.0):
            if not isinstance(error, Unreachable):
                raise error from None
            raise Unreachable(
                f"{self._address}: {error.message}",
                hint="is the coordinator running there, and is its port open to this machine?",
            ) from None
        return type(error)

    def _try_next_address(self) -> bool:
        """Turn to the next address, if there are several, and say whether it comes before a pause."""
        if len(self._addresses) == 1:
            return False
        self._turn += 1
        self._channel.close()
        self._open_channel()
        return self._turn % len(self._addresses) > 0


def _chunks(
    upload_id: str, payload: Path, offset: int, sent: Callable[[int], None]
) -> Iterator[Chunk[delta_pb2.UploadDeltaRequest]]:
    with payload.open("rb") as file:
        file.seek(offset)
        while data := file.read(CHUNK_BYTES):
            yield Chunk(delta_pb2.UploadDeltaRequest(upload_id=upload_id, offset=offset), data)
            offset += len(data)
            sent(offset)


def _as_error(err: grpc.RpcError | FedmergeError) -> FedmergeError:
    if isinstance(err, FedmergeError):
        return err
    status = rpc_status.from_call(err)
    if status is not None:
        return error_of(status)
    code = err.code() if isinstance(err, grpc.Call) else grpc.StatusCode.UNKNOWN
    details = (err.details() if isinstance(err, grpc.Call) else None) or "no answer"
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        if "certificate has expired" in details:
            return CertificateExpired(
                "the coordinator's certificate has expired",
                hint="tell its operator, unless this machine's clock is wrong",
            )
        if "certificate is not yet valid" in details:
            return UntrustedCertificate(
                "the coordinator's certificate is not valid yet, by this machine's clock",
                hint="set this machine's clock",
            )
        if any(sign in details for sign in NOT_OURS):
            return UntrustedCertificate(
                "the coordinator's certificate is not the one that coordinator.pem pins",
                hint="get the coordinator's current coordinator.pem from its operator",
            )
        return Unreachable("no coordinator answers")
    return Refused(f"the coordinator refused the call ({code.name.lower()}: {details})")


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
