"""Two coordinators on one PostgreSQL: whatever happens to the one that leads, the other goes on where it was."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from fedmerge.errors import Deposed
from fedmerge.events import MergeStarted, RoundPublished
from fedmerge.node.node import Node
from fedmerge.sim.inline import prepare_nodes
from fedmerge.store.database import Database
from fedmerge.store.lease import Lease
from fedmerge.store.ledger import Ledger, UploadRow
from fedmerge.tensors import Checkpoint, model_digest
from fedmerge.trust.certificates import TLS_NAME
from fedmerge.v1 import session_pb2, session_pb2_grpc
from fedmerge.verify import verify_directory
from fedmerge_client.link import GrpcLink
from tests.buckets import BucketServer
from tests.conftest import ServerProcess, make_base, make_config
from tests.databases import PostgresServer
from tests.e2e.test_federation import TRAINERS, coordinator_key, kinds, run_simulated

LEASE_S = 2.0


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Rivals:
    """Holders of leases on one database, each with a connection of its own."""

    def __init__(self, url: str) -> None:
        self.clock = Clock()
        self._url = url
        self._databases: list[Database] = []

    def lease(self, holder: str) -> Lease:
        return Lease(self.database(), holder, 6.0, self.clock)

    def database(self) -> Database:
        self._databases.append(Database(self._url))
        return self._databases[-1]

    def close(self) -> None:
        for database in self._databases:
            database.close()


@pytest.fixture
def rivals(database_url: str) -> Iterator[Rivals]:
    rivals = Rivals(database_url)
    yield rivals
    rivals.close()


def test_whoever_renews_keeps_the_lease_and_whoever_falls_silent_loses_it(rivals: Rivals) -> None:
    first, second = rivals.lease("first"), rivals.lease("second")
    assert first.try_take()
    for _ in range(12):
        assert not second.try_take()
        rivals.clock.now_s += 2
        first.renew()
    waited_s = 0
    while not second.try_take():
        rivals.clock.now_s += 1
        waited_s += 1
    assert 4 <= waited_s <= 6
    with pytest.raises(Deposed, match="second"):
        first.renew()
    second.release()
    assert first.try_take()
    with pytest.raises(Deposed):
        second.renew()


def test_a_deposed_coordinator_can_write_nothing(rivals: Rivals) -> None:
    old, new = rivals.lease("old"), rivals.lease("new")
    assert old.try_take()
    stale = Ledger(rivals.database(), lease=old)
    stale.append(MergeStarted(round=1), at_s=1.0)
    assert not new.try_take()
    rivals.clock.now_s += 6
    assert new.try_take()
    row = UploadRow("u", 1, "a" * 64, b"", b"")
    for write in (
        lambda: stale.append(RoundPublished(round=1, version="a" * 64), at_s=2.0),
        lambda: stale.begin_upload(row),
        lambda: stale.end_upload("u"),
        stale.require_lease,
    ):
        with pytest.raises(Deposed):
            write()
    current = Ledger(rivals.database(), lease=new)
    assert kinds(current) == ["merge_started"]
    current.append(RoundPublished(round=1, version="b" * 64), at_s=3.0)
    assert kinds(Ledger(rivals.database())) == ["merge_started", "round_published"]


def test_of_many_that_see_a_silent_holder_one_takes_over(rivals: Rivals) -> None:
    assert rivals.lease("first").try_take()
    others = [rivals.lease(f"other {number}") for number in range(6)]
    assert not any(other.try_take() for other in others)
    rivals.clock.now_s += 6
    with ThreadPoolExecutor(len(others)) as pool:
        assert list(pool.map(Lease.try_take, others)).count(True) == 1


def test_a_restart_takes_its_own_lease_up_at_once(rivals: Rivals) -> None:
    assert rivals.lease("here").try_take()
    assert rivals.lease("here").try_take()


class Pair:
    """Two coordinators with one database, one store of blobs, one key and one certificate; `a` leads first."""

    def __init__(self, folder: Path, database_url: str, blobs: str, environ: Mapping[str, str]) -> None:
        self.folder = folder
        self.environ = environ
        self.ports = [_free_port(), _free_port()]
        make_base(folder / "base")
        extra = f"[store]\ndatabase = '{database_url}'\nblobs = '{blobs}'\n"
        self.config, self.path = make_config(folder, extra=extra)
        prepare_nodes(self.config, list(TRAINERS))
        self.a = self._serve("a", self.ports[0])
        for name in ("tls.key", "tls.crt"):
            (folder / "b").mkdir(exist_ok=True)
            (folder / "b" / name).write_bytes((folder / "a" / name).read_bytes())
        self.b = self._serve("b", self.ports[1])

    def _serve(self, name: str, port: int) -> ServerProcess:
        environ = {"FEDMERGE_FEDERATION__STATE": name, "FEDMERGE_SERVER__LEASE_S": str(LEASE_S), **self.environ}
        return ServerProcess(self.path, listen=f"127.0.0.1:{port}", environ=environ)

    @property
    def addresses(self) -> str:
        return ",".join(f"127.0.0.1:{port}" for port in self.ports)

    @contextmanager
    def node(self, name: str, results: dict[str, Path]) -> Iterator[None]:
        """Run a node that knows both addresses, in a thread."""
        keys = prepare_nodes(self.config, list(TRAINERS))

        def take_part() -> None:
            link = GrpcLink(self.addresses, self.a.bundle, keys[name], connect_patience_s=60)
            node = Node(link, TRAINERS[name], keys[name], link.coordinator, self.folder / "nodes" / name)
            results[name] = node.run()
            link.close()

        thread = threading.Thread(target=take_part, daemon=True)
        thread.start()
        yield
        thread.join(90)

    def wait_for(self, kind: str) -> None:
        give_up_s = time.monotonic() + 60
        database = Database(self.config.database_url())
        while kind not in kinds(Ledger(database)):
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
        database.close()

    def log(self) -> str:
        return (self.folder / "serve.log").read_text()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(params=["folder", "bucket"])
def pair(request: pytest.FixtureRequest, tmp_path: Path, postgres: PostgresServer) -> Iterator[Pair]:
    if request.param == "folder":
        blobs, environ = "blobs", {}
    else:
        server: BucketServer = request.getfixturevalue("bucket_server")
        blobs, environ = server.new_bucket(), server.environ
    pair = Pair(tmp_path, postgres.new_database(), blobs, environ)
    yield pair
    for process in (pair.a, pair.b):
        if process.child.poll() is None:
            process.kill()


def _channel(address: str, bundle: Path) -> grpc.Channel:
    pem = bundle.read_bytes()
    end = b"-----END CERTIFICATE-----"
    credentials = grpc.ssl_channel_credentials(pem[: pem.index(end) + len(end)] + b"\n")
    return grpc.secure_channel(address, credentials, options=[("grpc.ssl_target_name_override", TLS_NAME)])


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["folder"], indirect=True)
def test_a_standby_takes_over_and_the_deposed_one_can_not_publish(tmp_path: Path, pair: Pair) -> None:
    with _channel(pair.b.address, pair.b.bundle) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            session_pb2_grpc.SessionServiceStub(channel).BeginSession(session_pb2.BeginSessionRequest())
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    retry = error_details_pb2.RetryInfo()
    status = rpc_status.from_call(caught.value)
    assert any(detail.Unpack(retry) for detail in status.details)
    assert 0 < retry.retry_delay.ToTimedelta().total_seconds() < LEASE_S

    results: dict[str, Path] = {}
    with pair.node("north", results):
        pair.wait_for("delta_accepted")
        pair.a.child.send_signal(signal.SIGSTOP)
        with pair.node("south", results):
            pair.wait_for("round_published")
            pair.a.child.send_signal(signal.SIGCONT)
            assert pair.a.wait() == 8
    assert "has taken this one's place" in pair.log()
    assert pair.b.stop() == 0
    check_published(pair, results, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["bucket"], indirect=True)
def test_a_standby_takes_over_at_once_when_the_leader_is_stopped_properly(tmp_path: Path, pair: Pair) -> None:
    results: dict[str, Path] = {}
    with pair.node("north", results):
        pair.wait_for("delta_accepted")
        assert pair.a.stop() == 0
        with pair.node("south", results):
            pair.wait_for("round_published")
    assert pair.b.stop() == 0
    check_published(pair, results, tmp_path)


def check_published(pair: Pair, results: dict[str, Path], tmp_path: Path) -> None:
    """The published version is the one that an undisturbed federation gives, and it was published once."""
    expected = run_simulated(tmp_path / "undisturbed").version
    assert {model_digest(Checkpoint(model_dir)) for model_dir in results.values()} == {expected}
    assert sorted(results) == ["north", "south"]
    ledger = Ledger(Database(pair.config.database_url()))
    assert kinds(ledger).count("round_published") == 1
    assert kinds(ledger).count("delta_accepted") == 2
    ledger.close()
    verify_directory(pair.folder / "b" / "models" / "round-0001", coordinator_key(pair.folder))
