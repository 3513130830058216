"""Mutated delta files, by the million: each mutant is refused by name or decodes to what the plan says.

    python benchmarks/fuzz.py [--quick] [--mutants N] [--seed S] [--replay S] [--plant BUG] [--json FILE]

A mutant is one frame of a file whose header is right, so that it gets past the header and into the decoders; one file
in ten is a mutant as a whole instead: its header, its lengths, its bytes anywhere. Every combination of sparsifier and
value type takes its turn, and so do factors and step files, in which a mutant is the byte string of one tensor. Frames
are smaller here than elsewhere, so that a file has several. Of each mutant it is asked that

- each tensor of it decodes to finite fp32 of the plan's shape (of a step file, to the model's dtype and shape), or is
  refused with `InvalidDelta` that names the tensor (the file, when that was mutated); any other exception is a failure;
- it takes less than a second of CPU;
- the process grows by less than 32 MiB over all of them, while the bombs among them would expand to 64 MiB.

A file follows from its seed alone, and `--replay` runs one again, with every mutant printed. Files are written to
memory where there is a /dev/shm. `--plant` takes a check out of the decoder first, to see that the mutants find it:
they do within a few hundred (`indices`: gaps may lead past the end of their chunk) or a few dozen (`expansion`: a zstd
frame may hold more than was said; `steps`: the same in a step file).
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import itertools
import json
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import zstandard
from mutations import FRAME_MUTATIONS, Section, mutate_json, repeat_a_key
from safetensors.numpy import load_file

from fedmerge.delta import frame, header, indices
from fedmerge.delta.codec import Codec
from fedmerge.delta.container import JSON_WORDS
from fedmerge.delta.frame import DeltaFile, layout_of, open_header, write_delta
from fedmerge.delta.header import to_json
from fedmerge.delta.quantize import QUANTIZERS
from fedmerge.delta.sparsify import SPARSIFIERS
from fedmerge.errors import InputError, InvalidDelta
from fedmerge.models import steps, ulp
from fedmerge.models.steps import SteppedModel, write_steps
from fedmerge.tensors import DTYPES, schema_of

PLAN_SEED = 2**40 + 7
MAX_CASE_S = 1.0
MAX_GROWTH_BYTES = 32 << 20
MAX_FILE_S = 60.0
CODECS = {
    f"{sparsifier}+{values}": Codec(
        sparsify=sparsifier,
        density=1.0 if sparsifier == "none" else 1 / 64 if number % 2 else 0.1,
        values=values,
        block_size=64 if number % 3 else 100,
        small_elements=8,
    )
    for sparsifier in SPARSIFIERS
    for number, values in enumerate(QUANTIZERS)
} | {
    f"lowrank {factors}": Codec(sparsify="lowrank", rank=4, factors=factors, block_size=64)
    for factors in ("exact", "fp16", "int8", "lloyd2")
}
SIZES = [(), (1,), (7,), (8,), (100,), (64, 64), (5000,), (3, 11), (90, 100), (2, 3, 5), (33, 48), (1, 4097)]


class Failure(Exception):
    """A mutant did what no file may do."""


Frames = list[list[Section]]
WORDS = zstandard.ZstdCompressionDict(JSON_WORDS, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


class DeltaSubject:
    """A delta file taken apart: its header's JSON, and the sections of each frame."""

    file_name = "delta"

    def __init__(self, name: str, directory: Path) -> None:
        self.codec = CODECS[name]
        generator = torch.Generator().manual_seed(1)
        delta = {f"t{i:02}": 1e-3 * torch.randn(shape, generator=generator) for i, shape in enumerate(SIZES)}
        delta["zero"] = torch.zeros(20, 20)
        delta["rank1"] = 1e-3 * torch.randn(60, 1, generator=generator) @ torch.randn(1, 50, generator=generator)
        self.schema, self.path = schema_of(delta), directory / self.file_name
        write_delta(self.path, delta, self.schema, self.codec, seed=PLAN_SEED)
        payload, header = open_header(self.path, 1 << 30)
        layout = layout_of(self.path, header)
        self.header = to_json(header)
        self.names: list[list[str]] = [[] for _ in layout.frames]
        for tensor, part in layout.parts.items():
            self.names[part.frame].append(tensor)
        self.frames: Frames = [
            [
                Section(kind, raw_bytes, payload.read(start, start + size).tobytes())
                for kind, raw_bytes, size, start in frame
            ]
            for frame in layout.frames
        ]

    def open(self) -> Mapping[str, torch.Tensor]:
        return DeltaFile(self.path, self.schema, self.codec, seed=PLAN_SEED)

    def data(self, frames: Frames) -> bytes:
        """A file of these frames whose header is right."""
        header = self.header | {"frames": [[len(section.coded) for section in frame] for frame in frames]}
        return assembled(*self.parts(frames, json.dumps(header)))

    def parts(self, frames: Frames, header_text: str) -> tuple[dict[str, Any], bytes]:
        """The table and the content of a safetensors file."""
        footer = zstandard.ZstdCompressor(dict_data=WORDS).compress(header_text.encode())
        payload = b"".join(section.coded for frame in frames for section in frame) + footer
        table: dict[str, Any] = {"__metadata__": {frame.KEY: str(len(footer))}}
        table[frame.PAYLOAD] = {"dtype": "U8", "shape": [len(payload)], "data_offsets": [0, len(payload)]}
        return table, payload

    def mutated(self, rng: random.Random) -> tuple[str, bytes]:
        """A file whose header, table or bytes anywhere are damaged."""
        header = json.loads(json.dumps(self.header))
        kind = rng.choice(["header", "header", "key twice", *FILE_MUTATIONS])
        if kind == "header":
            mutate_json(header, rng)
        text = json.dumps(header)
        if kind == "key twice":
            text = repeat_a_key(text, rng)
        return f"file {kind}", mutated_file(kind, *self.parts(self.frames, text), rng)


