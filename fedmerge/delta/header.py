"""The header of a delta file: which tensors it stands for, how each is encoded, and where its bytes are.

It says as little as it can, since in a file of few bits per parameter it would be most of the bytes. `codec` is how the
sender was asked to encode. `tensors` is a tree, so that layers that are alike are the same text, and compress: keys are
the parts of names, those of inner nodes with the dot behind them, and a leaf is a shape, followed by the name of an
encoding where it is not the one that the codec has for tensors of that shape. `frames` is for each frame the coded
length of each of its sections. All else follows: how long a tensor's sections are from its encoding and shape, and
which tensors are in a frame from those lengths (`in_frames`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fedmerge.delta.codec import Codec, Encoding
from fedmerge.delta.encoding import section_bytes
from fedmerge.errors import ConfigError, InputError, InvalidDelta
from fedmerge.tensors import TensorSpec

ZERO = "zero"
MAX_ELEMENTS = 1 << 48
MAX_DOTS = 64  # in a name, since each is a level of the tree

# A frame is closed when its sections have so many bytes together, before they are coded.
FRAME_BYTES = 1 << 16

Item = TypeVar("Item")


def in_frames(items: Iterable[tuple[Item, int]]) -> Iterator[list[Item]]:
    """Yield the items of each frame, given with their bytes: as many as fit, and one that does not fit alone."""
    frame: list[Item] = []
    room = FRAME_BYTES
    for item, num_bytes in items:
        if frame and num_bytes > room:
            yield frame
            frame, room = [], FRAME_BYTES
        frame.append(item)
        room -= num_bytes
        del item  # it may be large, and is not kept while the next one is made
        if room <= 0:
            yield frame
            frame, room = [], FRAME_BYTES
    if frame:
        yield frame


class Header(NamedTuple):
    """What a delta file says of itself: of each tensor, in the order of their names, its shape and its encoding.

    The encoding is None for a tensor that is all zero. `coded_bytes` has those of each section of each frame.
    """

    codec: Codec
    tensors: Mapping[str, tuple[TensorSpec, Encoding | None]]
    coded_bytes: list[list[int]]


class Section(NamedTuple):
    """A run of one kind of bytes of all tensors in a frame: its lengths, and where its coded bytes begin.

    One that coding does not make smaller is stored as it is, and both lengths are the same.
    """

    kind: str
    raw_bytes: int
    coded_bytes: int
    start: int


class Part(NamedTuple):
    """A tensor's share of a frame: where in each of its sections its bytes are."""

    frame: int
    slices: Mapping[str, slice]

    @property
    def raw_bytes(self) -> int:
        """The length of its sections before they are coded."""
        return sum(own.stop - own.start for own in self.slices.values())


class Layout(NamedTuple):
    """Where the bytes of each tensor are."""

    parts: Mapping[str, Part]
    frames: list[list[Section]]

    def coded_bytes(self, name: str) -> int:
        """Return a tensor's share of the coded bytes of its frame, in proportion to the bytes of its sections."""
        part = self.parts[name]
        sections = {section.kind: section for section in self.frames[part.frame]}
        shares = {kind: (own.stop - own.start) / max(1, sections[kind].raw_bytes) for kind, own in part.slices.items()}
        total: float = sum(share * sections[kind].coded_bytes for kind, share in shares.items())
        return round(total)


def encoding_name(encoding: Encoding | None) -> str:
    """Return what an encoding is called, or no encoding."""
    return ZERO if encoding is None else str(encoding)


def pooled_kind(encoding: Encoding, kind: str) -> str:
    """Return under which name a tensor's section lies in its frame: those of other encodings are other bytes."""
    return f"{encoding} {kind}"


def to_json(header: Header) -> dict[str, Any]:
    """Return `header` as JSON. Raises `InputError` for a name of too many parts."""
    leaves = {name: _leaf(header.codec, *found) for name, found in header.tensors.items()}
    return {"codec": _brief(header.codec), "tensors": _tree(leaves), "frames": header.coded_bytes}


def from_json(value: Any) -> Header:
    """Return the header that `value` is; raise `InvalidDelta` unless it is the JSON that `to_json` makes of it."""
    try:
        raw = _Header.model_validate(value)
        codec = Codec.from_dict(raw.codec)
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        raise InvalidDelta(f"header: {'.'.join(map(str, first['loc']))}: {first['msg']}") from err
    except ConfigError as err:
        raise InvalidDelta(f"header: {err.message}") from err
    header = Header(codec, {name: _read_leaf(codec, name, leaf) for name, leaf in _leaves(raw.tensors)}, raw.frames)
    if to_json(header) != value or list(header.tensors) != sorted(header.tensors):
        raise InvalidDelta("header: is not spelled as it would be written")
    return header


