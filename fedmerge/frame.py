"""Step 4, frame, and its inverse, decode: one task vector as one safetensors file, one frame per parameter.

A *delta file* holds a uint8 tensor per parameter, its frame, and one metadata key, `fedmerge`, whose JSON says what
the frames are: format, version, codec, and for each frame its shape, encoding and sections. A frame is its sections one
after another, each entropy-coded on its own. Encodings are `zero` (no bytes: a frozen layer costs nothing), a value
type such as `int8`, or a sparsifier and a value type, such as `seeded+int8`; a sparsifier that sends indices has their
sections first. `lowrank8+bf16` stands for two factors of rank 8.

Beside the task vector a file may carry *side tensors* (`fedmerge.statistics`), which the codec never thins: they travel
whole, in fp32 or bf16.

A reader knows the schema and the codec from the round's plan and takes neither from the file: the header has to say
what the plan implies, length for length, before anything is decoded or allocated. The same format carries the update
that the coordinator publishes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Annotated, Any, Final, Literal, NamedTuple

import numpy as np
import torch
import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fedmerge.codec import Codec, Encoding
from fedmerge.container import open_container, section_compressor, unzstd, writing_container
from fedmerge.delta import delta_schema
from fedmerge.encoding import decode, encode, most_bytes, num_values, section_bytes
from fedmerge.errors import ConfigError, InputError, InvalidDelta
from fedmerge.lowrank import LowRankDelta
from fedmerge.planes import Bytes, Sections
from fedmerge.seeds import derive_seed
from fedmerge.tensors import Schema, TensorMap, TensorSpec, require_same_schema, schema_of

FORMAT: Final = "fedmerge.delta"
VERSION = 1
ZERO = "zero"

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
    """What a delta file costs: elements it stands for, their bytes as fp32, bytes of the file, frames per encoding.

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


_Count = Annotated[int, Field(strict=True, ge=0, le=1 << 48)]


class _Section(NamedTuple):
    kind: str
    raw_bytes: _Count
    coded_bytes: _Count
    coder: str


