"""TLS for a coordinator without a certificate of its own: a self-signed one, handed to partners and pinned by them.

`coordinator.pem`, which the operator hands out, holds the certificate and the coordinator's public signing key. They
are two keys on purpose: the certificate secures connections and may be replaced, the signing key is the federation.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedmerge.config import Config
from fedmerge.errors import InputError, reporting_os_errors
from fedmerge.sign import PublicKey
from fedmerge.wire import TLS_NAME

VALID_DAYS = 825


def server_certificate(config: Config, now: dt.datetime) -> tuple[bytes, bytes]:
    """Return (private key, certificates) as PEM: the operator's own, or a self-signed pair kept in the state folder.

    A self-signed certificate is made anew when it has expired. Raises `ResourceError` when a file can't be read, and
    `InputError` when the two don't belong together.
    """
    if config.server.tls_cert is not None and config.server.tls_key is not None:
        return _load_pair(config.server.tls_key, config.server.tls_cert)
    key_path = config.federation.state / "tls.key"
    cert_path = config.federation.state / "tls.crt"
    with reporting_os_errors(config.federation.state):
        if cert_path.exists() and key_path.exists():
            pair = _load_pair(key_path, cert_path)
            if now < x509.load_pem_x509_certificate(pair[1]).not_valid_after_utc:
                return pair
        key_pem, cert_pem = _self_signed(config.server.address[0], now)
        config.federation.state.mkdir(parents=True, exist_ok=True)
        key_path.unlink(missing_ok=True)
        with os.fdopen(os.open(key_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key_pem)
        cert_path.write_bytes(cert_pem)
    return key_pem, cert_pem


def _load_pair(key_path: Path, cert_path: Path) -> tuple[bytes, bytes]:
    with reporting_os_errors(cert_path):
        pair = key_path.read_bytes(), cert_path.read_bytes()
        try:
            # An empty password, or OpenSSL would ask for one on the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_path, key_path, password="")
        except ssl.SSLError as err:
            raise InputError(
                f"{cert_path}: not a PEM certificate (chain) that {key_path.name} is the private key of",
                hint="correct server.tls_cert and server.tls_key, or remove both files for a self-signed certificate",
            ) from err
    return pair


def write_bundle(path: Path, certificate: bytes, key: PublicKey) -> None:
    """Write what partners need to trust this coordinator: its certificate and its public signing key."""
    with reporting_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(certificate.rstrip() + b"\n" + key.pem().encode())


def _self_signed(host: str, now: dt.datetime) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedmerge coordinator")])
    alternatives: list[x509.GeneralName] = [x509.DNSName(TLS_NAME), x509.DNSName("localhost")]
    try:
        alternatives.append(x509.IPAddress(ipaddress.ip_address(host)))
    except ValueError:
        alternatives.append(x509.DNSName(host))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return key_pem, certificate.public_bytes(serialization.Encoding.PEM)
