"""What each codec costs and how near it comes to its limits: bytes beside the entropy, speed beside memcpy.

    python benchmarks/codec.py [--quick] [--json FILE] [--base DIR --tuned DIR]

Task vectors are synthetic (a Gaussian one and a heavy-tailed one, with the shapes of a small language model) and, when
`--base` and `--tuned` name two Hugging Face directories, the real difference of the two. Speeds are megabytes of fp32
task vector per CPU second of one thread, through `write_delta` and `DeltaFile`, file included.

The bound of a codec is the order-0 entropy of the symbols it codes, tensor by tensor, with ideal models known to both
ends for free: for int8 that of the codes (scales and the file's header count as our overhead), for bf16 the entropy of
the exponent plus 8 bits, for fp32 the sum over byte planes; for a seeded mask the same over the kept values. A coder
that adapts within a tensor can go below it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from fedmerge.codec import Codec
from fedmerge.delta import subtract
from fedmerge.frame import DeltaFile, write_delta
from fedmerge.quantize import QUANTIZERS
from fedmerge.seeds import derive_seed
from fedmerge.sparsify import SPARSIFIERS
from fedmerge.tensors import Checkpoint, TensorMap, TensorSpec, schema_of, tensor_bytes

SEED = 1
CODECS = {
    "fp32": Codec(values="fp32"),
    "bf16": Codec(values="bf16"),
    "int8": Codec(),
    "seeded 10% bf16": Codec(sparsify="seeded", density=0.1, values="bf16"),
    "seeded 10% int8": Codec(sparsify="seeded", density=0.1),
    "seeded 1% int8": Codec(sparsify="seeded", density=0.01),
}


@dataclass(frozen=True)
class Row:
    """One codec on one task vector; speeds in MB of fp32 per CPU second, sizes in bits per parameter."""

    vector: str
    codec: str
    num_bytes: int
    bits: float
    bound_bits: float
    encode_mb_s: float
    decode_mb_s: float
    relative_error: float

    @property
    def gap_percent(self) -> float:
        return 100 * (self.bits / self.bound_bits - 1)


@dataclass(frozen=True)
class Target:
    """A figure to reach; `holds` says whether this run did."""

    name: str
    value: float
    goal: float
    holds: bool


def language_model_shapes(num_layers: int, width: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (vocabulary, width)}
    for layer in range(num_layers):
        for name, shape in {
            "attn.qkv.weight": (3 * width, width),
            "attn.out.weight": (width, width),
            "mlp.up.weight": (4 * width, width),
            "mlp.down.weight": (width, 4 * width),
            "norm.weight": (width,),
            "norm.bias": (width,),
        }.items():
            shapes[f"h.{layer}.{name}"] = shape
    return shapes


def gaussian(shapes: dict[str, tuple[int, ...]]) -> TensorMap:
    rng = np.random.default_rng(0)
    draws = {name: 1e-3 * rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return {name: torch.from_numpy(draw) for name, draw in draws.items()}


def heavy_tailed(shapes: dict[str, tuple[int, ...]]) -> TensorMap:
    """Student-t(5) with log-normal row and column scales."""
    rng = np.random.default_rng(0)
    result = {}
    for name, shape in shapes.items():
        draw = 1e-3 * rng.standard_t(5, size=shape)
        for axis in range(len(shape)):
            scale_shape = [1] * len(shape)
            scale_shape[axis] = shape[axis]
            draw *= rng.lognormal(0, 0.5, size=scale_shape)
        result[name] = torch.from_numpy(draw.astype(np.float32))
    return result


def entropy_bits(symbols: np.ndarray[Any, np.dtype[np.uint8]]) -> float:
    """Order-0 entropy of a byte string, in bits for the whole string."""
    counts = np.bincount(symbols, minlength=256)
    share = counts[counts > 0] / max(1, symbols.size)
    return float(-(share * np.log2(share)).sum()) * symbols.size


def bound_bits(delta: TensorMap, codec: Codec) -> float:
    """Entropy of what `codec` has to say about `delta`, in bits for the whole task vector."""
    total = 0.0
    for name, tensor in delta.items():
        if not tensor.any():
            continue
        sparsifier = SPARSIFIERS[codec.sparsifier(TensorSpec(tuple(tensor.shape), "F32"))]
        kept = sparsifier.sparsify(tensor.float().reshape(-1), derive_seed(SEED, name), codec.density)
        sections = dict(QUANTIZERS[codec.values].quantize(kept, codec.block_size))
        sections.pop("scales", None)
        if codec.values == "bf16":
            total += 8 * sections.pop("plane0").size
        total += sum(entropy_bits(section) for section in sections.values())
    return total


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of the better of two runs."""
    best = float("inf")
    for _ in range(2):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return max(best, 1e-9)


