"""What one node can take of a coordinator, and what a broken or hostile connection costs the others: real sockets."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedmerge.errors import Busy, Unreachable
from fedmerge.transparency.merkle import LEAF_BYTES, leaves_of, merkle_root
from fedmerge.v1 import delta_pb2, model_pb2, model_pb2_grpc, round_pb2, round_pb2_grpc
from fedmerge.wire import CHUNK_BYTES, error_of, status_of
from fedmerge_client.backoff import Backoff
from fedmerge_client.link import GrpcLink
from tests.conftest import Federation, ServerProcess, make_base, make_federation, wait_until
from tests.wire.test_upload import Site, site_of, translated


@contextlib.contextmanager
def serving(
    folder: Path, limits: str, names: tuple[str, ...] = ("north", "south")
) -> Iterator[tuple[Federation, ServerProcess]]:
    federation = make_federation(folder, names, extra="[delta]\nvalues = 'fp32'", server=limits)
    server = federation.serve()
    try:
        yield federation, server
    finally:
        server.stop()


def stream(site: Site, upload_id: str, chunks: Iterator[tuple[int, bytes]]) -> Callable[[], int]:
    """Begin to stream chunks; the result is called for the answer, and raises what the coordinator says."""
    requests = (delta_pb2.UploadDeltaRequest(upload_id=upload_id, offset=at, data=data) for at, data in chunks)
    call = site.stub.UploadDelta.future(requests, metadata=site.link.connection.metadata())
    return lambda: int(translated(call.result).committed_bytes)


def first_chunk_then_silence(data: bytes, end: threading.Event) -> Iterator[tuple[int, bytes]]:
    yield 0, data[:LEAF_BYTES]
    end.wait(30)


def test_a_silent_upload_loses_its_place_to_another_node_and_resumes_later(tmp_path: Path) -> None:
    with serving(tmp_path, "max_uploads = 1\nidle_s = 1.5\n") as (federation, server):
        north, south = (site_of(federation, server, federation.keys[name]) for name in ("north", "south"))
        payloads = [site.payload(site.spec()[0], scale=scale) for site, scale in ((north, 0.01), (south, 0.02))]
        upload, end = north.begin(payloads[0]), threading.Event()
        answer = stream(north, upload.upload_id, first_chunk_then_silence(payloads[0].read_bytes(), end))
        wait_until(lambda: north.committed(upload.upload_id) == LEAF_BYTES)
        # While it is silent there is no place, and the answer says when to come back.
        other = south.begin(payloads[1])
        with pytest.raises(Busy) as caught:
            south.send(other.upload_id, [(0, payloads[1].read_bytes()[:LEAF_BYTES])])
        assert caught.value.retry_after_s == 2.0
        south.submit(payloads[1])  # obeys, and gets the place
        with pytest.raises(Unreachable, match="no chunk came"):
            answer()
        end.set()
        assert north.begin(payloads[0]).upload_id != upload.upload_id  # another statement, another upload
        progress: list[int] = []
        envelope = north.statement(payloads[0]).sign(north.key)
        leaves = leaves_of(payloads[0])
        request = delta_pb2.BeginUploadRequest(envelope=envelope, leaf_hashes=b"".join(leaves))
        again = north.stub.BeginUpload(request, metadata=north.link.connection.metadata())
        north.send(again.upload_id, [(0, payloads[0].read_bytes()[:LEAF_BYTES])])
        north.link.submit(envelope, payloads[0], leaves, progress.append)
        assert progress[0] == LEAF_BYTES  # the same statement, the same upload, from where it stood
        for site in (north, south):
            site.link.close()


def test_where_all_places_are_taken_a_silent_upload_gives_way_long_before_its_time_is_up(tmp_path: Path) -> None:
    with serving(tmp_path, "max_uploads = 1\nidle_s = 12\n") as (federation, server):
        north, south = (site_of(federation, server, federation.keys[name]) for name in ("north", "south"))
        payloads = [site.payload(site.spec()[0], scale=scale) for site, scale in ((north, 0.01), (south, 0.02))]
        envelope, leaves, end = north.statement(payloads[0]).sign(north.key), leaves_of(payloads[0]), threading.Event()
        begin = delta_pb2.BeginUploadRequest(envelope=envelope, leaf_hashes=b"".join(leaves))
        upload = north.stub.BeginUpload(begin, metadata=north.link.connection.metadata())
        answer = stream(north, upload.upload_id, first_chunk_then_silence(payloads[0].read_bytes(), end))
        wait_until(lambda: north.committed(upload.upload_id) == LEAF_BYTES)
        south.submit(payloads[1])
        with pytest.raises(Unreachable, match="another node needed the place"):
            answer()
        end.set()
        north.link.submit(envelope, payloads[0], leaves, lambda sent: None)
        for site in (north, south):
            site.link.close()


def test_a_nodes_newest_stream_takes_the_place_of_its_earlier_one(tmp_path: Path) -> None:
    with serving(tmp_path, "max_uploads = 1\n") as (federation, server):
        north = site_of(federation, server, federation.keys["north"])
        payload = north.payload(north.spec()[0])
        envelope = north.statement(payload).sign(north.key)
        leaves = leaves_of(payload)
        request = delta_pb2.BeginUploadRequest(envelope=envelope, leaf_hashes=b"".join(leaves))
        upload = north.stub.BeginUpload(request, metadata=north.link.connection.metadata())
        end = threading.Event()
        answer = stream(north, upload.upload_id, first_chunk_then_silence(payload.read_bytes(), end))
        wait_until(lambda: north.committed(upload.upload_id) == LEAF_BYTES)
        north.link.submit(envelope, payload, leaves, lambda sent: None)  # at once: it need not wait for idle_s
        with pytest.raises(Unreachable, match="newer stream"):
            answer()
        end.set()
        north.link.close()


def test_a_node_that_is_too_fast_is_slowed_down_and_nothing_piles_up(tmp_path: Path) -> None:
    total, rate = 128 << 20, 4 << 20
    with serving(tmp_path, f"max_bytes_per_s = {rate}\n") as (federation, server):
        north, south = (site_of(federation, server, federation.keys[name]) for name in ("north", "south"))
        payload = tmp_path / "large"
        payload.write_bytes(secrets.token_bytes(total))
        upload = north.begin(payload)
        process = psutil.Process(server.child.pid)
        before = process.memory_info().rss
        pulled = [0]

        def chunks() -> Iterator[tuple[int, bytes]]:
            with payload.open("rb") as file:
                while data := file.read(LEAF_BYTES):
                    yield pulled[0], data
                    pulled[0] += len(data)

        began_s = time.monotonic()
        answer = stream(north, upload.upload_id, chunks())  # kept, or gRPC would cancel it
        wait_until(lambda: north.committed(upload.upload_id) >= 2 * rate)
        stored, took_s = north.committed(upload.upload_id), time.monotonic() - began_s
        assert stored <= rate * took_s + 2 * LEAF_BYTES
        # What is in flight is in HTTP/2's windows and in sockets' buffers, which the kernel lets grow to tens of MiB;
        # the rest waits in the sender's file, and what the coordinator itself holds is smaller still.
        assert pulled[0] - stored < 64 << 20
        assert process.memory_info().rss - before < 48 << 20
        # The limit is each node's own.
        del answer
        south.submit(south.payload(south.spec()[0]))
        for site in (north, south):
            site.link.close()


def file_of_the_base(folder: Path, num_bytes: int) -> tuple[Path, str]:
    """Put a file beside the base model, as a tokenizer would be, and return it with its root."""
    make_base(folder / "base")
    path = folder / "base" / "vocab.txt"
    path.write_bytes(secrets.token_bytes(num_bytes))
    return path, merkle_root(leaves_of(path)).hex()


def test_a_node_that_takes_nothing_loses_its_place_to_another(tmp_path: Path) -> None:
    path, root = file_of_the_base(tmp_path, 48 << 20)
    with serving(tmp_path, "max_downloads = 1\nidle_s = 1.5\n") as (federation, server):
        north, south = (site_of(federation, server, federation.keys[name]) for name in ("north", "south"))
        stub = model_pb2_grpc.ModelServiceStub(north.link.connection.stubs.channel)
        answers = stub.FetchArtifact(
            model_pb2.FetchArtifactRequest(root=root), metadata=north.link.connection.metadata()
        )
        assert next(iter(answers)).data  # and the rest waits at the coordinator, as windows are smaller than the file
        leaves = south.link.fetch(root, tmp_path / "south")  # told to come back, and gets the place
        assert merkle_root(leaves).hex() == root
        assert (tmp_path / "south").read_bytes() == path.read_bytes()
        with pytest.raises(Unreachable, match="nothing was taken"):
            translated(lambda: list(answers))
        north.link.fetch(root, tmp_path / "north")
        assert (tmp_path / "north").read_bytes() == path.read_bytes()
        for site in (north, south):
            site.link.close()


def test_nodes_that_leave_in_the_midst_of_a_download_are_no_error(tmp_path: Path) -> None:
    _, root = file_of_the_base(tmp_path, 8 << 20)
    with serving(tmp_path, "idle_s = 20\n") as (federation, server):
        for number in range(24):
            north = site_of(federation, server, federation.keys["north"])
            stub = model_pb2_grpc.ModelServiceStub(north.link.connection.stubs.channel)
            answers = stub.FetchArtifact(
                model_pb2.FetchArtifactRequest(root=root), metadata=north.link.connection.metadata()
            )
            assert next(iter(answers)).data
            if number % 2:
                answers.cancel()
            north.link.close()
        south = site_of(federation, server, federation.keys["south"])
        south.link.fetch(root, tmp_path / "south")
        south.link.close()
    said = (federation.folder / "serve.log").read_text()
    assert "ERROR" not in said
    assert "Traceback" not in said


def test_a_download_is_slowed_down_too(tmp_path: Path) -> None:
    num_bytes, rate = 8 << 20, 4 << 20
    _, root = file_of_the_base(tmp_path, num_bytes)
    with serving(tmp_path, f"max_bytes_per_s = {rate}\n") as (federation, server):
        north = site_of(federation, server, federation.keys["north"])
        began_s = time.monotonic()
        north.link.fetch(root, tmp_path / "north")
        assert num_bytes <= rate * (time.monotonic() - began_s) + 2 * CHUNK_BYTES
        north.link.close()


class Proxy:
    """A TCP proxy on loopback that can stop to pass bytes on, or pass one at a time, without closing anything."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.is_passing = threading.Event()
        self.is_passing.set()
        self.bytes_per_s: float | None = None
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.is_passing.set()
        for each in (self._listener, *self._sockets):
            each.close()

    def _accept(self) -> None:
        host, _, port = self._target.rpartition(":")
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection((host, int(port)))
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 if self.bytes_per_s else 65536):
                self.is_passing.wait()
                if self.bytes_per_s:
                    time.sleep(1 / self.bytes_per_s)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("bytes_per_s", [0, 1])
