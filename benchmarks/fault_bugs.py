"""Bugs to plant in a process before it starts: for each part of faults.py one that it must find."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fedmerge_server.run
from fedmerge.errors import BadOffset, reporting_os_errors
from fedmerge.events import DeltaAccepted, Event, MetricsReported
from fedmerge.store import shelves
from fedmerge.store.blobs import BlobStore
from fedmerge.store.entries import LedgerEntry
from fedmerge.store.lease import Lease
from fedmerge.store.ledger import Ledger
from fedmerge.transparency.merkle import LEAF_BYTES, leaf_hash


def acknowledge_before_writing() -> None:
    """Deltas are acknowledged at once, and get into the ledger with the next event of another kind."""
    append, write = Ledger.append, Ledger._write
    waiting: list[Callable[..., object]] = []
    can_wait = [False]

    def append_later(self: Ledger, *facts: Event, **more: Any) -> list[LedgerEntry]:
        can_wait[0] = all(isinstance(fact, (DeltaAccepted, MetricsReported)) for fact in facts)
        try:
            return append(self, *facts, **more)
        finally:
            can_wait[0] = False

    def write_later(self: Ledger, work: Callable[..., object]) -> None:
        waiting.append(work)
        if not can_wait[0]:
            write(self, lambda connection: [each(connection) for each in waiting])
            waiting.clear()

    Ledger.append = append_later  # type: ignore[assignment, method-assign]
    Ledger._write = write_later  # type: ignore[method-assign]


def blobs_appear_in_parts() -> None:
    """A blob is written under its final name."""

    def install(self: shelves.FolderShelf, source: Path, root: str) -> None:
        target = self._place(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        data = source.read_bytes()
        with target.open("wb", buffering=0) as file:
            file.write(data[: len(data) // 2])
            file.write(data[len(data) // 2 :])
        source.unlink()

    shelves.FolderShelf.install = install  # type: ignore[method-assign]


def nothing_is_synced() -> None:
    """Files and folders are said to be durable before they are."""
    shelves.sync_file = shelves.sync_directory = lambda path: None  # type: ignore[assignment]


def errors_of_sync_are_ignored() -> None:
    """What the disk says to a sync is not listened to."""
    really = shelves.sync_file

    def sync(path: Path) -> None:
        try:
            really(path)
        except OSError:
            return

    shelves.sync_file = sync


def halves_of_leaves_stay() -> None:
    """What a full disk takes of a leaf stays in the part of its upload."""

    def write_part(self: BlobStore, upload_id: str, offset: int, data: bytes, *promised: object) -> int:
        stored = self.part_bytes(upload_id)
        if offset != stored or offset % LEAF_BYTES:
            raise BadOffset(f"chunk at {offset}, but {stored} bytes are stored")
        with reporting_os_errors(self._parts), self._part(upload_id).open("ab") as file:
            file.write(data)
        return stored + len(data)

    BlobStore.write_part = write_part  # type: ignore[method-assign]


def nobody_is_fenced_off() -> None:
    """A coordinator does not notice that another has taken its place."""
    Lease.require = lambda self, connection: None  # type: ignore[method-assign]


def rounds_follow_the_wall_clock() -> None:
    """Deadlines are by a clock that may be set."""
    fedmerge_server.run.steady_clock = lambda: time.time  # type: ignore[assignment]


def chunks_are_not_checked() -> None:
    """Chunks of a delta are taken whatever their hash."""
    really = BlobStore.write_part

    def write_part(self: BlobStore, upload_id: str, offset: int, data: bytes, leaves: list[bytes], *more: int) -> int:
        at = offset // LEAF_BYTES
        return really(self, upload_id, offset, data, [*leaves[:at], leaf_hash(data), *leaves[at + 1 :]], *more)

    BlobStore.write_part = write_part  # type: ignore[assignment, method-assign]
