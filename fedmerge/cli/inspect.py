"""`fedmerge inspect`: show what is in a delta file, a model directory, or a signed statement."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from fedmerge.cli.output import JsonFlag, format_bytes, print_json, printable, stdout
from fedmerge.errors import InputError, InvalidDelta


def inspect(
    path: Annotated[Path, Parameter(name="FILE", help="A delta file, a model directory, or signed statements.")],
    /,
    *,
    json: JsonFlag = False,
) -> None:
    """Show what a file says of itself. Nothing is verified here: use `fedmerge verify` for that."""
    if path.is_dir():
        found = _model(path)
    elif not path.is_file():
        raise InputError(f"{path}: no such file")
    elif path.suffix == ".json":
        found = _statement(path)
    elif path.suffix == ".jsonl":
        found = _provenance(path)
    else:
        found = _delta(path)
    with _reporting(f"{path}: can't be shown"):
        if json:
            print_json(found)
        else:
            _show(found)


def _delta(path: Path) -> dict[str, Any]:
    from fedmerge.frame import inspect_delta

    try:
        found = inspect_delta(path)
    except InvalidDelta as err:
        problem = err.message.removeprefix(f"{path.name}: ")
        raise InputError(
            f"{path}: no delta file, or a damaged one ({problem})", hint="of a model, give the directory"
        ) from err
    claims = found["claims"]
    rows = [{"name": name, **claim} for name, claim in claims.pop("tensors").items()]
    return {"kind": "delta (as it claims)", "file_bytes": found["file_bytes"], **claims, "tensors": rows}


def _model(path: Path) -> dict[str, Any]:
    from fedmerge.delta import delta_schema
    from fedmerge.tensors import Checkpoint, model_digest, schema_digest

    checkpoint = Checkpoint(path)
    schema = checkpoint.schema
    return {
        "kind": "model",
        "version": model_digest(checkpoint),
        "schema_digest": schema_digest(delta_schema(schema)),
        "num_parameters": sum(spec.num_elements for spec in schema.values() if spec.is_float),
        "tensors": [
            {"name": name, "shape": list(spec.shape), "dtype": spec.dtype} for name, spec in sorted(schema.items())
        ],
    }


def _statement(path: Path) -> dict[str, Any]:
    with _reporting(f"{path}: neither a statement nor an envelope"):
        data = json_module.loads(path.read_bytes())
        return _opened(data) if "payload" in data else {"kind": "statement", "statement": data}


def _provenance(path: Path) -> dict[str, Any]:
    """Read what a published directory keeps in provenance.jsonl: an envelope on each line."""
    statements = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        with _reporting(f"{path}:{number}: not a provenance entry"):
            statements.append(_opened(json_module.loads(json_module.loads(line)["envelope"])))
    return {"kind": "provenance", "statements": statements}


def _opened(data: dict[str, Any]) -> dict[str, Any]:
    from securesystemslib.dsse import Envelope

    envelope = Envelope.from_dict(data)
    statement = json_module.loads(envelope.payload)
    return {"kind": envelope.payload_type, "signed_by": list(envelope.signatures), "statement": statement}


@contextmanager
def _reporting(problem: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise InputError(f"{problem} ({type(err).__name__})") from err


def _show(found: dict[str, Any]) -> None:
    rows = found.pop("tensors", None)
    for name, value in found.items():
        text = json_module.dumps(value, indent=2) if isinstance(value, (dict, list)) else str(value)
        shown = f"{value:,} ({format_bytes(value)})" if name.endswith("_bytes") else text
        lines = [printable(line) for line in f"{name.replace('_', ' ')}: {shown}".split("\n")]
        stdout.print("\n".join(lines), markup=False)
    if rows:
        table = Table()
        for heading in rows[0]:
            table.add_column(heading.replace("_", " "))
        for row in rows:
            table.add_row(*(escape(printable(str(value))) for value in row.values()))
        stdout.print(table)
