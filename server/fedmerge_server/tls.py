"""TLS of a coordinator: whose certificate it shows, whose it asks for, and how they change while it runs.

The certificate is the operator's own, or of the federation's authority (`server.ca`), or self-signed and pinned by the
partners. `coordinator.pem`, which the operator hands out, holds what partners check it by, and the coordinator's public
signing key. They are two keys on purpose: certificates secure connections and may be replaced, the signing key is the
federation. Where certificates are asked of nodes, the file also holds a ticket, with which a node gets its first one.
"""

from __future__ import annotations

import datetime as dt
import logging
import ssl
from pathlib import Path

import grpc

from fedmerge.config import Config
from fedmerge.errors import FedmergeError, InputError, Refused, reporting_os_errors
from fedmerge.files import replace_file
from fedmerge.trust.certificates import (
    TLS_NAME,
    Authority,
    Pair,
    half_life,
    is_issued_by,
    keep_pair,
    lifetime,
    read_pair,
    self_signed,
    settle_pair,
)
from fedmerge.trust.keys import Member
from fedmerge.trust.sign import PublicKey

log = logging.getLogger(__name__)

SELF_SIGNED_VALID = dt.timedelta(days=825)
SERVER_VALID = dt.timedelta(days=30)
TICKET_VALID = dt.timedelta(days=3650)


class Certificates:
    """The certificates of a running coordinator. Raises `ResourceError` or `InputError` for files of no use."""

    def __init__(self, config: Config, signing_key: PublicKey, now: dt.datetime) -> None:
        self._config = config
        self._signing_key = signing_key
        self.are_required = config.server.client_certificates == "required"
        self.authority = Authority.load(config.server.ca) if config.server.ca is not None else None
        self._ticket = self._load_ticket(now) if self.are_required and self.authority is not None else None
        self._marks = self._file_marks()
        self._pair, self._configuration = self._load(now)

    @property
    def bundle(self) -> Path:
        """The file that partners need to trust this coordinator."""
        return self._config.federation.state / "coordinator.pem"

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials for a port; each handshake takes the certificates that are current then."""
        shown = self._configuration

        def changed() -> grpc.ServerCertificateConfiguration | None:
            # gRPC takes what comes from here without a lock: handshakes side by side fail at times, or crash it.
            nonlocal shown
            if self._configuration is shown:
                return None
            shown = self._configuration
            return shown

        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            changed,  # type: ignore[arg-type]  # its types leave out None, for "as before"
            require_client_authentication=self.are_required,
        )

    def refresh(self, now: dt.datetime) -> None:
        """Take up files that have changed, and renew what is due; what is of no use is logged, and changes nothing."""
        marks = self._file_marks()
        is_due = self._is_issued and now >= half_life(self._pair.certificate)
        if marks == self._marks and not is_due:
            return
        self._marks = marks
        try:
            self._pair, self._configuration = self._load(now, renew=is_due)
        except FedmergeError as err:
            log.error("the certificate stays as it was: %s", err.message)
        else:
            log.info("new certificate, good until %s", lifetime(self._pair.certificate, where="certificate")[1])

    def issue(self, request: bytes, member: Member, now: dt.datetime) -> bytes:
        """Return a client certificate (PEM) for a member's request. Raises `Refused` where there is no authority."""
        if self.authority is None:
            raise Refused("this coordinator has no certificate authority", hint="use a certificate of your own")
        valid = dt.timedelta(hours=self._config.server.certificate_hours)
        return self.authority.node(request, member.name, member.key.key_id, now, valid)

    @property
    def _is_issued(self) -> bool:
        return self.authority is not None and self._config.server.tls_cert is None

    def _load(self, now: dt.datetime, *, renew: bool = False) -> tuple[Pair, grpc.ServerCertificateConfiguration]:
        server = self._config.server
        if server.tls_cert is not None and server.tls_key is not None:
            pair = _load_pair(server.tls_key, server.tls_cert)
        else:
            pair = self._kept_pair(now, renew=renew)
        roots = None
        if self.are_required:
            paths = [server.client_ca] if server.client_ca is not None else []
            roots = self.authority.pem if self.authority is not None else b""
            for path in paths:
                with reporting_os_errors(path):
                    roots += path.read_bytes()
                lifetime(roots, where=path)
        self._write_bundle(pair)
        return pair, grpc.ssl_server_certificate_configuration([(pair.key, pair.certificate)], roots)

    def _kept_pair(self, now: dt.datetime, *, renew: bool) -> Pair:
        """Return the pair in the state folder, or make it where there is none, or none that is still good."""
        state = self._config.federation.state
        key_path, cert_path = state / "tls.key", state / "tls.crt"
        if not renew and settle_pair(key_path, cert_path) is not None:
            pair = _load_pair(key_path, cert_path)
            issuer = self.authority.pem if self.authority else pair.certificate
            if now < lifetime(pair.certificate, where=cert_path)[1] and is_issued_by(pair.certificate, issuer):
                return pair
        host = self._config.server.address[0]
        names = [TLS_NAME, "localhost", host]
        if self.authority is not None:
            pair = self.authority.server(names, now, SERVER_VALID)
        else:
            pair = self_signed(names, now, SELF_SIGNED_VALID)
        keep_pair(key_path, cert_path, pair)
        return pair

    def _load_ticket(self, now: dt.datetime) -> Pair:
        assert self.authority is not None
        state = self._config.federation.state
        key_path, cert_path = state / "ticket.key", state / "ticket.crt"
        if settle_pair(key_path, cert_path) is not None:
            pair = _load_pair(key_path, cert_path)
            if is_issued_by(pair.certificate, self.authority.pem):
                return pair
        pair = self.authority.ticket(now, TICKET_VALID)
        keep_pair(key_path, cert_path, pair)
        return pair

    def _write_bundle(self, pair: Pair) -> None:
        anchor = self.authority.pem if self.authority is not None and self._is_issued else pair.certificate
        text = anchor.rstrip() + b"\n" + self._signing_key.pem().encode()
        if self._ticket is not None:
            text += self._ticket.certificate + self._ticket.key
        if not self.bundle.exists() or self.bundle.read_bytes() != text:
            replace_file(self.bundle, text, mode=0o666 if self._ticket is None else 0o600)

    def _file_marks(self) -> list[int]:
        server = self._config.server
        paths = [path for path in (server.tls_cert, server.tls_key, server.client_ca) if path is not None]
        return [path.stat().st_mtime_ns if path.exists() else 0 for path in paths]


def _load_pair(key_path: Path, cert_path: Path) -> Pair:
    pair = read_pair(key_path, cert_path)
    try:
        # An empty password, or OpenSSL would ask for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_path, key_path, password="")
    except ssl.SSLError as err:
        raise InputError(
            f"{cert_path}: not a PEM certificate (chain) that {key_path.name} is the private key of",
            hint="correct server.tls_cert and server.tls_key, or remove both files for a self-signed certificate",
        ) from err
    return pair
