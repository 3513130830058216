"""A transparency log: RFC 6962 proofs over the ledger, and checkpoints as C2SP has them.

Leaf i is the hash that the ledger's chain has after event i, the same as in a node's receipt; so a receipt is all that
a node needs to check that it is listed. A checkpoint (https://c2sp.org/tlog-checkpoint) says how many leaves there are
and their Merkle root, in a signed note (https://c2sp.org/signed-note). Members who have checked that it continues the
one they knew add a cosignature (https://c2sp.org/tlog-cosignature). Two checkpoints of one log that no consistency
proof joins, both signed, prove that the coordinator told two histories.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedmerge.errors import BadSignature, DigestMismatch, UntrustedKey
from fedmerge.transparency.merkle import MerkleTree, largest_power_below, leaf_hash, node_hash
from fedmerge.trust.sign import PublicKey, SigningKey

MAX_NOTE_BYTES = 1 << 16
# The signature types of signed notes; for P-256, which they don't know, one of the kind left to others.
CHECKPOINT_TYPES = {"ed25519": b"\x01", "p256": b"\xfffedmerge.dev/p256"}
COSIGNATURE_TYPES = {"ed25519": b"\x04", "p256": b"\xfffedmerge.dev/cosignature/p256"}
MEMBER_NAME = "fedmerge.dev/member/"


@dataclass(frozen=True)
class LogCheckpoint:
    """The log called `origin` has `size` leaves with this Merkle root."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        """Return the text that is signed."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"


@dataclass(frozen=True)
class Growth:
    """A signed checkpoint of the log now, and the proof that it continues the one of the size that was asked for."""

    note: bytes
    proof: list[bytes]


def log_origin(federation: str, run: str) -> str:
    """Return the name of a federation's log, and of the key that signs it."""
    return f"fedmerge.dev/{federation}/{run}"


def log_leaf(event_hash: str) -> bytes:
    """Return the leaf hash of an event, by the chain's hash (hex) after it."""
    return leaf_hash(bytes.fromhex(event_hash))


def inclusion_proof(tree: MerkleTree, index: int, size: int) -> list[bytes]:
    """Return the audit path of leaf `index` among the first `size` (RFC 6962, section 2.1.1)."""
    path: list[bytes] = []
    begin, end = 0, size
    while end - begin > 1:
        middle = begin + largest_power_below(end - begin)
        if index < middle:
            path.append(tree.root(middle, end))
            end = middle
        else:
            path.append(tree.root(begin, middle))
            begin = middle
    return path[::-1]


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Check that `leaf` is number `index` of `size` leaves (RFC 9162, section 2.1.3.2); raise `DigestMismatch`."""
    if not 0 <= index < size:
        raise DigestMismatch(f"the log of {size} leaves has no leaf {index}")
    number, last, found = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            raise DigestMismatch("the inclusion proof is too long")
        if number & 1 or number == last:
            found = node_hash(sibling, found)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            found = node_hash(found, sibling)
        number, last = number >> 1, last >> 1
    if last != 0 or found != root:
        raise DigestMismatch(f"leaf {index} is not in the log of {size} leaves")


def consistency_proof(tree: MerkleTree, old_size: int, size: int) -> list[bytes]:
    """Return the proof that of the first `size` leaves `old_size` stayed as they were (RFC 6962, section 2.1.2)."""
    if not 0 < old_size < size:
        return []
    path: list[bytes] = []
    begin, end = 0, size
    while old_size != end:
        middle = begin + largest_power_below(end - begin)
        if old_size <= middle:
            path.append(tree.root(middle, end))
            end = middle
        else:
            path.append(tree.root(begin, middle))
            begin = middle
    if begin:  # else the old tree is a whole subtree, whose head the verifier knows
        path.append(tree.root(begin, end))
    return path[::-1]


def verify_consistency(old_size: int, old_root: bytes, new_size: int, new_root: bytes, proof: Sequence[bytes]) -> None:
    """Check that a log of `old_size` leaves grew into one of `new_size` (RFC 9162, section 2.1.4.2).

    Raises `DigestMismatch` when the proof does not show it.
    """
    problem = DigestMismatch(f"the log of {new_size} leaves does not continue the one of {old_size}")
    if old_size > new_size:
        raise problem
    if old_size in (0, new_size):
        if proof or (old_size == new_size and old_root != new_root):
            raise problem
        return
    path = list(proof) if old_size & (old_size - 1) else [old_root, *proof]
    if not path:
        raise problem
    number, last = old_size - 1, new_size - 1
    while number & 1:
        number, last = number >> 1, last >> 1
    old = new = path[0]
    for sibling in path[1:]:
        if last == 0:
            raise problem
        if number & 1 or number == last:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            new = node_hash(new, sibling)
        number, last = number >> 1, last >> 1
    if last != 0 or (old, new) != (old_root, new_root):
        raise problem


def sign_checkpoint(checkpoint: LogCheckpoint, key: SigningKey) -> bytes:
    """Return the checkpoint as a signed note."""
    text = checkpoint.text()
    type_ = CHECKPOINT_TYPES[key.public.algorithm]
    return f"{text}\n{_line(checkpoint.origin, key.public, type_, key.sign_bytes(text.encode()))}".encode()


def open_checkpoint(note: bytes, key: PublicKey, *, where: str) -> LogCheckpoint:
    """Verify a log's own signature on a note, and return its checkpoint.

    Raises `UntrustedKey` when it has none of `key`, `BadSignature` when that does not verify, or it is no checkpoint.
    """
    text, lines = _parse_note(note, where=where)
    fields = text.split("\n")
    try:
        origin, size, root = fields[0], int(fields[1]), base64.b64decode(fields[2], validate=True)
    except (ValueError, IndexError, binascii.Error) as err:
        raise BadSignature(f"{where}: not a checkpoint") from err
    checkpoint = LogCheckpoint(origin, size, root)
    if checkpoint.text() != text or size < 0 or len(root) != 32:
        raise BadSignature(f"{where}: not a checkpoint")
    _verify_line(lines, origin, key, CHECKPOINT_TYPES[key.algorithm], text.encode(), where=where)
    return checkpoint


def open_by_any(note: bytes, keys: Iterable[PublicKey], *, where: str) -> LogCheckpoint:
    """Do as `open_checkpoint`, under whichever of a log's `keys` has signed the note: a log outlives its keys.

    They are told apart by the key ids in signature lines; the name in these, the log's origin, stays.
    """
    newest_first = list(keys)[::-1]
    for number, key in enumerate(newest_first, start=1):
        try:
            return open_checkpoint(note, key, where=where)
        except UntrustedKey:
            if number == len(newest_first):
                raise
    raise UntrustedKey(f"{where}: there is no key to verify it by")


def cosign(note: bytes, key: SigningKey, time_s: int) -> bytes:
    """Return a member's cosignature line for a note, whose checkpoint it has checked, at `time_s` (Unix time)."""
    text, _ = _parse_note(note, where="checkpoint")
    stamp = time_s.to_bytes(8, "big")
    signature = stamp + key.sign_bytes(_cosigned(text, time_s))
    type_ = COSIGNATURE_TYPES[key.public.algorithm]
    return _line(MEMBER_NAME + key.public.key_id, key.public, type_, signature).encode()


