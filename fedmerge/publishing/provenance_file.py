"""The provenance of a version, as it is published: each envelope a line of JSON, in the ledger's order, under zstd.

There is a frame for each merge, so a coordinator adds what is new and copies what it wrote before. Of members that
delivered or cosigned are the enrolments there, as soon as they did. The last frame has what came after the merge, and
each member's last cosignature; the next version has those that count then. The same ledger gives the same bytes,
however often it was begun.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import zstandard

from fedmerge.delta.container import MAX_WINDOW_BYTES
from fedmerge.errors import BadSignature, reporting_os_errors
from fedmerge.events import CheckpointCosigned, DeltaAccepted, MemberAdmitted, MemberRevoked, MergeFinished
from fedmerge.rounds.provenance import Signed, Signings
from fedmerge.store.entries import LedgerEntry, entries_from

PROVENANCE = "provenance.jsonl.zst"
_LEVEL = 3
# Statements come to about a tenth. What unpacks to far more was made to fill somebody's memory, or time.
MAX_RATIO = 256


class ProvenanceFile:
    """The provenance of the newest version, kept at `path` while a coordinator runs, and of no use afterwards."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin()

    def _begin(self) -> None:
        self._teller = _Teller()
        self._num_read = self._num_bytes = 0

    def write(self, entries: Sequence[LedgerEntry], merge_event: int, target: Path) -> None:
        """Write the provenance of what event `merge_event`, the newest merge, made. Raises `ResourceError`."""
        with reporting_os_errors(self._path):
            self._grow(entries, merge_event + 1)
        teller = self._teller.copy()
        after = [signed for entry in entries[merge_event + 1 :] for signed in teller.tell(entry)]
        with reporting_os_errors(target):
            shutil.copyfile(self._path, target)
            with target.open("ab") as file:
                _write_frame(file, [*after, *teller.cosignatures()])

    def _grow(self, entries: Sequence[LedgerEntry], end: int) -> None:
        self._path.touch()
        if self._path.stat().st_size < self._num_bytes:
            self._begin()  # somebody deleted it
        teller = self._teller.copy()
        found: list[Signed] = []
        with self._path.open("r+b") as file:
            # After what counts may be what was written when the disk was full.
            file.truncate(self._num_bytes)
            file.seek(self._num_bytes)
            for entry in entries_from(entries, self._num_read, end):
                found += teller.tell(entry)
                if isinstance(entry.event, MergeFinished):
                    _write_frame(file, found)
                    found = []
            num_bytes = file.tell()
        self._teller, self._num_read, self._num_bytes = teller, end, num_bytes


class _Teller:
    """Says what of a ledger's events goes into the file, and when."""

    def __init__(self) -> None:
        self._signings = Signings()
        self._waiting: dict[str, tuple[Signed, ...]] = {}
        self._named: set[str] = set()
        self._cosigned: dict[str, Signed] = {}

    def copy(self) -> _Teller:
        """Return one that goes on by itself."""
        other = _Teller()
        other._signings = copy.copy(self._signings)
        other._waiting, other._named, other._cosigned = dict(self._waiting), set(self._named), dict(self._cosigned)
        return other

    def tell(self, entry: LedgerEntry) -> list[Signed]:
        """Return what goes into the file with an event."""
        found = self._signings.of(entry)
        match entry.event:
            case DeltaAccepted(node_id=node_id):
                return [*self._name(node_id), *found]
            case CheckpointCosigned(node_id=node_id):
                self._cosigned[node_id] = found[0]
                return self._name(node_id)
            case MemberAdmitted(node_id=node_id) | MemberRevoked(node_id=node_id) if node_id not in self._named:
                self._waiting[node_id] = (*self._waiting.get(node_id, ()), *found)
                return []
            case _:
                return found

    def cosignatures(self) -> list[Signed]:
        """Return the last one of each member, in order."""
        return sorted(self._cosigned.values())

    def _name(self, node_id: str) -> list[Signed]:
        self._named.add(node_id)
        return list(self._waiting.pop(node_id, ()))


def _write_frame(file: BinaryIO, found: Iterable[Signed]) -> None:
    lines = "".join(json.dumps({"kind": each.kind, "envelope": each.envelope}) + "\n" for each in found)
    file.write(zstandard.ZstdCompressor(level=_LEVEL).compress(lines.encode()))


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a provenance file; raise `BadSignature` where it is none, and `OSError`."""
    left = MAX_RATIO * path.stat().st_size
    with path.open("rb") as file:
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        reader = decompressor.stream_reader(file, read_across_frames=True, closefd=False)
        try:
            with io.TextIOWrapper(reader, encoding="utf-8", newline="\n") as text:
                while line := text.readline(left + 1):
                    left -= len(line)
                    if left < 0:
                        raise BadSignature(f"{path}: unpacks to over {MAX_RATIO} times its size")
                    yield line
        except (zstandard.ZstdError, UnicodeDecodeError) as err:
            raise BadSignature(f"{path}: is not what fedmerge compressed") from err
