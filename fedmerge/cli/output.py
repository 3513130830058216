"""What commands print: results on stdout, everything for people's eyes on stderr, and logs there too.

Results are text, or with `--json` one JSON object. Logs are text on a terminal and one JSON object per line elsewhere.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedmerge.errors import ConfigError

LOG_LEVEL_VARIABLE = "FEDMERGE_LOG_LEVEL"
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
PACKAGES = ("fedmerge", "fedmerge_server", "fedmerge_client")

JsonFlag: TypeAlias = Annotated[bool, Parameter(name="--json", help="Print one JSON object on stdout instead of text.")]

# Lines are left whole: a terminal wraps them itself, and whatever reads a pipe wants them as they are.
stderr = Console(stderr=True, highlight=False, soft_wrap=True)
stdout = Console(highlight=False, soft_wrap=True)


def print_json(value: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=indent, allow_nan=False) + "\n")


def print_table(table: Table) -> None:
    """Print a table on stdout, as wide as it has to be: no cell is cut or broken for a narrow terminal."""
    widest = stdout.options.update(max_width=10_000)
    table.width = stdout.measure(table, options=widest).maximum
    stdout.print(table)


def print_problem(label: str, message: str, *, style: str) -> None:
    """Print `message` on stderr, each of its lines behind `label`, which alone is coloured."""
    for line in message.splitlines():
        stderr.print(Text.assemble((f"{label}: ", style), printable(line)))


def printable(text: str) -> str:
    """Return `text` without control characters: those of a file or a peer must not reach the terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def format_bytes(num_bytes: float) -> str:
    """Return a size for people, in powers of 1000: `999 B`, `1.2 MB`, `24 MB`, `3.1 GB`."""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while round(value, 1 if value < 10 else 0) >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}" if value < 9.95 and units[0] != "B" else f"{value:.0f} {units[0]}"


def parse_bytes(option: str, text: str) -> int:
    """Return the bytes that a size such as `500MB`, `5GB` or `2GiB` says; raise `ConfigError` for anything else."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?) ?([kKMGT]?)(i?)B?", text)
    num_bytes = 0
    if match:
        number, prefix, binary = match.groups()
        num_bytes = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))
    if num_bytes == 0:
        raise ConfigError(f"{option} {text:.60}: expected a size such as 500MB or 5GB")
    return num_bytes


def format_ratio(ratio: float) -> str:
    """Return how many times smaller something became: `4.1x`, `38x`."""
    return f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x"


def configure_logging(environ: Mapping[str, str] = os.environ) -> None:
    """Send this package's logs to stderr at the level of `FEDMERGE_LOG_LEVEL` (INFO by default).

    gRPC's own log and other packages' progress bars are off, unless the environment asks for them. Raises `ConfigError`
    when the level is not one of `LOG_LEVELS`.
    """
    level = environ.get(LOG_LEVEL_VARIABLE, "INFO").upper()
    if level not in LOG_LEVELS:
        raise ConfigError(f"{LOG_LEVEL_VARIABLE}: should be one of {', '.join(LOG_LEVELS)}, not {level!r}")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(text if sys.stderr.isatty() else JsonFormatter())
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, logger, message, and whatever was passed as `extra`."""

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03d"
    _standard = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        fields = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        # Libraries that mark every record for themselves, as Ray does, do so under a name of this kind.
        private = {name for name in vars(record) if name.startswith("_")}
        fields |= {name: value for name, value in vars(record).items() if name not in self._standard | private}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)
