"""What a node trusts and shows in TLS: the operator's coordinator.pem, and a certificate where it is asked for one."""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path

import grpc
from cryptography import x509

from fedmerge.errors import CertificateExpired, InputError
from fedmerge.trust.certificates import (
    TLS_NAME,
    Pair,
    Peer,
    certificate_request,
    half_life,
    is_issued_by,
    keep_pair,
    kept_pair,
    lifetime,
    read_pair,
)
from fedmerge.trust.sign import PublicKey, read_text

EXPECTED_BUNDLE = "expected the coordinator.pem that `fedmerge serve` writes"
BLOCK = re.compile(r"-----BEGIN ([A-Z ]+)-----.*?-----END \1-----\n?", re.DOTALL)


class Credentials:
    """A node's side of TLS. Raises `InputError` when `bundle` is not a coordinator.pem.

    Where the bundle has a ticket, the coordinator asks for certificates and issues them: they are kept in `folder`, or
    in memory alone, and one that was issued for another signing key than `key_id` is not shown. `own` are the key and
    certificate of a node that has one from elsewhere.
    """

    def __init__(
        self, bundle: Path, key_id: str, folder: Path | None = None, own: tuple[Path, Path] | None = None
    ) -> None:
        text = read_text(bundle)
        self.coordinator = PublicKey.from_pem(text, where=str(bundle))
        blocks = [(match[1], match[0]) for match in BLOCK.finditer(text)]
        kinds = [kind for kind, _ in blocks]
        begins_ticket = kinds.index("PUBLIC KEY")
        anchors = "".join(block for kind, block in blocks[:begins_ticket] if kind == "CERTIFICATE")
        self._anchors = _checked(anchors, bundle)
        rest = dict(blocks[begins_ticket:])
        self._ticket = None
        if "PRIVATE KEY" in rest and "CERTIFICATE" in rest:
            self._ticket = Pair(rest["PRIVATE KEY"].encode(), rest["CERTIFICATE"].encode())
        self._files = (folder / "tls.key", folder / "tls.crt") if folder is not None else None
        self._own = own
        self._key_id = key_id
        self._issued = self._load_issued()
        self.options = [("grpc.ssl_target_name_override", TLS_NAME)] if _is_pinned(self._anchors) else []

    def channel(self, now: dt.datetime) -> grpc.ChannelCredentials:
        """Return credentials for a new connection; raise `CertificateExpired` when the node's own has expired."""
        pair = self._shown(now)
        if pair is None:
            return grpc.ssl_channel_credentials(self._anchors)
        return grpc.ssl_channel_credentials(self._anchors, pair.key, pair.certificate)

    def is_due(self, now: dt.datetime) -> bool:
        """Whether the coordinator should issue a certificate now: there is none, or half of its time has passed."""
        if self._ticket is None or self._own is not None:
            return False
        if self._issued is None:
            return True
        return now >= half_life(self._issued.certificate)

    def request(self) -> Pair:
        """Return a new TLS key, and a request for its certificate."""
        return certificate_request()

    def keep(self, pair: Pair) -> None:
        """Show this key and certificate from the next connection on."""
        self._issued = pair
        if self._files is not None:
            keep_pair(*self._files, pair)

    def _shown(self, now: dt.datetime) -> Pair | None:
        if self._own is not None:
            pair = read_pair(*self._own)
            if now >= lifetime(pair.certificate, where=self._own[1])[1]:
                raise CertificateExpired(f"{self._own[1]}: this site's certificate has expired", hint="renew it")
            return pair
        if self._issued is not None and now < lifetime(self._issued.certificate, where="certificate")[1]:
            return self._issued
        return self._ticket

    def _load_issued(self) -> Pair | None:
        pair = kept_pair(*self._files) if self._ticket is not None and self._files is not None else None
        if pair is None:
            return None
        is_own = is_issued_by(pair.certificate, self._anchors) and Peer.parse(pair.certificate).key_id == self._key_id
        return pair if is_own else None


def _checked(anchors: str, bundle: Path) -> bytes:
    if not anchors:
        raise InputError(f"{bundle}: holds no certificate", hint=EXPECTED_BUNDLE)
    try:
        x509.load_pem_x509_certificates(anchors.encode())
    except ValueError as err:
        raise InputError(f"{bundle}: the certificate is damaged", hint=EXPECTED_BUNDLE) from err
    return anchors.encode()


def _is_pinned(anchors: bytes) -> bool:
    """Whether the coordinator is known by one name whatever its address, as with certificates that fedmerge makes."""
    try:
        certificate = x509.load_pem_x509_certificate(anchors)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return False
    return TLS_NAME in names.get_values_for_type(x509.DNSName)
