"""What each codec costs and how near it comes to its limits: bytes beside the entropy, speed beside memcpy.

    python benchmarks/codec.py [--quick] [--json FILE] [--base DIR --tuned DIR]

Task vectors are synthetic (a Gaussian one and a heavy-tailed one, with the shapes of a small language model) and, when
`--base` and `--tuned` name two Hugging Face directories, the real difference of the two. Speeds are megabytes of fp32
task vector per CPU second of one thread, through `write_delta` and `DeltaFile`, file included.

The bound of a codec is the order-0 entropy of the symbols it codes, tensor by tensor, with ideal models known to both
ends for free: for types with scales that of the codes (scales and the file's header count as our overhead), for bf16
the entropy of the exponent plus 8 bits, for fp32 the sum over byte planes; for a seeded mask the same over the kept
values. For top-k the choices are counted as well: log2 C(n, k) bits for k of a chunk's n elements. A coder that adapts
within a tensor can go below it, and indices can where rows differ in size. The column `scales` is the entropy of the
scales' bytes, which in small blocks are a cost of the block size more than of the coder.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors import safe_open

from fedmerge.blocks import INT4, LLOYD2, LLOYD3, SIGN
from fedmerge.codec import Codec
from fedmerge.delta import subtract
from fedmerge.frame import METADATA_KEY, DeltaFile, write_delta
from fedmerge.indices import CHUNK_ELEMENTS, kept_of_chunk
from fedmerge.planes import unpack_codes
from fedmerge.quantize import QUANTIZERS
from fedmerge.seeds import derive_seed
from fedmerge.sparsify import SPARSIFIERS
from fedmerge.tensors import Checkpoint, TensorMap, TensorSpec, schema_of, tensor_bytes

SEED = 1
CODECS = {
    "fp32": Codec(values="fp32"),
    "bf16": Codec(values="bf16"),
    "int8": Codec(),
    "int4/64": Codec(values="int4", block_size=64),
    "int4/256": Codec(values="int4", block_size=256),
    "lloyd3/256": Codec(values="lloyd3", block_size=256),
    "lloyd2/256": Codec(values="lloyd2", block_size=256),
    "sign/256": Codec(values="sign", block_size=256),
    "seeded 10% bf16": Codec(sparsify="seeded", density=0.1, values="bf16"),
    "seeded 10% int8": Codec(sparsify="seeded", density=0.1),
    "seeded 1% int8": Codec(sparsify="seeded", density=0.01),
    "seeded 1% lloyd2": Codec(sparsify="seeded", density=0.01, values="lloyd2"),
    "top 41 int8": Codec(sparsify="topk", density=41 / 4096),
    "top 64 int8": Codec(sparsify="topk", density=64 / 4096),
    "top 64 int4": Codec(sparsify="topk", density=64 / 4096, values="int4", block_size=64),
    "top 64 lloyd2": Codec(sparsify="topk", density=64 / 4096, values="lloyd2", block_size=64),
    "top 64 sign": Codec(sparsify="topk", density=64 / 4096, values="sign", block_size=64),
    "top 123 sign": Codec(sparsify="topk", density=123 / 4096, values="sign", block_size=64),
}
NUM_LEVELS = {"int4": INT4, "lloyd3": LLOYD3, "lloyd2": LLOYD2, "sign": SIGN}


@dataclass(frozen=True)
class Row:
    """One codec on one task vector; speeds in MB of fp32 per CPU second, sizes in bits per parameter."""

    vector: str
    codec: str
    num_bytes: int
    bits: float
    bound_bits: float
    scale_bits: float
    index_bits: float | None  # per index, with its bound
    index_bound_bits: float | None
    encode_mb_s: float
    decode_mb_s: float
    relative_error: float

    @property
    def gap_percent(self) -> float:
        return 100 * (self.bits / self.bound_bits - 1)

    @property
    def coding_gap_percent(self) -> float:
        """The same with the scales' own entropy in the bound."""
        return 100 * (self.bits / (self.bound_bits + self.scale_bits) - 1)


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


@dataclass(frozen=True)
class Bound:
    """Entropy of what a codec has to say about a task vector, in bits for the whole of it."""

    values: float
    scales: float
    indices: float
    num_indices: int


def choices_bits(num_elements: int, density: float) -> float:
    """log2 of the number of ways to choose what top-k keeps."""

    def of_chunk(size: int) -> float:
        return math.log2(math.comb(size, kept_of_chunk(size, density))) if size else 0.0

    num_whole, num_last = divmod(num_elements, CHUNK_ELEMENTS)
    return num_whole * of_chunk(CHUNK_ELEMENTS) + of_chunk(num_last)


