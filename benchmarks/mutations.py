"""How `fuzz.py` damages files: the sections of a frame, and JSON."""

from __future__ import annotations

import dataclasses
import json
import random
import struct
from dataclasses import dataclass
from typing import Any

import zstandard

BOMB_BYTES = 64 << 20


@dataclass(frozen=True)
class Section:
    """A section of a frame: its length, and its bytes, coded if they are fewer, or always if the format has it so."""

    kind: str
    raw_bytes: int
    coded: bytes
    always_coded: bool = False

    @property
    def raw(self) -> bytes:
        is_coded = self.always_coded or len(self.coded) < self.raw_bytes
        return zstandard.ZstdDecompressor().decompress(self.coded) if is_coded else self.coded

    def holding(self, raw: bytes, rng: random.Random) -> Section:
        """The section with other content, compressed if that makes it smaller, or not."""
        coded = zstandard.ZstdCompressor(level=1).compress(raw)
        if self.always_coded or (len(coded) < self.raw_bytes and rng.random() < 0.5):
            return dataclasses.replace(self, coded=coded)
        return dataclasses.replace(self, coded=raw)

    def coded_as(self, coded: bytes) -> Section:
        """The section with other zstd bytes, of a length that a header may have."""
        return dataclasses.replace(self, coded=coded if self.always_coded else coded[: self.raw_bytes - 1])


def zstd_of_zeros(size: int) -> bytes:
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=size)
    return b"".join(compressor.compress(bytes(1 << 20)) for _ in range(size >> 20)) + compressor.flush()


def declaring(size: int, coded: bytes) -> bytes:
    """The blocks of a zstd frame behind a header that declares `size` bytes (RFC 8878, section 3.1.1.1)."""
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size) + coded[zstandard.frame_header_size(coded) :]


BOMB = zstd_of_zeros(BOMB_BYTES)

# Content: what a section says once it is decompressed.


def replace_bytes(raw: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8)):
        raw[rng.randrange(len(raw))] = rng.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)])


def fill(raw: bytearray, rng: random.Random) -> None:
    start = rng.choice([0, rng.randrange(len(raw))])
    raw[start:] = bytes([rng.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)])]) * (len(raw) - start)


def scramble(raw: bytearray, rng: random.Random) -> None:
    raw[:] = rng.choice([rng.randbytes(len(raw)), raw[::-1], raw[1:] + raw[:1], bytes(sorted(raw))])


def set_float(raw: bytearray, rng: random.Random) -> None:
    """Put a value that no encoder makes where a scale may be, in planes of either width."""
    value = rng.choice([float("nan"), float("inf"), float("-inf"), -1.0, 3.4028234e38, 1e37, 1e-45, -0.0])
    width = rng.choice([2, 4])
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    bits >>= 32 - 8 * width
    rotated = (bits << 1 | bits >> (8 * width - 1)) & ((1 << 8 * width) - 1)
    column = len(raw) // width
    for plane, byte in enumerate(rotated.to_bytes(width, "little")):
        for i in range(column) if rng.random() < 0.3 else [rng.randrange(max(1, column))]:
            raw[min(len(raw) - 1, plane * column + i)] = byte


CONTENTS = [replace_bytes, replace_bytes, fill, scramble, set_float]


def mutate_content(frame: list[Section], rng: random.Random) -> str:
    number = rng.choice([i for i, section in enumerate(frame) if section.raw_bytes])
    change = rng.choice(CONTENTS)
    raw = bytearray(frame[number].raw)
    change(raw, rng)
    frame[number] = frame[number].holding(bytes(raw), rng)
    return f"{change.__name__} in {frame[number].kind}"


def mutate_coding(frame: list[Section], rng: random.Random) -> str:
    """Damage zstd: flipped bits, cut, junk behind, lies about the size, more frames than one, bombs."""
    number = rng.choice([i for i, section in enumerate(frame) if section.raw_bytes])
    section = frame[number]
    whole = zstandard.ZstdCompressor(level=1).compress(section.raw)
    coded = bytearray(whole)
    kind = rng.choice(
        ["flip", "flip", "flip", "cut", "junk", "size", "twice", "skippable", "bomb", "lying bomb", "none"]
    )
    match kind:
        case "flip":
            for _ in range(rng.randint(1, 4)):
                coded[rng.randrange(len(coded))] ^= 1 << rng.randrange(8)
        case "cut":
            del coded[rng.randrange(len(coded)) :]
        case "junk":
            coded += rng.randbytes(rng.randint(1, 9))
        case "size":
            sizes = [0, 1, section.raw_bytes - 1, section.raw_bytes + 1, 1 << 31, 1 << 50, (1 << 64) - 1]
            coded[:] = declaring(rng.choice(sizes), whole)
        case "twice":
            coded += whole
        case "skippable":
            size = rng.randrange(5)
            extra = b"\x50\x2a\x4d\x18" + struct.pack("<I", size) + bytes(size)
            coded[:] = rng.choice([extra + whole, whole + extra, extra])
        case "bomb":
            coded[:] = BOMB
        case "lying bomb":
            coded[:] = declaring(section.raw_bytes, BOMB)
        case _:
            coded.clear()
    frame[number] = section.coded_as(bytes(coded))
    return f"zstd {kind} in {section.kind}"


def exchange_sections(frame: list[Section], rng: random.Random) -> str:
    """Give one section the bytes of another, as far as they go."""
    one, other = (rng.choice([i for i, section in enumerate(frame) if section.raw_bytes]) for _ in range(2))
    donor = frame[other]
    if rng.random() < 0.5:
        frame[one] = frame[one].coded_as(donor.coded)
    else:
        repeated = donor.raw * (frame[one].raw_bytes // len(donor.raw) + 1)
        frame[one] = frame[one].holding(repeated[: frame[one].raw_bytes], rng)
    return f"exchange in {frame[one].kind}"


FRAME_MUTATIONS = [mutate_content, mutate_content, mutate_content, mutate_coding, mutate_coding, exchange_sections]

JUNK: list[Any] = [None, True, -1, 0, 1, 7, 1 << 47, 10**30, 0.5, float("inf"), "", "zero", "raw", [], {}, [[]]]


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


def repeat_a_key(text: str, rng: random.Random) -> str:
    """Say one key of an object twice, the second time of something else."""
    start = rng.choice([i for i, character in enumerate(text) if character == "{"]) + 1
    key = text[start : text.find(":", start)]
    return f"{text[:start]}{key}:{json.dumps(rng.choice(JUNK))},{text[start:]}" if key else text
