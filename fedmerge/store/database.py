"""The database under the ledger: SQLite in a file, or PostgreSQL, behind the same tables.

A committed transaction survives a power cut: SQLite runs in WAL mode with synchronous=FULL, PostgreSQL with
synchronous_commit. Only a simulation does without (`durable=False`): then it survives the end of the process, no more.

The tables are brought up to date when the database is opened, one process at a time. While a PostgreSQL server is away,
work on it waits: nobody can know whether a transaction that was cut off took place, so it is tried again, and must be
such that doing it twice is doing it once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    inspect,
    make_url,
    text,
)
from sqlalchemy.exc import DatabaseError, DBAPIError, InterfaceError, OperationalError

from fedmerge.errors import ResourceError, reporting_os_errors

log = logging.getLogger(__name__)

Result = TypeVar("Result")

RESTORE = "restore the folder from a backup; do not start a coordinator on it"
RETRY_S = 0.5

# The newest script in migrations/versions; here as well, because to look there takes longer than to open the ledger.
REVISION = "0002"

metadata = MetaData()

events = Table(
    "events",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at_s", Float, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("hash", String(64), nullable=False),
)

uploads = Table(
    "uploads",
    metadata,
    Column("upload_id", String(64), primary_key=True),
    Column("round", Integer, nullable=False),
    Column("node_id", String(64), nullable=False),
    Column("envelope", LargeBinary, nullable=False),
    Column("leaf_hashes", LargeBinary, nullable=False),
)

# A single row: the newest fencing token, who was given it, and a number that grows whenever that one shows it is alive.
lease = Table(
    "lease",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("token", BigInteger, nullable=False),
    Column("beat", BigInteger, nullable=False),
    Column("holder", String(1000), nullable=False),
)


def sqlite_url(path: Path) -> str:
    """Return the URL of a SQLite database in a file."""
    return f"sqlite:///{path}"


class Database:
    """A database with the ledger's tables, opened by URL. Raises `ResourceError` when it can't be, or is too new.

    One that is not `durable` waits for no disk: a power cut may take its latest transactions, or all of it.
    """

    def __init__(self, url: str, *, durable: bool = True) -> None:
        parsed = make_url(url)
        self.name = parsed.database or "" if parsed.drivername == "sqlite" else parsed.render_as_string()
        self._is_server = parsed.drivername != "sqlite"
        self._closing = threading.Event()
        if not self._is_server:
            folder = Path(self.name).parent
            with reporting_os_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"pool_pre_ping": True} if self._is_server else {}
        self.engine = create_engine(parsed, connect_args=_connect_args(self._is_server), **options)
        event.listen(self.engine, "connect", _on_connect(self._is_server, durable))
        try:
            with self._reported():
                self._migrate()
        except BaseException:
            self.engine.dispose()
            raise

    def run(self, work: Callable[[Connection], Result]) -> Result:
        """Do `work` in a transaction that is committed when this returns. Waits for a server that is away.

        `work` may be done again after it took place. Raises `ResourceError` when it can't be done, or when the database
        is closed while it waits.
        """
        is_away = False
        while True:
            try:
                with self._reported(), self.engine.begin() as connection:
                    result = work(connection)
            except _Away as err:
                if not is_away:
                    log.warning("%s; waiting for it", err.message)
                is_away = True
                if self._closing.wait(RETRY_S):
                    raise
            else:
                if is_away:
                    log.info("%s: is back", self.name)
                return result

    def is_within(self, folder: Path) -> bool:
        """Whether this is a file in `folder`."""
        return not self._is_server and Path(self.name).resolve().is_relative_to(folder.resolve())

    def abandon(self) -> None:
        """End all waiting: whatever waits for the server now raises `ResourceError`."""
        self._closing.set()

    def close(self) -> None:
        """Close the database."""
        self._closing.set()
        self.engine.dispose()

    def _migrate(self) -> None:
        if _revision_of(self.engine.connect()) == REVISION:
            return
        from fedmerge.store.migrations import upgrade

        with self.engine.connect() as connection:
            # One at a time: whoever comes second finds nothing left to do.
            if self._is_server:
                connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('fedmerge.ledger'))"))
            else:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            upgrade(connection, self.name)
            connection.commit()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as err:
            first_line = str(err.orig).partition("\n")[0]
            message = f"{self.name}: {first_line}"
            if self._is_server:
                if _is_away(err):
                    raise _Away(message, hint="is the PostgreSQL server running, and the URL right?") from err
                raise ResourceError(message, hint="the PostgreSQL server's own log may say more") from err
            # What SQLite calls a damaged file; anything else has a class of its own.
            hint = RESTORE if type(err) is DatabaseError else "is the disk full, or the file in use?"
            raise ResourceError(message, hint=hint) from err


class _Away(ResourceError):
    """The server does not answer at present."""


def _is_away(err: DBAPIError) -> bool:
    """Whether a server can't be reached now: its error has no code, or one of 08 (connection) or 57P (shutdown)."""
    code = getattr(err.orig, "sqlstate", None) or "08"
    return isinstance(err, (OperationalError, InterfaceError)) and code.startswith(("08", "57P"))


def _revision_of(connection: Connection) -> str | None:
    """Return the revision that the database's tables have; None for an empty one, or one of before there were any."""
    with connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _connect_args(is_server: bool) -> dict[str, Any]:
    # A connection whose other end vanished without a word is given up after about half a minute.
    keepalives = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}
    return {"connect_timeout": 10, **keepalives} if is_server else {"check_same_thread": False}


def _on_connect(is_server: bool, durable: bool) -> Callable[[Any, object], None]:
    def set_up(connection: Any, _record: object) -> None:
        if is_server:
            connection.execute(f"SET synchronous_commit = {'on' if durable else 'off'}")
            connection.commit()
        else:
            for pragma in ("journal_mode=WAL", f"synchronous={'FULL' if durable else 'OFF'}", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}")

    return set_up
