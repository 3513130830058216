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
        paired = [node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = paired + level[len(paired) * 2 :]
    return level[0]


class MerkleTree:
    """A tree of leaf hashes that grows; a head of `n` of them takes about log2(n) hashes, not `n`."""

    def __init__(self, leaf_hashes: Iterable[bytes] = ()) -> None:
        # Of level k, number i is the head of the leaves from i * 2**k to (i + 1) * 2**k.
        self._levels: list[list[bytes]] = [[]]
        for leaf in leaf_hashes:
            self.append(leaf)

    def __len__(self) -> int:
        return len(self._levels[0])

    def append(self, leaf: bytes) -> None:
        """Add a leaf."""
        head = leaf
        for level in self._levels:
            level.append(head)
            if len(level) % 2:
                return
            head = node_hash(level[-2], level[-1])
        self._levels.append([head])

    def root(self, begin: int, end: int) -> bytes:
        """Return the head of leaves `begin` to `end`, which are a subtree as RFC 6962 splits, or all from the first."""
        size = end - begin
        if size == 0:
            return merkle_root([])
        if size & (size - 1) == 0:
            return self._levels[size.bit_length() - 1][begin // size]
        middle = begin + largest_power_below(size)
        return node_hash(self.root(begin, middle), self.root(middle, end))


def largest_power_below(size: int) -> int:
    """Return the largest power of two below `size`, which is at least 2: how many leaves are left of the split."""
    return 1 << (size - 1).bit_length() - 1


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of an inner node: SHA-256(0x01 || left || right)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class LeafHashes:
    """The leaf hashes of a payload that comes piece by piece, however it is cut."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._whole: list[bytes] = []
        self._begin_leaf()

    def _begin_leaf(self) -> None:
        self._leaf, self._missing_bytes = hashlib.sha256(b"\x00"), LEAF_BYTES

    def update(self, data: bytes | memoryview) -> None:
        """Add a piece."""
        self.num_bytes += len(data)
        rest = memoryview(data)
        while rest:
            part, rest = rest[: self._missing_bytes], rest[self._missing_bytes :]
            self._leaf.update(part)
            self._missing_bytes -= len(part)
            if not self._missing_bytes:
                self._whole.append(self._leaf.digest())
                self._begin_leaf()

    def read(self, path: Path) -> None:
        """Add what is in a file."""
        with path.open("rb") as file:
            while data := file.read(LEAF_BYTES):
                self.update(data)

    @property
    def leaves(self) -> list[bytes]:
        """The hashes of what came so far, of which the last leaf may be shorter."""
        return self._whole + ([self._leaf.digest()] if self._missing_bytes < LEAF_BYTES else [])


def leaves_of(path: Path) -> list[bytes]:
    """Return the leaf hashes of a file, read once, 1 MiB at a time."""
    hashes = LeafHashes()
    hashes.read(path)
    return hashes.leaves


def num_leaves(num_bytes: int) -> int:
    """Return how many leaves a payload of `num_bytes` has."""
    return -(-num_bytes // LEAF_BYTES)
