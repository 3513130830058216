"""Step 4, frame, and its inverse, decode: one task vector as one safetensors file, tensors in compressed frames.

A *delta file* holds one uint8 tensor, `payload`: its frames one after another and, at the end, the compressed header
(`fedmerge.delta.header`). The only metadata says by its key the format and version, and how long the header is. A frame
stands for a run of tensors: the sections of each, end to end with those of the others of the same kind and encoding,
and each such pool entropy-coded on its own. Small tensors share a frame, since each coded section costs some bytes of
its own; one of 64 KiB and more is alone in its frame. Encodings are `zero` (no bytes: a frozen layer costs nothing), a
value type such as `int8`, or a sparsifier and a value type, such as `seeded+int8`; a sparsifier that sends indices has
their sections first. `lowrank8+bf16` stands for two factors of rank 8.

Beside the task vector a file may carry *side tensors* (`fedmerge.merge.statistics`), which the codec never thins: they
travel whole, in fp32 or bf16.

A reader knows the schema and the codec from the round's plan and takes neither from the file: the header has to say
what the plan implies, and no length is taken on trust before anything is decoded or allocated. The same format carries
the update that the coordinator publishes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Final, NamedTuple, TypeVar

import numpy as np
import torch
import zstandard
from torch import Tensor

from fedmerge.delta.codec import Codec, Encoding
from fedmerge.delta.container import (
    MAX_HEADER_BYTES,
    ByteString,
    open_container,
    pack_json,
    section_compressor,
    unpack_json,
    unzstd,
    writing_container,
)
from fedmerge.delta.encoding import decode, decode_factors, decode_sparse, encode, most_bytes
from fedmerge.delta.header import (
    FRAME_BYTES,
    Header,
    Layout,
    Section,
    encoding_name,
    from_json,
    in_frames,
    lay_out,
    pooled_kind,
    to_json,
)
from fedmerge.delta.lowrank import Factors, LowRankDelta
from fedmerge.delta.planes import Bytes
from fedmerge.delta.sparsify import Sparse
from fedmerge.delta.task_vector import delta_schema
from fedmerge.errors import InputError, InvalidDelta
from fedmerge.seeds import derive_seed
from fedmerge.tensors import Schema, TensorMap, TensorSpec, require_same_schema, schema_of

FORMAT: Final = "fedmerge.delta"
VERSION: Final = 2
KEY: Final = f"{FORMAT}.v{VERSION}"
PAYLOAD: Final = "payload"

Decoded = TypeVar("Decoded")

# The number format that a side tensor of each dtype travels in.
SIDE_VALUES: dict[str, str] = {"F32": "fp32", "BF16": "bf16"}

# Values up to here, divided by the density, are finite in every value type and after every rounding: what comes back is
# at most 2.2 times the largest value (the outermost level of lloyd3), and a stratum up to twice 1 / density.
MAX_VALUE = 2.0**125


class Choice(NamedTuple):
    """Why a tensor got an encoding of its own: the noise of the mask that it did without, or the energy it kept."""

    encoding: str
    noise_ratio: float | None
    energy: float | None


@dataclass(frozen=True, slots=True)
class DeltaStats:
    """What a delta file costs: elements it stands for, their bytes as fp32, bytes of the file, tensors per encoding.

    `choices` are known to its sender alone, by tensor: see `notes`.
    """

    num_elements: int
    dense_bytes: int
    payload_bytes: int
    encodings: dict[str, int]
    choices: Mapping[str, Choice] = field(default_factory=dict, compare=False)

    @property
    def bits_per_parameter(self) -> float:
        """Bits of the file per element of the task vector."""
        return 8 * self.payload_bytes / max(1, self.num_elements)

    def notes(self, codec: Codec) -> list[str]:
        """Return for people, one sentence each, what the sender did otherwise than the plan's codec asks first."""
        noisy = {name: choice.noise_ratio for name, choice in self.choices.items() if choice.noise_ratio is not None}
        energies = {name: choice.energy for name, choice in self.choices.items() if choice.energy is not None}
        notes = []
        if noisy:
            worst = max(noisy, key=lambda name: noisy[name])
            notes.append(
                f"{len(noisy)} tensors travel dense as {codec.fallback}: a mask of density {codec.density:g} would add "
                f"noise of up to {noisy[worst]:.3g} times the weights ({worst}), above {codec.max_noise_ratio:g}"
            )
        if energies:
            least = min(energies, key=lambda name: energies[name])
            mean = sum(energies.values()) / len(energies)
            notes.append(
                f"{len(energies)} matrices were cut to rank {codec.rank}, which keeps {mean:.1%} of their energy on "
                f"average, {energies[least]:.1%} at the least ({least})"
            )
        return notes


