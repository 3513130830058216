"""Texts, with labels or without, from JSON Lines, CSV or plain files, with errors that name the file and the line."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

from fedmerge.errors import InputError, did_you_mean

# Yields a file's records with the line that each stands on.
Reader: TypeAlias = Callable[[Path, IO[str]], Iterator[tuple[int, dict[str, Any]]]]


@dataclass(frozen=True, slots=True)
class Row:
    """One example: its `text`, its `label` as written, and the 1-based `line` it stands on."""

    text: str
    label: str
    line: int


def read_rows(path: Path, *, text_column: str = "text", label_column: str = "label") -> list[Row]:
    """Return the rows of `path`: `.jsonl`, `.json` or `.ndjson` (one object per line) or `.csv` (with a header line).

    Each may be gzipped (`.gz` added). Numbers and booleans in the label column become their JSON text. Raises
    `InputError` with file and line for a missing file, a line that can't be parsed, a missing column or no rows.
    """
    return [
        Row(_column(path, line, record, text_column), _column(path, line, record, label_column), line)
        for line, record in _records(path, TABLES)
    ]


def read_texts(path: Path, *, text_column: str = "text") -> list[str]:
    """Return the documents of `path`: a text column of what `read_rows` takes, or a `.txt` file, which is one document.

    Raises `InputError` as `read_rows` does.
    """
    readers: dict[str, Reader] = TABLES | {".txt": lambda path, file: iter([(1, {text_column: file.read()})])}
    return [_column(path, line, record, text_column) for line, record in _records(path, readers)]


def label_ids(path: Path, rows: Sequence[Row], label2id: Mapping[str, int]) -> list[int]:
    """Return the model's class index of each row. Raises `InputError` for the first label that the model lacks."""
    for row in rows:
        if row.label not in label2id:
            shown = sorted(label2id)[:12]
            more = f" and {len(label2id) - len(shown)} more" if len(label2id) > len(shown) else ""
            raise InputError(
                f"{path}:{row.line}: the model has no label {row.label!r}{did_you_mean(row.label, label2id)}",
                hint=f"its labels are {', '.join(shown)}{more}",
            )
    return [label2id[row.label] for row in rows]


def _records(path: Path, readers: Mapping[str, Reader]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and record of all that the reader for the file's suffix finds, which must be something."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    reader = readers.get(suffixes[-1] if suffixes else "")
    if reader is None:
        raise InputError(
            f"{path}: don't know how to read this file", hint=f"use one of {', '.join(readers)}, or one of these + .gz"
        )
    empty = True
    try:
        with _open_text(path) as file:
            for record in reader(path, file):
                empty = False
                yield record
    except FileNotFoundError as err:
        raise InputError(f"{path}: no such file") from err
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as err:
        raise InputError(f"{path}: can't be read as text ({err})") from err
    if empty:
        raise InputError(f"{path}: no rows")


def _open_text(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _json_lines(path: Path, file: IO[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise InputError(f"{path}:{number}: not JSON ({err})", hint="one JSON object per line") from err
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: not a JSON object", hint='for example {"text": "...", "label": "..."}')
        yield number, record


def _csv(path: Path, file: IO[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file, strict=True)
    try:
        for record in reader:
            if None in record:
                raise InputError(f"{path}:{reader.line_num}: more fields than the header has columns")
            yield reader.line_num, record
    except csv.Error as err:
        raise InputError(f"{path}:{reader.reader.line_num}: not CSV ({err})") from err


TABLES: dict[str, Reader] = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json_lines, ".csv": _csv}


def _column(path: Path, line: int, record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, bool | int):
        return json.dumps(value)
    if name not in record:
        raise InputError(
            f"{path}:{line}: no column {name!r}; there are {', '.join(map(repr, record)) or 'none'}",
            hint="say which columns to read: text_column = ... (and for labels label_column = ...)",
        )
    raise InputError(f"{path}:{line}: column {name!r} is empty or not text")
