"""The lease on a ledger: of several coordinators on one database, the one that may write.

Every write carries the holder's fencing token, a number that grows with each hand-over, and is refused in its own
transaction when the token is an older one: a coordinator that was stopped or cut off for longer than the lease can do
no harm, whatever it believes. Time is measured by each side on its own monotonic clock: the lease is up for whoever has
seen no sign of life for long enough, and wall clocks that differ or jump do not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, select, update

from fedmerge.errors import Deposed
from fedmerge.store.database import Database
from fedmerge.store.database import lease as _lease

# Made once: it goes before every write.
_BEAT = update(_lease).where(_lease.c.token == bindparam("held")).values(beat=_lease.c.beat + 1)


class _Row(NamedTuple):
    token: int
    beat: int
    holder: str


class Lease:
    """A claim of `holder` to write, for `lease_s` at a time by `clock`, which is monotonic and in seconds.

    The holder should `renew` every third of `lease_s`, others `try_take` every sixth: then another has it at most
    `lease_s` after a holder fell silent.
    """

    def __init__(self, database: Database, holder: str, lease_s: float, clock: Callable[[], float]) -> None:
        self._database = database
        self._holder = holder
        self._lease_s = lease_s
        self._clock = clock
        self._token: int | None = None
        self._seen: _Row | None = None
        self._seen_s = 0.0

    @property
    def leader(self) -> str:
        """Who held the lease when it was last looked at; "" for nobody."""
        return self._seen.holder if self._seen is not None else ""

    def try_take(self, *, at_once: bool = False) -> bool:
        """Take the lease if it is free, and say whether this holder has it now.

        It is free when it was given back, was this holder's own before a restart, or has shown no sign of life for two
        thirds of `lease_s` while the database could be read; or when the caller knows of no other holder (`at_once`).
        """
        began_s = self._clock()
        row = self._database.run(_read)
        now_s = self._clock()
        # While the database was away no holder could renew either.
        if row != self._seen or now_s - began_s > self._lease_s / 6:
            self._seen, self._seen_s = row, now_s
        is_own = row.holder in ("", self._holder)
        if not (at_once or is_own or now_s - self._seen_s >= self._lease_s * 2 / 3):
            return False
        taken = _Row(row.token + 1, row.beat + 1, self._holder)

        def take(connection: Connection) -> bool:
            if _read(connection) == taken:
                return True  # the try before this one took place after all
            same = (_lease.c.token == row.token) & (_lease.c.beat == row.beat)
            return connection.execute(update(_lease).where(same).values(taken._asdict())).rowcount == 1

        if self._database.run(take):
            self._token, self._seen = taken.token, taken
        return self._token is not None

    def renew(self) -> None:
        """Show a sign of life. Raises `Deposed` when another has taken the lease."""
        self._database.run(self.require)

    def require(self, connection: Connection) -> None:
        """Make a transaction one of the holder's: raise `Deposed` in it unless the lease is still held."""
        if self._token is None or connection.execute(_BEAT, {"held": self._token}).rowcount != 1:
            raise Deposed(
                f"another coordinator, {_read(connection).holder or 'since gone'}, has taken this one's place",
                hint="nothing is lost; started again, this one stands by",
            )

    def release(self) -> None:
        """Give the lease back, so that another need not wait for it. What is written after this is refused."""
        if self._token is None:
            return
        mine = update(_lease).where(_lease.c.token == self._token)
        given_back = mine.values(token=_lease.c.token + 1, beat=_lease.c.beat + 1, holder="")
        self._token = None
        self._database.run(lambda connection: connection.execute(given_back))


def _read(connection: Connection) -> _Row:
    return _Row(*connection.execute(select(_lease.c.token, _lease.c.beat, _lease.c.holder)).one())