def stats_of(header: Header, payload_bytes: int) -> DeltaStats:
    """Return what a delta file of `payload_bytes` with this header costs."""
    num_elements = sum(spec.num_elements for spec, _ in header.tensors.values())
    encodings = Counter(encoding_name(encoding) for _, encoding in header.tensors.values())
    return DeltaStats(num_elements, 4 * num_elements, payload_bytes, dict(sorted(encodings.items())))


def _require_in_range(values: Tensor, limit: float) -> bool:
    """Return whether flat fp32 `values` are not all zero; raise `InputError` for values that can't travel."""
    low, high = (float(bound) for bound in torch.aminmax(values)) if values.numel() else (0.0, 0.0)
    if not max(-low, high) <= limit:
        num_bad = int((~(values.double().abs() <= limit)).sum())
        raise InputError(f"{num_bad} values are NaN, infinite or beyond {limit:.3g}", hint="training diverged")
    return not low == high == 0


def _side_codec(codec: Codec, spec: TensorSpec) -> Codec:
    """Return how a side tensor of this `spec` travels."""
    return replace(codec, sparsify="none", density=1.0, rank=0, values=SIDE_VALUES[spec.dtype])


def write_delta(
    path: Path,
    delta: TensorMap,
    schema: Schema,
    codec: Codec,
    *,
    seed: int,
    base: TensorMap | None = None,
    side: TensorMap | None = None,
) -> DeltaStats:
    """Write the task vector `delta` as a delta file and return what it costs.

    `schema` says which tensors there must be, in which shapes (its integer tensors have no task vector and are left
    out); `seed` is the round's seed for this sender, from which each tensor's mask is derived; `base` is the model that
    the task vector is to be added to, against which the noise of a mask is judged: without it, it is not. A
    `LowRankDelta` travels by its factors where the codec allows. `side` are further tensors, fp32 or bf16, that travel
    whole. Tensors are read one at a time, and none is kept but small ones until their frame is full. The file appears
    whole or not at all, and its owner alone can read it. The same delta, codec, seed and library versions give the same
    bytes.

    Raises `ModelMismatch` when names or shapes differ from `schema`, `InputError` for NaN or infinite values and for a
    mask that would make too much noise, and `ResourceError` when the disk does not take the file.
    """
    side = side or {}
    schema = delta_schema(schema)
    where = f"delta for {path}"
    require_same_schema(schema, {name: schema.get(name, TensorSpec((), "F32")) for name in delta}, where=where)
    compressor = section_compressor(codec.zstd_level)
    factors = delta.factors if isinstance(delta, LowRankDelta) else {}
    encodings: dict[str, tuple[TensorSpec, Encoding | None]] = {}
    choices: dict[str, Choice] = {}

    def encoded_tensors() -> Iterator[tuple[dict[str, Bytes], int]]:
        for name in sorted([*schema, *side]):
            tensor = side[name] if name in side else delta[name]
            found = schema_of({name: tensor})
            spec = found[name] if name in side else schema[name]
            how = _side_codec(codec, spec) if name in side else codec
            require_same_schema({name: spec}, found, where=where)
            encodings[name] = TensorSpec(spec.shape, "F32"), None
            values = tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1)
            weights = base[name] if base is not None and how.encoding(spec).sparsifier == "seeded" else None
            try:
                if not _require_in_range(values, MAX_VALUE * how.density):
                    yield {}, 0
                    continue
                own_seed = derive_seed(seed, name)
                encoded = encode(values, spec, how, own_seed, factors=factors.get(name), base=weights)
            except InputError as err:
                raise InputError(f"{where}: {name}: {err.message}", hint=err.hint) from err
            encodings[name] = encodings[name][0], encoded.encoding
            if encoded.noise_ratio is not None or encoded.energy is not None:
                choices[name] = Choice(str(encoded.encoding), encoded.noise_ratio, encoded.energy)
            sections = {pooled_kind(encoded.encoding, kind): part for kind, part in encoded.sections.items()}
            yield sections, sum(part.size for part in sections.values())
            del encoded, sections  # as large as the tensor, and the next one's are made beside them

    with writing_container(path, KEY, where=where) as out:
        coded = []
        for frame in in_frames(encoded_tensors()):
            coded.append(_write_frame(frame, compressor, out.payload))
            frame.clear()
        header = Header(codec, encodings, coded)
        packed = pack_json(to_json(header))
        out.lengths[PAYLOAD] = out.payload.tell() + out.payload.write(packed)
        out.text = str(len(packed))
    return replace(stats_of(header, path.stat().st_size), choices=choices)


