"""A coordinator's seat: its state folder, the ledger's database, and the lease that says who leads."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from fedmerge.errors import ResourceError
from fedmerge.lock import FolderLock
from fedmerge.store.database import Database
from fedmerge.store.lease import Lease
from fedmerge.store.ledger import Ledger

log = logging.getLogger(__name__)


class Seat:
    """Holds `state_dir` and opens the database at `url`, but leads only once `try_take` or `take` says so.

    `clock` is monotonic, in seconds, and `durable` as in `Database`. Raises `ResourceError` while another
    coordinator runs on the folder, or when the database can't be opened.
    """

    def __init__(
        self, state_dir: Path, url: str, *, lease_s: float, clock: Callable[[], float], durable: bool = True
    ) -> None:
        with ExitStack() as opened:
            lock = FolderLock(state_dir, who="coordinator", hint="stop it first, or choose another federation.state")
            opened.callback(lock.close)
            self.durable = durable
            self.database = Database(url, durable=durable)
            opened.callback(self.database.close)
            # One coordinator on this folder: it may take up its own lease again. A copy of the folder is another one.
            holder = f"{platform.node()}:{state_dir.resolve()} ({state_dir.stat().st_ino})"
            self.lease = Lease(self.database, holder, lease_s, clock)
            # Where the database lies in the folder, the folder's lock says all that the lease could; if it locks.
            self._is_private = os.name == "posix" and self.database.is_within(state_dir)
            self._opened = opened.pop_all()

    def try_take(self) -> bool:
        """Take the lead if it is free, and say whether it is held."""
        return self.lease.try_take(at_once=self._is_private)

    def take(self) -> None:
        """Take the lead; raise `ResourceError` when another has it."""
        if not self.try_take():
            raise ResourceError(
                f"{self.database.name}: another coordinator leads, {self.lease.leader}",
                hint="fedmerge serve stands by and takes over; anything else has to wait until that one ends",
            )

    def open_ledger(self) -> Ledger:
        """Replay the ledger; it can be appended to as long as this seat leads."""
        return Ledger(self.database, lease=None if self._is_private else self.lease)

    def close(self) -> None:
        """Leave the lead, if it is held, and the folder to others."""
        self.database.abandon()
        try:
            self.lease.release()
        except ResourceError as err:
            log.warning("%s; the lease was not given back, and ends by itself", err.message)
        self._opened.close()
