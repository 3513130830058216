"""The container of delta and step files: a safetensors file of byte strings, with a text under one key of its metadata.

Any tool opens it, and nothing in it is executed. The key is the format and its version. Byte strings are made of zstd
frames. So is JSON: plain, it would be a good part of a file with few bits per parameter.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import zstandard
from safetensors import SafetensorError, safe_open

from fedmerge.delta.planes import Bytes
from fedmerge.errors import InputError, InvalidDelta, ResourceError

MAX_HEADER_BYTES = 16 << 20
MAX_WINDOW_BYTES = 1 << 23
_COPY_BYTES = 1 << 20
_JSON_LEVEL = 19

# What zstd may refer to as if it came before the JSON: what headers of delta files say, and names of common layers.
JSON_WORDS = (
    b'"bias":[384],"weight":[384,384]},"lm_head.":{"embed_tokens.":{"model.":{"norm.":{"wte.":{"transformer.":{"h.":{'
    b'"mlp.":{"gate_proj.":{"up_proj.":{"down_proj.":{"self_attn.":{"q_proj.":{"k_proj.":{"v_proj.":{"o_proj.":{'
    b'"input_layernorm.":{"post_attention_layernorm.":{"pooler.":{"classifier.":{"embeddings.":{"layers.":{'
    b'"bert.":{"encoder.":{"layer.":{"0.":{"attention.":{"output.":{"LayerNorm.":{"dense.":{"self.":{"key.":{"query.":{'
    b'"value.":{"intermediate.":{"zero"],"lloyd3"],"lowrank8+bf16"],"frames":[['
    b'{"codec":{"sparsify":"topk","density":0.015625,"values":"sign","block_size":64,"small_elements":'
    b'{"codec":{"sparsify":"seeded","density":0.01,"values":"lloyd2","block_size":256},"tensors":{"'
)
_WORDS = zstandard.ZstdCompressionDict(JSON_WORDS, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


@dataclass
class Container:
    """A file under construction: byte strings go to `payload`, each one's bytes to `lengths`; `text` is metadata."""

    payload: IO[bytes]
    lengths: dict[str, int] = field(default_factory=dict)
    text: str = ""


