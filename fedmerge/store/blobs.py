"""The blob store: a folder of files named by their Merkle root, and the parts of uploads under way.

A name handed in from outside never becomes a path: blobs are addressed by 64 hex digits, parts by ids made here.
A blob appears whole or not at all: its bytes are synced, then it is renamed into place, then the folder is synced.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from fedmerge.errors import BadOffset, DigestMismatch, UnknownVersion, reporting_os_errors
from fedmerge.merkle import LEAF_BYTES, leaf_hash, leaves_of, merkle_root, num_leaves

_ROOT = re.compile(r"[0-9a-f]{64}")


class BlobStore:
    """Content-addressed files below `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._parts = directory / "parts"
        with reporting_os_errors(directory):
            self._parts.mkdir(parents=True, exist_ok=True)

    def path(self, root: str) -> Path:
        """Return where the blob lies; raise `UnknownVersion` when there is none of that root."""
        if not _ROOT.fullmatch(root):
            raise UnknownVersion("a blob is named by 64 hex digits")
        path = self._place(root)
        if not path.is_file():
            raise UnknownVersion(f"no blob {root[:12]} is stored here")
        return path

    def has(self, root: str) -> bool:
        """Whether the blob is stored."""
        return self._place(root).is_file()

    def add(self, source: Path) -> str:
        """Move a finished file in and return its root."""
        root = merkle_root(leaves_of(source)).hex()
        self._install(source, root)
        return root

    def drop(self, root: str) -> None:
        """Remove a blob, if it is stored."""
        with reporting_os_errors(self.directory):
            self._place(root).unlink(missing_ok=True)

    def begin_part(self, upload_id: str) -> None:
        """Make the empty part of an upload."""
        with reporting_os_errors(self._parts):
            self._part(upload_id).touch()

    def write_part(self, upload_id: str, offset: int, data: bytes, leaves: Sequence[bytes], total_bytes: int) -> int:
        """Append one leaf to an upload's part, after checking it, and return the bytes now stored.

        Raises `BadOffset` when it does not continue the part, `DigestMismatch` when it is not the promised leaf.
        """
        stored = self.part_bytes(upload_id)
        if offset != stored or offset % LEAF_BYTES:
            raise BadOffset(f"chunk at {offset}, but {stored} bytes are stored", hint=f"continue at {stored}")
        expected_bytes = min(LEAF_BYTES, total_bytes - offset)
        if expected_bytes <= 0 or len(data) != expected_bytes:
            raise BadOffset(f"chunk at {offset} has {len(data)} bytes, expected {max(expected_bytes, 0)}")
        if leaf_hash(data) != leaves[offset // LEAF_BYTES]:
            raise DigestMismatch(
                f"chunk at {offset} does not have the promised hash", hint=f"send it again from {stored}"
            )
        with reporting_os_errors(self._parts), self._part(upload_id).open("ab") as file:
            file.write(data)
        return stored + len(data)

    def part_bytes(self, upload_id: str) -> int:
        """Return how many bytes of an upload are stored."""
        part = self._part(upload_id)
        return part.stat().st_size if part.exists() else 0

    def recover_part(self, upload_id: str, leaves: Sequence[bytes]) -> int:
        """After a crash, cut a part back to its longest prefix of whole, correct leaves, and return its length."""
        part = self._part(upload_id)
        part.touch()
        good = 0
        with part.open("rb") as file:
            for expected in leaves:
                chunk = file.read(LEAF_BYTES)
                if not chunk or leaf_hash(chunk) != expected:
                    break
                good += len(chunk)
        os.truncate(part, good)
        return good

    def finish_part(self, upload_id: str, root: str) -> Path:
        """Turn a complete part into the blob `root`. Every leaf was checked when it arrived."""
        if not self.has(root):
            self._install(self._part(upload_id), root)
        self.drop_part(upload_id)
        return self._place(root)

    def part_path(self, upload_id: str) -> Path:
        """Return the file of an upload's part, to be read before it becomes a blob."""
        return self._part(upload_id)

    def drop_part(self, upload_id: str) -> None:
        """Remove an upload's part."""
        self._part(upload_id).unlink(missing_ok=True)

    def drop_stray_parts(self, known: set[str]) -> None:
        """Remove parts that belong to no upload: what a crash between two steps leaves behind."""
        for part in self._parts.glob("*.part"):
            if part.stem not in known:
                part.unlink()

    def _install(self, source: Path, root: str) -> None:
        target = self._place(root)
        with reporting_os_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with source.open("rb+") as file:
                os.fsync(file.fileno())
            source.replace(target)
            sync_directory(target.parent)
            sync_directory(self.directory)

    def _place(self, root: str) -> Path:
        return self.directory / root[:2] / root

    def _part(self, upload_id: str) -> Path:
        return self._parts / f"{upload_id}.part"


def split_leaf_hashes(joined: bytes, payload_bytes: int, root: str) -> list[bytes]:
    """Split concatenated leaf hashes; raise `DigestMismatch` unless they fit the size and have the given root."""
    if len(joined) != 32 * num_leaves(payload_bytes):
        raise DigestMismatch(
            f"{len(joined)} bytes of leaf hashes do not fit a payload of {payload_bytes} bytes; "
            f"expected {32 * num_leaves(payload_bytes)}"
        )
    leaves = [joined[i : i + 32] for i in range(0, len(joined), 32)]
    if merkle_root(leaves).hex() != root:
        raise DigestMismatch("the leaf hashes do not have the signed Merkle root")
    return leaves


def sync_directory(directory: Path) -> None:
    """Make renames in a folder durable, where the platform can."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
