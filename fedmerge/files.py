"""Small files, written whole or not at all; and what makes files durable."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from fedmerge.errors import ResourceError, reporting_os_errors


def write_new(path: Path, data: bytes, *, if_exists: str, mode: int = 0o666, durable: bool = True) -> None:
    """Create the file `path`, and its folder, with the permissions `mode` from its first byte on.

    It is there whole, and if it is `durable` stays after a power cut, or it is not there. Raises `ResourceError` when
    it exists, with the hint `if_exists`, or can't be written.
    """
    partial = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        if path.exists():
            raise FileExistsError
        with contextlib.suppress(FileExistsError):  # a file in the folder's place: opening says so more clearly
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            _name(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
        for folder in (path.parent, *(made.parent for made in missing)) if durable else ():
            sync_directory(folder)
    except FileExistsError as err:
        raise ResourceError(f"{path}: already exists", hint=if_exists) from err
    except OSError as err:
        raise ResourceError(f"{path}: could not be written ({err.strerror})") from err


def _name(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)  # which does not replace what somebody else has just made
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        partial.rename(path)


def replace_file(path: Path, data: bytes, *, durable: bool = True, mode: int = 0o666) -> None:
    """Write the file `path`, and its folder, in place of the one that may be there; raise `ResourceError`.

    It has the permissions `mode` from its first byte on. Who reads it meanwhile, and if it is `durable` whoever comes
    after a power cut, finds the old file or the new one.
    """
    partial = path.with_name(f".{path.name}.partial")
    with reporting_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        partial.replace(path)


def sync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_tree(path: Path) -> None:
    """Make a file durable, or a folder with all that is in it."""
    if not path.is_dir():
        sync_file(path)
        return
    for inner in path.iterdir():
        sync_tree(inner)
    sync_directory(path)


def sync_directory(directory: Path) -> None:
    """Make renames in a folder durable, where the platform can."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
