"""A small federation's own certificate authority (X.509, RFC 5280), and what a node asks of it.

Certificates secure connections and live for a day; what a node is, its signing key says. A node's certificate names
that key, so that the two can't be mixed. The *ticket* is a certificate that names nobody: with it a node that has none
of its own yet gets through the door, and may ask for one.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmerge.errors import InputError, Refused, reporting_os_errors
from fedmerge.files import replace_file, write_new
from fedmerge.trust.sign import NEVER_OVERWRITTEN, SigningKey

CA_KEY, CA_CERTIFICATE = "ca.key", "ca.crt"
# The name in certificates that fedmerge makes for coordinators, which nodes expect whatever address they reach it at.
TLS_NAME = "coordinator.fedmerge.internal"
NODE_URI = "spiffe://fedmerge/node/"
TICKET_URI = "spiffe://fedmerge/ticket"
# Clocks differ; a certificate is good from a little before it was made.
SKEW = dt.timedelta(hours=1)
KEY_ENDS = b"-----END PRIVATE KEY-----\n"

_NODE_URI = re.compile(re.escape(NODE_URI) + r"([0-9a-f]{64})")


@dataclass(frozen=True)
class Pair:
    """A private key and its certificate (chain), both PEM."""

    key: bytes
    certificate: bytes


@dataclass(frozen=True)
class Peer:
    """What a verified certificate says: the node's key id if it names one, whether it is a ticket, when it ends."""

    key_id: str | None
    is_ticket: bool
    not_after: dt.datetime

    @classmethod
    def parse(cls, pem: bytes) -> Peer:
        """Read a certificate that the TLS library has verified."""
        certificate = x509.load_pem_x509_certificate(pem)
        try:
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        except x509.ExtensionNotFound:
            uris = []
        found = [match[1] for uri in uris if (match := _NODE_URI.fullmatch(uri))]
        return cls(found[0] if len(found) == 1 else None, TICKET_URI in uris, certificate.not_valid_after_utc)


