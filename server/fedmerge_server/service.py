"""The gRPC services: each call finds out who calls, hands the work to the coordinator on a thread, and answers.

Everything that can go wrong is an exception of `fedmerge.errors`, translated to a status in one place. Whatever is not
is logged here and reaches the caller as INTERNAL without a word about what it was.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.errors import BadOffset, Busy, Refused, ResourceError, Unreachable, VerificationError
from fedmerge.trust.keys import Member
from fedmerge.v1 import (
    delta_pb2,
    delta_pb2_grpc,
    log_pb2,
    log_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    round_pb2,
    round_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)
from fedmerge.wire import (
    CHUNK_BYTES,
    EXPORTED,
    FETCHED,
    PHASES,
    SESSION_HEADER,
    STATUS_DETAILS_HEADER,
    UPLOADED,
    Chunk,
    status_of,
)
from fedmerge_server.access import require_allowed, require_certificate
from fedmerge_server.limits import Streams, read_ahead
from fedmerge_server.sessions import Sessions
from fedmerge_server.tls import Certificates

log = logging.getLogger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_CODES = {code.value[0]: code for code in grpc.StatusCode}


@asynccontextmanager
async def answering(context: Context) -> AsyncIterator[None]:
    """End the call with the right status when the block raises."""
    try:
        yield
    except (grpc.aio.AbortError, asyncio.CancelledError):
        raise
    except grpc.aio.InternalError as err:  # the call has no other end any more
        raise asyncio.CancelledError from err
    except Exception as err:
        status = status_of(_for_caller(err))
        details = ((STATUS_DETAILS_HEADER, status.SerializeToString()),)
        await context.abort(_CODES[status.code], status.message, details)


def _for_caller(err: Exception) -> Exception:
    """Return what a caller is told: of the coordinator's own troubles only that there are some."""
    if isinstance(err, (Refused, VerificationError, Unreachable)):
        return err
    if isinstance(err, DecodeError):  # of a stream's message; those of other calls never get here
        return Refused("the message can't be parsed", hint="is the node of a version that this coordinator knows?")
    if isinstance(err, ResourceError):
        log.error("%s", err.message)
        return Busy("the coordinator can't store anything at present", hint="its log says why; try again later")
    log.error("internal error in a call", exc_info=err)
    return RuntimeError()


