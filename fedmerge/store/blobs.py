"""The blob store: files named by their Merkle root, on a shelf, and the parts of uploads under way.

A name handed in from outside never becomes a path: blobs are addressed by 64 hex digits, parts by ids made here. Parts
are a coordinator's own and stay on its disk: another one that takes over asks nodes for them again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedmerge.errors import BadOffset, DigestMismatch, UnknownVersion, reporting_os_errors
from fedmerge.store.shelves import ROOT, FolderShelf, Shelf, Stored
from fedmerge.transparency.merkle import LEAF_BYTES, leaf_hash, leaves_of, merkle_root, num_leaves


class BlobStore:
    """Content-addressed files below `directory`, or on another `shelf`; parts are below `directory` in any case."""

    def __init__(self, directory: Path, shelf: Shelf | None = None) -> None:
        self._shelf = shelf or FolderShelf(directory)
        self._parts = directory / "parts"
        with reporting_os_errors(directory):
            self._parts.mkdir(parents=True, exist_ok=True)

    def path(self, root: str) -> Path:
        """Return a file with the blob; raise `UnknownVersion` when there is none of that root."""
        if not ROOT.fullmatch(root):
            raise UnknownVersion("a blob is named by 64 hex digits")
        path = self._shelf.find(root)
        if path is None:
            raise UnknownVersion(f"no blob {root[:12]} is stored here")
        return path

    def has(self, root: str) -> bool:
        """Whether the blob is stored durably."""
        return self._shelf.has(root)

    def stored(self) -> Iterator[Stored]:
        """Yield all blobs, in no particular order."""
        return self._shelf.stored()

    def add(self, source: Path) -> str:
        """Move a finished file in and return its root."""
        root = merkle_root(leaves_of(source)).hex()
        self._shelf.install(source, root)
        return root

    def drop(self, root: str) -> None:
        """Remove a blob, if it is stored."""
        self._shelf.drop(root)

    def begin_part(self, upload_id: str) -> None:
        """Make the empty part of an upload."""
        with reporting_os_errors(self._parts):
            self._part(upload_id).touch()

    def write_part(
        self, upload_id: str, offset: int, data: bytes | memoryview, leaves: Sequence[bytes], total_bytes: int
    ) -> int:
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
        part = self._part(upload_id)
        with reporting_os_errors(self._parts):
            try:
                with part.open("ab") as file:
                    file.write(data)
            except OSError:
                os.truncate(part, stored)  # half a leaf is nothing to go on from
                raise
        return stored + len(data)

    def part_bytes(self, upload_id: str) -> int:
        """Return how many bytes of an upload are stored."""
        try:
            return self._part(upload_id).stat().st_size
        except FileNotFoundError:
            return 0

    def recover_part(self, upload_id: str, leaves: Sequence[bytes]) -> int:
        """After a crash, cut a part back to its longest prefix of whole, correct leaves, and return its length."""
        part = self._part(upload_id)
        good = 0
        with reporting_os_errors(part):
            part.touch()
            with part.open("rb") as file:
                for expected in leaves:
                    chunk = file.read(LEAF_BYTES)
                    if not chunk or leaf_hash(chunk) != expected:
                        break
                    good += len(chunk)
            os.truncate(part, good)
        return good

    def finish_part(self, upload_id: str, root: str) -> None:
        """Turn a complete part into the blob `root`. Every leaf was checked when it arrived."""
        if not self.has(root):
            self._shelf.install(self._part(upload_id), root)
        self.drop_part(upload_id)

    def part_path(self, upload_id: str) -> Path:
        """Return the file of an upload's part, to be read before it becomes a blob."""
        return self._part(upload_id)

    def drop_part(self, upload_id: str) -> None:
        """Remove an upload's part."""
        with reporting_os_errors(self._parts):
            self._part(upload_id).unlink(missing_ok=True)

    def drop_stray_parts(self, known: set[str]) -> None:
        """Remove parts that belong to no upload: what a crash between two steps leaves behind."""
        with reporting_os_errors(self._parts):
            for part in self._parts.glob("*.part"):
                if part.stem not in known:
                    part.unlink()

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
