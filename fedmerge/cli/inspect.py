"""`fedmerge inspect`: show what is in a delta file, a model directory, or a signed statement."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from fedmerge.cli.output import JsonFlag, format_bytes, print_json, stdout
from fedmerge.errors import InputError


def inspect(
    path: Annotated[Path, Parameter(name="FILE", help="A delta file, a model directory, or a signed statement.")],
    /,
    *,
    json: JsonFlag = False,
) -> None:
    """Show what a file says of itself. Nothing is verified here: use `fedmerge verify` for that."""
    if path.is_dir():
        found = _model(path)
    elif path.suffix in {".json", ".jsonl"}:
        found = _statement(path)
    elif path.is_file():
        found = _delta(path)
    else:
        raise InputError(f"{path}: no such file")
    if json:
        print_json(found)
        return
    _show(found)


def _delta(path: Path) -> dict[str, Any]:
    from fedmerge.frame import inspect_delta

    found = inspect_delta(path)
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
    from securesystemslib.dsse import Envelope

    try:
        data = json_module.loads(path.read_text())
        if "payload" in data:
            envelope = Envelope.from_dict(data)
            payload = json_module.loads(envelope.payload)
            return {"kind": envelope.payload_type, "signed_by": list(envelope.signatures), "statement": payload}
        return {"kind": "statement", "statement": data}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise InputError(f"{path}: neither a statement nor an envelope ({type(err).__name__})") from err


def _show(found: dict[str, Any]) -> None:
    rows = found.pop("tensors", None)
    for name, value in found.items():
        text = json_module.dumps(value, indent=2) if isinstance(value, (dict, list)) else str(value)
        shown = f"{value:,} ({format_bytes(value)})" if name.endswith("_bytes") else text
        stdout.print(f"{name.replace('_', ' ')}: {escape(shown)}")
    if rows:
        table = Table()
        for heading in rows[0]:
            table.add_column(heading.replace("_", " "))
        for row in rows:
            table.add_row(*(escape(str(value)) for value in row.values()))
        stdout.print(table)
