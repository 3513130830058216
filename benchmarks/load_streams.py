"""One upload and one download, beside the same bytes over bare gRPC, a TLS socket and a plain one."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import multiprocessing
import os
import socket
import ssl
import statistics
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from load_site import Site, Stopwatch, Usage, commit, payloads, signed, upload, zeros
from shared import at_least, print_table

from fedmerge.aggregation.aggregate import open_delta
from fedmerge.delta.task_vector import delta_schema
from fedmerge.files import sync_file
from fedmerge.transparency.merkle import leaves_of, merkle_root
from fedmerge.trust.certificates import TLS_NAME, self_signed
from fedmerge.wire import CHUNK_BYTES
from fedmerge_client.connection import CHANNEL_OPTIONS
from fedmerge_client.link import GrpcLink
from fedmerge_server.run import CHANNEL_OPTIONS as SERVER_OPTIONS

UP, DOWN = b"U", b"D"
SERVICE = "peer.Stream"


def accept_sockets(listener: socket.socket, context: ssl.SSLContext | None, file: Path) -> None:
    """Take what is sent and throw it away, or send the file, one connection after the other."""
    buffer = bytearray(CHUNK_BYTES)
    while True:
        connection, _ = listener.accept()
        if context is not None:
            connection = context.wrap_socket(connection, server_side=True)
        with connection:
            header = connection.recv(9)
            left = int.from_bytes(header[1:], "big")
            if header[:1] == UP:
                while left:
                    left -= connection.recv_into(buffer)
                connection.sendall(b".")
            else:
                for data in chunks_of(file):
                    connection.sendall(data)


async def answer_grpc(ready: Any, key: bytes, certificate: bytes, file: Path) -> None:
    """Take messages of bytes and throw them away, or send the file."""

    async def take(requests: AsyncIterator[Any], context: Any) -> bytes:
        async for _ in requests:
            pass
        return b"."

    async def give(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for data in chunks_of(file):
            yield data

    handlers = {
        "Take": grpc.stream_unary_rpc_method_handler(take),
        "Give": grpc.unary_stream_rpc_method_handler(give),
    }
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    await server.start()
    ready.put(port)
    await server.wait_for_termination()


def be_peer(kind: str, ready: Any, key: bytes, certificate: bytes, file: Path) -> None:
    """Be the other end."""
    if kind == "gRPC":
        asyncio.run(answer_grpc(ready, key, certificate, file))
        return
    listener = socket.create_server(("127.0.0.1", 0))
    context = None
    if kind == "TLS":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "pem").write_bytes(certificate + key)
            context.load_cert_chain(Path(folder) / "pem")
    ready.put(listener.getsockname()[1])
    accept_sockets(listener, context, file)


class Peer:
    """A process that takes and gives bytes: over "TCP", "TLS" or "gRPC" with TLS."""

    def __init__(self, kind: str, file: Path) -> None:
        self.kind = kind
        self.file = file
        spawn = multiprocessing.get_context("spawn")
        pair, ready = self_signed([TLS_NAME], dt.datetime.now(dt.UTC), dt.timedelta(days=1)), spawn.Queue()
        self.certificate = pair.certificate
        self.process = spawn.Process(target=be_peer, args=(kind, ready, pair.key, pair.certificate, file), daemon=True)
        self.process.start()
        self.port = ready.get()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()

    @contextmanager
    def connected(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            if self.kind == "TCP":
                yield connection
                return
            context = ssl.create_default_context(cadata=self.certificate.decode())
            with context.wrap_socket(connection, server_hostname=TLS_NAME) as secured:
                yield secured

    def _call(self, method: str) -> tuple[grpc.Channel, str]:
        credentials = grpc.ssl_channel_credentials(self.certificate)
        options = [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", TLS_NAME)]
        return grpc.secure_channel(f"127.0.0.1:{self.port}", credentials, options), f"/{SERVICE}/{method}"

    def send(self) -> None:
        """Send the file."""
        if self.kind == "gRPC":
            channel, method = self._call("Take")
            with channel:
                channel.stream_unary(method)(chunks_of(self.file))
            return
        with self.connected() as connection:
            connection.sendall(UP + self.file.stat().st_size.to_bytes(8, "big"))
            for data in chunks_of(self.file):
                connection.sendall(data)
            connection.recv(1)

    def fetch(self) -> None:
        """Receive the file, and throw it away."""
        if self.kind == "gRPC":
            channel, method = self._call("Give")
            with channel:
                for _ in channel.unary_stream(method)(b"."):
                    pass
            return
        buffer = bytearray(CHUNK_BYTES)
        with self.connected() as connection:
            connection.sendall(DOWN + bytes(8))
            while connection.recv_into(buffer):
                pass


def chunks_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            yield data


def hashed(path: Path) -> None:
    for data in chunks_of(path):
        hashlib.sha256(data)


def written(path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent) as file:
        for data in chunks_of(path):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def stream(folder: Path, *, quick: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure each in turn, several times; return goals and medians."""
    trials, payload_bytes = (3, 64 << 20) if quick else (7, 256 << 20)
    names = [f"node-{number}" for number in range(trials)]
    found: dict[str, list[Usage]] = {}
    with ExitStack() as stack:
        site = stack.enter_context(Site(folder, names, zeros(payload_bytes)))
        spec, digest = site.spec()
        made = payloads(site, spec, trials)
        file, schema = made[0].file, delta_schema(site.base.schema)
        base = site.base.directory / "model.safetensors"
        root = merkle_root(leaves_of(base)).hex()
        up = [stack.enter_context(Peer(kind, file)) for kind in ("TCP", "TLS", "gRPC")]
        down = [stack.enter_context(Peer(kind, base)) for kind in ("TCP", "TLS", "gRPC")]

        def record(name: str, work: Callable[[], Any], other: int | None = None) -> Any:
            watch = Stopwatch(other)
            result = work()
            found.setdefault(name, []).append(watch.read())
            return result

        def decoded() -> None:
            delta = open_delta(spec, site.keys[names[0]].public.key_id, file, schema)
            for name in delta:
                delta[name]

        def fetched(link: GrpcLink) -> None:
            target = folder / "fetched"
            assert merkle_root(link.fetch(root, target)).hex() == root
            sync_file(target)
            target.unlink()

        for name, payload in zip(names, made, strict=True):
            link, begin = site.link(name), signed(payload, site.keys[name], spec, digest)
            link.connect()
            for peer in up:
                record(f"up: {peer.kind}", peer.send, peer.process.pid)
            upload_id = record("up: ours", partial(upload, link, begin, payload), site.child.pid)
            record("up: ours, commit", partial(commit, link, upload_id), site.child.pid)
            for peer in down:
                record(f"down: {peer.kind}", peer.fetch, peer.process.pid)
            record("down: ours", partial(fetched, link), site.child.pid)
            record("alone: SHA-256", partial(hashed, file))
            record("alone: write and fsync", partial(written, file))
            record("alone: decode", decoded)
            link.close()
        sizes = {"up": file.stat().st_size, "down": base.stat().st_size, "alone": file.stat().st_size}
    medians = {name: Usage(*map(statistics.median, zip(*several, strict=True))) for name, several in found.items()}
    ratios = {
        way: [
            ours.wall_s / bare.wall_s for ours, bare in zip(found[f"{way}: ours"], found[f"{way}: gRPC"], strict=True)
        ]
        for way in ("up", "down")
    }
    gib = {name: sizes[name.partition(":")[0]] / (1 << 30) for name in medians}
    print_table(
        ["with TLS but for TCP", "MB/s", "CPU s per GiB", "node", "coordinator"],
        [
            [name, f"{sizes[name.partition(':')[0]] / 1e6 / each.wall_s:.0f}"]
            + [f"{value / gib[name]:.2f}" for value in (each.cpu_s, each.client_s, each.server_s)]
            for name, each in medians.items()
        ],
    )
    per_gib = {name: each.cpu_s / gib[name] for name, each in medians.items()}
    needed = per_gib["alone: SHA-256"] + per_gib["alone: write and fsync"]
    rest = {way: per_gib[f"{way}: gRPC"] + needed for way in ("up", "down")}
    for way, several in ratios.items():
        print(
            f"{way}: {1 / statistics.median(several):.2f} of bare gRPC by the clock, "
            f"{per_gib[f'{way}: gRPC'] / per_gib[f'{way}: ours']:.2f} by CPU; "
            f"bare gRPC, hash, write and fsync alone make {rest[way]:.2f} CPU s per GiB, "
            f"of ours {rest[way] / per_gib[f'{way}: ours']:.2f}"
        )
    targets = [
        at_least(0.8, f"speed of one {what} by the clock, of bare gRPC", 1 / statistics.median(ratios[way]))
        for way, what in (("up", "upload"), ("down", "download"))
    ] + [
        at_least(0.8, f"bare gRPC, hash and disk, of the CPU time of one {what}", rest[way] / per_gib[f"{way}: ours"])
        for way, what in (("up", "upload"), ("down", "download"))
    ]
    return targets, {"usage": {name: [each._asdict() for each in several] for name, several in found.items()}, **sizes}
