"""The transparency log against the definitions of RFC 6962 and a note that another implementation signed."""

from __future__ import annotations

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.errors import BadSignature, DigestMismatch, UntrustedKey, VerificationError
from fedmerge.transparency.log import (
    LogCheckpoint,
    check_cosignature,
    consistency_proof,
    cosign,
    inclusion_proof,
    log_leaf,
    note_key_id,
    open_checkpoint,
    sign_checkpoint,
    verify_consistency,
    verify_inclusion,
)
from fedmerge.transparency.merkle import MerkleTree, merkle_root
from fedmerge.trust.sign import ALGORITHMS, Algorithm, PublicKey, SigningKey

LEAVES = [log_leaf(hashlib.sha256(bytes([i])).hexdigest()) for i in range(40)]
TREE = MerkleTree(LEAVES)  # proofs are of its first leaves, however many came since


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 8, 20])
def test_every_leaf_has_a_proof_and_no_other_passes(size: int) -> None:
    leaves = LEAVES[:size]
    root = merkle_root(leaves)
    for index, leaf in enumerate(leaves):
        proof = inclusion_proof(TREE, index, size)
        verify_inclusion(leaf, index, size, proof, root)
        wrong = [
            (LEAVES[-1], index, size, proof, root),
            (leaf, index + 1, size, proof, root),
            (leaf, index, size, [*proof, LEAVES[0]], root),
            (leaf, index, size, proof, LEAVES[-1]),
            (leaf, -1, size, proof, root),
        ]
        wrong += [(leaf, index, size, proof[1:], root)] if proof else []
        for case in wrong:
            with pytest.raises(DigestMismatch):
                verify_inclusion(*case)


def test_every_growth_has_a_proof_and_no_other_passes() -> None:
    for new_size in range(1, 18):
        new = LEAVES[:new_size]
        for old_size in range(new_size + 1):
            old_root, new_root = merkle_root(new[:old_size]), merkle_root(new)
            proof = consistency_proof(TREE, old_size, new_size)
            verify_consistency(old_size, old_root, new_size, new_root, proof)
            if old_size == 0:
                continue
            other = merkle_root([*LEAVES[20 : 20 + old_size]])
            for wrong in (
                (old_size, other, new_size, new_root, proof),
                (new_size + 1, old_root, new_size, new_root, proof),
            ):
                with pytest.raises(DigestMismatch):
                    verify_consistency(*wrong)
            with pytest.raises(DigestMismatch):
                verify_consistency(old_size, old_root, new_size, new_root, [*proof, LEAVES[0]])
            if proof:
                with pytest.raises(DigestMismatch):
                    verify_consistency(old_size, old_root, new_size, new_root, proof[:-1])


def test_the_example_of_rfc_6962() -> None:
    # Section 2.1.3: seven leaves; the audit path of d3 is (c, g, l), the proof from 3 is (c, d, g, l).
    def pair(left: bytes, right: bytes) -> bytes:
        return hashlib.sha256(b"\x01" + left + right).digest()

    a, b, c, d, e, f, j = LEAVES[:7]
    g, h, i = pair(a, b), pair(c, d), pair(e, f)
    k, l = pair(g, h), pair(i, j)  # noqa: E741 - as the RFC calls it
    assert merkle_root(LEAVES[:7]) == pair(k, l)
    assert inclusion_proof(TREE, 3, 7) == [c, g, l]
    assert consistency_proof(TREE, 3, 7) == [c, d, g, l]
    assert consistency_proof(TREE, 4, 7) == [l]
    assert consistency_proof(TREE, 6, 7) == [i, j, k]


@settings(max_examples=50)
@given(st.integers(1, 40), st.data())
def test_a_changed_history_is_never_consistent(new_size: int, data: st.DataObject) -> None:
    old_size = data.draw(st.integers(1, new_size))
    changed = data.draw(st.integers(0, old_size - 1))
    old, new = list(LEAVES[:old_size]), list(LEAVES[:new_size])
    new[changed] = log_leaf("0" * 64)
    proof = consistency_proof(MerkleTree(new), old_size, new_size)
    with pytest.raises(DigestMismatch):
        verify_consistency(old_size, merkle_root(old), new_size, merkle_root(new), proof)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_checkpoints_and_cosignatures(algorithm: Algorithm) -> None:
    key, member, stranger = (SigningKey.generate(algorithm) for _ in range(3))
    checkpoint = LogCheckpoint("fedmerge.dev/test/0", 7, merkle_root(LEAVES[:7]))
    note = sign_checkpoint(checkpoint, key)
    assert note.startswith(b"fedmerge.dev/test/0\n7\n")
    assert open_checkpoint(note, key.public, where="t") == checkpoint
    with pytest.raises(UntrustedKey):
        open_checkpoint(note, stranger.public, where="t")
    line = cosign(note, member, 1_700_000_000)
    check_cosignature(note, line, member.public, where="t")
    other = sign_checkpoint(LogCheckpoint("fedmerge.dev/test/0", 6, merkle_root(LEAVES[:6])), key)
    with pytest.raises(BadSignature):
        check_cosignature(other, line, member.public, where="t")
    with pytest.raises(UntrustedKey):
        check_cosignature(note, line, stranger.public, where="t")
    assert open_checkpoint(note + line, key.public, where="t") == checkpoint  # further lines do not matter
    for position in range(len(note) - 1):
        damaged = bytearray(note)
        damaged[position] ^= 1
        with pytest.raises(VerificationError):
            open_checkpoint(bytes(damaged), key.public, where="t")


def test_a_note_that_go_signed() -> None:
    # The example of golang.org/x/mod/sumdb/note.
    name, key_id, encoded = ["PeterNeumann", "c74f20a3", "ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"]
    text = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
    line = "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="
    raw = base64.b64decode(encoded)
    spki = Ed25519PublicKey.from_public_bytes(raw[1:]).public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    key = PublicKey.from_spki(spki, where="t")
    assert key.raw() == raw[1:]
    assert note_key_id(name, key, raw[:1]).hex() == key_id
    signature = base64.b64decode(line)
    assert signature[:4].hex() == key_id
    key.verify_bytes(signature[4:], text.encode(), where="t")