class StepsSubject:
    """A step file taken apart: a frame for each tensor, with the sections of its byte string."""

    file_name = "steps"

    def __init__(self, dtype: str, directory: Path) -> None:
        generator = torch.Generator().manual_seed(1)
        self.before, after = {}, {}
        for i, shape in enumerate(SIZES):
            old = torch.randn(shape, generator=generator, dtype=torch.float64)
            new = old + [1e-3, 1e-2, 10.0][i % 3] * torch.randn(shape, generator=generator)
            self.before[f"t{i:02}"], after[f"t{i:02}"] = old.to(DTYPES[dtype]), new.to(DTYPES[dtype])
        self.schema, self.path = schema_of(self.before), directory / self.file_name
        write_steps(self.path, self.before, after, self.schema)
        self.names: list[list[str]] = []
        self.frames: Frames = []
        for name, stored in load_file(self.path).items():
            lengths = struct.unpack("<4Q", stored[:32].tobytes())
            ends = [32 + sum(lengths[:i]) for i in range(5)]
            coded = [stored[start:end].tobytes() for start, end in itertools.pairwise(ends)]
            sizes = map(zstandard.frame_content_size, coded)
            self.names.append([name])
            self.frames.append(
                [Section(*one, always_coded=True) for one in zip(ulp.SECTIONS, sizes, coded, strict=True)]
            )

    def open(self) -> Mapping[str, torch.Tensor]:
        return SteppedModel(self.before, self.path, self.schema)

    def data(self, frames: Frames) -> bytes:
        return assembled(*self.parts(frames))

    def parts(self, frames: Frames) -> tuple[dict[str, Any], bytes]:
        table: dict[str, Any] = {"__metadata__": {steps.KEY: ""}}
        strings = []
        for (name,), sections in zip(self.names, frames, strict=True):
            lengths = struct.pack("<4Q", *(len(section.coded) for section in sections))
            start = sum(map(len, strings))
            strings.append(lengths + b"".join(section.coded for section in sections))
            end = start + len(strings[-1])
            table[name] = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        return table, b"".join(strings)

    def mutated(self, rng: random.Random) -> tuple[str, bytes]:
        kind = rng.choice(FILE_MUTATIONS)
        return f"file {kind}", mutated_file(kind, *self.parts(self.frames), rng)


Subject = DeltaSubject | StepsSubject
FILE_MUTATIONS = ["table", "table key twice", "flip", "cut", "extend", "length"]


def assembled(table: dict[str, Any], content: bytes) -> bytes:
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + content


