"""Texts, with labels or without, and conversations, from JSON Lines, CSV, Parquet or plain files.

Errors name the file and the line, in Parquet the row.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

from fedmerge.errors import InputError, MissingExtra, did_you_mean

ROLES = ("system", "user", "assistant")

Record: TypeAlias = tuple[int, dict[str, Any]]
Message: TypeAlias = dict[str, str]
# Yields a file's records with the line that each stands on.
Reader: TypeAlias = Callable[[Path], Iterator[Record]]


@dataclass(frozen=True, slots=True)
class Row:
    """One example: its `text`, its `label` as written, and the 1-based `line` it stands on."""

    text: str
    label: str
    line: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was said, each message with its `role` and `content`, and the 1-based `line` it stands on."""

    messages: list[Message]
    line: int


def read_rows(path: Path, *, text_column: str = "text", label_column: str = "label") -> list[Row]:
    """Return the rows of `path`: `.jsonl`, `.json`, `.ndjson` (object per line), `.csv` (with a header) or `.parquet`.

    All but the last may be gzipped (`.gz` added). Numbers and booleans in the label column become their JSON text.
    Raises `InputError` with file and line for a missing file, a line that can't be parsed, a missing column or no rows,
    and `MissingExtra` where pyarrow is missing, for Parquet.
    """
    return [
        Row(_column(path, line, record, text_column), _column(path, line, record, label_column), line)
        for line, record in _records(path, TABLES)
    ]


def read_texts(path: Path, *, text_column: str = "text") -> list[str]:
    """Return the documents of `path`: a text column of what `read_rows` takes, or a `.txt` file, which is one document.

    Raises `InputError` as `read_rows` does.
    """

    def whole(path: Path) -> Iterator[Record]:
        with _open_text(path) as file:
            yield 1, {text_column: file.read()}

    readers: dict[str, Reader] = TABLES | {".txt": whole}
    return [_column(path, line, record, text_column) for line, record in _records(path, readers)]


def read_conversations(path: Path, *, messages_column: str = "messages") -> list[Conversation]:
    """Return the conversations of `path`: a column of what `read_rows` takes with a list of messages in each row.

    A message is an object with a `role`, "system", "user" or "assistant", and its `content`, both texts. A conversation
    has an assistant's message that is not its first. Raises `InputError` as `read_rows` does.
    """
    return [
        Conversation(_messages(path, line, record, messages_column), line) for line, record in _records(path, TABLES)
    ]


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
        for record in reader(path):
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


def _json_lines(path: Path) -> Iterator[Record]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as err:
                raise InputError(f"{path}:{number}: not JSON ({err})", hint="one JSON object per line") from err
            if not isinstance(record, dict):
                hint = 'for example {"text": "...", "label": "..."}'
                raise InputError(f"{path}:{number}: not a JSON object", hint=hint)
            yield number, record


def _csv(path: Path) -> Iterator[Record]:
    with _open_text(path) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for record in reader:
                if None in record:
                    raise InputError(f"{path}:{reader.line_num}: more fields than the header has columns")
                yield reader.line_num, record
        except csv.Error as err:
            raise InputError(f"{path}:{reader.reader.line_num}: not CSV ({err})") from err


def _parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as err:
        raise MissingExtra(f"{path}: reading Parquet needs pyarrow", hint='pip install "fedmerge[parquet]"') from err
    number = 0
    try:
        with path.open("rb") as opened, ParquetFile(opened) as file:
            for batch in file.iter_batches():
                for number, record in enumerate(batch.to_pylist(), start=number + 1):  # noqa: B020 - goes on counting
                    yield number, record
    except ArrowException as err:
        raise InputError(f"{path}: can't be read as Parquet ({err})") from err


TABLES: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}


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


def _messages(path: Path, line: int, record: dict[str, Any], name: str) -> list[Message]:
    where, example = f"{path}:{line}", '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}'
    messages = record.get(name)
    if name not in record:
        raise InputError(
            f"{where}: no column {name!r}; there are {', '.join(map(repr, record)) or 'none'}", hint=example
        )
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: column {name!r} is not a list of messages", hint=example)
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError(f"{where}: message {number} has no role and content that are texts", hint=example)
        if message["role"] not in ROLES:
            raise InputError(
                f"{where}: message {number} is of role {message['role']!r}", hint=f"one of {', '.join(ROLES)}"
            )
    roles = [message["role"] for message in messages]
    if roles[0] == "assistant" or "assistant" not in roles:
        raise InputError(f"{where}: needs a reply of the assistant, behind another message", hint=example)
    return [{key: message[key] for key in ("role", "content")} for message in messages]
