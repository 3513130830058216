"""`fedmerge inspect`: show what is in a delta or step file, a model directory, or a signed statement."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.markup import escape
from rich.table import Table

from fedmerge.cli.output import JsonFlag, format_bytes, print_json, printable, stdout
from fedmerge.errors import BadSignature, ConfigError, InputError, InvalidDelta

HEADINGS = {"coded_bytes": "bytes", "bits_per_parameter": "bits/param", "relative_error": "rel. error"}
JSON_ALONE = {"raw_bytes"}


def inspect(
    path: Annotated[
        Path, Parameter(name="FILE", help="A delta or step file, a model directory, or signed statements.")
    ],
    /,
    *,
    base: Annotated[
        Path | None, Parameter(help="Of a delta file: the directory of the model it is to be added to.")
    ] = None,
    tuned: Annotated[Path | None, Parameter(help="The fine-tune it was made of: also show what is lost.")] = None,
    seed: Annotated[int, Parameter(help="The plan's [merge] seed, for seeded masks.", validator=Number(gte=0))] = 0,
    json: JsonFlag = False,
) -> None:
    """Show what a file says of itself. Nothing is verified here: use `fedmerge verify` for that."""
    if (base is None) != (tuned is None):
        raise ConfigError("--base and --tuned go together", hint="what is lost is measured against their difference")
    if path.is_dir():
        found = _model(path)
    elif not path.is_file():
        raise InputError(f"{path}: no such file")
    elif path.suffix == ".json":
        found = _statement(path)
    elif path.suffix in {".jsonl", ".zst"}:
        found = _provenance(path)
    else:
        found = _delta(path)
    if base is not None and tuned is not None:
        if path.suffix in {".json", ".jsonl", ".zst"} or path.is_dir():
            raise ConfigError(f"{path}: --base and --tuned are for delta files")
        _add_errors(found, path, base, tuned, seed)
    with _reporting(f"{path}: can't be shown"):
        if json:
            print_json(found)
        else:
            _show(found)


def _delta(path: Path) -> dict[str, Any]:
    from fedmerge.delta.inspection import inspect_delta
    from fedmerge.models.steps import inspect_steps

    with suppress(InvalidDelta):
        return {"kind": "steps (as it claims)", **inspect_steps(path)}
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


def _add_errors(found: dict[str, Any], path: Path, base: Path, tuned: Path, seed: int) -> None:
    """Add to what a delta file claims how far each tensor is from the task vector `tuned - base`."""
    from fedmerge.delta.adapter import open_tuned
    from fedmerge.delta.codec import Codec
    from fedmerge.delta.inspection import relative_errors
    from fedmerge.tensors import Checkpoint

    codec, origin = Codec.from_dict(found["codec"]), Checkpoint(base)
    drawn_from = mask_seed(path, seed) if codec.sparsify == "seeded" else 0
    _, task_vector = open_tuned(tuned, origin, where=str(tuned))
    try:
        errors, total = relative_errors(path, task_vector, origin.schema, codec, seed=drawn_from)
    except InvalidDelta as err:
        raise InputError(f"{path}: does not fit {base} ({err.message.removeprefix(f'{path.name}: ')})") from err
    for row in found["tensors"]:
        row["relative_error"] = errors[row["name"]]
    found["totals"]["relative_error"] = total


def mask_seed(path: Path, seed: int) -> int:
    """Return the seed of a node's mask; its statement, which lies beside the delta, says which node and round."""
    from fedmerge.seeds import derive_seed

    beside = path.with_name("statement.json")
    if not beside.is_file():
        raise InputError(
            f"{path}: has a seeded mask, and no statement.json beside it says whose",
            hint="give the delta.safetensors in a node's folder, under rounds",
        )
    with _reporting(f"{beside}: not a delta statement"):
        claims = _statement(beside)["statement"]["predicate"]
        return derive_seed("mask", seed, claims["round"], claims["node_id"])


def _model(path: Path) -> dict[str, Any]:
    from fedmerge.delta.task_vector import delta_schema
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
    """Read a published directory's provenance, also once unpacked: an envelope, or a cosigned note, on each line."""
    from fedmerge.publishing.provenance_file import read_lines
    from fedmerge.rounds.provenance import COSIGNATURE

    statements = []
    try:
        lines = list(read_lines(path)) if path.suffix == ".zst" else path.read_text(errors="replace").splitlines()
    except BadSignature as err:
        raise InputError(f"{path}: no provenance, or a damaged one") from err
    for number, line in enumerate(lines, start=1):
        with _reporting(f"{path}:{number}: not a provenance entry"):
            entry = json_module.loads(line)
            if entry["kind"] == COSIGNATURE:  # a note of C2SP's, which is text
                statements.append({"kind": COSIGNATURE, "note": entry["envelope"].splitlines()})
            else:
                statements.append(_opened(json_module.loads(entry["envelope"])))
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
        columns = [name for name in rows[0] if name not in JSON_ALONE]
        table = Table()
        for name in columns:
            table.add_column(HEADINGS.get(name, name), justify="left" if name in {"name", "encoding"} else "right")
        for row in rows:
            table.add_row(*(escape(printable(_cell(row[name]))) for name in columns))
        stdout.print(table)


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.4g}"
        case list():
            return " x ".join(map(str, value)) or "scalar"
        case _:
            return str(value)
