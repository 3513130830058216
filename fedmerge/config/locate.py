"""Which line of a TOML text a key stands on: `tomllib` forgets, a person who made a mistake needs to know."""

from __future__ import annotations

import re
import tomllib
from typing import TypeAlias

KeyPath: TypeAlias = tuple[str | int, ...]

_KEY = r"""(?:"(?:\\.|[^"\\\n])*"|'[^'\n]*'|[A-Za-z0-9_-]+)"""
_DOTTED = rf"{_KEY}(?:[ \t]*\.[ \t]*{_KEY})*"
_STATEMENT = re.compile(
    rf"(?P<array>\[\[[ \t]*(?P<array_key>{_DOTTED})[ \t]*\]\])"
    rf"|(?P<table>\[[ \t]*(?P<table_key>{_DOTTED})[ \t]*\])"
    rf"|(?P<key>{_DOTTED})[ \t]*="
)
_VALUE_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|' + r"'''.*?'{3,5}|" + r'"(?:\\.|[^"\\\n])*"|' + r"'[^'\n]*'|#[^\n]*|.",
    re.DOTALL,
)


def key_lines(text: str) -> dict[KeyPath, int]:
    """Return the line, from 1, of every table and key of `text`, which must be valid TOML.

    Elements of an array of tables are numbered from 0: `("nodes", 1, "data")`. The keys of inline tables are not
    listed; `line_of` gives the line of the key that holds them.
    """
    lines: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}
    table: KeyPath = ()
    position = 0
    while position < len(text):
        match = _STATEMENT.match(text, position)
        if match is None:  # white space, a newline or a comment
            end = text.find("\n", position) if text[position] == "#" else position + 1
            position = len(text) if end < 0 else end
            continue
        line = text.count("\n", 0, position) + 1
        if match["key"]:
            path = table + _parts(match["key"])
            position = _skip_value(text, match.end())
        else:
            path = _inside_arrays(_parts(match["table_key"] or match["array_key"]), counts)
            if match["array"]:
                counts[path] = counts.get(path, -1) + 1
                lines.setdefault(path, line)
                path = (*path, counts[path])
            table = path
            position = match.end()
        for depth in range(1, len(path) + 1):  # a dotted key also opens the tables on its way
            lines.setdefault(path[:depth], line)
        if not match["key"]:
            lines[path] = line  # the header itself, not an earlier header below it
    return lines


def line_of(path: KeyPath, lines: dict[KeyPath, int]) -> int:
    """Return the line of `path`, or of the nearest table or key around it; 1 when there is none."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


def _parts(dotted: str) -> tuple[str, ...]:
    """Split a dotted key by letting tomllib read it, quotes and escapes included."""
    names: list[str] = []
    value: object = tomllib.loads(f"{dotted} = 0")
    while isinstance(value, dict):
        ((name, value),) = value.items()
        names.append(name)
    return tuple(names)


def _inside_arrays(names: tuple[str, ...], counts: dict[KeyPath, int]) -> KeyPath:
    """Return the path of a header: `[nodes.options]` speaks of the last element of `[[nodes]]`."""
    path: KeyPath = ()
    for i, name in enumerate(names):
        path = (*path, name)
        if path in counts and i + 1 < len(names):
            path = (*path, counts[path])
    return path


def _skip_value(text: str, position: int) -> int:
    """Return where the value that starts at `position` ends: at a newline outside strings and brackets."""
    depth = 0
    while match := _VALUE_TOKEN.match(text, position):
        token = match.group()
        if token == "\n" and depth == 0:
            break
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token, 0)
        position = match.end()
    return position