def test_a_connection_that_is_half_open_or_one_byte_a_second_holds_up_nobody(tmp_path: Path, bytes_per_s: int) -> None:
    with serving(tmp_path, "max_uploads = 1\nidle_s = 1\n") as (federation, server):
        proxy = Proxy(server.address)
        north = Site(
            GrpcLink(proxy.address, server.bundle, federation.keys["north"]),
            federation.keys["north"],
            tmp_path,
            site_of(federation, server, federation.keys["north"]).base,
        )
        direct, south = (site_of(federation, server, federation.keys[name]) for name in ("north", "south"))
        payload = north.payload(north.spec()[0])
        data, leaves = payload.read_bytes(), leaves_of(payload)
        envelope = north.statement(payload).sign(north.key)
        request = delta_pb2.BeginUploadRequest(envelope=envelope, leaf_hashes=b"".join(leaves))
        upload = north.stub.BeginUpload(request, metadata=north.link.connection.metadata())
        go_on = threading.Event()

        def chunks() -> Iterator[tuple[int, bytes]]:
            yield 0, data[:LEAF_BYTES]
            go_on.wait(30)
            yield LEAF_BYTES, data[LEAF_BYTES : 2 * LEAF_BYTES]

        answer = stream(north, upload.upload_id, chunks())
        wait_until(lambda: direct.committed(upload.upload_id) == LEAF_BYTES)
        if bytes_per_s:
            proxy.bytes_per_s = bytes_per_s
        else:
            proxy.is_passing.clear()
        go_on.set()
        south.submit(south.payload(south.spec()[0], scale=0.02))
        progress: list[int] = []
        direct.link.submit(envelope, payload, leaves, progress.append)
        assert progress[0] == LEAF_BYTES
        proxy.close()
        del answer
        for site in (north, direct, south):
            site.link.close()