def measure(vector: str, delta: TensorMap, codec_name: str, directory: Path) -> Row:
    codec, schema, path = CODECS[codec_name], schema_of(delta), directory / "delta"
    megabytes = sum(4 * tensor.numel() for tensor in delta.values()) / 1e6

    def decode() -> None:
        for _ in DeltaFile(path, schema, codec, seed=SEED).values():
            pass

    encode_s = cpu_seconds(lambda: write_delta(path, delta, schema, codec, seed=SEED))
    decode_s = cpu_seconds(decode)
    decoded = DeltaFile(path, schema, codec, seed=SEED)
    error = sum(float((decoded[name] - tensor).double().square().sum()) for name, tensor in delta.items())
    norm = sum(float(tensor.double().square().sum()) for tensor in delta.values())
    num_elements = decoded.stats.num_elements
    return Row(
        vector=vector,
        codec=codec_name,
        num_bytes=decoded.stats.payload_bytes,
        bits=decoded.stats.bits_per_parameter,
        bound_bits=bound_bits(delta, codec) / num_elements,
        encode_mb_s=megabytes / encode_s,
        decode_mb_s=megabytes / decode_s,
        relative_error=(error / norm) ** 0.5,
    )


def limits(delta: TensorMap) -> dict[str, tuple[float, float, float]]:
    """Return, by name, bits per parameter and MB/s in and out for copying the fp32 bytes and for plain zstd -3."""
    raw = b"".join(tensor_bytes(tensor) for tensor in delta.values())
    source, target = np.frombuffer(raw, np.uint8), np.empty(len(raw), np.uint8)
    target[:] = 0  # its pages exist before the clock starts
    copy_s = cpu_seconds(lambda: np.copyto(target, source))
    compressor, decompressor = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
    packed = compressor.compress(raw)
    pack_s = cpu_seconds(lambda: compressor.compress(raw))
    unpack_s = cpu_seconds(lambda: decompressor.decompress(packed))
    megabytes = len(raw) / 1e6
    return {
        "memcpy": (32.0, megabytes / copy_s, megabytes / copy_s),
        "zstd -3": (32 * len(packed) / len(raw), megabytes / pack_s, megabytes / unpack_s),
    }


def targets(rows: list[Row]) -> list[Target]:
    found = []
    for row in rows:
        if row.codec in {"int8", "bf16"}:
            goal = 5.0 if row.codec == "int8" else 10.0
            name = f"{row.vector}: {row.codec} over its entropy bound, percent at most"
            found.append(Target(name, round(row.gap_percent, 3), goal, row.gap_percent <= goal))
        if row.codec == "int8":
            for verb, speed in {"encode": row.encode_mb_s, "decode": row.decode_mb_s}.items():
                name = f"{row.vector}: int8 {verb}, MB of fp32 per CPU second at least"
                found.append(Target(name, round(speed, 1), 100.0, speed >= 100))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Sizes and speeds of delta codecs, beside their limits.")
    parser.add_argument("--quick", action="store_true", help="10 M parameters instead of 100 M, about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the targets and all figures to FILE")
    parser.add_argument("--base", type=Path, metavar="DIR", help="base model of a real task vector")
    parser.add_argument("--tuned", type=Path, metavar="DIR", help="fine-tune of it")
    options = parser.parse_args()
    if (options.base is None) != (options.tuned is None):
        parser.error("--base and --tuned go together")
    torch.set_num_threads(1)

    shapes = language_model_shapes(4, 384, 8000) if options.quick else language_model_shapes(12, 768, 20000)
    makers: dict[str, Callable[[], TensorMap]] = {
        "Gaussian": lambda: gaussian(shapes),
        "heavy-tailed": lambda: heavy_tailed(shapes),
    }
    if options.base:
        makers["real"] = lambda: dict(subtract(Checkpoint(options.tuned), Checkpoint(options.base)))
    else:
        print("No real task vector: --base and --tuned were not given. The figures below are of synthetic ones only.")

    rows: list[Row] = []
    speed_limits: dict[str, dict[str, tuple[float, float, float]]] = {}
    for vector, make in makers.items():
        delta = make()
        num_elements = sum(tensor.numel() for tensor in delta.values())
        print(f"\n{vector}: {num_elements / 1e6:.1f} M parameters, {4 * num_elements / 1e6:.0f} MB as fp32")
        print(f"{'codec':<18}{'MB':>8}{'bit/par':>9}{'x fp32':>8}{'bound':>8}{'gap %':>7}", end="")
        print(f"{'enc MB/s':>10}{'dec MB/s':>10}{'rel. L2':>10}")
        with tempfile.TemporaryDirectory() as directory:
            for codec_name in CODECS:
                row = measure(vector, delta, codec_name, Path(directory))
                rows.append(row)
                print(f"{row.codec:<18}{row.num_bytes / 1e6:>8.2f}{row.bits:>9.4f}{32 / row.bits:>8.2f}", end="")
                print(f"{row.bound_bits:>8.4f}{row.gap_percent:>7.2f}", end="")
                print(f"{row.encode_mb_s:>10.0f}{row.decode_mb_s:>10.0f}{row.relative_error:>10.2g}")
        speed_limits[vector] = limits(delta)
        for name, (bits, into, out) in speed_limits[vector].items():
            print(f"{name:<18}{bits / 8 * num_elements / 1e6:>8.2f}{bits:>9.4f}{32 / bits:>8.2f}", end="")
            print(f"{'':>15}{into:>10.0f}{out:>10.0f}{0:>10.2g}")

    print()
    verdicts = targets(rows)
    for target in verdicts:
        print(f"{'holds ' if target.holds else 'MISSED'} {target.name} {target.goal:g}: {target.value:g}")
    if options.json:
        report = {
            "targets": [vars(target) for target in verdicts],
            "rows": [{**vars(row), "gap_percent": row.gap_percent} for row in rows],
            "limits": speed_limits,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
