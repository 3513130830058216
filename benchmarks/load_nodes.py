"""Nodes by the dozen and the thousand, in a few processes: they wait, upload, or begin to and fall silent."""

from __future__ import annotations

import asyncio
import datetime as dt
import multiprocessing
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from load_site import Payload, commit, upload

from fedmerge.statements import SessionProof
from fedmerge.transparency.merkle import LEAF_BYTES
from fedmerge.trust.certificates import TLS_NAME, self_signed
from fedmerge.trust.sign import PublicKey, SigningKey
from fedmerge.v1 import delta_pb2, round_pb2, round_pb2_grpc, session_pb2, session_pb2_grpc
from fedmerge.wire import SESSION_HEADER, Chunk
from fedmerge_client.connection import CHANNEL_OPTIONS
from fedmerge_client.link import GrpcLink
from fedmerge_server.run import CHANNEL_OPTIONS as SERVER_OPTIONS

CONNECTING_AT_ONCE = 16
PATIENCE_S = 900
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Coordinator:
    """Where a coordinator is, and the file by which to trust it."""

    address: str
    bundle: Path


def secret_of(key: SigningKey) -> bytes:
    assert isinstance(key.private, Ed25519PrivateKey)
    return key.private.private_bytes_raw()


def key_of(secret: bytes) -> SigningKey:
    return SigningKey(Ed25519PrivateKey.from_private_bytes(secret))


class Crowd:
    """Processes that do `work(coordinator, share, told, stop)`, each with a share of `members`, until they are stopped.

    What they put into `told` is read here.
    """

    def __init__(self, work: Callable[..., None], coordinator: Coordinator, members: Sequence[Any], count: int) -> None:
        self.told: Any = SPAWN.Queue()
        self._stop = SPAWN.Event()
        shares = [list(members[number::count]) for number in range(count)]
        self._processes = [
            SPAWN.Process(target=work, args=(coordinator, share, self.told, self._stop), daemon=True)
            for share in shares
        ]
        for process in self._processes:
            process.start()

    def get(self) -> Any:
        """Return what was told next; raise what went wrong instead."""
        told = self.told.get(timeout=PATIENCE_S)
        if isinstance(told, Exception):
            raise told
        return told

    def stop(self) -> None:
        """Have the processes end."""
        self._stop.set()
        for process in self._processes:
            process.join(30)
            process.kill()


def be_waiting(coordinator: Coordinator, secrets: list[bytes], told: Any, stop: Any) -> None:
    """Be nodes that have a session and watch, as `fedmerge join` does; tell when each has seen something."""

    async def node(secret: bytes, channel: grpc.aio.Channel, places: asyncio.Semaphore) -> None:
        async with places:
            sessions = session_pb2_grpc.SessionServiceStub(channel)
            nonce = (await sessions.BeginSession(session_pb2.BeginSessionRequest())).nonce.hex()
            proof = SessionProof(coordinator_key=trusted, nonce=nonce).sign(key_of(secret))
            token = (await sessions.OpenSession(session_pb2.OpenSessionRequest(envelope=proof))).token
            watch = round_pb2_grpc.RoundServiceStub(channel).WatchRounds(
                round_pb2.WatchRoundsRequest(), metadata=((SESSION_HEADER, token),)
            )
            await watch.read()
        told.put(time.time())
        while await watch.read() is not grpc.aio.EOF:
            told.put(time.time())

    async def nodes() -> None:
        places = asyncio.Semaphore(CONNECTING_AT_ONCE)
        channels = [grpc.aio.secure_channel(coordinator.address, credentials, options) for _ in secrets]
        pairs = zip(secrets, channels, strict=True)
        tasks = [asyncio.create_task(told_of_errors(secret, channel, places)) for secret, channel in pairs]
        await asyncio.to_thread(stop.wait)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def told_of_errors(secret: bytes, channel: grpc.aio.Channel, places: asyncio.Semaphore) -> None:
        try:
            await node(secret, channel, places)
        except Exception as err:
            told.put(err)

    pem, end = coordinator.bundle.read_bytes(), b"-----END CERTIFICATE-----"
    credentials = grpc.ssl_channel_credentials(pem[: pem.index(end) + len(end)] + b"\n")
    options = [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", TLS_NAME)]
    trusted = PublicKey.load(coordinator.bundle).key_id
    asyncio.run(nodes())


def serve_bare(bundle: Path, ready: Any) -> None:
    """Be a gRPC server with TLS that answers as a coordinator does, and has nothing behind it."""

    class Services(session_pb2_grpc.SessionServiceServicer, round_pb2_grpc.RoundServiceServicer):
        async def BeginSession(self, request: Any, context: Any) -> session_pb2.BeginSessionResponse:  # noqa: N802
            return session_pb2.BeginSessionResponse(nonce=bytes(32))

        async def OpenSession(self, request: Any, context: Any) -> session_pb2.OpenSessionResponse:  # noqa: N802
            return session_pb2.OpenSessionResponse(token="token")

        async def WatchRounds(  # noqa: N802
            self, request: Any, context: Any
        ) -> AsyncIterator[round_pb2.WatchRoundsResponse]:
            yield round_pb2.WatchRoundsResponse()
            await asyncio.Event().wait()

    async def serve() -> None:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        session_pb2_grpc.add_SessionServiceServicer_to_server(Services(), server)
        round_pb2_grpc.add_RoundServiceServicer_to_server(Services(), server)
        pair = self_signed([TLS_NAME], dt.datetime.now(dt.UTC), dt.timedelta(days=1))
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(pair.key, pair.certificate)]))
        bundle.write_bytes(pair.certificate + SigningKey.generate().public.pem().encode())
        await server.start()
        ready.put(f"127.0.0.1:{port}")
        await server.wait_for_termination()

    asyncio.run(serve())


