"""Envelopes against the DSSE specification, computed by hand, and against everything that must not verify."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.errors import BadSignature, FedmergeError, InputError, ResourceError, UntrustedKey, WrongPassphrase
from fedmerge.trust.certificates import keep_pair, kept_pair, self_signed, settle_pair
from fedmerge.trust.keys import TrustStore
from fedmerge.trust.passphrase import PASSPHRASE, PASSPHRASE_FILE, find_passphrase
from fedmerge.trust.sign import ALGORITHMS, Algorithm, PublicKey, SigningKey, open_envelope

KEY = SigningKey.generate()
TRUSTED = {KEY.public.key_id: KEY.public}
TYPE = "application/vnd.test+json"


def pae(payload_type: str, payload: bytes) -> bytes:
    """Pre-authentication encoding, as DSSE 1.0 writes it."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


@given(st.binary(max_size=2000), st.text("abcdefghij/.+", min_size=1, max_size=60))
def test_the_signature_is_ed25519_over_the_specifications_encoding(payload: bytes, payload_type: str) -> None:
    envelope = json.loads(KEY.sign(payload_type, payload))
    assert base64.b64decode(envelope["payload"]) == payload
    assert envelope["payloadType"] == payload_type
    (signature,) = envelope["signatures"]
    assert signature["keyid"] == KEY.public.key_id
    KEY.private.public_key().verify(base64.b64decode(signature["sig"]), pae(payload_type, payload))
    with pytest.raises(InvalidSignature):
        KEY.private.public_key().verify(base64.b64decode(signature["sig"]), payload)


@given(st.binary(max_size=500))
def test_what_was_signed_comes_back(payload: bytes) -> None:
    signed = open_envelope(KEY.sign(TYPE, payload), TYPE, TRUSTED, where="test")
    assert (signed.payload, signed.signer) == (payload, KEY.public)


@settings(max_examples=400)
@given(st.data())
def test_no_change_of_an_envelope_gives_another_payload(data: st.DataObject) -> None:
    payload = b'{"round": 1}'
    envelope = bytearray(KEY.sign(TYPE, payload))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(envelope) - 1))
        envelope[position] = data.draw(st.integers(0, 255))
    try:
        assert open_envelope(bytes(envelope), TYPE, TRUSTED, where="test").payload == payload
    except (BadSignature, UntrustedKey):
        return


def test_an_envelope_can_not_be_spelt_otherwise() -> None:
    """64 bytes in base64 leave four bits of the last digit to no one, and JSON has room for more keys."""
    envelope = json.loads(KEY.sign(TYPE, b"{}"))
    assert open_envelope(json.dumps(envelope, indent=1).encode(), TYPE, TRUSTED, where="test").payload == b"{}"
    (signature,) = envelope["signatures"]
    other = signature["sig"][:-3] + chr(ord(signature["sig"][-3]) + 1) + "=="
    assert base64.b64decode(other) == base64.b64decode(signature["sig"])
    changes = [
        envelope | {"signatures": [signature | {"sig": other}]},
        envelope | {"signatures": [signature | {"note": ""}]},
        envelope | {"payload": envelope["payload"].rstrip("=")[:-1] + "1="},
        envelope | {"note": ""},
    ]
    for changed in changes:
        with pytest.raises(BadSignature, match="as it is written here"):
            open_envelope(json.dumps(changed).encode(), TYPE, TRUSTED, where="test")


