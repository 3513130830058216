"""Steps in units in the last place: every bit pattern, a second decoder, the bound they stand at, bytes that lie."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedmerge.errors import InvalidDelta
from fedmerge.models.ulp import LAYOUTS, decode, encode, most_bytes

Bits = npt.NDArray[Any]
each_dtype = pytest.mark.parametrize("dtype", list(LAYOUTS))


def unsigned(dtype: str) -> np.dtype[Any]:
    return np.dtype(f"u{LAYOUTS[dtype].width // 8}")


def bits_of(values: torch.Tensor) -> Bits:
    """Return the patterns of 16-bit floats."""
    return values.view(torch.int16).numpy().view(np.uint16)


def ordered(patterns: Bits) -> npt.NDArray[np.int64]:
    """Return the rank of 16-bit floats as the number of floats above -0 or below +0, by arithmetic of its own."""
    magnitudes = (patterns & 0x7FFF).astype(np.int64)
    return np.where(patterns >> 15, -1 - magnitudes, magnitudes)


def entropy_bits(symbols: npt.NDArray[Any]) -> float:
    """Order-0 entropy in bits, of all symbols together."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / symbols.size)).sum())


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("seed", range(3))
def test_every_16_bit_pattern_arrives_from_every_other(dtype: str, seed: int) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    old = np.concatenate([every, every])
    new = np.concatenate([np.random.default_rng(seed).permutation(every), every])
    assert np.array_equal(decode(old, encode(old, new, dtype), dtype), new)


def test_zero_and_minus_zero_are_neighbours_and_not_the_same() -> None:
    zeros = np.zeros(100_000, np.uint16)
    minus_zeros = zeros | 0x8000
    for old, new in ((zeros, minus_zeros), (minus_zeros, zeros)):
        coded = encode(old, new, "BF16")
        assert np.array_equal(decode(old, coded, "BF16"), new)
        assert coded.size < 200
    # The longest steps there are: from the highest pattern to the lowest and back.
    ends = np.array([0x7FFF, 0xFFFF] * 50, np.uint16)
    assert np.array_equal(decode(ends, encode(ends, ends[::-1].copy(), "F16"), "F16"), ends[::-1])


@each_dtype
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_patterns_of_any_width_arrive(dtype: str, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 40))
    old = data.draw(arrays(unsigned(dtype), size))
    new = data.draw(arrays(unsigned(dtype), size))
    repeats = data.draw(st.sampled_from([1, 300]))  # both with and without contexts
    old, new = np.repeat(old, repeats), np.tile(new, repeats)
    coded = encode(old, new, dtype)
    assert np.array_equal(decode(old, coded, dtype), new)
    assert coded.size <= most_bytes(old.size, dtype)
    assert encode(old, new, dtype).tobytes() == coded.tobytes()


