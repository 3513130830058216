"""The Merkle tree of RFC 6962 (section 2.1) over a payload's 1 MiB leaves.

A payload is named by its root, so a chunk can be checked the moment it arrives, and a bad one costs 1 MiB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

LEAF_BYTES = 1 << 20


def leaf_hash(data: bytes | memoryview) -> bytes:
    """Return the hash of one leaf: SHA-256(0x00 || data)."""
    digest = hashlib.sha256(b"\x00")
    digest.update(data)
    return digest.digest()


def merkle_root(leaf_hashes: Sequence[bytes]) -> bytes:
    """Return the tree head of the given leaf hashes; of no leaves, the hash of the empty string."""
    if not leaf_hashes:
        return hashlib.sha256(b"").digest()
    # RFC 6962 splits at the largest power of two below n. Pairing neighbours level by level and carrying an odd
    # one up builds the same tree without recursion.
    level = list(leaf_hashes)
    while len(level) > 1:
        paired = [hashlib.sha256(b"\x01" + level[i] + level[i + 1]).digest() for i in range(0, len(level) - 1, 2)]
        level = paired + level[len(paired) * 2 :]
    return level[0]


def leaves_of(path: Path) -> list[bytes]:
    """Return the leaf hashes of a file, read once, 1 MiB at a time."""
    with path.open("rb") as file:
        return leaves_of_chunks(iter(lambda: file.read(LEAF_BYTES), b""))


def leaves_of_chunks(chunks: Iterable[bytes]) -> list[bytes]:
    """Return the leaf hashes of chunks that are 1 MiB each, the last one possibly shorter."""
    return [leaf_hash(chunk) for chunk in chunks]


def num_leaves(num_bytes: int) -> int:
    """Return how many leaves a payload of `num_bytes` has."""
    return -(-num_bytes // LEAF_BYTES)