class Services(
    session_pb2_grpc.SessionServiceServicer,
    round_pb2_grpc.RoundServiceServicer,
    delta_pb2_grpc.DeltaServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    log_pb2_grpc.LogServiceServicer,
):
    """All services of one coordinator. Must be made on the event loop that serves them."""

    def __init__(self, coordinator: Coordinator, certificates: Certificates) -> None:
        self._coordinator = coordinator
        self._certificates = certificates
        self._intake = coordinator.intake
        self._sessions = Sessions(coordinator.key.public, coordinator.trust)
        self._changed = asyncio.Event()
        server = coordinator.config.server
        self._uploads = Streams("uploads", server.max_uploads, server.max_bytes_per_s, server.idle_s)
        self._downloads = Streams("downloads", server.max_downloads, server.max_bytes_per_s, server.idle_s)
        self._idle_s = server.idle_s
        # Deltas are decoded on as many threads as they are merged on; those that wait for one must not take the threads
        # that chunks and files need.
        num_threads = coordinator.config.merge_workers().num_threads
        self._committing = ThreadPoolExecutor(num_threads, thread_name_prefix="commit")
        self._exporting = asyncio.Lock()
        self._stopping = False
        self._num_viewed = -1
        self._viewing: asyncio.Future[tuple[round_pb2.WatchRoundsResponse, bytes]]
        loop = asyncio.get_running_loop()

        def journal_changed() -> None:
            loop.call_soon_threadsafe(self.wake)

        coordinator.journal.on_change.append(journal_changed)

    def wake(self) -> None:
        """Let everyone who waits for a change look again."""
        # Waiters hold the old event; whoever comes later waits for the next change.
        self._changed.set()
        self._changed = asyncio.Event()

    def stop(self) -> None:
        """End the calls that wait for changes; their callers go on trying for a while."""
        self._stopping = True
        self.wake()

    async def wait_for_change(self, timeout_s: float) -> None:
        """Wait until the journal grows, or `timeout_s` has passed."""
        await _wait(self._changed, timeout_s)

    def _member(self, context: Context, method: str) -> Member:
        """Return who calls, if it may; everything is looked up anew, as it may have changed since the last call."""
        metadata = dict(context.invocation_metadata() or ())
        token = metadata.get(SESSION_HEADER, "")
        member = self._sessions.caller(token if isinstance(token, str) else "")
        rule = require_allowed(method, member)
        if self._certificates.are_required:
            shown = context.auth_context().get("x509_pem_cert")
            require_certificate(next(iter(shown), None) if shown else None, member, rule, dt.datetime.now(dt.UTC))
        return member

    def _caller(self, context: Context, method: str) -> str:
        return self._member(context, method).key.key_id

    # SessionService

    async def BeginSession(  # noqa: N802 - named by the protocol
        self, request: session_pb2.BeginSessionRequest, context: Context
    ) -> session_pb2.BeginSessionResponse:
        """Give out a nonce, and how the coordinator came by its key."""
        handovers = self._coordinator.journal.state.handovers
        return session_pb2.BeginSessionResponse(nonce=self._sessions.begin(), handovers=handovers)

    async def OpenSession(  # noqa: N802
        self, request: session_pb2.OpenSessionRequest, context: Context
    ) -> session_pb2.OpenSessionResponse:
        """Open a session for whoever signed the nonce."""
        async with answering(context):
            token = self._sessions.open(request.envelope)
            await asyncio.to_thread(self._coordinator.welcome, self._sessions.caller(token))
        return session_pb2.OpenSessionResponse(token=token)

    async def Enroll(  # noqa: N802
        self, request: session_pb2.EnrollRequest, context: Context
    ) -> session_pb2.EnrollResponse:
        """Enrol a newcomer."""
        async with answering(context):
            trusted = await asyncio.to_thread(
                self._coordinator.members.enrol, request.token, request.key, request.envelope, self._sessions.use
            )
        return session_pb2.EnrollResponse(trusted=trusted)

    async def RotateKey(  # noqa: N802
        self, request: session_pb2.RotateKeyRequest, context: Context
    ) -> session_pb2.RotateKeyResponse:
        """Replace the caller's key."""
        async with answering(context):
            caller = self._caller(context, "RotateKey")
            await asyncio.to_thread(self._coordinator.members.rotate, caller, request.envelope, request.proof)
        return session_pb2.RotateKeyResponse()

    async def IssueCertificate(  # noqa: N802
        self, request: session_pb2.IssueCertificateRequest, context: Context
    ) -> session_pb2.IssueCertificateResponse:
        """Give the caller a certificate of its own."""
        async with answering(context):
            member = self._member(context, "IssueCertificate")
            certificate = self._certificates.issue(request.request, member, dt.datetime.now(dt.UTC))
        return session_pb2.IssueCertificateResponse(certificate=certificate)

    # RoundService

    async def WatchRounds(  # noqa: N802
        self, request: round_pb2.WatchRoundsRequest, context: Context
    ) -> AsyncIterator[round_pb2.WatchRoundsResponse]:
        """Stream the state: now, and after every change that is more than another delta or metric."""
        async with answering(context):
            told: bytes | None = None
            while True:
                # Taken before looking: what changes from here on is not missed.
                changed = self._changed
                self._caller(context, "WatchRounds")
                view, news = await self._view()
                if news != told:
                    told = news
                    yield view
                    if view.finished:
                        return
                if self._stopping:
                    raise Unreachable("the coordinator is stopping")
                await _wait(changed, 30.0)

    async def ReportMetrics(  # noqa: N802
        self, request: round_pb2.ReportMetricsRequest, context: Context
    ) -> round_pb2.ReportMetricsResponse:
        """Record an evaluation."""
        async with answering(context):
            caller = self._caller(context, "ReportMetrics")
            await asyncio.to_thread(self._coordinator.report_metrics, caller, request.envelope)
        return round_pb2.ReportMetricsResponse()

    # DeltaService

    async def BeginUpload(  # noqa: N802
        self, request: delta_pb2.BeginUploadRequest, context: Context
    ) -> delta_pb2.BeginUploadResponse:
        """Admit a delta by its statement."""
        async with answering(context):
            caller = self._caller(context, "BeginUpload")
            upload_id, stored = await asyncio.to_thread(
                self._intake.begin, caller, request.envelope, request.leaf_hashes
            )
        return delta_pb2.BeginUploadResponse(upload_id=upload_id, committed_bytes=stored)

    async def UploadDelta(  # type: ignore[override]  # noqa: N802 - see `chunk_handlers`
        self, request_iterator: AsyncIterator[Chunk[delta_pb2.UploadDeltaRequest]], context: Context
    ) -> delta_pb2.UploadDeltaResponse:
        """Store chunks as they come."""
        stored, upload_id = 0, ""
        async with answering(context):
            try:
                with self._uploads.place(self._caller(context, "UploadDelta")):
                    async with aclosing(read_ahead(request_iterator, self._idle_s)) as requests:
                        async for request, data in requests:
                            # Checked for every chunk: a key that stops being trusted is cut off in the middle.
                            caller = self._caller(context, "UploadDelta")
                            upload_id = upload_id or request.upload_id
                            stored = await asyncio.to_thread(
                                self._intake.write_chunk, caller, upload_id, request.offset, data
                            )
                            await self._uploads.moved(caller, len(data))
            except TimeoutError:
                raise Unreachable(f"no chunk came in {self._idle_s:g} s; {stored} bytes are stored") from None
        return delta_pb2.UploadDeltaResponse(committed_bytes=stored)

    async def GetUpload(  # noqa: N802
        self, request: delta_pb2.GetUploadRequest, context: Context
    ) -> delta_pb2.GetUploadResponse:
        """Say how much is stored."""
        async with answering(context):
            caller = self._caller(context, "GetUpload")
            stored = await asyncio.to_thread(self._intake.committed_bytes, caller, request.upload_id)
        return delta_pb2.GetUploadResponse(committed_bytes=stored)

    async def CommitDelta(  # noqa: N802
        self, request: delta_pb2.CommitDeltaRequest, context: Context
    ) -> delta_pb2.CommitDeltaResponse:
        """Make a delta count."""
        async with answering(context):
            caller = self._caller(context, "CommitDelta")
            loop = asyncio.get_running_loop()
            receipt = await loop.run_in_executor(self._committing, self._intake.commit, caller, request.upload_id)
        return delta_pb2.CommitDeltaResponse(receipt_envelope=receipt)

    # ModelService

    async def FetchArtifact(  # type: ignore[override]  # noqa: N802 - written to, not a generator: writes can time out
        self, request: model_pb2.FetchArtifactRequest, context: Context
    ) -> None:
        """Stream a file."""
        async with answering(context):
            try:
                with self._downloads.place(self._caller(context, "FetchArtifact")):
                    path = await asyncio.to_thread(self._coordinator.artifact, request.root)
                    if not 0 <= request.offset <= path.stat().st_size:
                        raise BadOffset(f"the file has {path.stat().st_size} bytes", hint="start again from 0")
                    with path.open("rb") as file:
                        file.seek(request.offset)
                        while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
                            caller = self._caller(context, "FetchArtifact")
                            async with asyncio.timeout(self._idle_s):
                                await context.write(Chunk(model_pb2.FetchArtifactResponse(), data))
                            await self._downloads.moved(caller, len(data))
            except TimeoutError:
                raise Unreachable(f"nothing was taken in {self._idle_s:g} s") from None

    # LogService

    async def GetCheckpoint(  # noqa: N802
        self, request: log_pb2.GetCheckpointRequest, context: Context
    ) -> log_pb2.GetCheckpointResponse:
        """Sign the log as it is now."""
        async with answering(context):
            self._caller(context, "GetCheckpoint")
            growth = await asyncio.to_thread(self._coordinator.log.growth, request.old_size)
        return log_pb2.GetCheckpointResponse(note=growth.note, proof=growth.proof)

    async def GetInclusion(  # noqa: N802
        self, request: log_pb2.GetInclusionRequest, context: Context
    ) -> log_pb2.GetInclusionResponse:
        """Prove that an event is there."""
        async with answering(context):
            self._caller(context, "GetInclusion")
            proof = await asyncio.to_thread(self._coordinator.log.inclusion, request.index, request.size)
        return log_pb2.GetInclusionResponse(proof=proof)

    async def Cosign(  # noqa: N802
        self, request: log_pb2.CosignRequest, context: Context
    ) -> log_pb2.CosignResponse:
        """Record a cosignature."""
        async with answering(context):
            caller = self._caller(context, "Cosign")
            await asyncio.to_thread(self._coordinator.log.cosign, caller, request.note, request.cosignature)
        return log_pb2.CosignResponse()

    async def FetchExport(  # type: ignore[override]  # noqa: N802 - see `chunk_handlers`
        self, request: log_pb2.FetchExportRequest, context: Context
    ) -> AsyncIterator[Chunk[log_pb2.FetchExportResponse]]:
        """Make an export, one at a time, and stream it."""
        async with answering(context):
            self._caller(context, "FetchExport")
            if self._exporting.locked():
                raise Busy("another export is under way", hint="try again later")
            async with self._exporting:
                with TemporaryDirectory(prefix="export-", dir=self._coordinator.config.federation.state) as scratch:
                    path, rounds = Path(scratch) / "export.tar", list(request.rounds) or None
                    await asyncio.to_thread(self._coordinator.export, path, rounds, with_deltas=request.with_deltas)
                    with path.open("rb") as file:
                        while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
                            self._caller(context, "FetchExport")
                            yield Chunk(log_pb2.FetchExportResponse(), data)

    async def _view(self) -> tuple[round_pb2.WatchRoundsResponse, bytes]:
        """Return the state, and what of it is news to who watches; made once after each change, for all of them."""
        num_events = len(self._coordinator.journal.ledger.entries)
        if num_events != self._num_viewed:
            self._num_viewed = num_events
            # On a thread: it needs the journal's lock, which may wait for the disk or the database.
            self._viewing = asyncio.ensure_future(asyncio.to_thread(self._make_view, num_events))
        try:
            return await asyncio.shield(self._viewing)
        except Exception:
            self._num_viewed = -1
            raise

    def _make_view(self, num_events: int) -> tuple[round_pb2.WatchRoundsResponse, bytes]:
        coordinator = self._coordinator
        with coordinator.journal.lock:
            state = coordinator.journal.state
            view = round_pb2.WatchRoundsResponse(
                round=state.round,
                phase=PHASES[state.phase],
                spec_envelope=coordinator.spec_envelope(),
                record_envelope=coordinator.record_envelope(),
                candidates_envelope=coordinator.candidates_envelope(),
                finished=coordinator.finished(),
                failure=state.failure,
            )
            news = view.SerializeToString(deterministic=True)
            view.num_events, view.num_deltas = num_events, len(state.deltas)
            return view, news


async def _wait(changed: asyncio.Event, timeout_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await changed.wait()


def chunk_handlers(services: Services) -> list[grpc.GenericRpcHandler]:
    """Return what answers the methods that carry chunks, in place of the generated code, which would copy them."""
    upload = grpc.stream_unary_rpc_method_handler(
        services.UploadDelta, UPLOADED.from_bytes, delta_pb2.UploadDeltaResponse.SerializeToString
    )
    fetch = grpc.unary_stream_rpc_method_handler(
        services.FetchArtifact, model_pb2.FetchArtifactRequest.FromString, FETCHED.to_bytes
    )
    export = grpc.unary_stream_rpc_method_handler(
        services.FetchExport, log_pb2.FetchExportRequest.FromString, EXPORTED.to_bytes
    )
    return [
        grpc.method_handlers_generic_handler("fedmerge.v1.DeltaService", {"UploadDelta": upload}),
        grpc.method_handlers_generic_handler("fedmerge.v1.ModelService", {"FetchArtifact": fetch}),
        grpc.method_handlers_generic_handler("fedmerge.v1.LogService", {"FetchExport": export}),
    ]
