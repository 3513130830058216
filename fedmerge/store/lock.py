"""One coordinator at a time: a lock on the state folder that ends with its process, however that ends."""

from __future__ import annotations

import os
from pathlib import Path

from fedmerge.errors import ResourceError, reporting_os_errors


class FolderLock:
    """Holds `directory`, made if there is none, until it is released. Raises `ResourceError` when another holds it."""

    def __init__(self, directory: Path) -> None:
        with reporting_os_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._file = (directory / "lock").open("ab")
            if os.name != "posix":
                return
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as err:
                self._file.close()
                raise ResourceError(
                    f"{directory}: another coordinator is running on this folder",
                    hint="stop it first, or choose another federation.state",
                ) from err

    def release(self) -> None:
        """Let another have the folder."""
        self._file.close()
