"""One coordinator, or one node, at a time: a lock on its folder that ends with its process, however that ends."""

from __future__ import annotations

import os
import time
from pathlib import Path

from fedmerge.errors import ResourceError, reporting_os_errors

_POLL_S = 0.2


class FolderLock:
    """Holds `directory`, made if there is none, until it is closed.

    Raises `ResourceError`, which says `who` else runs there, with a `hint`, when another has held it for `patience_s`.
    """

    def __init__(self, directory: Path, *, who: str, hint: str, patience_s: float = 0.0) -> None:
        give_up_s = time.monotonic() + patience_s
        with reporting_os_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._file = (directory / "lock").open("ab")
            while not self._try_take():
                if time.monotonic() >= give_up_s:
                    self._file.close()
                    raise ResourceError(f"{directory}: another {who} is running on this folder", hint=hint)
                time.sleep(_POLL_S)

    def _try_take(self) -> bool:
        if os.name != "posix":
            return True
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Let another have the folder."""
        self._file.close()
