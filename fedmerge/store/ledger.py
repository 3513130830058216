"""The ledger: an append-only, hash-chained list of events in SQLite, through SQLAlchemy Core.

WAL with synchronous=FULL: a committed event survives a power cut. The chain makes a changed, dropped or reordered event
visible at the next start. Uploads under way are kept beside it, because an interrupted one must survive a restart, but
they are not facts and not part of the chain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy import (
    Column,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    event,
    insert,
    select,
)
from sqlalchemy.exc import DatabaseError, DBAPIError

from fedmerge.errors import DigestMismatch, ResourceError, reporting_os_errors
from fedmerge.events import Event, from_json, to_json

_metadata = MetaData()

_events = Table(
    "events",
    _metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at_s", Float, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("hash", String(64), nullable=False),
)

_uploads = Table(
    "uploads",
    _metadata,
    Column("upload_id", String(64), primary_key=True),
    Column("round", Integer, nullable=False),
    Column("node_id", String(64), nullable=False),
    Column("envelope", LargeBinary, nullable=False),
    Column("leaf_hashes", LargeBinary, nullable=False),
)

RESTORE = "restore the folder from a backup; do not start a coordinator on it"

GENESIS = hashlib.sha256(b"fedmerge.ledger.v1").hexdigest()


@dataclass(frozen=True)
class LedgerEntry:
    """An event in its place: `number` from 0, `at_s` the wall clock when written, `hash` the chain after it."""

    number: int
    at_s: float
    event: Event
    hash: str


@dataclass(frozen=True)
class UploadRow:
    """An upload begun and not yet committed: what the node signed, and the payload's leaf hashes, concatenated."""

    upload_id: str
    round: int
    node_id: str
    envelope: bytes
    leaf_hashes: bytes


class Ledger:
    """Appends and replays events. One process writes; the caller serialises the writes."""

    def __init__(self, path: Path) -> None:
        """Open or create the ledger; raise `ResourceError` when it can't be, `DigestMismatch` when it was altered."""
        with reporting_os_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._engine = create_engine(f"sqlite:///{path}", connect_args={"check_same_thread": False})
        event.listen(self._engine, "connect", _set_pragmas)
        with self._reported():
            _metadata.create_all(self._engine)
        self._entries = list(self._replay())

    def close(self) -> None:
        """Close the database."""
        self._engine.dispose()

    @property
    def head(self) -> str:
        """The hash of the last event, which stands for the whole history."""
        return self._entries[-1].hash if self._entries else GENESIS

    @property
    def entries(self) -> list[LedgerEntry]:
        """All events, in order."""
        return self._entries

    def append(self, fact: Event, *, at_s: float, ends_upload: str | None = None) -> LedgerEntry:
        """Commit an event durably, and in the same transaction forget the upload that it ends."""
        body = to_json(fact)
        number = len(self._entries)
        entry = LedgerEntry(number, at_s, fact, _chain(self.head, number, at_s, body))
        with self._reported(), self._engine.begin() as connection:
            connection.execute(insert(_events).values(number=number, at_s=at_s, body=body, hash=entry.hash))
            if ends_upload is not None:
                connection.execute(delete(_uploads).where(_uploads.c.upload_id == ends_upload))
        self._entries.append(entry)
        return entry

    def begin_upload(self, row: UploadRow) -> None:
        """Remember an upload, so that it can be resumed after a restart."""
        with self._reported(), self._engine.begin() as connection:
            connection.execute(insert(_uploads).values(**row.__dict__))

    def end_upload(self, upload_id: str) -> None:
        """Forget an upload."""
        with self._reported(), self._engine.begin() as connection:
            connection.execute(delete(_uploads).where(_uploads.c.upload_id == upload_id))

    def uploads(self) -> list[UploadRow]:
        """Return the uploads under way."""
        with self._reported(), self._engine.connect() as connection:
            return [UploadRow(**row) for row in connection.execute(select(_uploads)).mappings()]

    def _replay(self) -> Iterator[LedgerEntry]:
        head = GENESIS
        with self._reported(), self._engine.connect() as connection:
            rows = connection.execute(select(_events).order_by(_events.c.number)).all()
        for expected, row in enumerate(rows):
            # SQLite columns hold whatever type was written, so an altered row may hold anything.
            well_formed = row.number == expected and isinstance(row.at_s, float) and isinstance(row.body, bytes)
            head = _chain(head, expected, row.at_s, row.body) if well_formed else ""
            if row.hash != head:
                raise DigestMismatch(
                    f"{self._path}: event {expected} does not continue the hash chain; the ledger was altered",
                    hint=RESTORE,
                )
            try:
                fact = from_json(row.body)
            except ValidationError as err:
                raise DigestMismatch(f"{self._path}: event {expected} is not one this version knows") from err
            yield LedgerEntry(row.number, row.at_s, fact, row.hash)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as err:
            # What SQLite calls a damaged file; anything else has a class of its own.
            hint = RESTORE if type(err) is DatabaseError else "is the disk full, or the file in use?"
            raise ResourceError(f"{self._path}: {err.orig}", hint=hint) from err


def _chain(head: str, number: int, at_s: float, body: bytes) -> str:
    digest = hashlib.sha256(bytes.fromhex(head))
    digest.update(number.to_bytes(8, "big") + at_s.hex().encode() + b"\n" + body)
    return digest.hexdigest()


def _set_pragmas(connection: Any, _record: object) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
