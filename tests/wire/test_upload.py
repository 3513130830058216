"""A coordinator on loopback, over TLS, and nodes that break, lie and repeat themselves."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import write_delta
from fedmerge.delta.task_vector import delta_schema
from fedmerge.errors import (
    BadOffset,
    BadSignature,
    ConflictingSubmission,
    DigestMismatch,
    FedmergeError,
    InvalidDelta,
    NoSession,
    QuotaExceeded,
    Refused,
    RoundClosed,
    StaleBase,
    UnknownRound,
    UnknownUpload,
    UnknownVersion,
    UntrustedKey,
)
from fedmerge.statements import DeltaStatement, MetricsStatement, Receipt, Rejection, RoundSpec, SessionProof, digest_of
from fedmerge.tensors import Checkpoint
from fedmerge.transparency.merkle import LEAF_BYTES, leaves_of, merkle_root
from fedmerge.trust.sign import PublicKey, SigningKey
from fedmerge.v1 import delta_pb2, delta_pb2_grpc, log_pb2, session_pb2
from fedmerge.wire import SESSION_HEADER, error_of
from fedmerge_client.link import GrpcLink
from fedmerge_server.sessions import MAX_SESSIONS
from tests.conftest import Federation, ServerProcess, make_federation
from tests.unit.test_frame import Written, zstd


@dataclass
class Site:
    """A node by hand: every step of an upload can be done wrong on purpose."""

    link: GrpcLink
    key: SigningKey
    folder: Path
    base: Checkpoint

    @property
    def node_id(self) -> str:
        return self.key.public.key_id

    def spec(self) -> tuple[RoundSpec, str]:
        """Return the current round's spec and its digest."""
        for view in self.link.watch():
            if view.spec_envelope:
                trusted = {self.link.coordinator.key_id: self.link.coordinator}
                spec, signed = RoundSpec.open(view.spec_envelope, trusted, where="spec")
                return spec, digest_of(signed.payload)
        raise AssertionError

    def payload(self, spec: RoundSpec, *, scale: float = 0.01) -> Path:
        """Write a delta file that fits the round."""
        generator = torch.Generator().manual_seed(int(self.node_id[:12], 16))
        schema = delta_schema(self.base.schema)
        delta = {name: scale * torch.randn(s.shape, generator=generator) for name, s in schema.items()}
        path = self.folder / f"{secrets.token_hex(4)}.safetensors"
        write_delta(path, delta, schema, Codec.from_dict(spec.codec), seed=spec.mask_seed(self.node_id))
        return path

    def statement(self, payload: Path, **lies: Any) -> DeltaStatement:
        """Return an honest statement about a payload, but for the `lies`."""
        spec, digest = self.spec()
        truth: dict[str, Any] = {
            "federation": spec.federation,
            "run": spec.run,
            "round": spec.round,
            "spec_digest": digest,
            "nonce": spec.nonce,
            "base_digest": spec.model.digest,
            "schema_digest": spec.schema_digest,
            "node_id": self.node_id,
            "submission_id": secrets.token_hex(16),
            "codec": spec.codec,
            "payload_bytes": payload.stat().st_size,
            "payload_root": merkle_root(leaves_of(payload)).hex(),
            "num_examples": 10,
            "metrics": {},
            "software": "by hand",
        }
        return DeltaStatement.model_validate(truth | lies)

    def submit(self, payload: Path, **lies: Any) -> bytes:
        """Hand in a payload under a statement with `lies`; return the receipt."""
        envelope = self.statement(payload, **lies).sign(self.key)
        return self.link.submit(envelope, payload, leaves_of(payload), lambda sent: None)

    def begin(self, payload: Path) -> delta_pb2.BeginUploadResponse:
        envelope = self.statement(payload).sign(self.key)
        request = delta_pb2.BeginUploadRequest(envelope=envelope, leaf_hashes=b"".join(leaves_of(payload)))
        return self.stub.BeginUpload(request, metadata=self.link.connection.metadata())

    @property
    def stub(self) -> delta_pb2_grpc.DeltaServiceStub:
        return self.link.connection.stubs.deltas

    def send(self, upload_id: str, chunks: list[tuple[int, bytes]]) -> int:
        """Stream chunks as given and return the committed size; raise what the coordinator answers."""
        requests = [delta_pb2.UploadDeltaRequest(upload_id=upload_id, offset=at, data=data) for at, data in chunks]
        return int(
            translated(
                lambda: self.stub.UploadDelta(iter(requests), metadata=self.link.connection.metadata())
            ).committed_bytes
        )

    def committed(self, upload_id: str) -> int:
        request = delta_pb2.GetUploadRequest(upload_id=upload_id)
        return int(
            translated(lambda: self.stub.GetUpload(request, metadata=self.link.connection.metadata())).committed_bytes
        )


