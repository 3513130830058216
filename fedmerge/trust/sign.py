"""Step 5, sign, and its inverse, verify: DSSE envelopes and keys.

An envelope (https://github.com/secure-systems-lab/dsse, v1.0) carries the exact bytes that were signed, so nothing is
ever re-serialised to verify; the payload type is signed too, so that one kind of statement can't pass for another.
The algorithm belongs to the key record, never to the message.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from securesystemslib.dsse import Envelope
from securesystemslib.signer import Signature

from fedmerge.errors import BadSignature, InputError, UntrustedKey, WrongPassphrase
from fedmerge.files import write_new
from fedmerge.trust.passphrase import find_passphrase

Algorithm: TypeAlias = Literal["ed25519", "p256"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

MAX_ENVELOPE_BYTES = 1 << 20
ENCRYPTED = "-----BEGIN ENCRYPTED PRIVATE KEY-----"
NEVER_OVERWRITTEN = "choose another name; keys are never overwritten"


@dataclass(frozen=True)
class PublicKey:
    """A public key, Ed25519 or P-256; `key_id` is the SHA-256 (hex) of its SubjectPublicKeyInfo."""

    spki: bytes

    @cached_property
    def key_id(self) -> str:
        """The name of the key everywhere: in trust stores, statements and the ledger."""
        return hashlib.sha256(self.spki).hexdigest()

    @property
    def short(self) -> str:
        """First 12 hex digits of the key id, for people."""
        return self.key_id[:12]

    @property
    def algorithm(self) -> Algorithm:
        """What the key signs with. It belongs to the key, so no message can choose a weaker one."""
        return "ed25519" if isinstance(_loaded(self.spki), Ed25519PublicKey) else "p256"

    def pem(self) -> str:
        """Return the key as PEM text."""
        text = base64.encodebytes(self.spki).decode().replace("\n", "")
        lines = [text[i : i + 64] for i in range(0, len(text), 64)]
        return "\n".join(["-----BEGIN PUBLIC KEY-----", *lines, "-----END PUBLIC KEY-----", ""])

    @classmethod
    def from_spki(cls, spki: bytes, *, where: str) -> PublicKey:
        """Parse SubjectPublicKeyInfo bytes; raise `InputError` unless they are an Ed25519 or P-256 key."""
        try:
            key = serialization.load_der_public_key(spki)
        except (ValueError, UnsupportedAlgorithm) as err:
            raise InputError(f"{where}: not a public key ({err})") from err
        on_p256 = isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1)
        if not (on_p256 or isinstance(key, Ed25519PublicKey)):
            raise InputError(
                f"{where}: only Ed25519 and P-256 keys are accepted", hint="make one with: fedmerge keys new"
            )
        canonical = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        return cls(canonical)

    @classmethod
    def from_pem(cls, text: str, *, where: str) -> PublicKey:
        """Parse the first PUBLIC KEY block of a PEM text; raise `InputError` when there is none."""
        begin, end = "-----BEGIN PUBLIC KEY-----", "-----END PUBLIC KEY-----"
        if begin not in text or end not in text.split(begin, 1)[1]:
            raise InputError(f"{where}: holds no PUBLIC KEY block", hint="expected a PEM file from: fedmerge keys show")
        body = text.split(begin, 1)[1].split(end, 1)[0]
        try:
            spki = base64.b64decode("".join(body.split()), validate=True)
        except binascii.Error as err:
            raise InputError(f"{where}: the PUBLIC KEY block is damaged ({err})") from err
        return cls.from_spki(spki, where=where)

    @classmethod
    def load(cls, path: Path) -> PublicKey:
        """Read a PEM file; raise `InputError` when it is missing or holds no usable key."""
        return cls.from_pem(read_text(path), where=str(path))

    def raw(self) -> bytes:
        """Return the 32 bytes of an Ed25519 key; of a P-256 key, its SubjectPublicKeyInfo."""
        key = _loaded(self.spki)
        return key.public_bytes_raw() if isinstance(key, Ed25519PublicKey) else self.spki

    def verify_bytes(self, signature: bytes, data: bytes, *, where: str) -> None:
        """Verify a bare signature over `data`; raise `BadSignature`."""
        if not _verifies(self.spki, signature, data):
            raise BadSignature(f"{where}: the signature of key {self.short} does not verify")


@dataclass(frozen=True)
class SigningKey:
    """A private key, Ed25519 or P-256, kept in a PKCS#8 PEM file of mode 0600."""

    private: Ed25519PrivateKey | EllipticCurvePrivateKey

    @classmethod
    def generate(cls, algorithm: Algorithm = "ed25519") -> SigningKey:
        """Make a new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate() if algorithm == "ed25519" else ec.generate_private_key(SECP256R1()))

    @classmethod
    def load(cls, path: Path, passphrase: Callable[[Path], bytes] = find_passphrase) -> SigningKey:
        """Read a key file; raise `InputError` when it is missing, damaged or readable by other users.

        `passphrase` is asked, with the path, for that of an encrypted one; `WrongPassphrase` is raised where it does
        not open the file.
        """
        text = read_text(path)
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise InputError(f"{path}: other users can read this private key", hint=f"run: chmod 600 {path}")
        is_encrypted = ENCRYPTED in text
        password = passphrase(path) if is_encrypted else None
        try:
            private = serialization.load_pem_private_key(text.encode(), password=password)
        except (ValueError, TypeError, UnsupportedAlgorithm) as err:
            if is_encrypted:
                raise WrongPassphrase(f"{path}: the passphrase does not open this key") from err
            raise InputError(f"{path}: not a PKCS#8 private key ({err})") from err
        on_p256 = isinstance(private, EllipticCurvePrivateKey) and isinstance(private.curve, SECP256R1)
        if not isinstance(private, (Ed25519PrivateKey, EllipticCurvePrivateKey)) or (
            isinstance(private, EllipticCurvePrivateKey) and not on_p256
        ):
            raise InputError(f"{path}: not an Ed25519 or P-256 key", hint="make one with: fedmerge keys new")
        return cls(private)

    def save(self, path: Path, passphrase: bytes | None = None, *, durable: bool = True) -> None:
        """Write the key file, 0600 from its first byte; raise `ResourceError` rather than overwrite an existing one.

        Unless it is `durable`, a power cut may take it.
        """
        encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if passphrase is not None:
            encryption = serialization.BestAvailableEncryption(passphrase)
        pem = self.private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        write_new(path, pem, if_exists=NEVER_OVERWRITTEN, mode=0o600, durable=durable)

    @classmethod
    def load_or_create(cls, path: Path, algorithm: Algorithm = "ed25519") -> SigningKey:
        """Read the key file, or make it when there is none."""
        if not path.exists():
            cls.generate(algorithm).save(path)
        return cls.load(path)

    @cached_property
    def public(self) -> PublicKey:
        """The public half."""
        spki = self.private.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return PublicKey(spki)

    def sign_bytes(self, data: bytes) -> bytes:
        """Return a bare signature over `data`, which has to say itself what it is for."""
        if isinstance(self.private, Ed25519PrivateKey):
            return self.private.sign(data)
        # Deterministic (RFC 6979), so that signing a statement again gives the same envelope, as Ed25519 does.
        return self.private.sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))

    def sign(self, payload_type: str, payload: bytes) -> bytes:
        """Return the DSSE envelope (JSON bytes) of `payload`, signed under `payload_type`."""
        envelope = Envelope(payload, payload_type, {})
        key_id = self.public.key_id
        envelope.signatures[key_id] = Signature(key_id, self.sign_bytes(envelope.pae()).hex())
        return json.dumps(envelope.to_dict(), separators=(",", ":")).encode()


@dataclass(frozen=True)
class Signed:
    """A verified envelope: the payload bytes, who signed them, and the envelope as it travelled."""

    payload: bytes
    signer: PublicKey
    envelope: bytes


def claimed_signer(envelope: bytes, *, where: str) -> str:
    """Return the key id that an envelope names, which proves nothing. Raises `BadSignature` when it names none."""
    return _opened(envelope, where).key_id


def open_envelope(envelope: bytes, payload_type: str, trusted: Mapping[str, PublicKey], *, where: str) -> Signed:
    """Verify a DSSE envelope and return its payload.

    `trusted` maps key ids to keys. The key id in the envelope is only a hint: a key is looked up by it in `trusted`,
    and the signature must verify under that key. Raises `UntrustedKey` when the named key is not trusted, and
    `BadSignature` when the envelope is malformed, spelt otherwise than `SigningKey.sign` does (but for white space), of
    another type, not signed exactly once, or does not verify.
    """
    parsed = _opened(envelope, where)
    if parsed.payload_type != payload_type:
        raise BadSignature(f"{where}: signed as {parsed.payload_type!r}, expected {payload_type!r}")
    signer = trusted.get(parsed.key_id)
    if signer is None:
        raise UntrustedKey(
            f"{where}: signed by key {parsed.key_id[:12]}, which is not trusted here",
            hint="compare the key id with its owner over another channel, then: fedmerge keys trust FILE",
        )
    signer.verify_bytes(parsed.signature, parsed.signed, where=where)
    return Signed(parsed.payload, signer, envelope)


class _Parsed(NamedTuple):
    """An unverified envelope with one signature: `signed` are the bytes that it should be of."""

    payload_type: str
    payload: bytes
    signed: bytes
    key_id: str
    signature: bytes


def _opened(envelope: bytes, where: str) -> _Parsed:
    try:
        return _parse_envelope(envelope)
    except BadSignature as err:
        raise BadSignature(f"{where}: {err.message}") from err


# What follows from bytes alone is remembered of the latest few: all nodes of a simulation, and all steps of a round,
# open the same plan and the same merge record. Who is trusted is asked each time.


@lru_cache(maxsize=32)
def _parse_envelope(envelope: bytes) -> _Parsed:
    if len(envelope) > MAX_ENVELOPE_BYTES:
        raise BadSignature(f"envelope of {len(envelope)} bytes is over the limit of {MAX_ENVELOPE_BYTES}")
    try:
        parsed = Envelope.from_dict(json.loads(envelope))
        signatures = [(key_id, bytes.fromhex(one.signature)) for key_id, one in parsed.signatures.items()]
        # Base64 can be spelt in several ways, and keys that nobody reads could hold anything.
        parsed.signatures = {key_id: Signature(key_id, one.signature) for key_id, one in parsed.signatures.items()}
        is_exact = parsed.to_dict() == json.loads(envelope)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise BadSignature(f"not a DSSE envelope ({type(err).__name__})") from err
    if len(signatures) != 1:
        raise BadSignature(f"has {len(signatures)} signatures, expected one")
    if not is_exact:
        raise BadSignature("not a DSSE envelope as it is written here")
    return _Parsed(parsed.payload_type, parsed.payload, parsed.pae(), *signatures[0])


@lru_cache(maxsize=32)
def _verifies(spki: bytes, signature: bytes, data: bytes) -> bool:
    key = _loaded(spki)
    try:
        if isinstance(key, Ed25519PublicKey):
            key.verify(signature, data)
        else:
            key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=1024)
def _loaded(spki: bytes) -> Ed25519PublicKey | EllipticCurvePublicKey:
    key = serialization.load_der_public_key(spki)
    assert isinstance(key, (Ed25519PublicKey, EllipticCurvePublicKey))
    return key


def read_text(path: Path) -> str:
    """Read a small text file; raise `InputError` when it is missing, too large or not text."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_ENVELOPE_BYTES + 1)  # not all of it: a device may have no end
        if len(data) > MAX_ENVELOPE_BYTES:
            raise InputError(f"{path}: too large to be a key")
        return data.decode()
    except (OSError, UnicodeDecodeError) as err:
        raise InputError(f"{path}: can't be read ({getattr(err, 'strerror', None) or 'not text'})") from err


def parse_json_object(payload: bytes, *, where: str) -> dict[str, Any]:
    """Parse verified bytes as a JSON object; raise `BadSignature` when they are anything else."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as err:
        raise BadSignature(f"{where}: the signed payload is not JSON") from err
    if not isinstance(value, dict):
        raise BadSignature(f"{where}: the signed payload is not a JSON object")
    return value