def check_cosignature(note: bytes, line: bytes, key: PublicKey, *, where: str) -> None:
    """Verify a member's cosignature line for a note; raise `UntrustedKey` or `BadSignature`."""
    text, _ = _parse_note(note, where=where)
    try:
        lines = [line.decode()]
    except UnicodeDecodeError as err:
        raise BadSignature(f"{where}: not a cosignature") from err
    type_ = COSIGNATURE_TYPES[key.algorithm]
    _verify_line(lines, MEMBER_NAME + key.key_id, key, type_, text, where=where)


def note_key_id(name: str, key: PublicKey, type_: bytes) -> bytes:
    """Return the four bytes by which a signed note names a key."""
    return hashlib.sha256(name.encode() + b"\n" + type_ + key.raw()).digest()[:4]


def _verify_line(
    lines: Sequence[str], name: str, key: PublicKey, type_: bytes, signed: bytes | str, *, where: str
) -> None:
    key_id = note_key_id(name, key, type_)
    for line in lines:
        found_name, _, encoded = line.removeprefix("\u2014 ").rstrip("\n").partition(" ")
        try:
            data = base64.b64decode(encoded, validate=True)
        except binascii.Error as err:
            raise BadSignature(f"{where}: a signature line is damaged") from err
        # The last characters hold bits that stand for nothing, so that several texts give the same bytes.
        if base64.b64encode(data).decode() != encoded:
            raise BadSignature(f"{where}: a signature line is damaged")
        if (found_name, data[:4]) != (name, key_id):
            continue
        if isinstance(signed, str):
            signature, message = data[12:], _cosigned(signed, int.from_bytes(data[4:12], "big"))
        else:
            signature, message = data[4:], signed
        key.verify_bytes(signature, message, where=where)
        return
    raise UntrustedKey(f"{where}: has no signature of key {key.short}")


def _cosigned(text: str, time_s: int) -> bytes:
    return f"cosignature/v1\ntime {time_s}\n{text}".encode()


def _line(name: str, key: PublicKey, type_: bytes, signature: bytes) -> str:
    return f"\u2014 {name} {base64.b64encode(note_key_id(name, key, type_) + signature).decode()}\n"


def _parse_note(note: bytes, *, where: str) -> tuple[str, list[str]]:
    """Return a note's text, with its last newline, and its signature lines."""
    try:
        decoded = note.decode()
    except UnicodeDecodeError as err:
        raise BadSignature(f"{where}: not a signed note") from err
    text, blank, signatures = decoded.rpartition("\n\n")
    lines = signatures.splitlines()
    well_formed = all(line.startswith("\u2014 ") for line in lines) and signatures.endswith("\n")
    if len(note) > MAX_NOTE_BYTES or not blank or not lines or not well_formed:
        raise BadSignature(f"{where}: not a signed note")
    return f"{text}\n", lines
