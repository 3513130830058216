"""A YAML file that knows on which line each of its values stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedmerge.errors import ConfigError, MissingExtra

MAX_FILE_BYTES = 1 << 20


class YamlFile:
    """The parsed file `path`: `data` is what it holds. Nothing in it is executed.

    Raises `ConfigError` when it can't be read or is not YAML, `MissingExtra` without PyYAML.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            import yaml  # type: ignore[import-untyped]
        except ModuleNotFoundError as err:
            raise MissingExtra("the package yaml is not installed", hint="pip install pyyaml") from err
        try:
            with path.open("rb") as file:
                text = file.read(MAX_FILE_BYTES + 1)
        except OSError as err:
            raise ConfigError(f"{path}: can't be read ({err.strerror})") from err
        if len(text) > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: too large to be a merge configuration")
        try:
            loader = yaml.SafeLoader(text)
            self._root: Any = loader.get_single_node()
            self.data: Any = None if self._root is None else loader.construct_document(self._root)
        except yaml.MarkedYAMLError as err:
            line = f":{err.problem_mark.line + 1}" if err.problem_mark else ""
            raise ConfigError(f"{path}{line}: not YAML ({err.problem})") from err
        except (yaml.YAMLError, ValueError, RecursionError) as err:
            raise ConfigError(f"{path}: not YAML ({type(err).__name__})") from err

    def error(self, place: tuple[str | int, ...], problem: str, *, hint: str | None = None) -> ConfigError:
        """Return the error that says what is wrong at `place` (keys and list indices), with file and line."""
        dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
        return ConfigError(f"{self.path}:{self._line(place)}: {dotted + ': ' if dotted else ''}{problem}", hint=hint)

    def _line(self, place: tuple[str | int, ...]) -> int:
        """Return the line, from 1, of the value at `place`, or of the nearest around it."""
        node = self._root
        line = node.start_mark.line if node is not None else 0
        for part in place:
            found = None
            if isinstance(part, int) and node.id == "sequence" and part < len(node.value):
                found = node.value[part]
                line = found.start_mark.line
            elif node.id == "mapping":
                for key, value in node.value:
                    if key.value == part:
                        found, line = value, key.start_mark.line
            if found is None:
                break
            node = found
        return int(line) + 1
