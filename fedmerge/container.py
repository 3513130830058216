"""The container of delta and step files: a safetensors file of byte strings, with JSON under one key of its metadata.

Any tool opens it, it maps without copying, and nothing in it is executed. Byte strings are made of zstd frames. So is
the JSON, in base64 (RFC 4648): it repeats itself, and plain it would be half of a file with few bits per parameter.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import zstandard
from safetensors import SafetensorError, safe_open

from fedmerge.errors import InputError, InvalidDelta, ResourceError

METADATA_KEY = "fedmerge"
MAX_HEADER_BYTES = 16 << 20
MAX_WINDOW_BYTES = 1 << 23
_COPY_BYTES = 1 << 20
_HEADER_LEVEL = 12


@dataclass
class Container:
    """A file under construction: byte strings go to `payload`, each one's bytes to `lengths`; `header` is JSON."""

    payload: IO[bytes]
    lengths: dict[str, int] = field(default_factory=dict)
    header: str = ""


@contextmanager
def writing_container(path: Path, *, where: str) -> Iterator[Container]:
    """Write what the block puts into a container to `path`, when it has ended; whole or not at all.

    Byte strings wait in a nameless file beside `path` for the header, which comes first. The file's owner alone can
    read it. Raises `InputError`, beginning with `where`, for more strings than a reader takes, and `ResourceError` when
    the disk does not take the file.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with tempfile.TemporaryFile(dir=path.parent) as payload:
            container = Container(payload)
            yield container
            table = _safetensors_header(container)
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
        part.unlink(missing_ok=True)


def _safetensors_header(container: Container) -> bytes:
    """Return the table at the start of a safetensors file: where each byte string is, and the header as metadata."""
    table: dict[str, Any] = {"__metadata__": {METADATA_KEY: pack_header(container.header)}}
    end = 0
    for name, num_bytes in container.lengths.items():
        start, end = end, end + num_bytes
        table[name] = {"dtype": "U8", "shape": [num_bytes], "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def pack_header(text: str) -> str:
    """Return JSON as it stands in a file's metadata."""
    return base64.b64encode(zstandard.ZstdCompressor(level=_HEADER_LEVEL).compress(text.encode())).decode()


def unpack_header(packed: str) -> bytes:
    """Return the JSON of `pack_header`; raise `InvalidDelta` when it is not that, or too long."""
    try:
        coded = base64.b64decode(packed, validate=True)
        num_bytes = zstandard.frame_content_size(coded)
    except (ValueError, zstandard.ZstdError) as err:
        raise InvalidDelta(f"the header is not zstd in base64 ({err})") from err
    if not 0 <= num_bytes <= MAX_HEADER_BYTES:
        raise InvalidDelta(f"the header is over the limit of {MAX_HEADER_BYTES} bytes")
    return unzstd(memoryview(coded), num_bytes)


def open_container(path: Path, max_payload_bytes: int, *, what: str) -> tuple[Any, Any]:
    """Open what `writing_container` wrote; return its safetensors handle and the JSON value of its header.

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
        if metadata.keys() != {METADATA_KEY}:
            raise InvalidDelta(f"not a {what}: metadata keys are {sorted(metadata)[:3]}")
        return file, json.loads(unpack_header(metadata[METADATA_KEY]), object_pairs_hook=_unique_keys)
    except (SafetensorError, ValueError, RecursionError) as err:
        raise InvalidDelta(f"not a {what} ({err})") from err
    except OSError as err:
        raise InputError(f"{path}: could not read the {what} ({err.strerror})") from err


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key appears twice")
    return table


def unzstd(coded: memoryview, raw_bytes: int) -> bytes:
    """Return the content of one zstd frame, which must be of `raw_bytes`; raise `InvalidDelta` otherwise."""
    try:
        # The decompressor allocates what the zstd header declares, so that is compared first.
        declared_bytes = zstandard.frame_content_size(coded)
        if declared_bytes != raw_bytes:
            raise InvalidDelta(f"declares {declared_bytes} bytes of content, not {raw_bytes}")
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        return decompressor.decompress(coded, max_output_size=raw_bytes, allow_extra_data=False)
    except zstandard.ZstdError as err:
        raise InvalidDelta(f"is not one zstd frame ({err})") from err


def section_compressor(level: int) -> zstandard.ZstdCompressor:
    """Return a compressor for sections (`fedmerge.planes`), at a `level` of 1 to 19."""
    # Byte planes have few symbols and no phrases: a short match costs more than the Huffman codes it replaces. Tiny
    # match tables still find long repeats (untouched rows) and miss the short ones: measured on the exponents of a
    # Gaussian, that is 20 % smaller and three times as fast as the level's own tables.
    parameters = zstandard.ZstdCompressionParameters.from_level(level, min_match=7, hash_log=6, chain_log=6)
    return zstandard.ZstdCompressor(compression_params=parameters)
