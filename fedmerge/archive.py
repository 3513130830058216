"""A folder of files as one file: tar, with no time, owner or order of its own, so that equal contents are equal bytes.

Reading trusts nothing: a member's header must be, byte for byte, the one that writing it would give, its name one of
plain parts, its size within the file. There are no links, devices, permissions or sparse files to be careful with.
"""

from __future__ import annotations

import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from fedmerge.errors import InputError, VerificationError, reporting_os_errors

BLOCK_BYTES = 512
COPY_BYTES = 1 << 20
PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
NAME = re.compile(rf"{PART}(/{PART}){{0,3}}")
MAX_NAME = 99  # as many bytes as a plain tar header has room for


def write_tar(files: Mapping[str, Path | bytes], target: Path) -> None:
    """Write `files`, contents or where they are by name, sorted by name. Raises `ResourceError`."""
    with reporting_os_errors(target), target.open("wb") as out:
        for name, content in sorted(files.items()):
            num_bytes = len(content) if isinstance(content, bytes) else content.stat().st_size
            out.write(_header(name, num_bytes))
            if isinstance(content, bytes):
                out.write(content)
            else:
                with content.open("rb") as file:
                    shutil.copyfileobj(file, out, COPY_BYTES)
            out.write(bytes(-num_bytes % BLOCK_BYTES))
        out.write(bytes(2 * BLOCK_BYTES))


def write_folder(files: Mapping[str, Path | bytes], target: Path) -> None:
    """Write `files` below the folder `target`. Raises `ResourceError`."""
    with reporting_os_errors(target):
        for name, content in sorted(files.items()):
            path = target / _safe(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                shutil.copyfile(content, path)


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """Give the folder that `path` is, or one that it is unpacked to. Raises `VerificationError` or `InputError`."""
    if path.is_dir():
        yield path
        return
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    with TemporaryDirectory(prefix="fedmerge-archive-") as scratch, reporting_os_errors(path):
        unpack(path, Path(scratch))
        yield Path(scratch)


def unpack(path: Path, target: Path) -> None:
    """Write an archive's files below `target`: never more bytes than it has itself. Raises `VerificationError`."""
    with path.open("rb") as file:
        left, last = path.stat().st_size, ""
        while left >= BLOCK_BYTES:
            header = file.read(BLOCK_BYTES)
            left -= BLOCK_BYTES
            if header == bytes(BLOCK_BYTES):
                if file.read() != bytes(BLOCK_BYTES):
                    raise VerificationError(f"{path}: has something after its last file, or does not end as it should")
                return
            name, num_bytes = _parse(header, where=path)
            padded = num_bytes + -num_bytes % BLOCK_BYTES
            if name <= last or padded > left:
                raise VerificationError(f"{path}: {name} is out of order, there twice, or longer than the archive")
            left, last = left - padded, name
            place = target / name
            if any(parent.is_file() for parent in place.parents) or place.exists():
                raise VerificationError(f"{path}: {name} is both a file and a folder")
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("xb") as out:
                _copy(file, out, num_bytes)
            if file.read(padded - num_bytes) != bytes(padded - num_bytes):
                raise VerificationError(f"{path}: there is something in the gap after {name}")
    raise VerificationError(f"{path}: ends in the middle")


def _parse(header: bytes, *, where: Path) -> tuple[str, int]:
    """Return a member's name and size; raise `VerificationError` unless its header is as `_header` writes it."""
    problem = VerificationError(f"{where}: not an archive as fedmerge writes them: no plain file")
    try:
        name = header[:100].rstrip(b"\0").decode("ascii")
        num_bytes = tarfile.TarInfo.frombuf(header, "ascii", "strict").size
        if num_bytes < 0 or _header(name, num_bytes) != header:
            raise problem
    except (ValueError, tarfile.HeaderError) as err:
        raise problem from err
    return name, num_bytes


def _header(name: str, num_bytes: int) -> bytes:
    member = tarfile.TarInfo(_safe(name))
    member.size, member.mode = num_bytes, 0o644
    return member.tobuf(tarfile.GNU_FORMAT, "ascii", "strict")


def _safe(name: str) -> str:
    if len(name) > MAX_NAME or not NAME.fullmatch(name):
        raise VerificationError(f"{name!r:.120} is not a name that a file in an archive may have")
    return name


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int) -> None:
    while num_bytes:
        data = source.read(min(COPY_BYTES, num_bytes))
        if not data:
            return
        target.write(data)
        num_bytes -= len(data)
