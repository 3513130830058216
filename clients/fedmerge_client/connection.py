"""A node's connection to a coordinator: the channel, the session over it, and what is tried again.

Errors come out as the classes that the coordinator raised. A call that finds nobody is tried again, with full jitter,
until `patience_s` has passed without an answer (or as long as a round's plan allows).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import grpc
from grpc_status import rpc_status

from fedmerge.errors import (
    Busy,
    CertificateExpired,
    FedmergeError,
    NoSession,
    Refused,
    Unreachable,
    UntrustedCertificate,
)
from fedmerge.statements import SessionProof
from fedmerge.statements.handover import Pin
from fedmerge.trust.certificates import Pair
from fedmerge.trust.sign import PublicKey, SigningKey
from fedmerge.v1 import (
    delta_pb2,
    delta_pb2_grpc,
    log_pb2,
    log_pb2_grpc,
    model_pb2,
    round_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)
from fedmerge.wire import EXPORTED, FETCHED, MAX_MESSAGE_BYTES, SESSION_HEADER, UPLOADED, error_of
from fedmerge_client.backoff import Backoff
from fedmerge_client.credentials import Credentials

Answer = TypeVar("Answer")

CALL_TIMEOUT_S = 60.0

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


class Stubs:
    """The coordinator's services over one channel, and those of their calls whose chunks generated code would copy."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.sessions = session_pb2_grpc.SessionServiceStub(channel)
        self.rounds = round_pb2_grpc.RoundServiceStub(channel)
        self.deltas = delta_pb2_grpc.DeltaServiceStub(channel)
        self.log = log_pb2_grpc.LogServiceStub(channel)
        self.upload = channel.stream_unary(
            "/fedmerge.v1.DeltaService/UploadDelta", UPLOADED.to_bytes, delta_pb2.UploadDeltaResponse.FromString
        )
        self.fetch = channel.unary_stream(
            "/fedmerge.v1.ModelService/FetchArtifact",
            model_pb2.FetchArtifactRequest.SerializeToString,
            FETCHED.from_bytes,
        )
        self.fetch_export = channel.unary_stream(
            "/fedmerge.v1.LogService/FetchExport", log_pb2.FetchExportRequest.SerializeToString, EXPORTED.from_bytes
        )


class Connection:
    """A channel to one of a coordinator's addresses at a time, and a session over it; see `GrpcLink` for what it takes.

    `stubs` are those of the channel that is open now: any call may open another, so they are looked up after
    `metadata` was asked for. `pin` says which key the coordinator has.
    """

    def __init__(
        self,
        address: str,
        bundle: Path,
        key: SigningKey,
        *,
        home: Path | None,
        own_certificate: tuple[Path, Path] | None,
        connect_patience_s: float,
        patience_s: float,
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

    def keep_trying(self, patience_s: float) -> None:
        """Go on for so long without an answer from here on, if that is longer than before."""
        self._patience_s = max(self._patience_s, patience_s)

    def close(self) -> None:
        """Close the channel."""
        self.stubs.channel.close()

    def call(
        self, method: Callable[[Stubs], Callable[..., Answer]], request: object, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> Answer:
        """Return the answer to a request, however often it takes to ask. Raises what the coordinator raised."""
        backoff = self.backoff()
        while True:
            try:
                metadata = self.metadata()  # which may connect anew, so that the method is another's
                return method(self.stubs)(request, metadata=metadata, timeout=timeout_s)
            except grpc.RpcError as err:
                self.wait_or_raise(err, backoff, retried=(Busy,))

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what a call says of who calls, after opening a session or getting a certificate where one is due."""
        if self._credentials.is_due(dt.datetime.now(dt.UTC)):
            self._renew_certificate()
        return self._session_metadata()

    def nonce(self) -> str:
        """Return a nonce of the coordinator's, and hear which key it has now."""
        begun = self.stubs.sessions.BeginSession(session_pb2.BeginSessionRequest(), timeout=CALL_TIMEOUT_S)
        self.pin.follow(begun.handovers)
        return bytes(begun.nonce).hex()

    def backoff(self) -> Backoff:
        """Return the waits of one call."""
        return Backoff(self._patience_s if self._reached else self._connect_patience_s)

    def wait_or_raise(
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

    def _open_channel(self) -> None:
        self._token = None
        options = [*CHANNEL_OPTIONS, *self._credentials.options]
        credentials = self._credentials.channel(dt.datetime.now(dt.UTC))
        address = self._addresses[self._turn % len(self._addresses)]
        self.stubs = Stubs(grpc.secure_channel(address, credentials, options=options))

    def _try_next_address(self) -> bool:
        """Turn to the next address, if there are several, and say whether it comes before a pause."""
        if len(self._addresses) == 1:
            return False
        self._turn += 1
        self.close()
        self._open_channel()
        return self._turn % len(self._addresses) > 0

    def _session_metadata(self) -> tuple[tuple[str, str], ...]:
        if self._token is None:
            self._token = self._open_session()
        return ((SESSION_HEADER, self._token),)

    def _open_session(self) -> str:
        backoff = self.backoff()
        while True:
            try:
                nonce = self.nonce()
                proof = SessionProof(coordinator_key=self.coordinator.key_id, nonce=nonce)
                request = session_pb2.OpenSessionRequest(envelope=proof.sign(self._key))
                token = self.stubs.sessions.OpenSession(request, timeout=CALL_TIMEOUT_S).token
            except grpc.RpcError as err:
                self.wait_or_raise(err, backoff)
            else:
                self._reached = True
                return token

    def _renew_certificate(self) -> None:
        """Have the coordinator issue a certificate for a new TLS key, and connect anew with it."""
        pair, backoff = self._credentials.request(), self.backoff()
        while True:
            try:
                request = session_pb2.IssueCertificateRequest(request=pair.certificate)
                answer = self.stubs.sessions.IssueCertificate(
                    request, metadata=self._session_metadata(), timeout=CALL_TIMEOUT_S
                )
                break
            except grpc.RpcError as err:
                self.wait_or_raise(err, backoff)
        self._credentials.keep(Pair(pair.key, bytes(answer.certificate)))
        self.close()
        self._open_channel()


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