def test_downloads_and_rounds_are_served_while_deltas_are_decoded(tmp_path: Path) -> None:
    names = tuple(f"node-{number}" for number in range(8))
    with serving(tmp_path, "", names) as (federation, server):
        sites = [site_of(federation, server, federation.keys[name]) for name in names]
        spec, _ = sites[0].spec()
        payloads = [site.payload(spec) for site in sites]
        threads = [
            threading.Thread(target=site.submit, args=(payload,), daemon=True)
            for site, payload in zip(sites[:-1], payloads[:-1], strict=True)
        ]
        for thread in threads:
            thread.start()
        last, fetched = sites[-1], 0
        while any(thread.is_alive() for thread in threads):
            target = tmp_path / f"fetched-{fetched}"
            last.link.fetch(spec.base_files[0].root, target)
            assert target.stat().st_size == spec.base_files[0].num_bytes
            target.unlink()
            fetched += 1
        assert fetched
        for site in sites:
            site.link.close()


@pytest.mark.parametrize("retry_after_s", [None, 0.25, 2.0, 61.5])
def test_when_to_come_back_travels_with_the_error(retry_after_s: float | None) -> None:
    error = error_of(status_of(Busy("full", hint="wait", retry_after_s=retry_after_s)))
    assert isinstance(error, Busy)
    assert (error.message, error.hint, error.retry_after_s) == ("full", "wait", retry_after_s)


