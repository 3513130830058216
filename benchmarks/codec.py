"""What each codec costs and how near it comes to its limits: bytes beside the entropy, speed beside memcpy, memory.

    python benchmarks/codec.py [--quick] [--json FILE] [--cache DIR] [--base DIR --tuned DIR]

Task vectors are a synthetic one with heavy tails, in the shapes of a language model, and a real one: a fine-tune of the
text encoder that `make demo` uses, made once and kept in `--cache`, or the difference of the two Hugging Face
directories `--base` and `--tuned`. Speeds are megabytes of fp32 task vector per CPU second of one thread, through
`write_delta` and `DeltaFile`, file included. Memory is what a process of its own allocates above the task vector.

The bound of a codec is the order-0 entropy of the symbols it codes, tensor by tensor, with ideal models known to both
ends for free: of the codes, for bf16 of the exponent plus 8 bits, for fp32 of each byte plane; for a seeded mask the
same over the kept values. For top-k the choices are counted as well: log2 C(n, k) bits for k of a chunk's n elements. A
coder that adapts within a tensor can go below it, and indices can where rows differ in size. The column `scales` is the
entropy of the scales' bytes, which are said too and so belong to the bound; `gap` is how far the coded sections are
above that. The file's header has a column of its own.

Beside them, in the same run: memcpy, zstd -3 of the fp32 bytes and of their byte planes, ZipNN (arXiv 2411.05239) where
it is installed; and from their sources, what other systems spend on the same 64 of 4096 elements: Templar's code 12 + 8
bits for an index and a value, the paper behind it (SparseLoCo, arXiv 2508.15706) 12 + 2; and Flower 32 bits for every
parameter.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from task_vectors import CACHE, fine_tuned, heavy_tailed, kurtosis

from fedmerge.delta.blocks import INT4, LLOYD2, LLOYD3, SIGN
from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import DeltaFile, open_header, write_delta
from fedmerge.delta.header import lay_out
from fedmerge.delta.indices import CHUNK_ELEMENTS, kept_of_chunk
from fedmerge.delta.layerwise import num_largest
from fedmerge.delta.planes import unpack_codes
from fedmerge.delta.quantize import QUANTIZERS
from fedmerge.delta.regime import with_small_values
from fedmerge.delta.sparsify import SPARSIFIERS
from fedmerge.delta.task_vector import subtract
from fedmerge.errors import FedmergeError
from fedmerge.seeds import derive_seed
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
    "top 64 lloyd2/256": Codec(sparsify="topk", density=64 / 4096, values="lloyd2", block_size=256),
    "top 64 sign": Codec(sparsify="topk", density=64 / 4096, values="sign", block_size=64),
    "layer 64 sign": Codec(sparsify="layerwise_topk", density=64 / 4096, values="sign", block_size=64),
    "layer 64 lloyd2": Codec(sparsify="layerwise_topk", density=64 / 4096, values="lloyd2", block_size=64),
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
    header_bits: float
    index_bits: float | None  # per index, with its bound
    index_bound_bits: float | None
    encode_mb_s: float
    decode_mb_s: float
    relative_error: float

    @property
    def gap_percent(self) -> float:
        return 100 * ((self.bits - self.header_bits) / (self.bound_bits + self.scale_bits) - 1)


@dataclass(frozen=True)
class Target:
    """A figure to reach; `holds` says whether this run did."""

    name: str
    value: float
    goal: float
    holds: bool


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


def choices_bits(num_elements: int, density: float, sparsifier: str) -> float:
    """log2 of the number of ways to choose what top-k keeps."""
    if sparsifier == "layerwise_topk":
        kept = num_largest(num_elements, density)
        logs = (math.lgamma(count + 1) for count in (kept, num_elements - kept))
        return (math.lgamma(num_elements + 1) - sum(logs)) / math.log(2)

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
        encoding = codec.encoding(TensorSpec(tuple(tensor.shape), "F32"))
        sparsifier, type_ = encoding.sparsifier, encoding.values
        seed = derive_seed(SEED, name)
        kept = SPARSIFIERS[sparsifier].sparsify(tensor.float().reshape(-1), seed, codec.density).values
        if "topk" in sparsifier:
            indices += choices_bits(tensor.numel(), codec.density, sparsifier)
            num_indices += kept.numel()
        sections = dict(QUANTIZERS[type_].quantize(kept, codec.block_size))
        if "scales" in sections:
            num_planes = 4 if type_ == "int8" else 2
            scales += sum(entropy_bits(plane) for plane in sections.pop("scales").reshape(num_planes, -1))
        if type_ == "bf16":
            values += 8 * sections.pop("plane0").size
        if type_ in NUM_LEVELS:
            num_levels = len(NUM_LEVELS[type_].levels)
            meaning = np.arange(num_levels, dtype=np.uint8)
            sections["codes"] = unpack_codes(sections["codes"], kept.numel(), num_levels, meaning)
        values += sum(entropy_bits(section) for section in sections.values())
    return Bound(values, scales, indices, num_indices)


def index_bytes_of(path: Path) -> int:
    """Bytes of a delta file that say where the values belong."""
    _, header = open_header(path, 1 << 40)
    sections = [section for frame in lay_out(header).frames for section in frame]
    return sum(section.coded_bytes for section in sections if section.kind.split()[1].startswith(("gaps", "counts")))


def header_bytes_of(path: Path) -> int:
    """Bytes of a delta file that are not in frames."""
    _, header = open_header(path, 1 << 40)
    return path.stat().st_size - sum(map(sum, header.coded_bytes))


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of the better of two runs."""
    best = float("inf")
    for _ in range(2):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return max(best, 1e-9)