def second_decoder(old: Bits, coded: bytes, mantissa: int) -> Bits:
    """Decode 16-bit floats as docs/protocol.md says, an element at a time."""
    lengths, rest, sections = struct.unpack("<4Q", coded[:32]), coded[32:], []
    for length in lengths:
        sections.append(zstandard.ZstdDecompressor().decompress(rest[:length]))
        rest = rest[length:]
    assert not rest
    groups, nonzero, tokens, bits = sections
    exponents = (old & 0x7FFF) >> mantissa
    context = [min(15, int(exponents.max()) - int(e)) if old.size >= 4096 else 0 for e in exponents]
    mask, taken = [], 0
    for i in range(-(-old.size // 8)):
        present = groups[i // 8] >> (i % 8) & 1
        mask.append(nonzero[taken] if present else 0)
        taken += present
    token, stream = iter(tokens), iter(f"{int.from_bytes(bits, 'little'):0{8 * len(bits)}b}"[::-1])
    new = old.copy()
    for place, i in enumerate(sorted(range(old.size), key=context.__getitem__)):
        if mask[place // 8] >> (place % 8) & 1:
            symbol = next(token)
            if symbol >= 128:
                length, leading = 7 + (symbol - 128) // 8, (symbol - 128) % 8
                others = sum(int(next(stream)) << k for k in range(length - 3))
                symbol = (8 + leading << length - 3) + others
            step = symbol // 2 + 1 if symbol % 2 else -(symbol // 2) - 1
            rank = int(ordered(old[i : i + 1])[0]) + step
            new[i] = rank if rank >= 0 else 0x8000 | (-1 - rank)
    return new


@pytest.mark.parametrize(("size", "scale"), [(100, 0.1), (20_000, 1e-3), (20_000, 0.3)])
def test_a_second_decoder_agrees(size: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(size)
    before = torch.randn(size, generator=generator).to(torch.bfloat16)
    after = (before.float() + scale * torch.randn(size, generator=generator)).to(torch.bfloat16)
    old, new = bits_of(before), bits_of(after)
    assert np.array_equal(second_decoder(old, encode(old, new, "BF16").tobytes(), 7), new)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1e-3, 5e-3, 2e-2])
def test_steps_cost_less_than_their_order_0_entropy(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(500_000, generator=generator).to(dtype)
    after = (before.float() + scale * torch.randn(500_000, generator=generator)).to(dtype)
    old, new = bits_of(before), bits_of(after)
    steps = ordered(new) - ordered(old)
    name = "BF16" if dtype == torch.bfloat16 else "F16"
    assert 8 * encode(old, new, name).size < entropy_bits(steps)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3, 1.0])
def test_steps_at_random_places_cost_little_more_than_their_entropy(share: float) -> None:
    # Here the old values tell nothing. Geometric steps, so that no code of whole bits fits by chance.
    rng = np.random.default_rng(2)
    old = bits_of(torch.from_numpy(rng.standard_normal(1_000_000)).to(torch.bfloat16))
    steps = rng.geometric(0.3, old.size) * (rng.random(old.size) < share)
    new = (old + steps).astype(np.uint16)
    assert 8 * encode(old, new, "BF16").size < 1.09 * entropy_bits(ordered(new) - ordered(old))


@pytest.fixture(scope="module")
def example() -> tuple[Bits, Bits, bytes]:
    rng = np.random.default_rng(0)
    old = rng.integers(0, 1 << 16, 5_001).astype(np.uint16)
    new = old + rng.integers(-300, 300, old.size).astype(np.uint16) * (rng.random(old.size) < 0.2)
    return old, new, encode(old, new, "BF16").tobytes()


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_changed_bytes_are_refused_or_are_other_steps(example: tuple[Bits, Bits, bytes], data: st.DataObject) -> None:
    old, _, coded = example
    changed = bytearray(coded)
    for _ in range(data.draw(st.integers(1, 4))):
        match data.draw(st.sampled_from(["flip", "cut", "add"])):
            case "flip" if changed:
                changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del changed[data.draw(st.integers(0, len(changed))) :]
            case _:
                changed += data.draw(st.binary(min_size=1, max_size=9))
    try:
        decoded = decode(old, np.frombuffer(bytes(changed), np.uint8), "BF16")
    except InvalidDelta:
        return
    assert decoded.shape == old.shape
    assert decoded.dtype == old.dtype


def reassembled(coded: bytes, change: dict[int, bytes | None]) -> npt.NDArray[np.uint8]:
    """Return `coded` with what some of its sections decompress to replaced."""
    lengths, rest, sections = struct.unpack("<4Q", coded[:32]), coded[32:], []
    for i, length in enumerate(lengths):
        raw = change.get(i)
        sections.append(rest[:length] if raw is None else zstandard.compress(raw))
        rest = rest[length:]
    return np.frombuffer(struct.pack("<4Q", *map(len, sections)) + b"".join(sections), np.uint8)


def raw_section(coded: bytes, index: int) -> bytes:
    lengths = struct.unpack("<4Q", coded[:32])
    start = 32 + sum(lengths[:index])
    return zstandard.decompress(coded[start : start + lengths[index]])


def test_each_section_has_the_length_that_follows_from_those_before(example: tuple[Bits, Bits, bytes]) -> None:
    old, _, coded = example
    for index, kind in enumerate(("groups", "mask", "tokens", "bits")):
        for wrong in (raw_section(coded, index)[:-1], raw_section(coded, index) + b"\0", b"\0" * 100_000_000):
            with pytest.raises(InvalidDelta, match=f"section {kind} declares"):
                decode(old, reassembled(coded, {index: wrong}), "BF16")


def test_what_no_encoder_writes_is_refused(example: tuple[Bits, Bits, bytes]) -> None:
    old, _, coded = example
    tokens = raw_section(coded, 2)
    mask = raw_section(coded, 1)
    cases: dict[str, dict[int, bytes | None]] = {
        "a token stands for no step": {2: b"\xff" + tokens[1:]},
        "section groups is not filled": {0: raw_section(coded, 0)[:-1] + b"\xff"},
        "section mask has a zero byte": {1: b"\0" + mask[1:]},
    }
    for message, change in cases.items():
        with pytest.raises(InvalidDelta, match=message):
            decode(old, reassembled(coded, change), "BF16")
    one = np.zeros(1, np.uint16)
    longest = encode(one, one + 0x7FFF, "BF16").tobytes()  # 15 bits after the first, 3 of them in the token
    assert raw_section(longest, 2) == b"\xc7"
    with pytest.raises(InvalidDelta, match="longer than its type"):
        decode(one, reassembled(longest, {3: b"\xff\x0f"}), "BF16")
    with pytest.raises(InvalidDelta, match="section mask is not filled"):
        decode(one, reassembled(longest, {1: b"\x03"}), "BF16")
    with pytest.raises(InvalidDelta, match="section bits is not filled"):
        decode(one, reassembled(longest, {3: b"\xfd\x1f"}), "BF16")
    with pytest.raises(InvalidDelta, match="not sections of lengths"):
        decode(one, np.frombuffer(longest[:31], np.uint8), "BF16")
    with pytest.raises(InvalidDelta, match="not sections of lengths"):
        decode(one, np.frombuffer(longest + b"x", np.uint8), "BF16")