@given(
    st.one_of(st.binary(max_size=300), st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
)
def test_what_is_no_envelope_is_refused(junk: bytes | str) -> None:
    data = junk.encode() if isinstance(junk, str) else junk
    with pytest.raises(BadSignature):
        open_envelope(data, TYPE, TRUSTED, where="test")


def test_one_kind_of_statement_does_not_pass_for_another() -> None:
    envelope = KEY.sign("application/vnd.receipt+json", b"{}")
    with pytest.raises(BadSignature, match="signed as"):
        open_envelope(envelope, TYPE, TRUSTED, where="test")
    relabelled = envelope.replace(b"application/vnd.receipt+json", TYPE.encode())
    with pytest.raises(BadSignature, match="does not verify"):
        open_envelope(relabelled, TYPE, TRUSTED, where="test")


def test_the_key_id_in_an_envelope_decides_nothing() -> None:
    stranger = SigningKey.generate()
    claimed = stranger.sign(TYPE, b"{}").replace(stranger.public.key_id.encode(), KEY.public.key_id.encode())
    with pytest.raises(BadSignature, match="does not verify"):
        open_envelope(claimed, TYPE, TRUSTED, where="test")
    with pytest.raises(UntrustedKey):
        open_envelope(stranger.sign(TYPE, b"{}"), TYPE, TRUSTED, where="test")


@pytest.mark.parametrize("num_signatures", [0, 2])
def test_an_envelope_has_exactly_one_signature(num_signatures: int) -> None:
    envelope = json.loads(KEY.sign(TYPE, b"{}"))
    other = json.loads(SigningKey.generate().sign(TYPE, b"{}"))
    envelope["signatures"] = (envelope["signatures"] + other["signatures"])[:num_signatures]
    with pytest.raises(BadSignature, match=f"{num_signatures} signatures"):
        open_envelope(json.dumps(envelope).encode(), TYPE, TRUSTED, where="test")


def test_a_p256_key_may_sign(tmp_path: Path) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    spki = private.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    public = PublicKey.from_spki(spki, where="test")
    signature = private.sign(pae(TYPE, b"{}"), ec.ECDSA(hashes.SHA256()))
    envelope = {
        "payload": base64.b64encode(b"{}").decode(),
        "payloadType": TYPE,
        "signatures": [{"keyid": public.key_id, "sig": base64.b64encode(signature).decode()}],
    }
    opened = open_envelope(json.dumps(envelope).encode(), TYPE, {public.key_id: public}, where="test")
    assert opened.payload == b"{}"


def test_a_p256_key_signs_what_openssl_verifies_and_the_same_each_time() -> None:
    key = SigningKey.generate("p256")
    assert (key.public.algorithm, KEY.public.algorithm) == ("p256", "ed25519")
    envelope = key.sign(TYPE, b"{}")
    assert key.sign(TYPE, b"{}") == envelope
    signature = base64.b64decode(json.loads(envelope)["signatures"][0]["sig"])
    public = serialization.load_der_public_key(key.public.spki)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(signature, pae(TYPE, b"{}"), ec.ECDSA(hashes.SHA256()))
    trusted = {key.public.key_id: key.public}
    assert open_envelope(envelope, TYPE, trusted, where="test").payload == b"{}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_encrypted_key_file_opens_with_its_passphrase_alone(tmp_path: Path, algorithm: Algorithm) -> None:
    path, key = tmp_path / "node.key", SigningKey.generate(algorithm)
    key.save(path, b"correct horse")
    assert path.stat().st_mode & 0o777 == 0o600
    assert serialization.load_pem_private_key(path.read_bytes(), b"correct horse")
    assert SigningKey.load(path, lambda _: b"correct horse").public == key.public
    with pytest.raises(WrongPassphrase, match=r"node\.key"):
        SigningKey.load(path, lambda _: b"battery staple")


def test_a_passphrase_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, file = tmp_path / "node.key", tmp_path / "passphrase"
    KEY.save(path, b"from a file")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(WrongPassphrase, match="needs a passphrase"):
        SigningKey.load(path)
    file.write_bytes(b"from a file\r\nand nothing of this")
    monkeypatch.setenv(PASSPHRASE_FILE, str(file))
    assert SigningKey.load(path).public == KEY.public
    monkeypatch.setenv(PASSPHRASE, "wrong")
    with pytest.raises(WrongPassphrase, match="does not open"):
        SigningKey.load(path)
    assert find_passphrase(path, file) == b"from a file"  # what the command line names comes first
    for content in (b"", b"x" * 2000):
        file.write_bytes(content)
        with pytest.raises(WrongPassphrase):
            find_passphrase(path, file)
    with pytest.raises(InputError, match="nowhere"):
        find_passphrase(path, tmp_path / "nowhere")


def test_key_files_are_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "node.key"
    KEY.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert SigningKey.load(path).public == KEY.public
    with pytest.raises(ResourceError, match="already exists"):
        SigningKey.generate().save(path)
    path.chmod(0o640)
    with pytest.raises(InputError, match="other users"):
        SigningKey.load(path)


def test_a_key_id_is_the_hash_of_the_public_key_info() -> None:
    assert KEY.public.key_id == hashlib.sha256(KEY.public.spki).hexdigest()
    assert PublicKey.from_pem(KEY.public.pem(), where="test") == KEY.public
    loaded = serialization.load_pem_public_key(KEY.public.pem().encode())
    assert loaded == KEY.private.public_key()


@pytest.mark.parametrize("text", ["", "hello", "-----BEGIN PUBLIC KEY-----\n!!!\n-----END PUBLIC KEY-----\n"])
def test_a_file_without_a_key_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.pem"
    path.write_text(text)
    with pytest.raises(InputError, match=r"some\.pem"):
        PublicKey.load(path)


def test_other_algorithms_are_refused() -> None:
    key = rsa.generate_private_key(65537, 2048).public_key()
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    with pytest.raises(InputError, match="Ed25519"):
        PublicKey.from_pem(pem, where="test")


def test_a_trust_store_is_a_folder_of_keys(tmp_path: Path) -> None:
    store = TrustStore(tmp_path / "trusted")
    assert store.keys() == {}
    store.add(KEY.public, "north")
    store.add(KEY.public, "north")
    assert store.keys() == TRUSTED
    assert store.names() == {KEY.public.key_id: "north"}
    with pytest.raises(InputError, match="another key"):
        store.add(SigningKey.generate().public, "north")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b", os.sep])
def test_a_name_is_never_a_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(FedmergeError):
        TrustStore(tmp_path / "trusted").add(KEY.public, name)
    assert not (tmp_path / "trusted").exists()


def test_a_key_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a power cut, or whoever reads it at once, finds half of it."""
    path, synced, sync, link = tmp_path / "new" / "node.key", list[tuple[int, bool]](), os.fsync, os.link
    held: list[int] = []

    def spy_on_sync(descriptor: int) -> None:
        sync(descriptor)
        synced.append((os.fstat(descriptor).st_ino, path.exists()))

    def spy_on_link(source: Path, target: Path) -> None:
        held.append(len(source.read_bytes()))
        link(source, target)

    monkeypatch.setattr(os, "fsync", spy_on_sync)
    monkeypatch.setattr(os, "link", spy_on_link)
    SigningKey.generate().save(path)
    assert held == [path.stat().st_size]
    folders = [(folder.stat().st_ino, True) for folder in (path.parent, tmp_path)]
    assert synced == [(path.stat().st_ino, False), *folders]
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["node.key"]


def test_a_key_is_written_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    key = SigningKey.generate()
    key.save(tmp_path / "node.key")
    assert SigningKey.load(tmp_path / "node.key").public == key.public
    with pytest.raises(ResourceError, match="already exists"):
        key.save(tmp_path / "node.key")
    assert [each.name for each in tmp_path.iterdir()] == ["node.key"]


@pytest.mark.parametrize("num_done", range(4))
def test_a_certificate_and_its_key_fit_whenever_their_renewal_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_done: int
) -> None:
    now = dt.datetime.now(dt.UTC)
    old, new = (self_signed(["localhost"], now, dt.timedelta(days=1)) for _ in range(2))
    files = tmp_path / "tls.key", tmp_path / "tls.crt"
    keep_pair(*files, old)
    assert kept_pair(*files) == old
    replace, done = Path.replace, list[Path]()

    def stop_after_some(self: Path, target: Path) -> Path:
        if len(done) == num_done:
            raise KeyboardInterrupt
        done.append(target)
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", stop_after_some)
        with pytest.raises(KeyboardInterrupt) if num_done < 3 else contextlib.nullcontext():
            keep_pair(*files, new)
    expected = old if num_done == 0 else new
    assert kept_pair(*files) == expected
    assert settle_pair(*files) == expected
    assert [file.read_bytes() for file in files] == [expected.key, expected.certificate]
    assert [each.name for each in sorted(tmp_path.iterdir()) if "partial" not in each.name] == ["tls.crt", "tls.key"]
    assert files[0].stat().st_mode & 0o777 == 0o600
    assert kept_pair(tmp_path / "a", tmp_path / "b") is None