def measure(vector: str, delta: TensorMap, codec_name: str, directory: Path) -> Row:
    schema, path = schema_of(delta), directory / "delta"
    codec = with_small_values(CODECS[codec_name], schema)
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
        header_bits=8 * header_bytes_of(path) / num_elements,
        index_bits=8 * index_bytes_of(path) / bound.num_indices if bound.num_indices else None,
        index_bound_bits=bound.indices / bound.num_indices if bound.num_indices else None,
        encode_mb_s=megabytes / encode_s,
        decode_mb_s=megabytes / decode_s,
        relative_error=(error / norm) ** 0.5,
    )


def limits(delta: TensorMap) -> dict[str, tuple[float, float, float]]:
    """Return, by name, bits per parameter and MB/s in and out for coders of the fp32 bytes."""
    raw = b"".join(tensor_bytes(tensor) for tensor in delta.values())
    megabytes = len(raw) / 1e6
    source, target = np.frombuffer(raw, np.uint8), np.empty(len(raw), np.uint8)
    target[:] = 0  # its pages exist before the clock starts
    copy_s = cpu_seconds(lambda: np.copyto(target, source))
    compressor, decompressor = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()

    def shuffle() -> bytes:
        return compressor.compress(np.ascontiguousarray(source.reshape(-1, 4).T).data)

    def unshuffle(packed: bytes) -> object:
        return np.ascontiguousarray(np.frombuffer(decompressor.decompress(packed), np.uint8).reshape(4, -1).T)

    coders: dict[str, tuple[Callable[[], bytes], Callable[[bytes], object]]] = {
        "zstd -3": (lambda: compressor.compress(raw), decompressor.decompress),
        "shuffled zstd -3": (shuffle, unshuffle),
    }
    try:
        from zipnn import ZipNN

        zipnn = ZipNN(bytearray_dtype="float32", input_format="byte", threads=1)
        # It changes its input in place.
        coders["ZipNN"] = (lambda: bytes(zipnn.compress(bytearray(raw))), zipnn.decompress)
    except ImportError:
        print("ZipNN is not installed (pip install zipnn): no figures of it")
    found = {"memcpy": (32.0, megabytes / copy_s, megabytes / copy_s)}
    for name, (pack, unpack) in coders.items():
        packed = pack()
        into, out = cpu_seconds(pack), cpu_seconds(lambda packed=packed, unpack=unpack: unpack(packed))
        found[name] = (32 * len(packed) / len(raw), megabytes / into, megabytes / out)
    return found


# Bits per parameter by their own count, for the same choice of elements.
OTHERS = {
    "Flower": 32.0,
    "Templar, top 64": (12 + 8) * 64 / 4096,
    "SparseLoCo, top 64": (12 + 2) * 64 / 4096,
}


def gained_bytes(work: Callable[[], object]) -> int:
    """Return how much memory this process gains at most while it does `work`: its high-water mark, by Linux."""

    def status(key: str) -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(lines[key].split()[0])

    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the mark is now where the process is
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def memory_of(codec_name: str, quick: bool) -> dict[str, float]:
    """Return the peak memory of encoding and decoding, above the task vector, over the largest tensor's fp32 bytes.

    Decoding includes the tensor that comes out, and the frame in the mapped file.
    """
    delta = heavy_tailed(quick)
    schema = schema_of(delta)
    codec = with_small_values(CODECS[codec_name], schema)
    largest = 4 * max(tensor.numel() for tensor in delta.values())
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "delta"
        small = {name: tensor[:1] for name, tensor in delta.items()}
        write_delta(path, small, schema_of(small), codec, seed=SEED)  # what is loaded once is not counted
        dict(DeltaFile(path, schema_of(small), codec, seed=SEED))
        encoded = gained_bytes(lambda: write_delta(path, delta, schema, codec, seed=SEED))
        file = DeltaFile(path, schema, codec, seed=SEED)
        # One by one: pages of the file stay mapped, and are not what decoding allocates.
        decoded = max(gained_bytes(lambda name=name: file[name]) for name in file)
    return {"encode": encoded / largest, "decode": decoded / largest}


FAST = {"int8", "top 64 lloyd2", "top 64 lloyd2/256", "top 64 sign"}