def lay_out(header: Header) -> Layout:
    """Return where the bytes of each tensor are; raise `InvalidDelta` when the coded lengths can't be those of frames.

    Nothing is allocated for what the header claims.
    """
    sizes = {
        name: {} if encoding is None else _section_bytes(encoding, spec, header.codec)
        for name, (spec, encoding) in header.tensors.items()
    }
    names = list(in_frames((name, sum(parts.values())) for name, parts in sizes.items()))
    if len(names) != len(header.coded_bytes):
        raise InvalidDelta(f"header: has {len(header.coded_bytes)} frames, these tensors make {len(names)}")
    parts, frames, start = {}, [], 0
    for number, (frame_names, lengths) in enumerate(zip(names, header.coded_bytes, strict=True)):
        raw: Counter[str] = Counter()
        for name in frame_names:
            slices = {kind: slice(raw[kind], raw[kind] + size) for kind, size in sizes[name].items()}
            parts[name] = Part(number, slices)
            raw.update(sizes[name])
        where = f"{frame_names[0]}: " if len(frame_names) == 1 else f"{frame_names[0]} to {frame_names[-1]}: "
        if len(raw) != len(lengths):
            raise InvalidDelta(f"{where}sections are {lengths!r:.100}, expected {list(raw)}")
        for (kind, raw_bytes), coded_bytes in zip(raw.items(), lengths, strict=True):
            if coded_bytes > raw_bytes:
                raise InvalidDelta(f"{where}section {kind}: {coded_bytes} bytes for {raw_bytes} raw")
        starts = itertools.accumulate(lengths, initial=start)
        frames.append(list(map(Section, raw, raw.values(), lengths, starts)))
        start += sum(lengths)
    return Layout(parts, frames)


def _section_bytes(encoding: Encoding, spec: TensorSpec, codec: Codec) -> dict[str, int]:
    return {pooled_kind(encoding, kind): size for kind, size in section_bytes(encoding, spec, codec).items()}


_Count = Annotated[int, Field(strict=True, ge=0, le=MAX_ELEMENTS)]


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    codec: dict[str, Any]
    tensors: dict[str, Any]
    frames: list[list[_Count]]


_SHAPE: TypeAdapter[tuple[int, ...]] = TypeAdapter(Annotated[tuple[_Count, ...], Field(max_length=64)])


_DEFAULTS = Codec().to_dict()


def _brief(codec: Codec) -> dict[str, Any]:
    """Return the codec without what is by default."""
    return {key: value for key, value in codec.to_dict().items() if value != _DEFAULTS[key]}


def _usual(codec: Codec, spec: TensorSpec) -> Encoding | None:
    """Return the encoding that a tensor has of which nothing else is said."""
    return codec.encoding(spec) if spec.num_elements else None


def _leaf(codec: Codec, spec: TensorSpec, encoding: Encoding | None) -> list[int | str]:
    return [*spec.shape, *([] if encoding == _usual(codec, spec) else [encoding_name(encoding)])]


def _read_leaf(codec: Codec, name: str, leaf: Any) -> tuple[TensorSpec, Encoding | None]:
    """Return what a leaf says of the tensor called `name`."""
    own = leaf[-1] if isinstance(leaf, list) and leaf and isinstance(leaf[-1], str) else None
    shape = leaf if own is None else leaf[:-1]
    try:
        spec = TensorSpec(_SHAPE.validate_python(shape), "F32")
    except ValidationError as err:
        raise InvalidDelta(f"{name:.200}: shape is {shape!r:.100}") from err
    if spec.num_elements > MAX_ELEMENTS:
        raise InvalidDelta(f"{name:.200}: shape is {shape!r:.100}, of more than {MAX_ELEMENTS} elements")
    usual = _usual(codec, spec)
    if own is None:
        return spec, usual
    encoding = Encoding.parse(own)
    is_known = own == ZERO or (encoding is not None and not (encoding.rank and len(spec.shape) != 2))
    if not is_known or encoding == usual or not spec.num_elements:
        raise InvalidDelta(f"{name:.200}: encoding is {own!r:.100}")
    return spec, encoding


def _tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split(".")
        if len(path) > MAX_DOTS:
            raise InputError(f"{name:.200}: has more than {MAX_DOTS} dots", hint="rename the tensor")
        node = root
        for key in path:
            node = node.setdefault(f"{key}.", {})
        node[last] = leaf
    return root


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield names and leaves in their order."""
    if not isinstance(node, dict):
        yield name, node
        return
    if name.count(".") > MAX_DOTS:
        raise InvalidDelta(f"{name:.200}: has more than {MAX_DOTS} dots")
    for key, below in node.items():
        yield from _leaves(below, name + key)
