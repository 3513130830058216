"""Where whole blobs lie: a folder, or an object store. A blob appears there whole or not at all, and stays as it is."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from fedmerge.errors import reporting_os_errors
from fedmerge.files import sync_directory, sync_file

ROOT = re.compile(r"[0-9a-f]{64}")


class Stored(NamedTuple):
    """A blob that is stored: its root, its size, and when it was stored, by the clock of whoever stores it."""

    root: str
    num_bytes: int
    at_s: float


class Shelf(Protocol):
    """Blobs by Merkle root: 64 hex digits, which callers have checked. All methods may raise `ResourceError`."""

    def has(self, root: str) -> bool:
        """Whether the blob is stored durably."""

    def find(self, root: str) -> Path | None:
        """Return a local file with the blob, made if need be; None when it is not stored."""

    def install(self, source: Path, root: str) -> None:
        """Move a finished file in. It is durable when this returns."""

    def drop(self, root: str) -> None:
        """Remove a blob, if it is stored."""

    def stored(self) -> Iterator[Stored]:
        """Yield what is stored, in no particular order."""


class FolderShelf:
    """Blobs as files below a folder, which several coordinators may share.

    One that is not `durable` waits for no disk: a power cut may take the latest blobs, or leave them incomplete.
    """

    def __init__(self, directory: Path, *, durable: bool = True) -> None:
        self._directory = directory
        self._durable = durable

    def has(self, root: str) -> bool:
        """Whether the file is there: it is renamed into place only when it is synced."""
        return self._place(root).is_file()

    def find(self, root: str) -> Path | None:
        """Return the file."""
        path = self._place(root)
        return path if path.is_file() else None

    def install(self, source: Path, root: str) -> None:
        """Sync the file, rename it into place, then sync the folder."""
        target = self._place(root)
        with reporting_os_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                if self._durable:
                    sync_file(source)
            except OSError:
                # Nobody knows which bytes are on the disk now, and the next sync would not say so: they must come anew.
                source.unlink(missing_ok=True)
                raise
            try:
                source.replace(target)
            except OSError as err:
                if err.errno != errno.EXDEV:
                    raise
                # From another file system, by way of a name that is no blob's.
                near = target.with_name(f".{root}.{os.getpid()}")
                shutil.copyfile(source, near)
                if self._durable:
                    sync_file(near)
                near.replace(target)
                source.unlink()
            if self._durable:
                sync_directory(target.parent)
                sync_directory(self._directory)

    def drop(self, root: str) -> None:
        """Delete the file."""
        with reporting_os_errors(self._directory):
            self._place(root).unlink(missing_ok=True)

    def stored(self) -> Iterator[Stored]:
        """Yield the files."""
        for path in self._directory.glob("[0-9a-f][0-9a-f]/*"):
            if ROOT.fullmatch(path.name):
                found = path.stat()
                yield Stored(path.name, found.st_size, found.st_mtime)

    def _place(self, root: str) -> Path:
        return self._directory / root[:2] / root
