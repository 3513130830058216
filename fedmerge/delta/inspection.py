"""What a delta file holds, for people: what it claims of itself, and how far it is from the true task vector."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import FORMAT, VERSION, DeltaFile, layout_of, open_header, stats_of
from fedmerge.delta.header import encoding_name
from fedmerge.tensors import Schema, TensorMap


def inspect_delta(path: Path) -> dict[str, Any]:
    """Return what a delta file says of itself, for people: nothing under `claims` was checked against a plan.

    Keys: `path`; `file_bytes`, measured; `claims`, with `format`, `version`, `codec`, `totals` and, by name, `tensors`.
    A tensor's `coded_bytes` are its share of its frame, in which others may be, by the length of its sections.
    Raises `InvalidDelta` when it is not a delta file at all, and `InputError` when there is no file to read.
    """
    _, header = open_header(path, max_frame_bytes=1 << 62)
    file_bytes = path.stat().st_size
    layout, stats = layout_of(path, header), stats_of(header, file_bytes)
    claims = {
        "format": FORMAT,
        "version": VERSION,
        "codec": header.codec.to_dict(),
        "totals": {
            "num_elements": stats.num_elements,
            "dense_bytes": stats.dense_bytes,
            "payload_bytes": stats.payload_bytes,
            "encodings": stats.encodings,
            "bits_per_parameter": stats.bits_per_parameter,
        },
        "tensors": {
            name: {
                "shape": list(spec.shape),
                "encoding": encoding_name(encoding),
                "raw_bytes": layout.parts[name].raw_bytes,
                "coded_bytes": layout.coded_bytes(name),
                "bits_per_parameter": 8 * layout.coded_bytes(name) / max(1, spec.num_elements),
            }
            for name, (spec, encoding) in header.tensors.items()
        },
    }
    return {"path": str(path), "file_bytes": file_bytes, "claims": claims}


def relative_errors(
    path: Path, task_vector: TensorMap, schema: Schema, codec: Codec, *, seed: int
) -> tuple[dict[str, float | None], float | None]:
    """Return `|decoded - true| / |true|` of each tensor of a delta file, by name, and of all together.

    None stands for something where there was nothing. Raises `InvalidDelta` when the file is not of this schema, codec
    and seed.
    """
    errors: dict[str, float | None] = {}
    all_errors, all_norms = 0.0, 0.0
    for name, decoded in DeltaFile(path, schema, codec, seed=seed).items():
        true = task_vector[name].double()
        error, norm = float((decoded.double() - true).square().sum()), float(true.square().sum())
        errors[name] = _ratio(error, norm)
        all_errors, all_norms = all_errors + error, all_norms + norm
    return errors, _ratio(all_errors, all_norms)


def _ratio(squared_error: float, squared_norm: float) -> float | None:
    if squared_norm > 0:
        return math.sqrt(squared_error / squared_norm)
    return None if squared_error > 0 else 0.0
