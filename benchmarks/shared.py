"""What the benchmarks share: where the data is, goals, tables, and results that are kept between runs."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

NO_DATA = """\
FEDMERGE_DATA is not set. It names a folder with the data sets of this benchmark, gzipped JSON Lines:
{wanted}
They are other people's data and not part of this repository; benchmarks/README.md says where each comes from."""


def data_files(*names: str) -> list[Path]:
    """Return the files called `names` in the folder that FEDMERGE_DATA names, or say what is missing and exit."""
    folder = os.environ.get("FEDMERGE_DATA")
    if not folder:
        sys.exit(NO_DATA.format(wanted="\n".join(f"    {name}" for name in names)))
    paths = [Path(folder) / name for name in names]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        sys.exit(f"FEDMERGE_DATA={folder} lacks {', '.join(missing)}; see benchmarks/README.md")
    return paths


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a gzipped JSON Lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class Kept:
    """Results by what was asked for, in a folder, so that a benchmark that is run again has them already."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, asked: dict[str, Any]) -> bool:
        """Whether the same was asked before."""
        return self._path(asked).exists()

    def _path(self, asked: dict[str, Any]) -> Path:
        return self.folder / f"{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]}.json"

    def get(self, asked: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what `work` returned when the same was asked before, or let it work now."""
        path = self._path(asked)
        if not path.exists():
            found = work()
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps({"asked": asked, "found": found}, indent=1))
            partial.replace(path)
        result: dict[str, Any] = json.loads(path.read_text())["found"]
        return result


def at_most(goal: float, name: str, value: float) -> dict[str, Any]:
    return {"name": name, "value": round(value, 4), "goal": goal, "holds": value <= goal}


def at_least(goal: float, name: str, value: float) -> dict[str, Any]:
    return {"name": name, "value": round(value, 4), "goal": goal, "holds": value >= goal}


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns, the first to the left and the others to the right."""
    lines = [list(headings), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    for line in lines:
        print(
            f"{line[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        )


def report(targets: Sequence[dict[str, Any]], figures: dict[str, Any], file: Path | None) -> None:
    """Print whether each goal is reached, and write that and all figures to `file` as JSON."""
    print()
    for one in targets:
        print(f"{'met   ' if one['holds'] else 'MISSED'}  {one['name']}: {one['value']:g} (goal {one['goal']:g})")
    if file:
        file.write_text(json.dumps({"targets": list(targets), **figures}, indent=2) + "\n")