@dataclass(frozen=True)
class Sender:
    """A node that uploads: its key, its statement (a BeginUploadRequest), and its payload."""

    secret: bytes
    begin: bytes
    payload: Payload

    def link(self, coordinator: Coordinator) -> GrpcLink:
        return GrpcLink(coordinator.address, coordinator.bundle, key_of(self.secret), patience_s=600)


def be_sending(coordinator: Coordinator, senders: list[Sender], told: Any, stop: Any) -> None:
    """Be nodes that upload all at once, and commit; tell when each has its upload stored, and its receipt."""

    def send(sender: Sender) -> None:
        link = sender.link(coordinator)
        link.connect()
        barrier.wait()
        begun_s = time.time()
        upload_id = upload(link, delta_pb2.BeginUploadRequest.FromString(sender.begin), sender.payload)
        stored_s = time.time()
        commit(link, upload_id)
        told.put((begun_s, stored_s, time.time()))
        link.close()

    barrier = threading.Barrier(len(senders))
    with ThreadPoolExecutor(len(senders)) as pool:
        for each in [pool.submit(send, sender) for sender in senders]:
            each.result()


def be_stalling(coordinator: Coordinator, senders: list[Sender], told: Any, stop: Any) -> None:
    """Be nodes that send a chunk, then nothing, and come back at once when they are cut off.

    Tells "sent" when the chunk was, and after how many seconds of silence the coordinator ended the stream, and why.
    """

    def stall(sender: Sender) -> None:
        link, begin = sender.link(coordinator), delta_pb2.BeginUploadRequest.FromString(sender.begin)
        while not stop.is_set():
            upload = link.connection.call(lambda stubs: stubs.deltas.BeginUpload, begin)
            cut, sent_s = threading.Event(), [time.time()]

            def chunk_then_silence(
                upload: Any = upload, cut: threading.Event = cut, sent_s: list[float] = sent_s
            ) -> Iterator[Chunk[delta_pb2.UploadDeltaRequest]]:
                offset = upload.committed_bytes
                data = sender.payload.leaf(offset // LEAF_BYTES)
                yield Chunk(delta_pb2.UploadDeltaRequest(upload_id=upload.upload_id, offset=offset), data)
                sent_s[0] = time.time()
                told.put("sent")
                while not cut.wait(0.1) and not stop.is_set():
                    pass

            try:
                link.connection.stubs.upload(chunk_then_silence(), metadata=link.connection.metadata())
            except grpc.RpcError as err:
                silent_s, why = time.time() - sent_s[0], err.details() or ""
                told.put((silent_s, why))
                if "at once" in why:  # no place: come back as it says
                    stop.wait(2.0)
            cut.set()
        link.close()

    with ThreadPoolExecutor(len(senders)) as pool:
        for each in [pool.submit(stall, sender) for sender in senders]:
            each.result()
