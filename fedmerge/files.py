"""Files that must not exist yet, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fedmerge.errors import ResourceError


def write_new(path: Path, data: bytes, *, if_exists: str, mode: int = 0o666) -> None:
    """Create the file `path`, and its folder, with the permissions `mode` from its first byte on.

    Raises `ResourceError` when it exists, with the hint `if_exists`, or can't be written; then nothing is left of it.
    """
    try:
        with contextlib.suppress(FileExistsError):  # a file in the folder's place: opening says so more clearly
            path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    except FileExistsError as err:
        raise ResourceError(f"{path}: already exists", hint=if_exists) from err
    except OSError as err:
        raise ResourceError(f"{path}: could not be written ({err.strerror})") from err
