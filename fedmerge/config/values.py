"""The kinds of values in fedmerge.toml: sizes, addresses, paths, names and labels, and what is wrong with one."""

from __future__ import annotations

import ipaddress
import math
import os
import re
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, TypeGuard

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, ValidationInfo, WithJsonSchema

SIZE_UNITS: dict[str, int] = {"B": 1} | {
    f"{prefix}{infix}B": base**power
    for infix, base in (("", 1000), ("I", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([A-Za-z]+)")
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?)\]|([^\s:\[\]]+)):([0-9]{1,5})")


def parse_size(value: object) -> int:
    """Return a number of bytes from an int or a text like `"2GiB"` or `"500 MB"`; raise `ValueError` otherwise."""
    num_bytes = value if isinstance(value, int) and not isinstance(value, bool) else 0
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        num_bytes = int(float(match[1]) * SIZE_UNITS.get(match[2].upper(), 0))
    if not 0 < num_bytes <= 1 << 50:
        raise ValueError('should be a number of bytes, or a text like "500MB" or "2GiB"')
    return num_bytes


def parse_address(value: object) -> tuple[str, int]:
    """Return host and port from `"127.0.0.1:8700"` or `"[::1]:8700"`; raise `ValueError` otherwise."""
    match = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if match is None or int(match[3]) > 65535:
        raise ValueError('should be "host:port", with IPv6 in brackets: "[::1]:8700"')
    return match[1] or match[2], int(match[3])


def num_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_private(host: str) -> bool:
    """Return whether `host` is an address of a private network; a name, or a loopback address, says nothing."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return address.is_private and not (address.is_loopback or address.is_unspecified)


def _resolve(value: object, info: ValidationInfo) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError("should be a path")
    folder: Path = info.context["folder"] if info.context else Path()
    try:
        return (folder / Path(value).expanduser()).resolve()
    except (RuntimeError, OSError) as err:  # no such user's home, or links in a circle
        raise ValueError(f"can't be resolved ({err})") from err


def _labels(value: object, info: ValidationInfo) -> tuple[str, ...] | Path | None:
    if isinstance(value, str):
        return _resolve(value, info)
    names = tuple(value) if isinstance(value, (list, tuple)) else ()
    if value is None or (len(names) > 1 and all(name and isinstance(name, str) for name in names)):
        if len(set(names)) < len(names):
            raise ValueError("names a label twice")
        return names or None
    raise ValueError("should be a list of two or more label names, or the path of a text file with one per line")


def _grace(value: object) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    if _is_number(value) and 0 <= value < math.inf:
        return float(value)
    raise ValueError('should be a number of seconds from 0 up, or "auto"')


def _sample(value: object) -> int | float | None:
    if value is None or (_is_number(value) and (0 < value < 1 or (isinstance(value, int) and value >= 1))):
        return value
    raise ValueError("should be a number of nodes from 1 up, or a share of them between 0 and 1")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _database_url(value: object, info: ValidationInfo) -> str | None:
    """Accept the databases that a ledger can be in; a SQLite file's relative path starts from the file's folder."""
    if value is None:
        return None
    text = value if isinstance(value, str) else ""
    scheme, _, rest = text.partition("://")
    if scheme == "sqlite" and rest.startswith("/") and rest != "/":
        return f"sqlite:///{_resolve(rest[1:], info)}"
    if scheme == "postgresql+psycopg" and rest:
        return text
    raise ValueError('should be "sqlite:///FILE" or "postgresql+psycopg://USER@HOST/DATABASE"')


def _blobs(value: object, info: ValidationInfo) -> Path | str | None:
    """Accept a folder, or an object store's bucket and prefix."""
    if isinstance(value, str) and "://" in value:
        if not re.fullmatch(r"s3://[A-Za-z0-9][A-Za-z0-9.-]*(/[A-Za-z0-9._/-]+)?", value):
            raise ValueError('should be a folder, or "s3://BUCKET/PREFIX"')
        return value.rstrip("/")
    return None if value is None else _resolve(value, info)


def _name(value: str) -> str:
    # These names become folders, file names and parts of statements.
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", value):
        raise ValueError("should be letters, digits, '-', '_' and '.', at most 100, not beginning with '.'")
    return value


def _address(value: str) -> str:
    parse_address(value)
    return value


Name: TypeAlias = Annotated[str, AfterValidator(_name)]
Address: TypeAlias = Annotated[str, AfterValidator(_address)]
FilePath: TypeAlias = Annotated[Path, BeforeValidator(_resolve), WithJsonSchema({"type": "string"})]
Size: TypeAlias = Annotated[
    int, BeforeValidator(parse_size), WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]})
]
DatabaseUrl: TypeAlias = Annotated[
    str | None,
    PlainValidator(_database_url),
    WithJsonSchema({"type": "string", "pattern": "^(sqlite|postgresql\\+psycopg)://"}),
]
BlobsUrl: TypeAlias = Annotated[Path | str | None, PlainValidator(_blobs), WithJsonSchema({"type": "string"})]
Labels: TypeAlias = Annotated[
    tuple[str, ...] | Path | None,
    PlainValidator(_labels),
    WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "string"}, "minItems": 2}, {"type": "string"}]}),
]
Grace: TypeAlias = Annotated[
    float | Literal["auto"],
    PlainValidator(_grace),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"const": "auto"}]}),
]
Sample: TypeAlias = Annotated[
    int | float | None,
    PlainValidator(_sample),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
            ]
        }
    ),
]
Positive: TypeAlias = Annotated[int, Field(ge=1)]
Range: TypeAlias = Annotated[tuple[float, float], Field(strict=False)]
ValueType: TypeAlias = Literal["fp32", "bf16", "fp16", "int8", "int4", "lloyd3", "lloyd2", "sign"]
