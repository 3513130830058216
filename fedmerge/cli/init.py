"""`fedmerge init` and `fedmerge schema`: the configuration file, written from the classes that read it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fedmerge.cli.output import print_json, stderr
from fedmerge.config import Config, Section, SimulatedNode, json_schema
from fedmerge.files import write_new

FILE_NAME = "fedmerge.toml"
HEADER = """\
# Configuration of a fedmerge federation. Relative paths start from this file's folder.
# Environment variables FEDMERGE_<SECTION>__<KEY> override what stands here.
# For completion in an editor, run: fedmerge schema > fedmerge.schema.json, and uncomment this line:
# #:schema ./fedmerge.schema.json
"""


def init(
    directory: Annotated[Path, Parameter(name="DIR", help="Folder to write it in; made if there is none.")] = Path(), /
) -> None:
    """Write a commented fedmerge.toml: every key, its default, and what it does."""
    path, text = directory / FILE_NAME, template()
    write_new(path, text.encode(), if_exists="edit it, or give another folder: fedmerge init DIR")
    stderr.print(f"wrote {path}; set model.base in it, then run: fedmerge doctor {path}", markup=False)


def schema() -> None:
    """Print the JSON schema of fedmerge.toml, for editors."""
    print_json(json_schema(), indent=2)


def template() -> str:
    """Return the text of a fedmerge.toml that sets every key to its default, with its documentation above it."""
    blocks = [HEADER]
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            blocks.append("\n".join(_table(f"[{name}]", field.annotation)) + "\n")
        else:  # the array of simulated nodes, which is for `fedmerge simulate` alone
            lines = _table(f"[[{name}]]", SimulatedNode)
            blocks.append("\n".join(f"# {line}" if line else "#" for line in lines) + "\n")
    return "\n".join(blocks)


def _table(header: str, section: type[Section]) -> Iterator[str]:
    yield from _comment(section.__doc__ or "")
    yield header
    for key, field in section.model_fields.items():
        yield ""
        yield from _comment(field.description or "")
        # An example stands for what has no default, and for a default that is written in a friendlier way.
        default = field.get_default(call_default_factory=True, validated_data={})
        example = field.examples[0] if field.examples else default
        optional = not field.is_required() and default in (None, ())
        yield f"{'# ' if optional else ''}{key} = {toml_value(example)}"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width=100, initial_indent="# ", subsequent_indent="# ")


def toml_value(value: object) -> str:
    """Return a value in TOML's notation, which is JSON's but for tables."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {toml_value(item)}' for key, item in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    return json.dumps(value, ensure_ascii=False, default=str)
