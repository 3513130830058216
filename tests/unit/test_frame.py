"""Delta files: round trips, a second decoder written from the format, and every way a file can lie."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import resource
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fedmerge.delta.codec import Codec
from fedmerge.delta.container import JSON_WORDS
from fedmerge.delta.frame import MAX_VALUE, DeltaFile, write_delta
from fedmerge.delta.inspection import inspect_delta
from fedmerge.delta.strata import positions
from fedmerge.errors import InputError, InvalidDelta, ModelMismatch, ResourceError
from fedmerge.seeds import derive_seed
from fedmerge.tensors import TensorMap, TensorSpec, schema_of

SEED = 2**40 + 7
CODECS = {
    "int8": Codec(),
    "bf16": Codec(values="bf16"),
    "fp16": Codec(values="fp16"),
    "fp32": Codec(values="fp32"),
    "seeded int8": Codec(sparsify="seeded", density=0.25, small_elements=8, block_size=64),
    "seeded bf16": Codec(sparsify="seeded", density=0.25, values="bf16", small_elements=0),
    "seeded fp32": Codec(sparsify="seeded", density=0.25, values="fp32", small_elements=0),
    "int4": Codec(values="int4", block_size=64),
    "lloyd3": Codec(values="lloyd3"),
    "lloyd2": Codec(values="lloyd2", block_size=100),
    "sign": Codec(values="sign", block_size=300),
    "seeded lloyd2": Codec(sparsify="seeded", density=0.25, values="lloyd2", small_elements=0),
    "topk fp32": Codec(sparsify="topk", density=1 / 64, values="fp32", small_elements=8),
    "topk bf16": Codec(sparsify="topk", density=0.25, values="bf16", small_elements=0),
    "topk int8": Codec(sparsify="topk", density=1 / 64, small_elements=8, block_size=8),
    "topk int4": Codec(sparsify="topk", density=1 / 64, values="int4", small_elements=8, block_size=8),
    "topk lloyd3": Codec(sparsify="topk", density=0.1, values="lloyd3", small_elements=8, block_size=64),
    "topk lloyd2": Codec(sparsify="topk", density=0.1, values="lloyd2", small_elements=0, block_size=64),
    "topk sign": Codec(sparsify="topk", density=0.01, values="sign", small_elements=8),
    "layerwise fp16": Codec(sparsify="layerwise_topk", density=1 / 64, values="fp16", small_elements=0),
    "layerwise sign": Codec(sparsify="layerwise_topk", density=0.1, values="sign", small_elements=8, block_size=64),
    "lowrank": Codec(sparsify="lowrank", rank=4),
    "lowrank bf16": Codec(sparsify="lowrank", rank=8, factors="bf16", values="fp16"),
}
each_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))

# Of the largest value: half of the absmax step for int8 and int4, half of an ulp for bf16, nothing for fp32. The few
# levels of the other types are no further from a value than the largest value is from zero.
RELATIVE_ERROR = {
    "int8": 1 / 254 + 2**-22,
    "int4": (1 + 2**-7) / 14 + 2**-20,
    "bf16": 2**-8,
    "fp16": 2**-11,
    "fp32": 0.0,
    "lloyd3": 1.0,
    "lloyd2": 1.0,
    "sign": 1.0 + 2**-8,
}
VALUE_TYPES = st.sampled_from(sorted(RELATIVE_ERROR))


def a_delta() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "embed.weight": torch.zeros(40, 16),
        "h.0.bias": torch.randn(7, generator=generator) * 1e-3,
        "h.0.weight": torch.randn(48, 33, generator=generator) * 1e-3,
        "scale": torch.tensor(0.25),
        "unused": torch.zeros(0, 5),
    }


class Written:
    """A delta file in parts, to be changed and put together again."""

    def __init__(self, path: Path, codec: Codec, delta: TensorMap | None = None) -> None:
        self.path, self.codec = path, codec
        self.delta = a_delta() if delta is None else delta
        self.schema = schema_of(self.delta)
        write_delta(path, self.delta, self.schema, codec, seed=SEED)
        self.frames, text = parts_of(path)
        self.header: dict[str, Any] = json.loads(text)

    def rewrite(self, header_text: str | None = None, **metadata: str) -> None:
        footer = packed(json.dumps(self.header) if header_text is None else header_text)
        payload = np.frombuffer(self.frames + footer, np.uint8)
        save_file({"payload": payload}, self.path, metadata={KEY: str(len(footer)), **metadata})

    def decode(self) -> dict[str, torch.Tensor]:
        return dict(DeltaFile(self.path, self.schema, self.codec, seed=SEED))


KEY = "fedmerge.delta.v2"


def parts_of(path: Path) -> tuple[bytes, str]:
    """Return the frames of a delta file and the text of its header."""
    payload = load_file(path)["payload"].tobytes()
    with safe_open(path, framework="np") as file:
        header_bytes = int(file.metadata()[KEY])
    words = zstandard.ZstdCompressionDict(JSON_WORDS, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    text = zstandard.ZstdDecompressor(dict_data=words).decompress(payload[-header_bytes:])
    return payload[:-header_bytes], text.decode()


def packed(text: str) -> bytes:
    words = zstandard.ZstdCompressionDict(JSON_WORDS, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return zstandard.ZstdCompressor(level=19, dict_data=words).compress(text.encode())


def assert_refused_or_sound(written: Written) -> bool:
    """Return whether the file decoded; anything but InvalidDelta, or a tensor out of order, is a failure."""
    try:
        decoded = written.decode()
    except InvalidDelta:
        return False
    assert decoded.keys() == written.schema.keys()
    for name, tensor in decoded.items():
        assert tensor.dtype == torch.float32
        assert tuple(tensor.shape) == written.schema[name].shape
        assert torch.isfinite(tensor).all()
    return True


# Round trips


@each_codec
def test_a_delta_comes_back_within_the_error_of_its_codec(codec: Codec, tmp_path: Path) -> None:
    delta = a_delta()
    write_delta(tmp_path / "d", delta, schema_of(delta), codec, seed=SEED)
    decoded = DeltaFile(tmp_path / "d", schema_of(delta), codec, seed=SEED)
    assert list(decoded) == sorted(delta)
    for name, tensor in delta.items():
        expected = tensor
        if codec.sparsify == "lowrank" and tensor.ndim == 2:
            continue  # test_lowrank.py has what is left of matrices
        dense = codec.sparsify == "none" or (tensor.ndim < 2 and tensor.numel() < codec.small_elements)
        if not dense and tensor.ndim > 0 and codec.sparsify == "topk":
            expected = largest(tensor, codec.density)
        elif not dense and tensor.ndim > 0 and codec.sparsify == "layerwise_topk":
            expected = largest(tensor, codec.density, chunk_elements=tensor.numel() or 1)
        elif not dense and tensor.ndim > 0 and codec.sparsify == "seeded":
            expected = torch.zeros(tensor.numel())
            kept = torch.from_numpy(positions(derive_seed(SEED, name), tensor.numel(), codec.density))
            sizes = torch.full_like(kept, 4)
            sizes[-1:] = (tensor.numel() - 1) % 4 + 1  # strata of 1 / 0.25 elements, the last of what is left
            expected[kept] = tensor.reshape(-1)[kept] * sizes
            expected = expected.reshape(tensor.shape)
        bound = RELATIVE_ERROR[codec.values] * expected.abs().max().item() if expected.numel() else 0
        assert decoded[name].shape == tensor.shape
        assert (decoded[name] - expected).abs().le(bound).all()


def largest(tensor: torch.Tensor, density: float, chunk_elements: int = 4096) -> torch.Tensor:
    """`tensor` with zeros for all but the largest elements of each chunk, by sorting."""
    dense = torch.zeros_like(tensor).reshape(-1)
    for start in range(0, tensor.numel(), chunk_elements):
        chunk = tensor.reshape(-1)[start : start + chunk_elements]
        num_kept = max(1, math.floor(density * chunk.numel() + 0.5))
        kept = chunk.abs().sort(descending=True, stable=True).indices[:num_kept]
        dense[start + kept] = chunk[kept]
    return dense.reshape(tensor.shape)


EDGES = [0.0, -0.0, 2.0**-149, -(2.0**-130), 1e-30, MAX_VALUE, -MAX_VALUE, 1.0]
ELEMENTS = st.floats(-MAX_VALUE, MAX_VALUE, width=32, allow_subnormal=True) | st.sampled_from(EDGES)


@given(
    array=arrays(np.float32, array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=5), elements=ELEMENTS),
    values=VALUE_TYPES,
    block_size=st.integers(8, 40),
)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_and_any_value_comes_back(
    array: npt.NDArray[np.float32], values: str, block_size: int, tmp_path: Path
) -> None:
    codec = Codec(values=values, block_size=block_size)
    delta = {"w": torch.from_numpy(array.copy())}
    write_delta(tmp_path / "d", delta, schema_of(delta), codec, seed=SEED)
    decoded = DeltaFile(tmp_path / "d", schema_of(delta), codec, seed=SEED)["w"].numpy()
    assert decoded.shape == array.shape
    assert decoded.dtype == np.float32
    if values == "fp32":
        np.testing.assert_array_equal(decoded, array)
    elif array.size:
        wide = array.astype(np.float64)
        scale = np.abs(wide) if values == "bf16" else np.abs(wide).max()
        if values == "fp16":  # half of an ulp, and for values that small, of the least fp16
            scale = np.maximum(np.abs(wide), 2.0**-28 * np.abs(wide).max())
        smallest = 2.0**-149 if values == "int8" else 2.0**-133
        assert (np.abs(decoded - wide) <= RELATIVE_ERROR[values] * scale + smallest).all()


@pytest.mark.parametrize("sparsify", ["none", "seeded", "topk", "lowrank"])
def test_small_vectors_arrive_exactly_where_the_plan_says_so(tmp_path: Path, sparsify: str) -> None:
    generator = torch.Generator().manual_seed(4)
    shapes = {"bias": (768,), "scale": (), "embedding": (5000,), "matrix": (64, 96)}
    delta = {name: torch.randn(shape, generator=generator) * 1e-3 for name, shape in shapes.items()}
    settings = {"rank": 4} if sparsify == "lowrank" else {} if sparsify == "none" else {"density": 0.05}
    codec = Codec.from_dict({"sparsify": sparsify, "values": "lloyd2", "small_values": "fp32", **settings})
    write_delta(tmp_path / "d", delta, schema_of(delta), codec, seed=1)
    arrived = DeltaFile(tmp_path / "d", schema_of(delta), codec, seed=1)
    assert [name for name in shapes if torch.equal(arrived[name], delta[name])] == ["bias", "scale"]


@given(
    array=arrays(np.float32, array_shapes(min_dims=1, max_dims=4, max_side=7), elements=ELEMENTS),
    values=VALUE_TYPES,
    density=st.floats(0.01, 0.999) | st.just(1.0),
    seed=st.integers(0, 2**64 - 1),
)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_seeded_delta_is_finite_or_refused_by_its_sender(
    array: npt.NDArray[np.float32], values: str, density: float, seed: int, tmp_path: Path
) -> None:
    codec = Codec(sparsify="seeded", density=density, values=values, small_elements=0)
    delta = {"w": torch.from_numpy(array.copy())}
    if np.abs(array).max() > MAX_VALUE * density:
        with pytest.raises(InputError, match=r"w: .* beyond"):
            write_delta(tmp_path / "d", delta, schema_of(delta), codec, seed=seed)
        return
    write_delta(tmp_path / "d", delta, schema_of(delta), codec, seed=seed)
    decoded = DeltaFile(tmp_path / "d", schema_of(delta), codec, seed=seed)["w"]
    assert torch.isfinite(decoded).all()
    decoded.view(-1)[torch.from_numpy(positions(derive_seed(seed, "w"), array.size, density))] = 0
    assert not decoded.any()


@given(
    array=arrays(np.float32, array_shapes(min_dims=1, max_dims=3, max_side=9), elements=ELEMENTS),
    values=VALUE_TYPES,
    density=st.floats(1e-6, 1.0) | st.just(1.0),
    block_size=st.integers(8, 40),
)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_topk_delta_comes_back(
    array: npt.NDArray[np.float32], values: str, density: float, block_size: int, tmp_path: Path
) -> None:
    codec = Codec(sparsify="topk", density=density, values=values, small_elements=0, block_size=block_size)
    delta = {"w": torch.from_numpy(array * np.float32(density / 2))}
    write_delta(tmp_path / "d", delta, schema_of(delta), codec, seed=SEED)
    decoded = DeltaFile(tmp_path / "d", schema_of(delta), codec, seed=SEED)["w"]
    expected = largest(delta["w"], density)
    assert decoded.shape == expected.shape
    bound = RELATIVE_ERROR[values] * expected.double().abs().max() + (0 if values == "fp32" else 2.0**-133)
    assert (decoded.double() - expected).abs().max() <= bound
    assert decoded.count_nonzero() <= max(1, math.floor(density * array.size + 0.5))


def decode_from_the_format(path: Path, codec: Codec) -> dict[str, npt.NDArray[np.float64]]:
    """The decoder again, in plain numpy and fp64, from the description of the format."""
    data, text = parts_of(path)
    header = json.loads(text)
    tensors = dict(flat("", header["tensors"]))
    frames: list[list[str]] = []
    room = 0
    for name, (shape, encoding) in tensors.items():
        num_bytes = sum(sizes_from_the_format(shape, encoding or default_encoding(shape, codec), codec).values())
        if not frames or room <= 0 or num_bytes > room:
            frames.append([])
            room = 65536
        frames[-1].append(name)
        room -= num_bytes
    assert len(frames) == len(header["frames"])
    result = {}
    for names, lengths in zip(frames, header["frames"], strict=True):
        encodings = {name: tensors[name][1] or default_encoding(tensors[name][0], codec) for name in names}
        sizes = {name: sizes_from_the_format(tensors[name][0], encodings[name], codec) for name in names}
        kinds = dict.fromkeys((encodings[name], kind) for name in names for kind in sizes[name])
        pools: dict[tuple[str, str], bytes] = {}
        for (encoding, kind), coded_bytes in zip(kinds, lengths, strict=True):
            coded, data = data[:coded_bytes], data[coded_bytes:]
            raw_bytes = sum(sizes[name].get(kind, 0) for name in names if encodings[name] == encoding)
            is_coded = coded_bytes < raw_bytes
            pools[encoding, kind] = zstandard.ZstdDecompressor().decompress(coded) if is_coded else coded
            assert len(pools[encoding, kind]) == raw_bytes
        for name in names:
            parts = {}
            for kind, size in sizes[name].items():
                pool = pools[encodings[name], kind]
                parts[kind] = np.frombuffer(pool[:size], np.uint8).astype(np.uint64)
                pools[encodings[name], kind] = pool[size:]
            result[name] = tensor_from_the_format(name, parts, tensors[name][0], encodings[name], codec)
        assert not any(pools.values())
    assert not data
    return result


def flat(name: str, node: Any) -> Iterator[tuple[str, tuple[list[int], str]]]:
    if isinstance(node, dict):
        for key, below in node.items():
            yield from flat(name + key, below)
    else:
        named = bool(node) and isinstance(node[-1], str)
        yield name, (node[:-1], node[-1]) if named else (node, "")


def default_encoding(shape: list[int], codec: Codec) -> str:
    if 0 in shape:
        return "zero"
    is_small = len(shape) == 0 or (len(shape) == 1 and shape[0] < codec.small_elements)
    return codec.values if codec.sparsify in {"none", "lowrank"} or is_small else f"{codec.sparsify}+{codec.values}"


def sizes_from_the_format(shape: list[int], encoding: str, codec: Codec) -> dict[str, int]:
    sparsifier, _, values = encoding.rpartition("+")
    size = math.prod(shape)
    chunks = [min(4096, size - start) for start in range(0, size, 4096)]
    indices: dict[str, int] = {}
    if encoding == "zero":
        return {}
    if sparsifier.startswith("lowrank"):
        rank = int(sparsifier.removeprefix("lowrank"))
        sides = {"left": rank * shape[0], "right": rank * shape[1]}
        parts = {f"{side}_{k}": n for side, m in sides.items() for k, n in value_sizes(m, values, codec).items()}
        return {"scale": 8, **parts}
    if sparsifier == "seeded":
        size = math.ceil(size * round(codec.density * 2**32) / 2**32)
    elif sparsifier == "topk":
        size = sum(max(1, math.floor(codec.density * chunk + 0.5)) for chunk in chunks)
    elif sparsifier == "layerwise_topk":
        size = max(1, math.floor(codec.density * size + 0.5))
        indices = {"counts_low": len(chunks), "counts_high": len(chunks)}
    if sparsifier.endswith("topk"):
        halved = -(-size // 2)
        low, high = (halved, size) if codec.density < 1 / 40 else (size, halved)
        indices |= {"gaps_low": low, "gaps_high": high}
    return {**indices, **value_sizes(size, values, codec)}


def value_sizes(num_values: int, values: str, codec: Codec) -> dict[str, int]:
    planes = {"fp32": 4, "bf16": 2, "fp16": 2}
    if values in planes:
        exponent = {"exponent": 1} if values == "fp16" else {}
        return {**exponent, **{f"plane{i}": num_values for i in range(planes[values])}}
    num_blocks = -(-num_values // codec.block_size)
    scale_bytes, per_byte = {"int8": (4, 1), "int4": (2, 2), "lloyd3": (2, 2), "lloyd2": (2, 4), "sign": (2, 8)}[values]
    return {"scales": scale_bytes * num_blocks, "codes": -(-num_values // per_byte)}


def tensor_from_the_format(
    name: str, parts: dict[str, npt.NDArray[np.uint64]], shape: list[int], encoding: str, codec: Codec
) -> npt.NDArray[np.float64]:
    size = math.prod(shape)
    dense = np.zeros(size)
    if encoding.startswith("lowrank"):
        return product_from_the_format(parts, shape, encoding, codec)
    if encoding.startswith("seeded+"):
        starts = [int(i / codec.density) for i in range(math.ceil(size * codec.density))]
        words = np.random.Philox(key=derive_seed(SEED, name)).random_raw(len(starts) // 2 + 1)
        draws = np.stack([words & 0xFFFFFFFF, words >> 32], axis=1).reshape(-1)[: len(starts)]
        sizes = np.diff([*starts, size])
        kept = values_from_the_format(parts, codec, len(starts)) * sizes
        dense[starts + (draws * sizes.astype(np.uint64) >> 32).astype(np.int64)] = kept
    elif "topk+" in encoding:
        indices = indices_from_the_format(parts, size, codec.density)
        dense[indices] = values_from_the_format(parts, codec, len(indices))
    elif encoding != "zero":
        dense[:] = values_from_the_format(parts, codec, size)
    return dense.reshape(shape)


def product_from_the_format(
    parts: dict[str, npt.NDArray[np.uint64]], shape: list[int], encoding: str, codec: Codec
) -> npt.NDArray[np.float64]:
    rank, _, values = encoding.removeprefix("lowrank").partition("+")
    sides = []
    for side, size in zip(("left", "right"), shape, strict=True):
        own = {kind.removeprefix(f"{side}_"): part for kind, part in parts.items() if kind.startswith(side)}
        sides.append(values_from_the_format(own, replace(codec, values=values), int(rank) * size))
    (scale,) = parts["scale"].astype(np.uint8).view("<f8")
    result: npt.NDArray[np.float64] = scale * sides[0].reshape(-1, int(rank)) @ sides[1].reshape(int(rank), -1)
    return result


def indices_from_the_format(parts: dict[str, npt.NDArray[np.uint64]], num_elements: int, density: float) -> list[int]:
    low_bits = 4 if density < 1 / 40 else 8
    low, high = parts["gaps_low"].tolist(), parts["gaps_high"].tolist()
    if low_bits == 4:
        low = [digit for byte in low for digit in (byte % 16, byte // 16)]
    else:
        high = [digit for byte in high for digit in (byte % 16, byte // 16)]
    indices, gap = [], 0
    for start in range(0, num_elements, 4096):
        index = start - 1
        num_kept = max(1, math.floor(density * min(4096, num_elements - start) + 0.5))
        if "counts_low" in parts:
            num_kept = int(parts["counts_low"][start // 4096] + 256 * parts["counts_high"][start // 4096])
        for _ in range(num_kept):
            index += 1 + low[gap] + 2**low_bits * high[gap]
            indices.append(index)
            gap += 1
    return indices


LEVELS = {
    "int4": list(range(-7, 8)),
    "lloyd3": [-2.1519, -1.3439, -0.7560, -0.2451, 0.2451, 0.7560, 1.3439, 2.1519],
    "lloyd2": [-1.5104, -0.4528, 0.4528, 1.5104],
    "sign": [-1, 1],
}


def values_from_the_format(
    parts: dict[str, npt.NDArray[np.uint64]], codec: Codec, num_values: int
) -> npt.NDArray[np.float64]:
    def floats(planes: list[npt.NDArray[np.uint64]], width: int) -> npt.NDArray[np.float64]:
        rotated = np.zeros(planes[0].size, np.uint64)
        for i, plane in enumerate(planes):
            rotated |= plane << np.uint64(8 * i)
        bits = (rotated >> 1) | ((rotated & 1) << np.uint64(8 * width - 1))
        return (bits << np.uint64(32 - 8 * width)).astype(np.uint32).view(np.float32).astype(np.float64)

    if codec.values == "int8":
        scales = floats(list(parts["scales"].reshape(4, -1)), 4)
        codes: npt.NDArray[np.int8] = parts["codes"].astype(np.uint8).view(np.int8)
        values: npt.NDArray[np.float64] = codes * np.repeat(scales, codec.block_size)[: codes.size]
        return values
    if codec.values in LEVELS:
        levels = np.array(LEVELS[codec.values], np.float64)
        per_byte = {"int4": 2, "lloyd3": 2, "lloyd2": 4, "sign": 8}[codec.values]
        digits = [int(byte) // levels.size**i % levels.size for byte in parts["codes"] for i in range(per_byte)]
        scales = floats(list(parts["scales"].reshape(2, -1)), 2)
        scaled: npt.NDArray[np.float64] = np.repeat(scales, codec.block_size)[:num_values]
        return levels[digits[:num_values]] * scaled
    planes = [parts[kind] for kind in sorted(parts) if kind.startswith("plane")]
    if codec.values == "fp16":
        rotated = planes[0] | planes[1] << np.uint64(8)
        halves = ((rotated >> 1) | ((rotated & 1) << np.uint64(15))).astype(np.uint16).view(np.float16)
        return halves.astype(np.float64) * 2.0 ** (int(parts["exponent"][0]) - 112 - 15)
    return floats(planes, len(planes))


@each_codec
def test_a_second_decoder_written_from_the_format_agrees(codec: Codec, tmp_path: Path) -> None:
    written = Written(tmp_path / "d", codec)
    reference = decode_from_the_format(written.path, codec)
    for name, tensor in written.decode().items():
        np.testing.assert_allclose(tensor.double().numpy(), reference[name], rtol=2.0**-22, atol=1e-12)


@each_codec
def test_the_same_delta_gives_the_same_bytes(codec: Codec, tmp_path: Path) -> None:
    delta = a_delta()
    write_delta(tmp_path / "a", delta, schema_of(delta), codec, seed=SEED)
    write_delta(tmp_path / "b", dict(reversed(delta.items())), schema_of(delta), codec, seed=SEED)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_file_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    written = Written(tmp_path / "d", CODECS["topk int4"])
    data = written.path.read_bytes()
    written.rewrite(parts_of(written.path)[1])
    assert (tmp_path / "d").read_bytes() == data
    write_delta(tmp_path / "new", written.delta, written.schema, written.codec, seed=SEED)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600


@given(sizes=st.lists(st.integers(0, 1500), min_size=1, max_size=80), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tensors_share_frames_of_64_kib(sizes: list[int], seed: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta = {
        f"block.{i}.{'w' * (size % 3)}": torch.randn(size, 30, generator=generator) for i, size in enumerate(sizes)
    }
    codec = Codec(values="bf16")
    written = Written(tmp_path / "d", codec, delta)
    assert len(written.header["frames"]) <= 1 + sum(60 * size for size in sizes) // (1 << 15)
    file = DeltaFile(written.path, written.schema, codec, seed=SEED)
    for name in sorted(delta, key=lambda name: derive_seed(seed, name)):  # in any order
        assert torch.equal(file[name], delta[name].bfloat16().float())
    for name, values in decode_from_the_format(written.path, codec).items():
        np.testing.assert_array_equal(values, delta[name].bfloat16().double().numpy())


@given(st.lists(st.text(st.sampled_from("ab.-0"), max_size=6), min_size=1, max_size=20, unique=True))
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_names_come_back(tmp_path: Path, names: list[str]) -> None:
    delta = {name: torch.full((2,), float(number + 1)) for number, name in enumerate(names)}
    write_delta(tmp_path / "d", delta, schema_of(delta), Codec(values="fp32"), seed=SEED)
    decoded = DeltaFile(tmp_path / "d", schema_of(delta), Codec(values="fp32"), seed=SEED)
    assert {name: tensor.tolist() for name, tensor in decoded.items()} == {n: t.tolist() for n, t in delta.items()}


def test_a_name_of_too_many_dots_is_refused(tmp_path: Path) -> None:
    for num_dots in (65, 5000):
        delta = {"." * num_dots: torch.ones(2)}
        with pytest.raises(InputError, match="more than 64 dots"):
            write_delta(tmp_path / "d", delta, schema_of(delta), Codec(), seed=SEED)


def test_a_file_of_many_small_tensors_is_hardly_more_than_their_values(tmp_path: Path) -> None:
    """A transformer's 16 tensors a layer, 24 times: under two bytes of the file for each of them beside its scale."""
    generator = torch.Generator().manual_seed(0)
    parts = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    parts += ["attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"]
    names = [f"encoder.layer.{layer}.{part}.{kind}" for layer in range(24) for part in parts for kind in ("a", "b")]
    delta = {name: torch.randn(64, generator=generator) for name in names}
    codec = Codec(values="sign", block_size=64)
    stats = write_delta(tmp_path / "d", delta, schema_of(delta), codec, seed=SEED)
    assert stats.payload_bytes < len(names) * (64 // 8 + 2 + 2)


class Computed(dict[str, torch.Tensor]):
    """A delta whose tensors are made anew whenever they are asked for."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.randn(super().__getitem__(name).shape, generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize("values", ["fp32", "int8"])
def test_no_frame_stays_in_memory(values: str, tmp_path: Path) -> None:
    delta = Computed({"w" * number: torch.zeros(1 << 18).expand(1 << 18) for number in range(1, 21)})
    write_delta(tmp_path / "d", delta, schema_of(delta), Codec(values=values), seed=SEED)  # compiles kernels
    tracemalloc.start()  # of which numpy and zstandard tell, torch does not
    stats = write_delta(tmp_path / "d", delta, schema_of(delta), Codec(values=values), seed=SEED)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 3 * 4 * (1 << 18) < stats.payload_bytes


def test_stats_count_what_is_there(tmp_path: Path) -> None:
    delta = a_delta()
    codec = CODECS["seeded int8"]
    stats = write_delta(tmp_path / "d", delta, schema_of(delta), codec, seed=SEED)
    assert stats.num_elements == 40 * 16 + 7 + 48 * 33 + 1
    assert stats.dense_bytes == 4 * stats.num_elements
    assert stats.payload_bytes == (tmp_path / "d").stat().st_size
    assert stats.bits_per_parameter == 8 * stats.payload_bytes / stats.num_elements
    # h.0.bias has fewer than small_elements elements, and the scalar has none of the dimensions it would take.
    assert stats.encodings == {"zero": 2, "int8": 2, "seeded+int8": 1}
    assert DeltaFile(tmp_path / "d", schema_of(delta), codec, seed=SEED).stats == stats


def test_frozen_layers_cost_nothing(tmp_path: Path) -> None:
    delta = {"a": torch.zeros(1000, 1000), "b": -torch.zeros(10)}
    stats = write_delta(tmp_path / "d", delta, schema_of(delta), Codec(), seed=SEED)
    assert stats.payload_bytes < 1000
    assert stats.encodings == {"zero": 2}


# The most over the entropy, in percent: what Huffman codes of whole bytes and bf16 scales cost.
@pytest.mark.parametrize(
    ("codec", "num_levels", "most_percent"),
    [
        (Codec(values="int4", block_size=64), 15, 6.5),
        (Codec(values="lloyd3", block_size=256), 8, 2.5),
        (Codec(values="lloyd2", block_size=256), 4, 4),
        (Codec(values="sign", block_size=1024), 2, 2),
    ],
    ids=lambda param: param.values if isinstance(param, Codec) else None,
)
def test_few_bits_come_close_to_their_entropy(
    codec: Codec, num_levels: int, most_percent: float, tmp_path: Path
) -> None:
    delta = {"w": torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))}
    stats = write_delta(tmp_path / "d", delta, schema_of(delta), codec, seed=SEED)
    decoded = DeltaFile(tmp_path / "d", schema_of(delta), codec, seed=SEED)["w"]
    # Ranks of the decoded values within their blocks stand for the codes.
    blocks = decoded.view(-1, codec.block_size).numpy()
    symbols = np.rint(blocks / np.abs(blocks).max(axis=1, keepdims=True) * 1000)
    counts = np.unique(symbols, return_counts=True)[1] / symbols.size
    assert counts.size >= num_levels
    entropy = float(-(counts * np.log2(counts)).sum())
    assert stats.bits_per_parameter < entropy * (1 + most_percent / 100)


@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_gaussian_values_come_close_to_their_entropy(values: str, tmp_path: Path) -> None:
    delta = {"w": torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))}
    stats = write_delta(tmp_path / "d", delta, schema_of(delta), Codec(values=values), seed=SEED)
    if values == "int8":
        scale = delta["w"].view(-1, 1024).abs().amax(dim=1, keepdim=True) / 127
        symbols, rest = (delta["w"].view(-1, 1024) / scale).round().numpy(), 0.0
    else:
        symbols, rest = np.frexp(delta["w"].to(torch.bfloat16).float().numpy())[1], 8.0
    counts = np.unique(symbols, return_counts=True)[1] / symbols.size
    bound = float(-(counts * np.log2(counts)).sum()) + rest
    assert bound - 0.01 < stats.bits_per_parameter < bound * 1.02


def test_integer_tensors_of_the_schema_have_no_frame(tmp_path: Path) -> None:
    schema = {"w": TensorSpec((3,), "BF16"), "position_ids": TensorSpec((5,), "I64")}
    delta = {"w": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}
    codec = Codec(values="fp32")
    write_delta(tmp_path / "d", delta, schema, codec, seed=SEED)
    decoded = DeltaFile(tmp_path / "d", schema, codec, seed=SEED)
    assert {name: tensor.tolist() for name, tensor in decoded.items()} == {"w": [1.0, 2.0, 3.0]}
    assert decoded["w"].dtype == torch.float32


def test_a_delta_in_another_memory_layout_is_the_same_delta(tmp_path: Path) -> None:
    base = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    for name, tensor in {"a": base.T, "b": base.T.contiguous()}.items():
        write_delta(tmp_path / name, {"w": tensor}, schema_of({"w": tensor}), Codec(), seed=SEED)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# What the writer refuses


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.pop("scale"), "misses scale"),
        (lambda d: d.update(extra=torch.zeros(2)), "has unknown extra"),
        (lambda d: d.update(scale=torch.zeros(1)), r"scale has shape \[1\], not \[\]"),
    ],
)
def test_write_refuses_a_delta_of_another_model(
    change: Callable[[dict[str, torch.Tensor]], Any], match: str, tmp_path: Path
) -> None:
    delta = a_delta()
    schema = schema_of(delta)
    change(delta)
    with pytest.raises(ModelMismatch, match=match):
        write_delta(tmp_path / "d", delta, schema, Codec(), seed=SEED)
    assert list(tmp_path.iterdir()) == []


@each_codec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_write_refuses_values_that_can_not_travel(codec: Codec, value: float, tmp_path: Path) -> None:
    delta = a_delta()
    delta["h.0.weight"][3, 5] = value
    with pytest.raises(InputError, match=r"h\.0\.weight: 1 values"):
        write_delta(tmp_path / "d", delta, schema_of(delta), codec, seed=SEED)


def test_write_reports_a_disk_that_does_not_take_it(tmp_path: Path) -> None:
    delta = {"w": torch.randn(100_000, generator=torch.Generator().manual_seed(0))}
    write_delta(tmp_path / "d", {"w": torch.zeros(100_000)}, schema_of(delta), Codec(), seed=SEED)
    before = (tmp_path / "d").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # the same EFBIG/ENOSPC path as a full disk
    try:
        with pytest.raises(ResourceError, match="could not be written"):
            write_delta(tmp_path / "d", delta, schema_of(delta), Codec(), seed=SEED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert (tmp_path / "d").read_bytes() == before


def test_write_reports_a_folder_that_is_not_there(tmp_path: Path) -> None:
    delta = a_delta()
    with pytest.raises(ResourceError):
        write_delta(tmp_path / "nowhere" / "d", delta, schema_of(delta), Codec(), seed=SEED)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResourceError):
        write_delta(tmp_path / "folder", delta, schema_of(delta), Codec(), seed=SEED)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# What the reader refuses: the plan comes from outside the file


def test_the_file_must_agree_with_the_plan(tmp_path: Path) -> None:
    written = Written(tmp_path / "d", CODECS["seeded int8"])
    for other in (Codec(), Codec(sparsify="seeded", density=0.25, small_elements=8, block_size=128)):
        with pytest.raises(InvalidDelta, match="the plan's is"):
            DeltaFile(written.path, written.schema, other, seed=SEED)
    larger = {**written.schema, "more": TensorSpec((2,), "F32")}
    with pytest.raises(InvalidDelta, match="more: missing"):
        DeltaFile(written.path, larger, written.codec, seed=SEED)
    smaller = {name: spec for name, spec in written.schema.items() if name != "scale"}
    with pytest.raises(InvalidDelta, match="scale: not a tensor of this model"):
        DeltaFile(written.path, smaller, written.codec, seed=SEED)
    turned = {**written.schema, "h.0.weight": TensorSpec((33, 48), "F32")}
    with pytest.raises(InvalidDelta, match=r"h\.0\.weight: shape is \[48, 33\], not \[33, 48\]"):
        DeltaFile(written.path, turned, written.codec, seed=SEED)


def test_a_missing_file_and_an_unknown_name(tmp_path: Path) -> None:
    written = Written(tmp_path / "d", Codec())
    with pytest.raises(KeyError):
        DeltaFile(written.path, written.schema, written.codec, seed=SEED)["nothing"]
    for read in (inspect_delta, lambda path: DeltaFile(path, written.schema, Codec(), seed=SEED)):
        with pytest.raises(InputError, match="could not read"):
            read(tmp_path / "nowhere")


W = "h.0.weight"


def _set(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        node: Any = header
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = to

    return change


LEAF = ("tensors", "h.", "0.", "weight")

LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "codec value": (_set("codec", "block_size", to=512), "the plan's is"),
    "codec type": (_set("codec", "block_size", to="1024"), "block_size"),
    "codec key": (_set("codec", "levels", to=1), "levels"),
    "codec default": (_set("codec", "block_size", to=1024), "as it would be written"),
    "codec name": (_set("codec", "values", to="int3"), "int3"),
    "codec name of a megabyte": (_set("codec", "values", to="x" * 1_000_000), "codec.values: unknown name"),
    "codec gone": (lambda h: h.pop("codec"), "codec"),
    "unknown key": (_set("note", to="hello"), "note"),
    "shape": (_set(*LEAF, to=[48, 34]), W),
    "shape transposed": (_set(*LEAF, to=[33, 48]), W),
    "shape negative": (_set(*LEAF, to=[-48, -33]), W),
    "shape of huge numbers": (_set(*LEAF, to=[10**4000]), W),
    "shape of a huge product": (_set(*LEAF, to=[1 << 40, 1 << 40]), W),
    "shape of floats": (_set(*LEAF, to=[48.0, 33.0]), W),
    "shape of true": (_set(*LEAF, to=[48, True]), W),
    "shape of many sizes": (_set(*LEAF, to=[1 << 47] * 100_000), W),
    "shape a number": (_set(*LEAF, to=5), W),
    "shape a text": (_set(*LEAF, to="48"), W),
    "encoding unknown": (_set(*LEAF, to=[48, 33, "pickle"]), f"{W}: encoding"),
    "encoding of another codec": (_set(*LEAF, to=[48, 33, "bf16"]), f"{W}: encoding"),
    "encoding seeded": (_set(*LEAF, to=[48, 33, "seeded+int8"]), f"{W}: encoding"),
    "encoding of three factors": (_set(*LEAF, to=[4, 4, 99, "lowrank1+fp32"]), f"{W}: encoding"),
    "encoding that follows": (_set(*LEAF, to=[48, 33, "int8"]), f"{W}: encoding"),
    "encoding twice": (_set(*LEAF, to=[48, 33, "zero", "zero"]), f"{W}: shape"),
    "encoding zero with sections": (_set(*LEAF, to=[48, 33, "zero"]), "section"),
    "zero tensor as int8": (_set("tensors", "embed.", "weight", to=[40, 16]), "section"),
    "coded bytes fewer": (_set("frames", 0, 1, to=3), "as the header says"),
    "coded bytes negative": (_set("frames", 0, 1, to=-3), "frames.0.1"),
    "coded bytes true": (_set("frames", 0, 1, to=True), "frames.0.1"),
    "section missing": (lambda h: h["frames"][0].pop(0), "as the header says"),
    "section more": (lambda h: h["frames"][0].append(0), "embed.weight to unused: sections are"),
    "frame more": (lambda h: h["frames"].append([]), "2 frames"),
    "frame missing": (lambda h: h["frames"].clear(), "as the header says"),
    "frames none": (_set("frames", to=None), "frames"),
    "tensor missing": (lambda h: h["tensors"]["h."]["0."].pop("weight"), W),
    "tensor extra": (lambda h: h["tensors"].update(zzz=[2]), "zzz"),
    "tensors a list": (lambda h: h.update(tensors=list(h["tensors"])), "tensors"),
    "tensors out of order": (
        lambda h: h["tensors"].update(embed_=h["tensors"].pop("embed.")),
        "as it would be written",
    ),
    "names in another order": (
        lambda h: h["tensors"].update(scale=h["tensors"].pop("scale")),
        "as it would be written",
    ),
    "two dots in one part": (lambda h: h["tensors"].update({"h.0.": h["tensors"].pop("h.")["0."]}), "as it would"),
    "a branch without leaves": (_set("tensors", "z.", to={}), "as it would be written"),
    "a branch of many levels": (_set("tensors", "z.", to=json.loads('{"a.":' * 400 + "[]" + "}" * 400)), "64 dots"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_by_name(lie: str, tmp_path: Path) -> None:
    written = Written(tmp_path / "d", Codec())
    change, expected = LIES[lie]
    change(written.header)
    written.rewrite()
    with pytest.raises(InvalidDelta) as caught:
        written.decode()
    assert expected in caught.value.message
    assert len(caught.value.message) < 1000


def test_sections_that_move_bytes_between_them_are_refused(tmp_path: Path) -> None:
    written = Written(tmp_path / "d", Codec())
    written.header["frames"][0][0] += 1
    written.header["frames"][0][1] -= 1
    written.rewrite()
    with pytest.raises(InvalidDelta, match=r"embed.weight to unused: section int8 scales"):
        written.decode()


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{", "1" * 5000, "[" * 100_000, '{"format": "fedmerge.delta"}', '"\\ud800"', '{"\\ud800": 1}'],
)
def test_a_header_that_is_no_header_is_refused(text: str, tmp_path: Path) -> None:
    written = Written(tmp_path / "d", Codec())
    written.rewrite(header_text=text)
    with pytest.raises(InvalidDelta):
        written.decode()
    with pytest.raises(InvalidDelta):
        inspect_delta(written.path)


def test_a_key_that_appears_twice_is_refused(tmp_path: Path) -> None:
    written = Written(tmp_path / "d", Codec())
    text = json.dumps(written.header)
    written.rewrite(header_text='{"codec": {}, ' + text[1:])
    with pytest.raises(InvalidDelta, match="appears twice"):
        written.decode()


def test_other_metadata_and_other_tensors_are_refused(tmp_path: Path) -> None:
    written = Written(tmp_path / "d", Codec())
    written.rewrite(format="pt")
    with pytest.raises(InvalidDelta, match="metadata keys"):
        written.decode()
    written.rewrite()
    payload = load_file(written.path)["payload"]
    length = str(payload.size - len(written.frames))
    for metadata in (None, {}, {"fedmerge.delta.v1": length}, {"fedmerge.delta.v3": length}):
        save_file({"payload": payload}, written.path, metadata=metadata)
        with pytest.raises(InvalidDelta, match="not a delta file of this version: metadata keys are"):
            written.decode()
    for text in (
        "",
        "0",
        f"0{length}",
        f"-{length}",
        f" {length}",
        "x",
        "1e2",
        str(payload.size + 1),
        "9" * 5000,
        "\u0661",
    ):
        save_file({"payload": payload}, written.path, metadata={KEY: text})
        with pytest.raises(InvalidDelta, match="the header's length is"):
            written.decode()
    for text in (str(int(length) + 1), str(int(length) - 1), str(payload.size)):
        save_file({"payload": payload}, written.path, metadata={KEY: text})
        with pytest.raises(InvalidDelta, match="header"):
            written.decode()
    for changed in (payload.view(np.int8), payload.reshape(1, -1)):
        save_file({"payload": changed}, written.path, metadata={KEY: length})
        with pytest.raises(InvalidDelta, match=r"payload: is .*, not a byte string"):
            written.decode()
    for changed in (payload[1:], np.append(payload[:1], payload)):
        save_file({"payload": changed}, written.path, metadata={KEY: length})
        with pytest.raises(InvalidDelta, match="not as many as the header says"):
            written.decode()
    for names in (["payload", "more"], ["frames"], []):
        save_file(dict.fromkeys(names, payload), written.path, metadata={KEY: length})
        with pytest.raises(InvalidDelta, match="not 'payload' alone"):
            written.decode()


def test_sizes_are_checked_before_the_file_is_opened(tmp_path: Path) -> None:
    written = Written(tmp_path / "d", Codec())
    data = written.path.read_bytes()
    written.path.write_bytes(((16 << 20) + 1).to_bytes(8, "little") + data[8:])
    with pytest.raises(InvalidDelta, match="header is over the limit"):
        written.decode()
    written.path.write_bytes(data)
    with written.path.open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(InvalidDelta, match="more than this model can need"):
        written.decode()


def replace_section(written: Written, section: int, coded: bytes) -> None:
    """Put `coded` in the place of a section of the only frame, with a header that agrees."""
    (lengths,) = written.header["frames"]
    start = sum(lengths[:section])
    written.frames = written.frames[:start] + coded + written.frames[start + lengths[section] :]
    lengths[section] = len(coded)
    written.rewrite()


def alone(path: Path, codec: Codec) -> Written:
    """A file with one tensor, so that sections are its own."""
    return Written(path, codec, {W: a_delta()[W]})


NUM_VALUES = 256 * 256
GOOD = bytes(range(100)) + bytes(NUM_VALUES - 100)
MIB = 1 << 20


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def zstd_without_size(data: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(data) + compressor.flush()


def declaring(size: int, coded: bytes, descriptor: bytes = b"\xe0") -> bytes:
    """The blocks of a zstd frame behind a header that declares `size` bytes (RFC 8878, section 3.1.1.1)."""
    return b"\x28\xb5\x2f\xfd" + descriptor + size.to_bytes(8, "little") + coded[zstandard.frame_header_size(coded) :]


def skippable(size: int) -> bytes:
    return b"\x50\x2a\x4d\x18" + size.to_bytes(4, "little") + bytes(size)


BOMBS: dict[str, Callable[[], bytes]] = {
    "expands to 64 MiB": lambda: zstd(bytes(64 * MIB)),
    "expands to 64 MiB, size not declared": lambda: zstd_without_size(bytes(64 * MIB)),
    "expands to 64 MiB, declares the right size": lambda: declaring(NUM_VALUES, zstd(bytes(64 * MIB))),
    "declares a petabyte": lambda: declaring(1 << 50, zstd(GOOD)),
    "declares the right size, holds less": lambda: declaring(NUM_VALUES, zstd(bytes(200))),
    "right size, not declared": lambda: zstd_without_size(GOOD),
    "a window of two terabytes": lambda: declaring(NUM_VALUES, zstd(GOOD), b"\xc0\xf8"),
    "a second frame after it": lambda: zstd(GOOD) + zstd(GOOD),
    "a skippable frame after it": lambda: zstd(GOOD) + skippable(4),
    "a skippable frame before it": lambda: skippable(4) + zstd(GOOD),
    "only a skippable frame": lambda: skippable(NUM_VALUES - 100),
    "bytes after it": lambda: zstd(GOOD) + b"\0",
    "cut short": lambda: zstd(GOOD)[:-1],
    "cut to its header": lambda: zstd(GOOD)[:9],
    "too short": lambda: zstd(GOOD)[:3],
    "empty": lambda: b"",
    "not zstd": lambda: b"\x1f\x8b" + bytes(100),
    "one value too many": lambda: zstd(GOOD + b"\0"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_frame_does_not_expand_past_its_tensor(bomb: str, tmp_path: Path) -> None:
    written = Written(tmp_path / "d", Codec(), {W: torch.ones(256, 256)})
    replace_section(written, 1, BOMBS[bomb]())
    tracemalloc.start()
    with pytest.raises(InvalidDelta, match=r"h\.0\.weight: section int8 codes"):
        written.decode()
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2 * MIB


@pytest.mark.parametrize("coded", [zstd(GOOD), declaring(NUM_VALUES, zstd(GOOD))])
def test_a_replaced_section_that_is_right_is_taken(coded: bytes, tmp_path: Path) -> None:
    """Guards the test above: what it replaces is where the values are, and its headers can be right."""
    written = Written(tmp_path / "d", Codec(), {W: torch.ones(256, 256)})
    replace_section(written, 1, coded)
    assert written.decode()[W].reshape(-1).nonzero().reshape(-1).tolist() == list(range(1, 100))


def test_a_header_that_declares_a_huge_tensor_allocates_nothing(tmp_path: Path) -> None:
    written = Written(tmp_path / "d", Codec())
    huge = 1 << 46
    written.header["tensors"]["embed."]["weight"] = [huge]
    written.header["frames"] = [[0, 0], written.header["frames"][0]]
    written.rewrite()
    tracemalloc.start()
    with pytest.raises(InvalidDelta, match=r"embed\.weight: shape"):
        written.decode()
    assert inspect_delta(written.path)["claims"]["tensors"]["embed.weight"]["shape"] == [huge]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("values", "exponents"),
    [("fp32", 3), ("bf16", 1)],
)
def test_values_must_be_finite(values: str, exponents: int, tmp_path: Path) -> None:
    written = alone(tmp_path / "d", Codec(values=values))
    replace_section(written, exponents, zstd(b"\xff" * 48 * 33))
    with pytest.raises(InvalidDelta, match=r"h\.0\.weight: 1584 values are NaN or infinite"):
        written.decode()


def test_a_file_that_shrinks_or_goes_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    delta = {"w": torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))}
    path, schema, codec = tmp_path / "d", schema_of(delta), Codec(values="fp32")
    write_delta(path, delta, schema, codec, seed=0)
    opened = DeltaFile(path, schema, codec, seed=0)
    whole = opened["w"]
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match="shorter than when it was opened"):
        opened["w"]
    path.unlink()
    with pytest.raises(InputError, match="could not be read"):
        opened["w"]
    assert torch.equal(whole, delta["w"])


def test_rescaling_must_not_overflow(tmp_path: Path) -> None:
    written = alone(tmp_path / "d", CODECS["seeded fp32"])
    num_kept = 48 * 33 // 4
    replace_section(written, 3, zstd(b"\xfe" * num_kept))
    with pytest.raises(InvalidDelta, match=f"{num_kept} values are NaN or infinite"):
        written.decode()


def test_scales_must_be_finite(tmp_path: Path) -> None:
    written = alone(tmp_path / "d", Codec(block_size=8))
    num_blocks = 48 * 33 // 8
    replace_section(written, 0, zstd(bytes(3 * num_blocks) + b"\xff" * num_blocks))
    with pytest.raises(InvalidDelta, match=f"{num_blocks} of {num_blocks} scales"):
        written.decode()


@pytest.mark.parametrize(
    ("name", "section", "content", "match"),
    [
        ("topk sign", 1, b"\xff" * 16, "the indices of 1 chunks go past their end"),
        ("layerwise sign", 0, b"\x9f", "the counts of its chunks sum to 159, not 158"),
        ("layerwise sign", 1, b"\x01", "the counts of its chunks sum to 414, not 158"),
        ("layerwise sign", 3, b"\xff" * 79, "the indices of 1 chunks go past their end"),
        ("fp16", 0, b"\xff", "the exponent is 143, above 128"),
        ("fp16", 2, b"\xff" * 1584, "1584 values are NaN or infinite"),
        ("int4", 1, b"\xe1" * 792, "792 bytes are no 2 codes of 15 levels"),
        ("lloyd3", 1, b"\x40" * 792, "792 bytes are no 2 codes of 8 levels"),
        ("sign", 0, b"\x00" * 6 + b"\xff" * 6, "6 of 6 scales"),
    ],
)
def test_indices_and_codes_must_be_in_range(
    name: str, section: int, content: bytes, match: str, tmp_path: Path
) -> None:
    written = alone(tmp_path / "d", CODECS[name])
    coded = zstandard.ZstdCompressor().compress(content)
    replace_section(written, section, coded if len(coded) < len(content) else content)
    with pytest.raises(InvalidDelta, match=rf"h\.0\.weight: {match}"):
        written.decode()


def test_indices_travel_before_their_values(tmp_path: Path) -> None:
    written = alone(tmp_path / "d", CODECS["topk sign"])
    # 1 % of 1584 elements; gaps of 4 bits, two to a byte, and 8 bits; one scale; 8 signs to a byte.
    assert written.header["frames"] == [[8, 16, 2, 2]]
    assert [len(written.frames), written.header["tensors"]] == [28, {"h.": {"0.": {"weight": [48, 33]}}}]


# Mutations of headers; those of frames and whole files are in test_fuzz.py


JUNK: list[Any] = [None, True, -1, 0, 1, 7, 1 << 47, 10**30, 0.5, float("inf"), "", "zero", "raw", [], {}, [[]]]


@pytest.mark.parametrize("name", ["int8", "seeded bf16", "int4", "topk lloyd2", "layerwise sign", "lowrank bf16"])
def test_mutated_headers_are_refused_or_decode_to_finite_tensors(name: str, tmp_path: Path) -> None:
    written = Written(tmp_path / "d", CODECS[name])
    pristine = written.header
    rng = random.Random(name)
    for _ in range(1000):
        written.header = copy.deepcopy(pristine)
        for _ in range(rng.randint(1, 2)):
            mutate_json(written.header, rng)
        written.rewrite()
        # The plan leaves no freedom in the header: only mutations that cancelled out are taken.
        assert assert_refused_or_sound(written) == (spelled(written.header) == spelled(pristine))


def spelled(header: dict[str, Any]) -> str:
    # As text, because 1 == True; with every number a float, because JSON has one kind.
    return json.dumps(json.loads(json.dumps(header), parse_int=float), sort_keys=True)


def mutate_json(root: Any, rng: random.Random) -> None:
    """Change, remove, add or exchange one value somewhere below `root`."""
    node: Any = root
    while isinstance(node, dict | list) and node:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
            node = node[key]
            continue
        match rng.randrange(4):
            case 0:
                node[key] = rng.choice(JUNK)
            case 1:
                del node[key]
            case 2 if isinstance(node, dict):
                node[rng.choice(["x", "", "zero", "shape"])] = rng.choice(JUNK)
            case 2 if isinstance(node, list):
                node.insert(rng.randint(0, len(node)), rng.choice(JUNK))
            case _:
                other = rng.choice(keys)
                node[key], node[other] = node[other], node[key]
        return


# Codec


def test_codec_is_its_dictionary() -> None:
    for codec in CODECS.values():
        assert Codec.from_dict(json.loads(json.dumps(codec.to_dict()))) == codec
    assert Codec.from_dict({}) == Codec()
    assert Codec.from_dict({"sparsify": "seeded", "density": 1}).density == 1.0


@pytest.mark.parametrize("level", range(1, 20))
def test_every_level_writes_what_a_reader_takes(level: int, tmp_path: Path) -> None:
    delta = {"w": torch.randn(300, 100, generator=torch.Generator().manual_seed(0))}
    delta["w"][::3] = 0
    codec = Codec(values="bf16", zstd_level=level)
    write_delta(tmp_path / "d", delta, schema_of(delta), codec, seed=SEED)
    decoded = DeltaFile(tmp_path / "d", schema_of(delta), codec, seed=SEED)["w"]
    assert torch.equal(decoded, delta["w"].to(torch.bfloat16).float())


# Inspect


def test_inspect_reports_the_claims(tmp_path: Path) -> None:
    written = Written(tmp_path / "d", CODECS["seeded int8"])
    report = inspect_delta(written.path)
    json.dumps(report)
    assert report["file_bytes"] == written.path.stat().st_size
    claims = report["claims"]
    assert (claims["format"], claims["version"]) == ("fedmerge.delta", 2)
    assert Codec.from_dict(claims["codec"]) == written.codec
    assert claims["totals"]["num_elements"] == sum(tensor.numel() for tensor in written.delta.values())
    assert claims["totals"]["bits_per_parameter"] == 8 * report["file_bytes"] / claims["totals"]["num_elements"]
    assert claims["tensors"][W]["encoding"] == "seeded+int8"
    assert claims["tensors"][W]["shape"] == [48, 33]
    coded_bytes = sum(tensor["coded_bytes"] for tensor in claims["tensors"].values())
    assert abs(coded_bytes - len(written.frames)) <= 2
    assert 48 * 33 / 8 < claims["tensors"][W]["coded_bytes"] < 48 * 33 / 3  # a quarter of the elements, in a byte each


def test_inspect_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    save_file({"w": np.zeros(3)}, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    for path in tmp_path.iterdir():
        with pytest.raises(InvalidDelta):
            inspect_delta(path)


def test_inspect_refuses_a_codec_that_is_none(tmp_path: Path) -> None:
    written = Written(tmp_path / "d", Codec())
    written.header["codec"]["values"] = "int3"
    written.rewrite()
    with pytest.raises(InvalidDelta, match=r"codec\.values: unknown name 'int3'"):
        inspect_delta(written.path)