def _write_frame(
    frame: Iterable[Mapping[str, Bytes]], compressor: zstandard.ZstdCompressor, out: IO[bytes]
) -> list[int]:
    """Pool the sections of a frame's tensors, code each, write them to `out` and return their lengths."""
    pools: dict[str, list[Bytes]] = {}
    for sections in frame:
        for kind, part in sections.items():
            pools.setdefault(kind, []).append(part)
    lengths = []
    for parts in pools.values():
        raw = parts[0] if len(parts) == 1 else np.concatenate(parts)
        coded = compressor.compress(raw.data)
        lengths.append(out.write(coded if len(coded) < raw.size else raw.data))
    return lengths


def _invalid(path: Path, problem: str) -> InvalidDelta:
    return InvalidDelta(
        f"{path.name}: {problem:.400}", hint="it is damaged, or was not written for this round's plan; encode it again"
    )


def open_header(path: Path, max_frame_bytes: int) -> tuple[ByteString, Header]:
    """Open a delta file and return its payload and its header, well formed and as long as its frames.

    `max_frame_bytes` bounds all frames together. Raises `InvalidDelta` for anything else than a delta file, and
    `InputError` when there is no file to read.
    """
    try:
        file, text = open_container(path, KEY, max_frame_bytes + MAX_HEADER_BYTES, what="delta file")
        names = file.keys()
        if list(names) != [PAYLOAD]:
            raise InvalidDelta(f"tensors are {names[:3]!r:.200}, not {PAYLOAD!r} alone")
        view = file.get_slice(PAYLOAD)
        if view.get_dtype() != "U8" or len(view.get_shape()) != 1:
            raise InvalidDelta(f"{PAYLOAD}: is {view.get_dtype()} {view.get_shape()}, not a byte string")
        (num_bytes,) = view.get_shape()
        if not re.fullmatch("[1-9][0-9]{0,8}", text, re.ASCII) or int(text) > min(num_bytes, MAX_HEADER_BYTES):
            raise InvalidDelta(f"the header's length is {text!r:.20}, of {num_bytes} bytes")
        frame_bytes = num_bytes - int(text)
        # safetensors has made sure that its one tensor is all that comes after the table.
        payload = ByteString(path, path.stat().st_size - num_bytes)
        header = from_json(unpack_json(payload.read(frame_bytes, num_bytes).data))
        if sum(map(sum, header.coded_bytes)) != frame_bytes:
            raise InvalidDelta(f"the frames are {frame_bytes} bytes long, not as many as the header says")
    except InvalidDelta as err:
        raise _invalid(path, err.message) from err
    return payload, header


def layout_of(path: Path, header: Header) -> Layout:
    """Return where in the delta file at `path` each tensor is; raise `InvalidDelta` when it can't be as it says."""
    try:
        return lay_out(header)
    except InvalidDelta as err:
        raise _invalid(path, err.message) from err


