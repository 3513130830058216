"""What a program outside of fedmerge leaves: a directory with a model or a LoRA adapter, and perhaps figures."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from fedmerge.errors import InputError, reporting_os_errors

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def holds_model(directory: Path) -> bool:
    """Return whether `directory` holds weights that a node can read, of a model or of an adapter."""
    return any((directory / name).is_file() for name in WEIGHTS)


def require_model(directory: Path, *, where: str) -> None:
    """Raise `InputError` unless `directory` holds weights."""
    if not holds_model(directory):
        raise InputError(
            f"{where}: {directory} holds no model"
            if directory.is_dir()
            else f"{where}: {directory}: no such directory",
            hint=f"one of {', '.join(WEIGHTS)} has to be there; save with save_pretrained(safe_serialization=True)",
        )


def find_model(directory: Path, *, where: str) -> Path:
    """Return `directory` if it holds weights, or else its `checkpoint-N` with the highest N, as Trainers leave them.

    Raises `InputError` when neither does.
    """
    numbered = [
        (int(found[1]), path)
        for path in directory.iterdir()
        if (found := re.fullmatch(r"checkpoint-(\d{1,9})", path.name)) and holds_model(path)
    ]
    if not holds_model(directory) and numbered:
        return max(numbered)[1]
    require_model(directory, where=where)
    return directory


def link_directory(source: Path, target: Path) -> Path:
    """Make `target` a directory of links to the files of `source`, so that the node may delete it; return it."""
    with reporting_os_errors(target):
        target.mkdir(exist_ok=True)
        for path in source.iterdir():
            link = target / path.name
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
    return target


def read_figures(text: str, *, where: str) -> dict[str, float]:
    """Return the numbers of a JSON object; raise `InputError` for anything else, or a number that is not finite."""
    try:
        figures = json.loads(text)
    except ValueError as err:
        raise InputError(f"{where}: not JSON ({err})", hint='expected an object of numbers: {"accuracy": 0.9}') from err
    if not isinstance(figures, dict):
        raise InputError(f"{where}: not a JSON object", hint='expected an object of numbers: {"accuracy": 0.9}')
    for name, value in figures.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{where}: {name} is {value!r:.50}, not a finite number")
    return {str(name): float(value) for name, value in figures.items()}