def bound_of(delta: TensorMap, codec: Codec) -> Bound:
    values = scales = indices = 0.0
    num_indices = 0
    for name, tensor in delta.items():
        if not tensor.any():
            continue
        sparsifier = codec.sparsifier(TensorSpec(tuple(tensor.shape), "F32"))
        seed = derive_seed(SEED, name)
        kept = SPARSIFIERS[sparsifier].sparsify(tensor.float().reshape(-1), seed, codec.density).values
        if sparsifier == "topk":
            indices += choices_bits(tensor.numel(), codec.density)
            num_indices += kept.numel()
        sections = dict(QUANTIZERS[codec.values].quantize(kept, codec.block_size))
        if "scales" in sections:
            num_planes = 4 if codec.values == "int8" else 2
            scales += sum(entropy_bits(plane) for plane in sections.pop("scales").reshape(num_planes, -1))
        if codec.values == "bf16":
            values += 8 * sections.pop("plane0").size
        if codec.values in NUM_LEVELS:
            num_levels = len(NUM_LEVELS[codec.values].levels)
            meaning = np.arange(num_levels, dtype=np.uint8)
            sections["codes"] = unpack_codes(sections["codes"], kept.numel(), num_levels, meaning)
        values += sum(entropy_bits(section) for section in sections.values())
    return Bound(values, scales, indices, num_indices)


def index_bytes_of(path: Path) -> int:
    """Bytes of a delta file that say where the values belong."""
    with safe_open(path, framework="np") as file:
        frames = json.loads(file.metadata()[METADATA_KEY])["frames"].values()
    return sum(coded for frame in frames for kind, _, coded, _ in frame["sections"] if kind.startswith("gaps"))


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
    bound = bound_of(delta, codec)
    return Row(
        vector=vector,
        codec=codec_name,
        num_bytes=decoded.stats.payload_bytes,
        bits=decoded.stats.bits_per_parameter,
        bound_bits=(bound.values + bound.indices) / num_elements,
        scale_bits=bound.scales / num_elements,
        index_bits=8 * index_bytes_of(path) / bound.num_indices if bound.num_indices else None,
        index_bound_bits=bound.indices / bound.num_indices if bound.num_indices else None,
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
        if row.codec in {"int4/64", "int4/256", "lloyd3/256", "lloyd2/256", "sign/256"}:
            name = f"{row.vector}: {row.codec} over the entropy of codes and scales, percent at most"
            found.append(Target(name, round(row.coding_gap_percent, 3), 2.0, row.coding_gap_percent <= 2))
        if row.index_bits and row.index_bound_bits and row.codec in {"top 41 int8", "top 64 sign", "top 123 sign"}:
            gap = 100 * (row.index_bits / row.index_bound_bits - 1)
            name = f"{row.vector}: {row.codec}: indices over log2 C(4096, k) / k, percent at most"
            found.append(Target(name, round(gap, 3), 5.0, gap <= 5))
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
        print(f"{'codec':<18}{'MB':>8}{'bit/par':>9}{'x fp32':>8}{'bound':>8}{'gap %':>7}{'scales':>8}", end="")
        print(f"{'enc MB/s':>10}{'dec MB/s':>10}{'rel. L2':>10}")
        with tempfile.TemporaryDirectory() as directory:
            for codec_name in CODECS:
                row = measure(vector, delta, codec_name, Path(directory))
                rows.append(row)
                print(f"{row.codec:<18}{row.num_bytes / 1e6:>8.2f}{row.bits:>9.4f}{32 / row.bits:>8.2f}", end="")
                print(f"{row.bound_bits:>8.4f}{row.gap_percent:>7.2f}{row.scale_bits:>8.4f}", end="")
                print(f"{row.encode_mb_s:>10.0f}{row.decode_mb_s:>10.0f}{row.relative_error:>10.2g}")
        speed_limits[vector] = limits(delta)
        for name, (bits, into, out) in speed_limits[vector].items():
            print(f"{name:<18}{bits / 8 * num_elements / 1e6:>8.2f}{bits:>9.4f}{32 / bits:>8.2f}", end="")
            print(f"{'':>23}{into:>10.0f}{out:>10.0f}{0:>10.2g}")

    print()
    verdicts = targets(rows)
    for target in verdicts:
        print(f"{'holds ' if target.holds else 'MISSED'} {target.name} {target.goal:g}: {target.value:g}")
    if options.json:
        report = {
            "targets": [vars(target) for target in verdicts],
            "rows": [
                {**vars(row), "gap_percent": row.gap_percent, "coding_gap_percent": row.coding_gap_percent}
                for row in rows
            ],
            "limits": speed_limits,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