class _Frame(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: Annotated[tuple[_Count, ...], Field(max_length=64)]
    dtype: Literal["F32"]
    encoding: str
    sections: tuple[_Section, ...]

    @property
    def coded_bytes(self) -> int:
        return sum(section.coded_bytes for section in self.sections)


class Header(BaseModel):
    """What a delta file says of itself; `stats` sums it up."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["fedmerge.delta"]
    version: Annotated[int, Field(strict=True, ge=VERSION, le=VERSION)]
    codec: dict[str, Any]
    frames: dict[str, _Frame]

    def stats(self, payload_bytes: int) -> DeltaStats:
        """Return what a file of `payload_bytes` with this header costs."""
        num_elements = sum(TensorSpec(frame.shape, "F32").num_elements for frame in self.frames.values())
        encodings = Counter(frame.encoding for frame in self.frames.values())
        return DeltaStats(num_elements, 4 * num_elements, payload_bytes, dict(sorted(encodings.items())))


# How a section is stored: each takes its bytes in the file and the length that must come out.
DECODERS: dict[str, Callable[[memoryview, int], bytes | memoryview]] = {
    "raw": lambda coded, _: coded,
    "zstd": unzstd,
}


def _decode_sections(data: memoryview, sections: Iterable[_Section]) -> Sections:
    decoded: dict[str, Bytes] = {}
    for kind, raw_bytes, coded_bytes, coder in sections:
        try:
            decoded[kind] = np.frombuffer(DECODERS[coder](data[:coded_bytes], raw_bytes), dtype=np.uint8)
        except InvalidDelta as err:
            raise InvalidDelta(f"section {kind} {err.message}") from err
        data = data[coded_bytes:]
    return decoded


def _require_in_range(values: Tensor, limit: float) -> bool:
    """Return whether flat fp32 `values` are not all zero; raise `InputError` for values that can't travel."""
    low, high = (float(bound) for bound in torch.aminmax(values)) if values.numel() else (0.0, 0.0)
    if not max(-low, high) <= limit:
        num_bad = int((~(values.double().abs() <= limit)).sum())
        raise InputError(f"{num_bad} values are NaN, infinite or beyond {limit:.3g}", hint="training diverged")
    return not low == high == 0


def _write_frame(
    sections: Sections, spec: TensorSpec, encoding: str, compressor: zstandard.ZstdCompressor, *, out: IO[bytes]
) -> _Frame:
    """Code a tensor's sections, write them to `out` and return their frame."""
    entries = []
    for kind, raw in sections.items():
        coded = compressor.compress(raw.data)
        coder, stored = ("zstd", memoryview(coded)) if len(coded) < raw.size else ("raw", raw.data)
        entries.append(_Section(kind, raw.size, stored.nbytes, coder))
        out.write(stored)
    return _Frame(shape=spec.shape, dtype="F32", encoding=encoding, sections=tuple(entries))


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
    whole. Tensors are read one at a time, and none is kept: frames wait in a nameless file beside `path` for the
    header, which comes first. The file appears whole or not at all, and its owner alone can read it. The same delta,
    codec, seed and library versions give the same bytes.

    Raises `ModelMismatch` when names or shapes differ from `schema`, `InputError` for NaN or infinite values and for a
    mask that would make too much noise, and `ResourceError` when the disk does not take the file.
    """
    side = side or {}
    schema = delta_schema(schema)
    where = f"delta for {path}"
    require_same_schema(schema, {name: schema.get(name, TensorSpec((), "F32")) for name in delta}, where=where)
    compressor = section_compressor(codec.zstd_level)
    factors = delta.factors if isinstance(delta, LowRankDelta) else {}
    frames: dict[str, _Frame] = {}
    choices: dict[str, Choice] = {}
    with writing_container(path, where=where) as out:
        for name in (*schema, *side):
            tensor = side[name] if name in side else delta[name]
            found = schema_of({name: tensor})
            spec = found[name] if name in side else schema[name]
            how = _side_codec(codec, spec) if name in side else codec
            require_same_schema({name: spec}, found, where=where)
            values = tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1)
            weights = base[name] if base is not None and how.encoding(spec).sparsifier == "seeded" else None
            try:
                if not _require_in_range(values, MAX_VALUE * how.density):
                    frames[name] = _write_frame({}, spec, ZERO, compressor, out=out.payload)
                    continue
                own_seed = derive_seed(seed, name)
                encoded = encode(values, spec, how, own_seed, factors=factors.get(name), base=weights)
            except InputError as err:
                raise InputError(f"{where}: {name}: {err.message}", hint=err.hint) from err
            frames[name] = _write_frame(encoded.sections, spec, str(encoded.encoding), compressor, out=out.payload)
            if encoded.noise_ratio is not None or encoded.energy is not None:
                choices[name] = Choice(str(encoded.encoding), encoded.noise_ratio, encoded.energy)
            del encoded  # its sections are as large as the tensor, and the next one's are made beside them
        out.lengths |= {name: frame.coded_bytes for name, frame in frames.items()}
        header = Header(format=FORMAT, version=VERSION, codec=codec.to_dict(), frames=frames)
        out.header = header.model_dump_json()
    return replace(header.stats(path.stat().st_size), choices=choices)


def _invalid(path: Path, problem: str) -> InvalidDelta:
    return InvalidDelta(
        f"{path.name}: {problem:.400}", hint="it is damaged, or was not written for this round's plan; encode it again"
    )


def open_header(path: Path, max_frame_bytes: int) -> tuple[Any, Header]:
    """Open a delta file and return its handle and header, well formed and in agreement with the frames' true lengths.

    `max_frame_bytes` bounds all frames together. Raises `InvalidDelta` for anything else than a delta file, and
    `InputError` when there is no file to read.
    """
    try:
        file, claims = open_container(path, max_frame_bytes, what="delta file")
        header = Header.model_validate(claims)
        Codec.from_dict(header.codec)
    except ConfigError as err:
        raise _invalid(path, f"header: {err.message}") from err
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        raise _invalid(path, f"header: {'.'.join(map(str, first['loc']))}: {first['msg']}") from err
    except InvalidDelta as err:
        raise _invalid(path, err.message) from err
    names = file.keys()
    if set(names) != header.frames.keys():
        odd = sorted(set(names) ^ header.frames.keys())[0]
        raise _invalid(path, f"{odd}: is not both in the header and among the frames")
    for name in names:
        view, coded_bytes = file.get_slice(name), header.frames[name].coded_bytes
        if (view.get_dtype(), view.get_shape()) != ("U8", [coded_bytes]):
            found = f"{view.get_dtype()} {view.get_shape()}"
            raise _invalid(path, f"{name}: frame is {found}, its sections have {coded_bytes} bytes")
    return file, header


class DeltaFile(Mapping[str, Tensor]):
    """A delta file as a tensor map: `[name]` decodes one tensor to fp32 of the schema's shape.

    `schema`, `codec` and `seed` are the plan's, as given to `write_delta`, and `side` is the schema of the side tensors
    (F32 or BF16); the file has to agree with them. Opening checks the whole header and raises `InvalidDelta` naming the
    tensor; decoding raises it for frames that do not decompress to what the header says, and for values that are not
    finite. The file must not change while it is open.
    """

    def __init__(self, path: Path, schema: Schema, codec: Codec, *, seed: int, side: Schema | None = None) -> None:
        self.path = path
        travelling = delta_schema(schema) | (side or {})
        self.schema = {name: TensorSpec(spec.shape, "F32") for name, spec in travelling.items()}
        self._side_codecs = {name: _side_codec(codec, spec) for name, spec in (side or {}).items()}
        self.codec = codec
        self._seed = seed
        self._file, self._header = open_header(
            path, sum(most_bytes(spec, self._codec_of(name)) for name, spec in self.schema.items())
        )
        self._encodings: dict[str, tuple[Encoding, int]] = {}  # of each frame that is not all zero, with its M
        if self._header.codec != codec.to_dict():
            raise _invalid(path, f"codec is {self._header.codec!r:.200}, the plan's is {codec.to_dict()}")
        if self._header.frames.keys() != self.schema.keys():
            odd = sorted(self._header.frames.keys() ^ self.schema.keys())[0]
            raise _invalid(path, f"{odd}: {'missing' if odd in self.schema else 'not a tensor of this model'}")
        for name, spec in self.schema.items():
            self._check(name, spec, self._header.frames[name])

    def __getitem__(self, name: str) -> Tensor:
        frame, spec = self._header.frames[name], self.schema[name]
        if frame.encoding == ZERO:
            return torch.zeros(spec.shape)
        try:
            sections = _decode_sections(memoryview(self._file.get_tensor(name)), frame.sections)
            encoding, num_kept = self._encodings[name]
            seed = derive_seed(self._seed, name)
            return decode(sections, encoding, spec, self._codec_of(name), seed=seed, num_kept=num_kept)
        except InvalidDelta as err:
            raise _invalid(self.path, f"{name}: {err.message}") from err

    def __iter__(self) -> Iterator[str]:
        return iter(self.schema)

    def __len__(self) -> int:
        return len(self.schema)

    @property
    def stats(self) -> DeltaStats:
        """What the file costs."""
        return self._header.stats(self.path.stat().st_size)

    def _codec_of(self, name: str) -> Codec:
        return self._side_codecs.get(name, self.codec)

    def _check(self, name: str, spec: TensorSpec, frame: _Frame) -> None:
        """Raise `InvalidDelta` unless `frame` is one that the plan allows for a tensor of this `spec`."""
        codec = self._codec_of(name)
        if frame.shape != spec.shape:
            raise _invalid(self.path, f"{name}: shape is {list(frame.shape)}, not {list(spec.shape)}")
        if frame.encoding == ZERO:
            expected: dict[str, int] = {}
        elif (encoding := codec.allowed(spec, frame.encoding)) is not None:
            num_kept = num_values(encoding, spec, codec)
            expected = section_bytes(encoding, spec, codec, num_kept)
            self._encodings[name] = encoding, num_kept
        else:
            wanted = str(codec.encoding(spec))
            raise _invalid(self.path, f"{name}: encoding is {frame.encoding!r:.100}, not {wanted!r}")
        found = [(section.kind, section.raw_bytes) for section in frame.sections]
        if found != list(expected.items()):
            raise _invalid(self.path, f"{name}: sections are {found!r:.200}, expected {list(expected.items())}")
        for kind, raw_bytes, coded_bytes, coder in frame.sections:
            # A section that coding does not make smaller travels raw, so no frame is longer than its values.
            lengths_agree = coded_bytes == raw_bytes if coder == "raw" else coded_bytes < raw_bytes
            if coder not in DECODERS or not lengths_agree:
                raise _invalid(
                    self.path, f"{name}: section {kind}: {coded_bytes} bytes of {coder!r} for {raw_bytes} raw"
                )
