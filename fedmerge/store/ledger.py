"""The ledger: an append-only, hash-chained list of events in a database, through SQLAlchemy Core.

The chain makes a changed, dropped or reordered event visible at the next start, and where old events are read again: in
memory are only the newest. Uploads under way are kept beside it, because an interrupted one must survive a restart, but
they are not facts and not part of the chain.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from pydantic import ValidationError
from sqlalchemy import Connection, Row, bindparam, delete, insert, select

from fedmerge.errors import DigestMismatch
from fedmerge.events import Event, from_json, to_json
from fedmerge.store.database import RESTORE, Database, sqlite_url
from fedmerge.store.database import events as _events
from fedmerge.store.database import uploads as _uploads
from fedmerge.store.entries import BATCH, GENESIS, LedgerEntry, chain_hash
from fedmerge.store.lease import Lease

# Made once: they are part of every round.
_INSERT = insert(_events)
_BEGIN = insert(_uploads)
_END = delete(_uploads).where(_uploads.c.upload_id == bindparam("ended"))
_SELECT = select(_events).where(_events.c.number >= bindparam("begin")).order_by(_events.c.number)


@dataclass(frozen=True)
class UploadRow:
    """An upload begun and not yet committed: what the node signed, and the payload's leaf hashes, concatenated."""

    upload_id: str
    round: int
    node_id: str
    envelope: bytes
    leaf_hashes: bytes


class Ledger:
    """Appends and replays events. One process writes; the caller serialises the writes.

    Where there is a `lease`, every write needs it, and raises `Deposed` once another coordinator has taken it.
    """

    def __init__(self, database: Database | Path, *, lease: Lease | None = None) -> None:
        """Open or create the ledger in a database, or in a SQLite file of its own.

        Raises `ResourceError` when it can't be opened, `DigestMismatch` when it was altered.
        """
        self._database = database if isinstance(database, Database) else Database(sqlite_url(database))
        self._lease = lease
        self._entries = _Entries(self._database)

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    @property
    def head(self) -> str:
        """The hash of the last event, which stands for the whole history."""
        return self._entries.head

    @property
    def entries(self) -> Sequence[LedgerEntry]:
        """All events, in order; old ones are read when they are asked for.

        Then it raises `DigestMismatch` for those that were altered since the ledger was opened, or that are not ones
        that this version knows, and `ResourceError`.
        """
        return self._entries

    def bodies(self) -> list[bytes]:
        """Return the events as they are stored and chained, in order; one more may be there than among the entries."""
        query = select(_events.c.body).order_by(_events.c.number)
        return self._database.run(lambda connection: [bytes(row.body) for row in connection.execute(query)])

    def append(self, *facts: Event, at_s: float, ends_upload: str | None = None) -> list[LedgerEntry]:
        """Commit events, one at least, in one transaction, and in the same one forget the upload that they end."""
        entries: list[LedgerEntry] = []
        rows: list[dict[str, object]] = []
        head = self.head
        for number, fact in enumerate(facts, start=len(self._entries)):
            body = to_json(fact)
            head = chain_hash(head, number, at_s, body)
            entries.append(LedgerEntry(number, at_s, fact, head))
            rows.append({"number": number, "at_s": at_s, "body": body, "hash": head})

        tries = itertools.count()

        def write(connection: Connection) -> None:
            if next(tries) and _hash_of(connection, entries[-1].number) == head:
                return  # the try before this one took place after all
            connection.execute(_INSERT, rows)
            if ends_upload is not None:
                connection.execute(_END, {"ended": ends_upload})

        self._write(write)
        self._entries.extend(entries)
        return entries

    def begin_upload(self, row: UploadRow) -> None:
        """Remember an upload, so that it can be resumed after a restart."""

        def write(connection: Connection) -> None:
            connection.execute(_END, {"ended": row.upload_id})
            connection.execute(_BEGIN, row.__dict__)

        self._write(write)

    def end_upload(self, upload_id: str) -> None:
        """Forget an upload."""
        self._write(lambda connection: connection.execute(_END, {"ended": upload_id}))

    def uploads(self) -> list[UploadRow]:
        """Return the uploads under way."""
        return self._database.run(
            lambda connection: [UploadRow(**row) for row in connection.execute(select(_uploads)).mappings()]
        )

    def require_lease(self) -> None:
        """Raise `Deposed` unless this coordinator still leads: to be asked before something is deleted."""
        self._write(lambda connection: None)

    def _write(self, work: Callable[[Connection], object]) -> None:
        def fenced(connection: Connection) -> None:
            if self._lease is not None:
                self._lease.require(connection)
            work(connection)

        self._database.run(fenced)


