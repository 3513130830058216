"""Client certificates of the federation's own authority, and certificates that change or expire while it runs."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from google.protobuf import descriptor_pool

from fedmerge.errors import (
    CertificateExpired,
    CertificateMismatch,
    CertificateRequired,
    InputError,
    NotAllowed,
    Refused,
    Unreachable,
    UntrustedCertificate,
)
from fedmerge.trust.certificates import TLS_NAME, Authority, Pair, Peer, certificate_request
from fedmerge.trust.keys import Member, TrustStore
from fedmerge.trust.sign import SigningKey
from fedmerge.v1 import delta_pb2, log_pb2, model_pb2, round_pb2, session_pb2, session_pb2_grpc
from fedmerge_client.link import GrpcLink
from fedmerge_server.access import METHODS, require_allowed
from tests.conftest import Federation, ServerProcess, make_federation
from tests.wire.test_upload import site_of, translated

NOW = dt.datetime.now(dt.UTC)
DAY = dt.timedelta(days=1)
REQUIRED = "[delta]\nvalues = 'fp32'\n"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Federation, ServerProcess]]:
    """A coordinator that asks for certificates, which last 5 seconds."""
    folder = tmp_path_factory.mktemp("guarded")
    federation = make_federation(folder, extra=REQUIRED)
    text = federation.config_path.read_text()
    server = '[server]\nca = "ca"\nclient_certificates = "required"\ncertificate_hours = 0.0014'
    federation.config_path.write_text(text.replace("[server]", server))
    Authority.create(folder / "ca", NOW, 30 * DAY)
    TrustStore(federation.config.federation.trusted).add(SigningKey.generate().public, "third")
    process = federation.serve()
    yield federation, process
    process.stop()


def test_hundreds_of_connections_at_once_are_all_taken(server: ServerProcess) -> None:
    """gRPC's handshakes raced with certificates that were handed to it for each of them."""
    pem = server.bundle.read_bytes()
    credentials = grpc.ssl_channel_credentials(pem[: pem.index(b"-----BEGIN PUBLIC KEY")])
    options = [("grpc.ssl_target_name_override", TLS_NAME), ("grpc.use_local_subchannel_pool", 1)]

    def connect(_: int) -> int:
        with grpc.secure_channel(server.address, credentials, options) as channel:
            sessions = session_pb2_grpc.SessionServiceStub(channel)
            return len(sessions.BeginSession(session_pb2.BeginSessionRequest(), timeout=60).nonce)

    with ThreadPoolExecutor(32) as pool:
        assert set(pool.map(connect, range(2000))) == {32}
    assert server.child.poll() is None


def test_a_node_gets_a_certificate_and_renews_it_by_itself(
    guarded: tuple[Federation, ServerProcess], tmp_path: Path
) -> None:
    federation, server = guarded
    key = federation.keys["north"]
    link = GrpcLink(server.address, server.bundle, key, home=tmp_path, patience_s=5)
    view = next(iter(link.watch()))
    first = (tmp_path / "tls.crt").read_bytes()
    assert (tmp_path / "tls.key").stat().st_mode & 0o777 == 0o600
    assert Peer.parse(first).key_id == key.public.key_id
    time.sleep(6)  # it has expired, and so has the connection that was opened with it, for all that it is worth
    request = round_pb2.WatchRoundsRequest()
    with pytest.raises(CertificateExpired):
        translated(
            lambda: next(
                iter(link.connection.stubs.rounds.WatchRounds(request, metadata=link.connection._session_metadata()))
            )
        )
    assert next(iter(link.watch())).round == view.round
    assert (tmp_path / "tls.crt").read_bytes() != first
    link.close()


