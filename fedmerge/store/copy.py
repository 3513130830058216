"""Copying what a coordinator must not lose: blobs, and then the ledger that names them."""

from __future__ import annotations

import shutil

from sqlalchemy import Connection, insert, select

from fedmerge.errors import DigestMismatch, ResourceError, reporting_os_errors
from fedmerge.store.blobs import BlobStore
from fedmerge.store.database import Database, events
from fedmerge.store.ledger import Ledger


def copy_blobs(source: BlobStore, target: BlobStore) -> int:
    """Copy the blobs that `target` lacks, and return how many. Raises `DigestMismatch` for one that was changed."""
    num_copied = 0
    for found in source.stored():
        if target.has(found.root):
            continue
        path, scratch = source.path(found.root), target.part_path(f"copy-{found.root[:16]}")
        with reporting_os_errors(scratch):
            shutil.copyfile(path, scratch)
        if target.add(scratch) != found.root:
            target.drop(found.root)
            raise DigestMismatch(f"{path}: was changed after it was stored", hint="restore it from a backup")
        num_copied += 1
    return num_copied


def copy_ledger(source: Database, target: Database) -> int:
    """Copy a ledger, once it is checked, to a database that has none, and return its number of events.

    The rows are copied as they are, in one transaction: hashes hold whatever version wrote them. Uploads under way are
    not copied; nodes begin them again. The caller sees to it that nobody writes either. Raises `ResourceError`.
    """
    Ledger(source)
    rows = source.run(lambda connection: [dict(row) for row in connection.execute(select(events)).mappings()])

    def write(connection: Connection) -> None:
        found = [dict(row) for row in connection.execute(select(events)).mappings()]
        if found and found != rows:
            raise ResourceError(f"{target.name}: holds another ledger already", hint="copy to an empty database")
        if rows and not found:
            connection.execute(insert(events), rows)

    target.run(write)
    return len(Ledger(target).entries)