@dataclass(frozen=True)
class Authority:
    """A certificate authority: `ca.key` and `ca.crt` in a folder of its own."""

    key: SigningKey
    certificate: x509.Certificate

    @classmethod
    def create(cls, folder: Path, now: dt.datetime, valid: dt.timedelta, passphrase: bytes | None = None) -> Authority:
        """Make one, for coordinators by the name of `TLS_NAME`. Raises `ResourceError`."""
        key = SigningKey.generate("p256")
        builder = _builder("fedmerge certificate authority", key.private.public_key(), now, valid)
        certificate = (
            builder.issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedmerge certificate authority")]))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(TLS_NAME)]), critical=False)
            .sign(_ec(key), hashes.SHA256())
        )
        key.save(folder / CA_KEY, passphrase)
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        write_new(folder / CA_CERTIFICATE, pem, if_exists=NEVER_OVERWRITTEN)
        return cls(key, certificate)

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """Read one; raise `InputError` when there is none, or its two files don't belong together."""
        if not (folder / CA_KEY).exists():
            raise InputError(f"{folder}: holds no {CA_KEY}", hint="make one with: fedmerge keys ca DIR")
        key = SigningKey.load(folder / CA_KEY)
        try:
            certificate = x509.load_pem_x509_certificate((folder / CA_CERTIFICATE).read_bytes())
        except (OSError, ValueError) as err:
            raise InputError(
                f"{folder}: holds no {CA_CERTIFICATE}", hint="make one with: fedmerge keys ca DIR"
            ) from err
        if certificate.public_key() != key.private.public_key():
            raise InputError(f"{folder}: {CA_CERTIFICATE} and {CA_KEY} don't belong together")
        return cls(key, certificate)

    @property
    def pem(self) -> bytes:
        """The authority's own certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def server(self, names: Sequence[str], now: dt.datetime, valid: dt.timedelta) -> Pair:
        """Return a new key and certificate for a coordinator that is reached under `names`, DNS or IP."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder("fedmerge coordinator", key.public_key(), now, self._within(now, valid))
        purpose = ExtendedKeyUsageOID.SERVER_AUTH
        return Pair(_private_pem(key), self._issue(builder, [_general_name(name) for name in names], purpose))

    def ticket(self, now: dt.datetime, valid: dt.timedelta) -> Pair:
        """Return a new key and certificate that name no node."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder("fedmerge ticket", key.public_key(), now, self._within(now, valid))
        names = [x509.UniformResourceIdentifier(TICKET_URI)]
        return Pair(_private_pem(key), self._issue(builder, names, ExtendedKeyUsageOID.CLIENT_AUTH))

    def node(self, request: bytes, name: str, key_id: str, now: dt.datetime, valid: dt.timedelta) -> bytes:
        """Return a certificate for the key that signed `request` (PKCS#10, PEM), which names the node's signing key.

        Nothing of the request counts but its key. Raises `Refused` unless it is one, with an EC key.
        """
        try:
            asked = x509.load_pem_x509_csr(request)
            is_valid = asked.is_signature_valid
            public = asked.public_key()
        except (ValueError, InvalidSignature, TypeError) as err:
            raise Refused("not a certificate request") from err
        if not is_valid or not isinstance(public, ec.EllipticCurvePublicKey):
            raise Refused("the certificate request is not signed by an EC key of its own")
        builder = _builder(name[:64], public, now, self._within(now, valid))
        names = [x509.UniformResourceIdentifier(NODE_URI + key_id)]
        return self._issue(builder, names, ExtendedKeyUsageOID.CLIENT_AUTH)

    def _within(self, now: dt.datetime, valid: dt.timedelta) -> dt.timedelta:
        return min(valid, self.certificate.not_valid_after_utc - now)

    def _issue(
        self, builder: x509.CertificateBuilder, names: Sequence[x509.GeneralName], purpose: x509.ObjectIdentifier
    ) -> bytes:
        certificate = (
            builder.issuer_name(self.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(_ec(self.key), hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)


def self_signed(names: Sequence[str], now: dt.datetime, valid: dt.timedelta) -> Pair:
    """Return a new key and a certificate that vouches for itself, for a coordinator whose partners pin it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedmerge coordinator")])
    certificate = (
        _builder("fedmerge coordinator", key.public_key(), now, valid)
        .issuer_name(name)
        .add_extension(x509.SubjectAlternativeName([_general_name(each) for each in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Pair(_private_pem(key), certificate.public_bytes(serialization.Encoding.PEM))


def certificate_request() -> Pair:
    """Return a new private key, and a request for a certificate of it in the place of the certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return Pair(_private_pem(key), request.public_bytes(serialization.Encoding.PEM))


def lifetime(pem: bytes, *, where: object) -> tuple[dt.datetime, dt.datetime]:
    """Return from when and until when the first certificate is good; raise `InputError` when it is none."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError as err:
        raise InputError(f"{where}: not a PEM certificate") from err
    return certificate.not_valid_before_utc, certificate.not_valid_after_utc


def is_issued_by(pem: bytes, issuer: bytes) -> bool:
    """Whether a certificate is signed by the key of another; False when one of them is no certificate."""
    try:
        certificate, authority = x509.load_pem_x509_certificate(pem), x509.load_pem_x509_certificate(issuer)
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def half_life(pem: bytes) -> dt.datetime:
    """Return when half of the time has passed for which a certificate that this module made was made."""
    begin, end = lifetime(pem, where="certificate")
    return end - (end - begin - SKEW) / 2


def read_pair(key_path: Path, certificate_path: Path) -> Pair:
    """Read a private key and its certificate; raise `ResourceError` when one can't be read."""
    with reporting_os_errors(certificate_path):
        certificate = certificate_path.read_bytes()
    with reporting_os_errors(key_path):
        return Pair(key_path.read_bytes(), certificate)


def keep_pair(key_path: Path, certificate_path: Path, pair: Pair) -> None:
    """Write a pair for `kept_pair`, in place of the one that may be there. Raises `ResourceError`."""
    renewed = _renewed(key_path)
    replace_file(renewed, pair.key + pair.certificate, mode=0o600)
    replace_file(key_path, pair.key, mode=0o600)
    replace_file(certificate_path, pair.certificate)
    with reporting_os_errors(renewed):
        renewed.unlink()


def kept_pair(key_path: Path, certificate_path: Path) -> Pair | None:
    """Return the pair that was kept, None when there is none. Raises `ResourceError`.

    Key and certificate fit each other whenever it was that somebody was killed who wrote them.
    """
    renewed = _renewed(key_path)
    with reporting_os_errors(renewed), contextlib.suppress(FileNotFoundError):
        key, end, certificate = renewed.read_bytes().partition(KEY_ENDS)
        return Pair(key + end, certificate)
    if not (key_path.exists() and certificate_path.exists()):
        return None
    return read_pair(key_path, certificate_path)


def settle_pair(key_path: Path, certificate_path: Path) -> Pair | None:
    """Do as `kept_pair`, and put what it returns into the two files, for whoever reads these. Nobody else may write."""
    pair = kept_pair(key_path, certificate_path)
    if pair is not None and _renewed(key_path).exists():
        keep_pair(key_path, certificate_path, pair)
    return pair


def _renewed(key_path: Path) -> Path:
    return key_path.with_suffix(".renewed")


def _builder(
    name: str, public: CertificatePublicKeyTypes, now: dt.datetime, valid: dt.timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + valid)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _ec(key: SigningKey) -> ec.EllipticCurvePrivateKey:
    if not isinstance(key.private, ec.EllipticCurvePrivateKey):
        raise InputError("a certificate authority needs a P-256 key", hint="make one with: fedmerge keys ca DIR")
    return key.private


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
