"""The passphrase of a key file: from a file, the environment, or whoever sits at the terminal."""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path

from fedmerge.errors import InputError, WrongPassphrase

PASSPHRASE = "FEDMERGE_PASSPHRASE"
PASSPHRASE_FILE = "FEDMERGE_PASSPHRASE_FILE"
MAX_BYTES = 1024
HOW_TO_GIVE = f"set {PASSPHRASE_FILE} to a file that holds it, or run this on a terminal"


def find_passphrase(key_path: Path, file: Path | None = None, *, is_new: bool = False) -> bytes:
    """Return the passphrase of the key file `key_path`.

    It is looked for in `file`, in the environment variables, and then asked for on the terminal, twice if it `is_new`.
    Raises `WrongPassphrase` when there is none to be had, or it is empty, and `InputError` for a file of no use.
    """
    variable_file = os.environ.get(PASSPHRASE_FILE)
    if file is None and PASSPHRASE in os.environ:
        found = os.environ[PASSPHRASE].encode()
    elif file is not None or variable_file:
        found = _first_line(file or Path(str(variable_file)))
    elif sys.stdin is not None and sys.stdin.isatty():
        found = _ask(key_path, is_new=is_new)
    else:
        raise WrongPassphrase(f"{key_path}: needs a passphrase", hint=HOW_TO_GIVE)
    if not found:
        raise WrongPassphrase(f"{key_path}: the passphrase is empty", hint=HOW_TO_GIVE)
    if len(found) > MAX_BYTES:
        raise WrongPassphrase(f"{key_path}: the passphrase is longer than {MAX_BYTES} bytes")
    return found


def _first_line(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.readline(MAX_BYTES + 2).rstrip(b"\r\n")
    except OSError as err:
        raise InputError(f"{path}: the passphrase can't be read ({err.strerror})") from err


def _ask(key_path: Path, *, is_new: bool) -> bytes:
    found = getpass.getpass(f"passphrase of {key_path}: ")
    if is_new and found != getpass.getpass("once more: "):
        raise WrongPassphrase("the two passphrases differ", hint="run it again")
    return found.encode()