def test_whose_certificate_it_is_counts(guarded: tuple[Federation, ServerProcess]) -> None:
    federation, server = guarded
    north, south = (
        GrpcLink(server.address, server.bundle, federation.keys[name], patience_s=5) for name in ("north", "south")
    )
    north.connect()
    # A session by the ticket may ask for a certificate, and do nothing else.
    ticket = GrpcLink(server.address, server.bundle, federation.keys["south"])
    session = ticket.connection._session_metadata()
    watch = round_pb2.WatchRoundsRequest()
    with pytest.raises(CertificateRequired):
        translated(lambda: next(iter(ticket.connection.stubs.rounds.WatchRounds(watch, metadata=session))))
    with pytest.raises(Refused, match="not a certificate request"):
        translated(
            lambda: ticket.connection.stubs.sessions.IssueCertificate(
                session_pb2.IssueCertificateRequest(request=b"junk"), metadata=session
            )
        )
    # South's session over north's connection.
    with pytest.raises(CertificateMismatch):
        translated(lambda: next(iter(north.connection.stubs.rounds.WatchRounds(watch, metadata=session))))
    for link in (north, south, ticket):
        link.close()


def test_a_certificate_of_the_key_that_was_replaced_is_not_shown(
    guarded: tuple[Federation, ServerProcess], tmp_path: Path
) -> None:
    federation, server = guarded
    old, new = SigningKey.generate(), SigningKey.generate()
    TrustStore(federation.config.federation.trusted).add(old.public, "fourth")
    link = GrpcLink(server.address, server.bundle, old, home=tmp_path, patience_s=5)
    next(iter(link.watch()))
    link.rotate_key(new)
    link.close()
    again = GrpcLink(server.address, server.bundle, new, home=tmp_path, patience_s=5)
    next(iter(again.watch()))
    again.close()
    assert Peer.parse((tmp_path / "tls.crt").read_bytes()).key_id == new.public.key_id


def test_strangers_do_not_get_through_the_door(guarded: tuple[Federation, ServerProcess], tmp_path: Path) -> None:
    federation, server = guarded
    assert server.bundle.stat().st_mode & 0o077 == 0  # the ticket in it is for partners alone
    text = server.bundle.read_text()
    end = "-----END PUBLIC KEY-----\n"
    (tmp_path / "no-ticket.pem").write_text(text[: text.index(end) + len(end)])
    key = federation.keys["north"]
    bare = GrpcLink(server.address, tmp_path / "no-ticket.pem", key, connect_patience_s=0.5)
    with pytest.raises(Unreachable):
        bare.connect()
    bare.close()
    other = Authority.create(tmp_path / "other", NOW, DAY)
    pair = other.ticket(NOW, DAY)
    alien = tmp_path / "key", tmp_path / "crt"
    alien[0].write_bytes(pair.key)
    alien[1].write_bytes(pair.certificate)
    stranger = GrpcLink(server.address, server.bundle, key, own_certificate=alien, connect_patience_s=0.5)
    with pytest.raises(Unreachable):
        stranger.connect()
    stranger.close()
    alien[1].write_bytes(other.ticket(NOW - 2 * DAY, DAY).certificate)
    with pytest.raises(CertificateExpired, match="this site's"):
        GrpcLink(server.address, server.bundle, key, own_certificate=alien)


def _write(folder: Path, pair: Pair) -> None:
    (folder / "own.key").write_bytes(pair.key)
    (folder / "own.crt").write_bytes(pair.certificate)