def targets(rows: list[Row], memory: dict[str, dict[str, float]]) -> list[Target]:
    found = []
    for row in rows:
        gap = round(row.gap_percent, 3)
        name = f"{row.vector}: {row.codec} over its bound, percent at most"
        found.append(Target(name, gap, 5.0, gap <= 5))
        if row.codec in FAST:
            for verb, speed, goal in (("encode", row.encode_mb_s, 400.0), ("decode", row.decode_mb_s, 1000.0)):
                name = f"{row.vector}: {row.codec} {verb}, MB of fp32 per CPU second at least"
                found.append(Target(name, round(speed, 1), goal, speed >= goal))
        if row.codec in FAST - {"int8"}:
            ratio = round(32 / row.bits, 1)
            found.append(
                Target(f"{row.vector}: {row.codec} times smaller than fp32 at least", ratio, 215, ratio >= 215)
            )
    for codec_name, peaks in memory.items():
        for verb, peak in peaks.items():
            name = f"heavy-tailed: {codec_name} {verb}, peak memory over the largest tensor at most"
            found.append(Target(name, round(peak, 2), 4.0, peak <= 4))
    return found


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sizes, speeds and memory of delta codecs, beside their limits.")
    parser.add_argument("--quick", action="store_true", help="10 M synthetic parameters instead of 100 M")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the targets and all figures to FILE")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, metavar="DIR", help=f"where the fine-tune is kept ({CACHE})"
    )
    parser.add_argument("--base", type=Path, metavar="DIR", help="base model of a task vector of your own")
    parser.add_argument("--tuned", type=Path, metavar="DIR", help="fine-tune of it")
    parser.add_argument("--memory-of", choices=CODECS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if (options.base is None) != (options.tuned is None):
        parser.error("--base and --tuned go together")
    return options


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    if options.memory_of:
        print(json.dumps(memory_of(options.memory_of, options.quick)))
        return

    makers: dict[str, Callable[[], TensorMap]] = {"heavy-tailed": lambda: heavy_tailed(options.quick)}
    if options.base:
        makers["real"] = lambda: dict(subtract(Checkpoint(options.tuned), Checkpoint(options.base)))
    else:
        makers["real"] = lambda: fine_tuned(options.cache)

    rows: list[Row] = []
    speed_limits: dict[str, dict[str, tuple[float, float, float]]] = {}
    for vector, make in makers.items():
        try:
            delta = make()
        except FedmergeError as err:
            print(f"\nno {vector} task vector: {err.message} ({err.hint})")
            continue
        num_elements = sum(tensor.numel() for tensor in delta.values())
        print(f"\n{vector}: {num_elements / 1e6:.1f} M parameters, {4 * num_elements / 1e6:.0f} MB as fp32,", end=" ")
        print(f"kurtosis {kurtosis(delta):.1f}")
        print(
            f"{'codec':<18}{'MB':>8}{'bit/par':>9}{'x fp32':>8}{'bound':>8}{'scales':>8}{'header':>8}{'gap %':>7}",
            end="",
        )
        print(f"{'enc MB/s':>10}{'dec MB/s':>10}{'rel. L2':>10}")
        with tempfile.TemporaryDirectory() as directory:
            for codec_name in CODECS:
                row = measure(vector, delta, codec_name, Path(directory))
                rows.append(row)
                print(f"{row.codec:<18}{row.num_bytes / 1e6:>8.2f}{row.bits:>9.4f}{32 / row.bits:>8.2f}", end="")
                print(
                    f"{row.bound_bits:>8.4f}{row.scale_bits:>8.4f}{row.header_bits:>8.4f}{row.gap_percent:>7.2f}",
                    end="",
                )
                print(f"{row.encode_mb_s:>10.0f}{row.decode_mb_s:>10.0f}{row.relative_error:>10.2g}", flush=True)
        speed_limits[vector] = limits(delta)
        for name, (bits, into, out) in speed_limits[vector].items():
            print(f"{name:<18}{bits / 8 * num_elements / 1e6:>8.2f}{bits:>9.4f}{32 / bits:>8.2f}", end="")
            print(f"{'':>31}{into:>10.0f}{out:>10.0f}{0:>10.2g}")
        for name, bits in OTHERS.items():
            print(f"{name:<18}{bits / 8 * num_elements / 1e6:>8.2f}{bits:>9.4f}{32 / bits:>8.2f}")

    memory: dict[str, dict[str, float]] = {}
    print("\npeak memory above the task vector, over the largest tensor's fp32 bytes (heavy-tailed)")
    for codec_name in ("fp32", "bf16", "int8", "int4/256", "seeded 10% int8", "top 64 lloyd2", "top 64 sign"):
        command = [sys.executable, __file__, "--memory-of", codec_name, *(["--quick"] if options.quick else [])]
        memory[codec_name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{codec_name:<18}encode {memory[codec_name]['encode']:.2f}, decode {memory[codec_name]['decode']:.2f}")

    print()
    verdicts = targets(rows, memory)
    for target in verdicts:
        print(f"{'holds ' if target.holds else 'MISSED'} {target.name} {target.goal:g}: {target.value:g}")
    if options.json:
        report = {
            "targets": [vars(target) for target in verdicts],
            "rows": [{**vars(row), "gap_percent": row.gap_percent} for row in rows],
            "limits": speed_limits,
            "memory": memory,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