def test_waits_are_jittered_grow_and_end_with_the_patience() -> None:
    began_s = time.monotonic()
    backoff, waits = Backoff(0.6), 0
    while backoff.wait():
        waits += 1
    assert waits >= 2
    assert time.monotonic() - began_s >= 0.6
    asked = Backoff(10.0)
    began_s = time.monotonic()
    assert asked.wait(at_least_s=0.3)
    assert time.monotonic() - began_s >= 0.3
    assert not Backoff(0.0).wait()


def test_watchers_hear_of_what_concerns_them_and_not_of_every_delta(tmp_path: Path) -> None:
    with serving(tmp_path, "") as (federation, server):
        north, south = (site_of(federation, server, federation.keys[name]) for name in ("north", "south"))
        stub = round_pb2_grpc.RoundServiceStub(north.link.connection.stubs.channel)
        watched = stub.WatchRounds(round_pb2.WatchRoundsRequest(), metadata=north.link.connection.metadata())
        while next(watched).phase != round_pb2.ROUND_PHASE_OPEN:
            pass
        for site in (north, south):
            site.submit(site.payload(site.spec()[0]))
        phases = [view.phase for view in watched]
        # The first delta is no news, each phase is at most once, and the end is told at once.
        assert phases == sorted(set(phases), key=phases.index)
        assert round_pb2.ROUND_PHASE_OPEN not in phases
        assert phases[-1] == round_pb2.ROUND_PHASE_PUBLISHED
        for site in (north, south):
            site.link.close()