def test_a_coordinators_certificate_is_replaced_while_it_runs(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "authority", NOW, 30 * DAY)
    federation = make_federation(tmp_path)
    text = federation.config_path.read_text()
    own = '[server]\ntls_cert = "own.crt"\ntls_key = "own.key"'
    federation.config_path.write_text(text.replace("[server]", own))
    _write(tmp_path, authority.server([TLS_NAME], NOW, DAY))
    server = federation.serve()
    trust = tmp_path / "anchors.pem"
    trust.write_bytes(authority.pem + server.bundle.read_bytes()[server.bundle.read_bytes().index(b"-----BEGIN PUB") :])
    address = server.address

    def attempt() -> None:
        link = GrpcLink(address, trust, federation.keys["north"], connect_patience_s=0.2)
        try:
            link.connect()
        finally:
            link.close()

    def becomes(error: type[Exception] | None, saying: str = "") -> None:
        deadline_s = time.monotonic() + 15
        while True:
            message = ""
            try:
                attempt()
                found: type[Exception] | None = None
            except UntrustedCertificate as err:
                found, message = type(err), err.message
            if found is error and saying in message:
                return
            assert time.monotonic() < deadline_s, found
            time.sleep(0.3)

    becomes(None)
    _write(tmp_path, authority.server([TLS_NAME], NOW - 2 * DAY, DAY))
    becomes(CertificateExpired)
    _write(tmp_path, authority.server([TLS_NAME], NOW + 2 * DAY, DAY))
    becomes(UntrustedCertificate, "not valid yet, by this machine's clock")
    _write(tmp_path, Authority.create(tmp_path / "another", NOW, DAY).server([TLS_NAME], NOW, DAY))
    becomes(UntrustedCertificate, "not the one that coordinator.pem pins")
    (tmp_path / "own.crt").write_text("half of one")  # of no use: the one before stays
    _write(tmp_path, authority.server([TLS_NAME], NOW, DAY))
    becomes(None)
    assert server.stop() == 0


def test_an_auditor_looks_and_does_not_touch(federation: Federation, server: ServerProcess) -> None:
    key = SigningKey.generate()
    TrustStore(federation.config.federation.trusted).add(key.public, "audit", "Audit Ltd", "auditor")
    auditor = site_of(federation, server, key)
    spec, _ = auditor.spec()
    with pytest.raises(NotAllowed, match="auditor"):
        auditor.submit(auditor.payload(spec))
    auditor.link.fetch(spec.base_files[0].root, federation.folder / "fetched")
    # Nor is it waited for.
    for name in ("north", "south"):
        site = site_of(federation, server, federation.keys[name])
        site.submit(site.payload(spec))
        site.link.close()
    assert any(view.phase == "published" for view in auditor.link.watch())
    auditor.link.close()


def test_every_method_has_its_line_in_the_table() -> None:
    files = [module.DESCRIPTOR for module in (session_pb2, round_pb2, delta_pb2, model_pb2, log_pb2)]
    assert all(descriptor_pool.Default().FindFileByName(file.name) for file in files)
    methods = {
        method.name for file in files for service in file.services_by_name.values() for method in service.methods
    }
    assert methods == METHODS.keys()
    assert {method for method, rule in METHODS.items() if rule is None} == {"BeginSession", "OpenSession", "Enroll"}
    auditor = Member("audit", SigningKey.generate().public, "Audit Ltd", "auditor")
    for method in ("Frobnicate", "BeginUpload"):
        with pytest.raises(NotAllowed):
            require_allowed(method, auditor)


def test_an_authority_signs_no_more_than_it_should(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "ca", NOW, DAY)
    assert Authority.load(tmp_path / "ca").pem == authority.pem
    node_id = "a" * 64
    certificate = authority.node(certificate_request().certificate, "north", node_id, NOW, 30 * DAY)
    parsed = x509.load_pem_x509_certificate(certificate)
    parsed.verify_directly_issued_by(authority.certificate)
    assert parsed.not_valid_after_utc <= authority.certificate.not_valid_after_utc
    assert not parsed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert Peer.parse(certificate) == Peer(node_id, False, parsed.not_valid_after_utc)
    assert Peer.parse(authority.ticket(NOW, DAY).certificate).is_ticket
    request = bytearray(certificate_request().certificate)
    request[200] ^= 1
    with pytest.raises(Refused):
        authority.node(bytes(request), "north", node_id, NOW, DAY)
    other = Authority.create(tmp_path / "other", NOW, DAY)
    (tmp_path / "ca" / "ca.crt").write_bytes(other.pem)
    with pytest.raises(InputError, match="belong together"):
        Authority.load(tmp_path / "ca")
    with pytest.raises(InputError, match=r"holds no ca\.key"):
        Authority.load(tmp_path / "nowhere")