def translated(call: Callable[[], Any]) -> Any:
    """Make a raw call; raise the exception class that travelled."""
    from grpc_status import rpc_status

    try:
        return call()
    except grpc.RpcError as err:
        raise error_of(rpc_status.from_call(err)) from None  # type: ignore[arg-type]


def site_of(federation: Federation, server: ServerProcess, key: SigningKey) -> Site:
    link = GrpcLink(server.address, server.bundle, key, patience_s=5)
    folder = federation.folder / "sites" / key.public.short
    folder.mkdir(parents=True, exist_ok=True)
    return Site(link, key, folder, Checkpoint(federation.folder / "base"))


@pytest.fixture
def north(federation: Federation, server: ServerProcess) -> Iterator[Site]:
    site = site_of(federation, server, federation.keys["north"])
    yield site
    site.link.close()


@pytest.fixture
def south(federation: Federation, server: ServerProcess) -> Iterator[Site]:
    site = site_of(federation, server, federation.keys["south"])
    yield site
    site.link.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Federation, ServerProcess]]:
    """One coordinator for all tests in which nothing is accepted."""
    federation = make_federation(tmp_path_factory.mktemp("shared"), extra="[delta]\nvalues = 'fp32'")
    server = federation.serve()
    yield federation, server
    server.stop()


@pytest.fixture
def liar(shared: tuple[Federation, ServerProcess]) -> Iterator[Site]:
    federation, server = shared
    site = site_of(federation, server, federation.keys["north"])
    yield site
    site.link.close()