@contextmanager
def writing_container(path: Path, key: str, *, where: str) -> Iterator[Container]:
    """Write what the block puts into a container to `path`, when it has ended; whole or not at all.

    `key` is the metadata's, the format with its version.

    Byte strings wait for the header, which comes first, in a nameless file beside `path`, or in memory while they are
    few. The file's owner alone can read it. Raises `InputError`, beginning with `where`, for more strings than a reader
    takes, and `ResourceError` when the disk does not take the file.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with tempfile.SpooledTemporaryFile(_COPY_BYTES, dir=str(path.parent)) as payload:
            container = Container(payload)
            yield container
            table = _safetensors_header(container, key)
            if len(table) > MAX_HEADER_BYTES:
                raise InputError(f"{where}: {len(container.lengths)} tensors are too many for one file")
            payload.seek(0)
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(len(table).to_bytes(8, "little") + table)
                shutil.copyfileobj(payload, file, _COPY_BYTES)
        part.replace(path)
    except OSError as err:
        raise ResourceError(f"{path}: could not be written ({err})", hint="is the disk full?") from err
    finally:
        with suppress(OSError):  # what is left over harms nobody
            part.unlink(missing_ok=True)


def _safetensors_header(container: Container, key: str) -> bytes:
    """Return the table at the start of a safetensors file: where each byte string is, and the text as metadata."""
    table: dict[str, Any] = {"__metadata__": {key: container.text}}
    end = 0
    for name, num_bytes in container.lengths.items():
        start, end = end, end + num_bytes
        table[name] = {"dtype": "U8", "shape": [num_bytes], "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def pack_json(value: Any) -> bytes:
    """Return a JSON value as one zstd frame."""
    text = json.dumps(value, separators=(",", ":")).encode()
    return zstandard.ZstdCompressor(level=_JSON_LEVEL, dict_data=_WORDS).compress(text)


def unpack_json(coded: memoryview) -> Any:
    """Return the value that `pack_json` was given; raise `InvalidDelta` when it is not that, or too long."""
    try:
        num_bytes = zstandard.frame_content_size(coded)
        if not 0 <= num_bytes <= MAX_HEADER_BYTES:
            raise InvalidDelta(f"the header is over the limit of {MAX_HEADER_BYTES} bytes")
        return json.loads(unzstd(coded, num_bytes, words=_WORDS), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError, zstandard.ZstdError) as err:
        raise InvalidDelta(f"the header is not JSON in zstd ({err})") from err


def open_container(path: Path, key: str, max_payload_bytes: int, *, what: str) -> tuple[Any, str]:
    """Open what `writing_container` wrote with this `key`; return its safetensors handle and its text.

    `max_payload_bytes` bounds the byte strings together, `what` names such files in errors. Raises `InvalidDelta` for
    any other file, and `InputError` when there is none to read.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as raw:
            header_bytes = int.from_bytes(raw.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise InvalidDelta(f"the header is over the limit of {MAX_HEADER_BYTES} bytes")
        if file_bytes > 8 + header_bytes + max_payload_bytes:
            raise InvalidDelta(f"{file_bytes} bytes are more than this model can need")
        file: Any = safe_open(path, framework="np")  # its methods have no annotations
        metadata = file.metadata() or {}
        if metadata.keys() != {key}:
            raise InvalidDelta(f"not a {what} of this version: metadata keys are {sorted(metadata)[:3]}, not {key!r}")
        return file, str(metadata[key])
    except SafetensorError as err:
        raise InvalidDelta(f"not a {what} ({err})") from err
    except OSError as err:
        raise InputError(f"{path}: could not read the {what} ({err.strerror})") from err


@dataclass(frozen=True)
class ByteString:
    """A byte string of a container, from byte `offset` of the file on.

    It is read and not mapped: where a disk fails that is an error that can be told, and what was read does not count as
    the process's memory.
    """

    path: Path
    offset: int

    def read(self, start: int, stop: int) -> Bytes:
        """Return some of its bytes. Raises `InputError` when the file can't be read any more."""
        data = np.empty(stop - start, dtype=np.uint8)
        left = data.data
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + start)
                while left and (num_read := file.readinto(left)):
                    left = left[num_read:]
        except OSError as err:
            raise InputError(f"{self.path}: could not be read ({err.strerror})") from err
        if left:
            raise InputError(f"{self.path}: is shorter than when it was opened")
        return data


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key appears twice")
    return table


def unzstd(coded: memoryview, raw_bytes: int, *, words: zstandard.ZstdCompressionDict | None = None) -> bytes:
    """Return the content of one zstd frame, which must be of `raw_bytes`; raise `InvalidDelta` otherwise."""
    try:
        # The decompressor allocates what the zstd header declares, so that is compared first.
        declared_bytes = zstandard.frame_content_size(coded)
        if declared_bytes != raw_bytes:
            raise InvalidDelta(f"declares {declared_bytes} bytes of content, not {raw_bytes}")
        decompressor = zstandard.ZstdDecompressor(dict_data=words, max_window_size=MAX_WINDOW_BYTES)
        return decompressor.decompress(coded, max_output_size=raw_bytes, allow_extra_data=False)
    except zstandard.ZstdError as err:
        raise InvalidDelta(f"is not one zstd frame ({err})") from err


def section_compressor(level: int) -> zstandard.ZstdCompressor:
    """Return a compressor for sections (`fedmerge.delta.planes`), at a `level` of 1 to 19."""
    # Byte planes have few symbols and no phrases: a short match costs more than the Huffman codes it replaces. Tiny
    # match tables still find long repeats (untouched rows) and miss the short ones: measured on the exponents of a
    # Gaussian, that is 20 % smaller and three times as fast as the level's own tables.
    parameters = zstandard.ZstdCompressionParameters.from_level(level, min_match=7, hash_log=6, chain_log=6)
    return zstandard.ZstdCompressor(compression_params=parameters)