class _Entries(Sequence[LedgerEntry]):
    """The events of a ledger. Checks them all once, and again those that are read again; raises `DigestMismatch`.

    `head` is the last one's hash.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._newest: deque[LedgerEntry] = deque(maxlen=BATCH)
        self._size, self.head = 0, GENESIS
        self._heads = [GENESIS]  # the hash before each batch
        while True:
            rows = self._rows(self._size, BATCH)
            self._take(row.hash for row in rows)
            if len(rows) < BATCH:
                break

    def extend(self, entries: Sequence[LedgerEntry]) -> None:
        """Take up what was appended."""
        self._newest.extend(entries)
        self._take([entry.hash for entry in entries])

    def _take(self, hashes: Iterable[str]) -> None:
        for self.head in hashes:
            self._size += 1
            if self._size % BATCH == 0:
                self._heads.append(self.head)

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> LedgerEntry: ...
    @overload
    def __getitem__(self, index: slice) -> list[LedgerEntry]: ...
    def __getitem__(self, index: int | slice) -> LedgerEntry | list[LedgerEntry]:
        numbers = range(self._size)[index]
        if isinstance(numbers, int):
            return self._read(numbers, numbers + 1)[0]
        found = self._read(min(numbers), max(numbers) + 1) if numbers else []
        return found[:: numbers.step]

    def __iter__(self) -> Iterator[LedgerEntry]:
        begin = 0
        while begin < self._size:
            entries = self._read(begin, min(begin + BATCH, self._size))
            yield from entries
            begin += len(entries)

    def __reversed__(self) -> Iterator[LedgerEntry]:
        for batch in reversed(range(0, self._size, BATCH)):
            yield from reversed(self._read(batch, min(batch + BATCH, self._size)))

    def _read(self, begin: int, end: int) -> list[LedgerEntry]:
        newest = list(self._newest)
        if newest and newest[0].number <= begin:
            return newest[begin - newest[0].number : end - newest[0].number]
        found: list[LedgerEntry] = []
        for batch in range(begin - begin % BATCH, end, BATCH):
            rows = self._rows(batch, min(end - batch, BATCH))
            found += [self._entry(row) for row in rows if row.number >= begin]
        return found

    def _rows(self, begin: int, num: int) -> Sequence[Row[Any]]:
        """Return so many rows from the beginning of a batch on."""
        rows = self._database.run(lambda connection: connection.execute(_SELECT.limit(num), {"begin": begin}).all())
        head = self._heads[begin // BATCH]
        for expected, row in enumerate(rows, start=begin):
            # SQLite columns hold whatever type was written, so an altered row may hold anything.
            well_formed = row.number == expected and isinstance(row.at_s, float) and isinstance(row.body, bytes)
            head = chain_hash(head, expected, row.at_s, row.body) if well_formed else ""
            if row.hash != head:
                raise self._altered(expected)
        if begin + len(rows) < min(begin + num, self._size):
            raise self._altered(begin + len(rows))
        return rows

    def _altered(self, number: int) -> DigestMismatch:
        problem = f"event {number} does not continue the hash chain; the ledger was altered"
        return DigestMismatch(f"{self._database.name}: {problem}", hint=RESTORE)

    def _entry(self, row: Row[Any]) -> LedgerEntry:
        try:
            return LedgerEntry(row.number, row.at_s, from_json(row.body), row.hash)
        except ValidationError as err:
            raise DigestMismatch(f"{self._database.name}: event {row.number} is not one this version knows") from err


def _hash_of(connection: Connection, number: int) -> str | None:
    return connection.execute(select(_events.c.hash).where(_events.c.number == number)).scalar()