LIES: dict[str, tuple[dict[str, Any], type[FedmergeError]]] = {
    "federation": ({"federation": "another"}, StaleBase),
    "run": ({"run": "0" * 32}, StaleBase),
    "a later round": ({"round": 7}, UnknownRound),
    "round spec": ({"spec_digest": "0" * 64}, StaleBase),
    "nonce": ({"nonce": "0" * 64}, StaleBase),
    "base": ({"base_digest": "0" * 64}, StaleBase),
    "schema": ({"schema_digest": "0" * 64}, StaleBase),
    "codec": ({"codec": {"values": "int8"}}, InvalidDelta),
    "node": ({"node_id": "0" * 64}, BadSignature),
    "size": ({"payload_bytes": 10}, DigestMismatch),
    "a size over the limit": ({"payload_bytes": 1 << 40}, QuotaExceeded),
    "digest": ({"payload_root": "0" * 64}, DigestMismatch),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_in_the_statement_is_refused_by_name_before_any_byte(liar: Site, lie: str) -> None:
    spec, _ = liar.spec()
    claims, expected = LIES[lie]
    with pytest.raises(expected) as caught:
        liar.submit(liar.payload(spec), **claims)
    assert type(caught.value) is expected


def test_a_statement_signed_by_a_key_nobody_trusts_is_refused(liar: Site) -> None:
    spec, _ = liar.spec()
    payload = liar.payload(spec)
    stranger = SigningKey.generate()
    envelope = liar.statement(payload, node_id=stranger.public.key_id).sign(stranger)
    with pytest.raises(UntrustedKey):
        liar.link.submit(envelope, payload, leaves_of(payload), lambda sent: None)


def test_a_statement_of_another_trusted_node_is_not_taken_from_this_one(
    liar: Site, shared: tuple[Federation, ServerProcess]
) -> None:
    spec, _ = liar.spec()
    payload = liar.payload(spec)
    other = shared[0].keys["south"]
    envelope = liar.statement(payload, node_id=other.public.key_id).sign(other)
    with pytest.raises(BadSignature, match="but"):
        liar.link.submit(envelope, payload, leaves_of(payload), lambda sent: None)


def test_a_changed_statement_does_not_verify(liar: Site) -> None:
    spec, _ = liar.spec()
    payload = liar.payload(spec)
    honest = liar.statement(payload, num_examples=10).sign(liar.key)
    forged = liar.statement(payload, num_examples=99).sign(SigningKey.generate())
    signature = honest[honest.index(b'"signatures"') :]
    spliced = forged[: forged.index(b'"signatures"')] + signature
    with pytest.raises(BadSignature):
        liar.link.submit(spliced, payload, leaves_of(payload), lambda sent: None)


def test_an_unknown_key_gets_no_session(shared: tuple[Federation, ServerProcess]) -> None:
    federation, server = shared
    site = site_of(federation, server, SigningKey.generate())
    with pytest.raises(UntrustedKey):
        site.spec()
    site.link.close()


def test_a_signed_nonce_opens_one_session_here(liar: Site) -> None:
    def opened(**lies: str) -> Callable[[], Any]:
        truth = {"coordinator_key": liar.link.coordinator.key_id, "nonce": liar.link.connection.nonce()}
        request = session_pb2.OpenSessionRequest(envelope=SessionProof(**{**truth, **lies}).sign(liar.key))
        return lambda: translated(lambda: liar.link.connection.stubs.sessions.OpenSession(request))

    replayed = opened()
    assert replayed().token
    with pytest.raises(BadSignature, match="unknown, used or expired"):
        replayed()
    with pytest.raises(BadSignature, match="unknown, used or expired"):
        opened(nonce="0" * 64)()
    with pytest.raises(BadSignature, match="made for another coordinator"):
        opened(coordinator_key="0" * 64)()


def test_a_keys_oldest_session_gives_way_when_it_opens_too_many(shared: tuple[Federation, ServerProcess]) -> None:
    federation, server = shared
    site = site_of(federation, server, federation.keys["south"])
    site.link.connect()
    oldest = site.link.connection._token
    for _ in range(MAX_SESSIONS):
        site.link.connection._token = None
        site.link.connect()
    request = log_pb2.GetCheckpointRequest()
    assert translated(
        lambda: site.link.connection.stubs.log.GetCheckpoint(request, metadata=site.link.connection.metadata())
    ).note
    with pytest.raises(NoSession):
        translated(lambda: site.link.connection.stubs.log.GetCheckpoint(request, metadata=((SESSION_HEADER, oldest),)))
    site.link.close()


def test_a_chunk_that_is_no_message_is_refused_and_no_internal_error(
    liar: Site, shared: tuple[Federation, ServerProcess]
) -> None:
    upload = liar.link.connection.stubs.channel.stream_unary("/fedmerge.v1.DeltaService/UploadDelta")
    with pytest.raises(Refused, match="can't be parsed"):
        translated(lambda: upload(iter([b"\xff" * 40]), metadata=liar.link.connection.metadata()))
    assert "internal error" not in (shared[0].folder / "serve.log").read_text()


def test_a_certificate_that_is_not_pinned_is_refused(shared: tuple[Federation, ServerProcess], tmp_path: Path) -> None:
    federation, server = shared
    other = make_federation(tmp_path)
    impostor = other.serve()
    try:
        link = GrpcLink(impostor.address, server.bundle, federation.keys["north"], connect_patience_s=2)
        with pytest.raises(FedmergeError) as caught:
            next(link.watch())
        assert caught.value.exit_code in {3, 4}
        link.close()
    finally:
        impostor.stop()


def test_a_wrong_chunk_costs_that_chunk_only(liar: Site) -> None:
    spec, _ = liar.spec()
    payload = liar.payload(spec)
    data = payload.read_bytes()
    upload = liar.begin(payload)
    first, second = data[:LEAF_BYTES], bytearray(data[LEAF_BYTES : 2 * LEAF_BYTES])
    second[0] ^= 1
    with pytest.raises(DigestMismatch):
        liar.send(upload.upload_id, [(0, first), (LEAF_BYTES, bytes(second))])
    assert liar.committed(upload.upload_id) == LEAF_BYTES


@pytest.mark.parametrize(
    ("offset", "num_bytes"), [(0, 10), (LEAF_BYTES, LEAF_BYTES), (7, LEAF_BYTES), (0, LEAF_BYTES + 1), (-LEAF_BYTES, 5)]
)
def test_a_chunk_that_is_no_leaf_is_refused(liar: Site, offset: int, num_bytes: int) -> None:
    spec, _ = liar.spec()
    payload = liar.payload(spec)
    upload = liar.begin(payload)
    data = (payload.read_bytes() * 2)[:num_bytes]
    with pytest.raises(BadOffset):
        liar.send(upload.upload_id, [(offset, data)])
    assert liar.committed(upload.upload_id) == 0


def test_committing_half_an_upload_is_refused(liar: Site) -> None:
    spec, _ = liar.spec()
    payload = liar.payload(spec)
    upload = liar.begin(payload)
    liar.send(upload.upload_id, [(0, payload.read_bytes()[:LEAF_BYTES])])
    request = delta_pb2.CommitDeltaRequest(upload_id=upload.upload_id)
    with pytest.raises(BadOffset):
        translated(lambda: liar.stub.CommitDelta(request, metadata=liar.link.connection.metadata()))


def test_an_upload_of_another_node_is_unknown(liar: Site, shared: tuple[Federation, ServerProcess]) -> None:
    spec, _ = liar.spec()
    upload = liar.begin(liar.payload(spec))
    other = site_of(*shared, shared[0].keys["south"])
    with pytest.raises(UnknownUpload):
        other.committed(upload.upload_id)
    other.link.close()


def test_a_payload_with_another_shape_is_refused_when_it_is_decoded(
    liar: Site, shared: tuple[Federation, ServerProcess]
) -> None:
    spec, _ = liar.spec()
    schema = delta_schema(liar.base.schema)
    schema["vector"] = type(schema["vector"])((301,), "F32")
    path = liar.folder / "reshaped.safetensors"
    delta = {name: torch.ones(s.shape) for name, s in schema.items()}
    write_delta(path, delta, schema, Codec.from_dict(spec.codec), seed=spec.mask_seed(liar.node_id))
    envelope = liar.statement(path).sign(liar.key)
    told = []
    for progress in (list[int](), list[int]()):
        with pytest.raises(InvalidDelta, match="vector") as caught:
            liar.link.submit(envelope, path, leaves_of(path), progress.append)
        told.append((caught.value.rejection, progress))
    # The coordinator's word for it is signed, and the same when it is asked again, which takes no byte.
    assert told[0][0] == told[1][0]
    assert told[1][1] == [path.stat().st_size]
    coordinator = liar.link.coordinator
    said, _ = Rejection.open(told[0][0].encode(), {coordinator.key_id: coordinator}, where="rejection")
    assert said.statement_digest == digest_of(base64.b64decode(json.loads(envelope)["payload"]))
    assert (said.node_id, said.reason, said.detail) == (liar.node_id, "INVALID_DELTA", str(caught.value))
    # It is this node's alone.
    commit = delta_pb2.CommitDeltaRequest(upload_id=said.statement_digest)
    other = site_of(*shared, shared[0].keys["south"])
    with pytest.raises(UnknownUpload):
        translated(lambda: other.stub.CommitDelta(commit, metadata=other.link.connection.metadata()))
    other.link.close()


def test_nan_is_refused_with_the_tensors_name(liar: Site) -> None:
    spec, _ = liar.spec()
    delta = {name: torch.full(s.shape, 1.0) for name, s in delta_schema(liar.base.schema).items()}
    written = Written(liar.folder / "plain.safetensors", Codec.from_dict(spec.codec), delta)
    lengths, exponents = written.header["frames"][0], zstd(b"\xff" * delta["matrix"].numel())
    start = sum(lengths[:3])
    written.frames = written.frames[:start] + exponents + written.frames[start + lengths[3] :]
    lengths[3] = len(exponents)
    written.rewrite()
    with pytest.raises(InvalidDelta, match="matrix"):
        liar.submit(written.path)


def test_files_are_served_by_root_only(liar: Site) -> None:
    for root in ("../../coordinator.key", "0" * 64, ""):
        with pytest.raises(UnknownVersion):
            liar.link.fetch(root, liar.folder / "out")


def test_metrics_must_come_from_who_signed_them(liar: Site, shared: tuple[Federation, ServerProcess]) -> None:
    spec, _ = liar.spec()
    other = shared[0].keys["south"]
    statement = MetricsStatement(
        federation=spec.federation,
        run=spec.run,
        round=0,
        node_id=other.public.key_id,
        model="global",
        digest=spec.model.digest,
        values={"accuracy": 1.0},
    )
    with pytest.raises(BadSignature):
        liar.link.report_metrics(statement.sign(other))


def test_an_interrupted_upload_goes_on_where_it_stood(north: Site) -> None:
    spec, _ = north.spec()
    payload = north.payload(spec)
    data = payload.read_bytes()
    statement = north.statement(payload)
    envelope = statement.sign(north.key)
    leaves = leaves_of(payload)
    request = delta_pb2.BeginUploadRequest(envelope=envelope, leaf_hashes=b"".join(leaves))
    upload_id = north.stub.BeginUpload(request, metadata=north.link.connection.metadata()).upload_id

    def breaks_off() -> Iterator[delta_pb2.UploadDeltaRequest]:
        yield delta_pb2.UploadDeltaRequest(upload_id=upload_id, offset=0, data=data[:LEAF_BYTES])
        raise ConnectionError("the line went dead")

    with pytest.raises(grpc.RpcError):
        north.stub.UploadDelta(breaks_off(), metadata=north.link.connection.metadata())
    stored = north.committed(upload_id)
    progress: list[int] = []
    receipt = north.link.submit(envelope, payload, leaves, progress.append)
    # The leaf that was on its way may arrive between the two looks; nothing that arrived is sent again.
    assert stored <= progress[0] <= LEAF_BYTES
    assert progress[-1] == len(data)
    opened, _ = Receipt.open(receipt, {north.link.coordinator.key_id: north.link.coordinator}, where="receipt")
    assert opened.statement_digest == digest_of(statement.to_payload())


def test_an_upload_that_gave_way_to_another_one_is_begun_again(north: Site) -> None:
    spec, _ = north.spec()
    payload, other = north.payload(spec), north.payload(spec, scale=0.02)
    statement = north.statement(payload)
    told: list[int] = []

    def sent(num_bytes: int) -> None:
        if not told:
            north.begin(other)
        told.append(num_bytes)

    receipt = north.link.submit(statement.sign(north.key), payload, leaves_of(payload), sent)
    trusted = {north.link.coordinator.key_id: north.link.coordinator}
    signed_for, _ = Receipt.open(receipt, trusted, where="receipt")
    assert signed_for.statement_digest == digest_of(statement.to_payload())
    assert told.count(0) == 2


def test_an_upload_survives_a_restart_of_the_coordinator(federation: Federation) -> None:
    server = federation.serve()
    site = site_of(federation, server, federation.keys["north"])
    spec, _ = site.spec()
    payload = site.payload(spec)
    envelope = site.statement(payload).sign(site.key)
    request = delta_pb2.BeginUploadRequest(envelope=envelope, leaf_hashes=b"".join(leaves_of(payload)))
    upload_id = site.stub.BeginUpload(request, metadata=site.link.connection.metadata()).upload_id
    site.send(upload_id, [(0, payload.read_bytes()[:LEAF_BYTES])])
    address = server.address
    server.kill()
    again = federation.serve(listen=address)
    try:
        progress: list[int] = []
        site.link.submit(envelope, payload, leaves_of(payload), progress.append)
        assert progress[0] == LEAF_BYTES
    finally:
        site.link.close()
        again.stop()


def test_replaying_a_statement_gives_the_same_receipt_and_counts_once(north: Site) -> None:
    spec, _ = north.spec()
    payload = north.payload(spec)
    envelope = north.statement(payload).sign(north.key)
    receipts = {north.link.submit(envelope, payload, leaves_of(payload), lambda sent: None) for _ in range(3)}
    assert len(receipts) == 1
    assert next(north.link.watch()).num_deltas == 1


def test_a_second_delta_in_one_round_is_a_conflict(north: Site) -> None:
    spec, _ = north.spec()
    north.submit(north.payload(spec))
    with pytest.raises(ConflictingSubmission):
        north.submit(north.payload(spec, scale=0.5))


def test_a_delta_for_a_round_that_is_over_is_refused(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, num_rounds=2)
    server = federation.serve()
    sites = [site_of(federation, server, key) for key in federation.keys.values()]
    try:
        spec, _ = sites[0].spec()
        old = sites[0].payload(spec)
        envelope = sites[0].statement(old).sign(sites[0].key)
        late = sites[0].statement(old).sign(sites[0].key)
        receipt = sites[0].link.submit(envelope, old, leaves_of(old), lambda sent: None)
        sites[1].submit(sites[1].payload(spec))
        for view in sites[0].link.watch():
            if view.round == 2:
                break
        with pytest.raises(RoundClosed):
            sites[0].link.submit(late, old, leaves_of(old), lambda sent: None)
        # Whoever did not get the receipt gets it now.
        assert sites[0].link.submit(envelope, old, leaves_of(old), lambda sent: None) == receipt
    finally:
        for site in sites:
            site.link.close()
        server.stop()


def test_a_key_that_stops_being_trusted_is_cut_off_at_its_next_call(north: Site, federation: Federation) -> None:
    spec, _ = north.spec()
    payload = north.payload(spec)
    upload = north.begin(payload)
    (federation.config.federation.trusted / "north.pem").unlink()
    with pytest.raises(UntrustedKey):
        north.send(upload.upload_id, [(0, payload.read_bytes()[:LEAF_BYTES])])


def test_nothing_is_answered_without_a_session(shared: tuple[Federation, ServerProcess], liar: Site) -> None:
    for method, request in (
        (liar.stub.GetUpload, delta_pb2.GetUploadRequest(upload_id="x")),
        (liar.stub.BeginUpload, delta_pb2.BeginUploadRequest()),
        (liar.stub.CommitDelta, delta_pb2.CommitDeltaRequest(upload_id="x")),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            method(request)  # type: ignore[operator]
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]


def test_the_bundle_names_the_key_that_signs(shared: tuple[Federation, ServerProcess]) -> None:
    federation, server = shared
    assert PublicKey.load(server.bundle) == SigningKey.load(federation.config.federation.key).public