class DeltaFile(Mapping[str, Tensor]):
    """A delta file as a tensor map: `[name]` decodes one tensor to fp32 of the schema's shape.

    `schema`, `codec` and `seed` are the plan's, as given to `write_delta`, and `side` is the schema of the side tensors
    (F32 or BF16); the file has to agree with them. Opening checks the whole header and raises `InvalidDelta` naming the
    tensor; decoding raises it for frames that do not decompress to what the header says, and for values that are not
    finite, and `InputError` when the file can't be read any more. It must not change meanwhile.
    """

    def __init__(self, path: Path, schema: Schema, codec: Codec, *, seed: int, side: Schema | None = None) -> None:
        self.path = path
        travelling = delta_schema(schema) | (side or {})
        self.schema = {name: TensorSpec(spec.shape, "F32") for name, spec in travelling.items()}
        self._side_codecs = {name: _side_codec(codec, spec) for name, spec in (side or {}).items()}
        self.codec = codec
        self._seed = seed
        self._payload, self._header = open_header(
            path, sum(most_bytes(spec, self._codec_of(name)) for name, spec in self.schema.items())
        )
        if self._header.codec != codec:
            raise _invalid(path, f"codec is {self._header.codec.to_dict()}, the plan's is {codec.to_dict()}")
        if self._header.tensors.keys() != self.schema.keys():
            odd = sorted(self._header.tensors.keys() ^ self.schema.keys())[0]
            raise _invalid(path, f"{odd}: {'missing' if odd in self.schema else 'not a tensor of this model'}")
        for name, spec in self.schema.items():
            self._check(name, spec, *self._header.tensors[name])
        self._layout = layout_of(path, self._header)
        self._last: tuple[int, dict[str, Bytes]] = -1, {}  # the last small frame and its sections

    def __getitem__(self, name: str) -> Tensor:
        encoding = self._header.tensors[name][1]
        return torch.zeros(self.schema[name].shape) if encoding is None else self._decode(name, encoding, decode)

    def sparse(self, name: str) -> Sparse | None:
        """Return the entries of one tensor, flat, that a sparsifier kept; None where it was not thinned.

        Raises as decoding it does.
        """
        encoding = self._header.tensors[name][1]
        if encoding is None:
            return Sparse(torch.empty(0, dtype=torch.int64), torch.empty(0))
        if encoding.rank or encoding.sparsifier == "none":
            return None
        return self._decode(name, encoding, decode_sparse)

    def factors_of(self, name: str) -> Factors | None:
        """Return the factors that a matrix travelled as, None if it did not. Raises as decoding it does."""
        encoding = self._header.tensors[name][1]
        if encoding is None or not encoding.rank:
            return None
        return self._decode(name, encoding, decode_factors)

    def _decode(self, name: str, encoding: Encoding, how: Callable[..., Decoded]) -> Decoded:
        part, codec, seed = self._layout.parts[name], self._codec_of(name), derive_seed(self._seed, name)
        try:
            pools = self._frame(part.frame)
            sections = {kind.partition(" ")[2]: pools[kind][own] for kind, own in part.slices.items()}
            return how(sections, encoding, self.schema[name], codec, seed=seed)
        except InvalidDelta as err:
            raise _invalid(self.path, f"{name}: {err.message}") from err

    def __iter__(self) -> Iterator[str]:
        return iter(self.schema)

    def __len__(self) -> int:
        return len(self.schema)

    @property
    def stats(self) -> DeltaStats:
        """What the file costs."""
        return stats_of(self._header, self.path.stat().st_size)

    def _codec_of(self, name: str) -> Codec:
        return self._side_codecs.get(name, self.codec)

    def _check(self, name: str, spec: TensorSpec, found: TensorSpec, encoding: Encoding | None) -> None:
        """Raise `InvalidDelta` unless the plan allows what was `found` for a tensor of this `spec`."""
        codec = self._codec_of(name)
        if found.shape != spec.shape:
            raise _invalid(self.path, f"{name}: shape is {list(found.shape)}, not {list(spec.shape)}")
        if encoding is not None and not codec.allows(spec, encoding):
            wanted = str(codec.encoding(spec))
            raise _invalid(self.path, f"{name}: encoding is {str(encoding)!r:.100}, not {wanted!r}")

    def _frame(self, number: int) -> dict[str, Bytes]:
        """Return the sections of a frame, by kind. Those of many small tensors are kept for the next of them."""
        last, pools = self._last
        if last == number:
            return pools
        sections = self._layout.frames[number]
        pools = {section.kind: self._section(section) for section in sections}
        if sum(section.raw_bytes for section in sections) <= FRAME_BYTES:
            self._last = number, pools
        return pools

    def _section(self, section: Section) -> Bytes:
        stored = self._payload.read(section.start, section.start + section.coded_bytes)
        if section.coded_bytes == section.raw_bytes:
            return stored
        try:
            return np.frombuffer(unzstd(stored.data, section.raw_bytes), dtype=np.uint8)
        except InvalidDelta as err:
            raise InvalidDelta(f"section {section.kind} {err.message}") from err