def mutated_file(kind: str, table: dict[str, Any], content: bytes, rng: random.Random) -> bytes:
    if kind == "table":
        mutate_json(table, rng)
    text = json.dumps(table)
    if kind == "table key twice":
        text = repeat_a_key(text, rng)
    data = bytearray(len(text).to_bytes(8, "little") + text.encode() + content)
    match kind:
        case "flip":
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(rng.choice([len(data), 8 + len(text)]))] ^= 1 << rng.randrange(8)
        case "cut":
            del data[rng.randrange(len(data)) :]
        case "extend":
            data += rng.randbytes(rng.choice([1, 100, 100_000]))
        case "length":
            lengths = [0, 1, len(text) - 1, len(text) + 1, len(data), (16 << 20) + 1, 1 << 62, (1 << 64) - 1]
            data[:8] = rng.choice(lengths).to_bytes(8, "little")
    return bytes(data)


def outcome(subject: Subject, opened: Mapping[str, torch.Tensor] | None = None, names: Iterable[str] = ()) -> str:
    """Read the tensors called `names` of a file that is open, or a whole file; return "refused" or "decoded".

    Raises `Failure` for any other end.
    """
    start, result = time.process_time(), "decoded"
    try:
        model = subject.open() if opened is None else opened
        for name in names or model:
            try:
                tensor = model[name]
            except InvalidDelta as err:
                require_naming(err, f"{subject.file_name}: {name}: ")
                result = "refused"
                continue
            spec = subject.schema[name]
            is_delta = subject.file_name == "delta"
            dtype = torch.float32 if is_delta else DTYPES[spec.dtype]
            if tensor.dtype != dtype or tuple(tensor.shape) != spec.shape:
                raise Failure(f"{name}: {tensor.dtype} {list(tensor.shape)}, for {dtype} {list(spec.shape)}")
            if is_delta and not torch.isfinite(tensor).all():
                raise Failure(f"{name}: not finite")
    except (InvalidDelta, InputError) as err:
        require_naming(err, f"{subject.file_name}: ")
        result = "refused"
    except Failure:
        raise
    except Exception as err:
        raise Failure(f"{type(err).__name__}: {err}") from err
    if time.process_time() - start > MAX_CASE_S:
        raise Failure(f"took {time.process_time() - start:.1f} s")
    return result


def require_naming(err: InvalidDelta | InputError, start: str) -> None:
    if not err.message.startswith(start):
        raise Failure(f"the message does not begin with {start}: {err.message}") from err


def cases(seed: int, subjects: dict[str, Subject]) -> Iterator[tuple[str, str, Callable[[], str]]]:
    """Make the file of `seed`, and yield what was mutated, how, and what returns the outcome, of each mutant in it."""
    rng = random.Random(seed)
    what = list(subjects)[seed % len(subjects)]
    subject = subjects[what]
    if rng.random() < 0.1:
        kind, data = subject.mutated(rng)
        subject.path.write_bytes(data)
        yield what, kind, lambda: outcome(subject)
        return
    frames = [list(sections) for sections in subject.frames]
    kinds = [
        rng.choice(FRAME_MUTATIONS)(sections, rng) if any(section.raw_bytes for section in sections) else ""
        for sections in frames
    ]
    data = subject.data(frames)
    subject.path.write_bytes(data)
    try:
        opened = subject.open()
    except InvalidDelta as err:
        # Several bombs together may be more than any sound file has, which is told before the header is.
        if "more than this model can need" not in err.message or len(data) <= len(subject.data(subject.frames)):
            raise Failure(f"a right header was refused: {err.message}") from err
        yield what, "too long frames", lambda: outcome(subject)
        return
    for names, kind in zip(subject.names, kinds, strict=True):
        if kind:
            yield f"{what}: {names[0]}", kind, lambda names=names: outcome(subject, opened, names)


