"""Reads and writes a provenance file with zstandard alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import zstandard


def read_provenance(path: Path) -> list[dict[str, str]]:
    """Return the entries of a provenance file: kind and envelope of each."""
    with path.open("rb") as file:
        text = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()
    return [json.loads(line) for line in text.decode().splitlines()]


def write_provenance(path: Path, entries: Iterable[dict[str, str]]) -> None:
    """Write such a file, in one frame."""
    path.write_bytes(zstandard.compress("".join(json.dumps(entry) + "\n" for entry in entries).encode()))