def peak_bytes(reset: bool = False) -> int:
    """Return the most memory that this process has held, since the last reset where the system can do that."""
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(status["VmHWM"].split()[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def unchecked_indices(put: Callable[[Any, str, Any], object]) -> None:
    add_gaps = indices._add_gaps
    put(indices, "_add_gaps", lambda *arguments: 0 * add_gaps(*arguments))


def unzstd_of_any_length(coded: memoryview, raw_bytes: int) -> bytes:
    try:
        return zstandard.ZstdDecompressor().decompress(coded)[:raw_bytes].ljust(raw_bytes, b"\0")
    except zstandard.ZstdError as err:
        raise InvalidDelta(f"is not one zstd frame ({err})") from err


def small_frames(put: Callable[[Any, str, Any], object]) -> None:
    """Let a file of a few kilobytes have several frames."""
    put(header, "FRAME_BYTES", 512)


PLANTED: dict[str, Callable[[Callable[[Any, str, Any], object]], object]] = {
    "indices": unchecked_indices,
    "expansion": lambda put: put(frame, "unzstd", unzstd_of_any_length),
    "steps": lambda put: put(ulp, "unzstd", unzstd_of_any_length),
}


class Fuzzer:
    """Runs files by their seeds, and counts outcomes by kind of mutation."""

    def __init__(self, directory: Path) -> None:
        self.subjects: dict[str, Subject] = {}
        for number, name in enumerate([*CODECS, *ulp.LAYOUTS]):
            (directory / str(number)).mkdir()
            kind = DeltaSubject if name in CODECS else StepsSubject
            self.subjects[name if name in CODECS else f"steps {name}"] = kind(name, directory / str(number))
        self.counts: Counter[tuple[str, str]] = Counter()
        self.slowest_s = 0.0
        for name, subject in self.subjects.items():
            if outcome(subject) != "decoded":  # which also compiles what it takes
                raise Failure(f"{name}: a sound file is refused")
        self.start_bytes = peak_bytes(reset=True)

    def run(self, seed: int, show: bool = False) -> int:
        """Run the file of `seed` and return the number of mutants in it; raise `Failure`."""
        faulthandler.dump_traceback_later(MAX_FILE_S, exit=True)
        start, number, what = time.process_time(), 0, "opening it"
        try:
            for where, mutation, check in cases(seed, self.subjects):
                what = f"{where}: {mutation}"
                result = check()
                number += 1
                self.counts[mutation.split(" in ")[0], result] += 1
                if show:
                    print(f"{result}  {what}")
        except Failure as err:
            raise Failure(f"{what}: {err}") from err
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.slowest_s = max(self.slowest_s, time.process_time() - start)
        if peak_bytes() - self.start_bytes > MAX_GROWTH_BYTES:
            raise Failure(f"the process grew by {(peak_bytes() - self.start_bytes) >> 20} MiB")
        return number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50,000 mutants instead of 1,000,000")
    parser.add_argument("--mutants", type=int, metavar="N", help="this many mutants")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the first file")
    parser.add_argument("--replay", type=int, metavar="S", help="run the one file of this seed and show its mutants")
    parser.add_argument("--plant", choices=PLANTED, help="take a check out of the decoder first")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the targets and counts to FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = options.mutants or (50_000 if options.quick else 1_000_000)
    failed: list[str] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as directory:
        small_frames(setattr)
        fuzzer = Fuzzer(Path(directory))
        if options.plant:
            PLANTED[options.plant](setattr)
        num_mutants, seed, start = 0, options.seed if options.replay is None else options.replay, time.process_time()
        print(f"{len(fuzzer.subjects)} encodings, files from seed {seed} on")
        while num_mutants < wanted and not failed:
            try:
                num_mutants += fuzzer.run(seed, show=options.replay is not None)
            except Failure as err:
                failed.append(str(err))
                plant = f" --plant {options.plant}" if options.plant else ""
                print(f"FAILED: seed {seed}: {err}\nagain: {sys.executable} {sys.argv[0]} --replay {seed}{plant}")
            if options.replay is not None:
                break
            seed += 1
        grown, spent = fuzzer.start_bytes, time.process_time() - start
    kinds = sorted({kind for kind, _ in fuzzer.counts})
    print(f"\n{'mutation':<20}{'refused':>10}{'decoded':>10}")
    for kind in kinds:
        print(f"{kind:<20}{fuzzer.counts[kind, 'refused']:>10}{fuzzer.counts[kind, 'decoded']:>10}")
    print(f"{num_mutants} mutants in files {options.seed} to {seed - 1}, {spent:.0f} CPU seconds;", end=" ")
    print(f"slowest file {fuzzer.slowest_s:.2f} s, process grew by {(peak_bytes() - grown) / 2**20:.1f} MiB\n")
    verdict = {"name": "mutants that break a rule, at most", "value": len(failed), "goal": 0, "holds": not failed}
    print(f"{'holds ' if not failed else 'MISSED'} {verdict['name']} 0: {len(failed)} (of {num_mutants})")
    if options.json:
        counts = [{"mutation": kind, "outcome": result, "count": n} for (kind, result), n in fuzzer.counts.items()]
        report = {"targets": [verdict], "mutants": num_mutants, "cpu_s": spent, "counts": counts, "failed": failed}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
