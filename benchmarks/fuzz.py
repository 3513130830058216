"""Mutated delta files, by the million: each mutant is refused by name or decodes to what the plan says.

    python benchmarks/fuzz.py [--quick] [--mutants N] [--seed S] [--replay S] [--plant BUG] [--json FILE]

A mutant is one frame of a file whose header is right, so that it gets past the header and into the decoders; one file
in ten is a mutant as a whole instead: its header, its lengths, its bytes anywhere. Every combination of sparsifier and
value type takes its turn, and so do factors. Of each mutant it is asked that

- it decodes to finite fp32 of the plan's shape, or is refused with `InvalidDelta` that names the tensor (the file, when
  it is the file that was mutated); any other exception is a failure;
- it takes less than a second of CPU;
- the process grows by less than 32 MiB over all of them, while the bombs among them would expand to 64 MiB.

A file follows from its seed alone, and `--replay` runs one again, with every mutant printed. Files are written to
memory where there is a /dev/shm. `--plant` takes a check out of the decoder first, to see that the mutants find it:
they do within a few hundred (`indices`: gaps may lead past the end of their chunk) or a few dozen (`expansion`: a zstd
frame may hold more than was said).
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import zstandard
from mutations import FRAME_MUTATIONS, Section, mutate_json, repeat_a_key

from fedmerge import frame, indices
from fedmerge.codec import Codec
from fedmerge.container import METADATA_KEY, pack_header, unpack_header
from fedmerge.errors import InputError, InvalidDelta
from fedmerge.frame import DeltaFile, write_delta
from fedmerge.quantize import QUANTIZERS
from fedmerge.sparsify import SPARSIFIERS
from fedmerge.tensors import schema_of

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
    """A mutant did what no delta may do."""


Frames = dict[str, list[Section]]


class Subject:
    """A delta file taken apart: the header's values, and the sections of each frame."""

    def __init__(self, name: str, directory: Path) -> None:
        self.codec = CODECS[name]
        generator = torch.Generator().manual_seed(1)
        delta = {f"t{i:02}": 1e-3 * torch.randn(shape, generator=generator) for i, shape in enumerate(SIZES)}
        delta["zero"] = torch.zeros(20, 20)
        delta["rank1"] = 1e-3 * torch.randn(60, 1, generator=generator) @ torch.randn(1, 50, generator=generator)
        self.schema, self.path = schema_of(delta), directory / "delta"
        write_delta(self.path, delta, self.schema, self.codec, seed=PLAN_SEED)
        data = self.path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        table = json.loads(data[8:end])
        self.header = json.loads(unpack_header(table["__metadata__"][METADATA_KEY]))
        self.frames: Frames = {}
        for tensor, claim in self.header["frames"].items():
            position = end + table[tensor]["data_offsets"][0]
            self.frames[tensor] = []
            for kind, raw_bytes, coded_bytes, coder in claim["sections"]:
                section = Section(kind, raw_bytes, data[position : position + coded_bytes], coder)
                self.frames[tensor].append(section)
                position += coded_bytes

    def header_of(self, frames: Frames) -> dict[str, Any]:
        """The header that is right for `frames`."""
        claims = {
            name: claim | {"sections": [[s.kind, s.raw_bytes, len(s.coded), s.coder] for s in frames[name]]}
            for name, claim in self.header["frames"].items()
        }
        return self.header | {"frames": claims}

    def open(self) -> DeltaFile:
        return DeltaFile(self.path, self.schema, self.codec, seed=PLAN_SEED)


def table_of(frames: Frames, header_text: str) -> dict[str, Any]:
    table: dict[str, Any] = {"__metadata__": {METADATA_KEY: pack_header(header_text)}}
    end = 0
    for name, sections in frames.items():
        start, end = end, end + sum(len(section.coded) for section in sections)
        table[name] = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
    return table


def assembled(table: str, frames: Frames) -> bytes:
    text = table.encode()
    payload = b"".join(section.coded for sections in frames.values() for section in sections)
    return len(text).to_bytes(8, "little") + text + payload


def mutated_file(subject: Subject, rng: random.Random) -> tuple[str, bytes]:
    header = json.loads(json.dumps(subject.header))
    kind = rng.choice(["header", "header", "key twice", "table", "table key twice", "flip", "cut", "extend", "length"])
    if kind == "header":
        mutate_json(header, rng)
    text = json.dumps(header)
    if kind == "key twice":
        text = repeat_a_key(text, rng)
    table = table_of(subject.frames, text)
    if kind == "table":
        mutate_json(table, rng)
    table_text = json.dumps(table)
    if kind == "table key twice":
        table_text = repeat_a_key(table_text, rng)
    data = bytearray(assembled(table_text, subject.frames))
    match kind:
        case "flip":
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(rng.choice([len(data), 8 + len(table_text)]))] ^= 1 << rng.randrange(8)
        case "cut":
            del data[rng.randrange(len(data)) :]
        case "extend":
            data += rng.randbytes(rng.choice([1, 100, 100_000]))
        case "length":
            lengths = [
                0,
                1,
                len(table_text) - 1,
                len(table_text) + 1,
                len(data),
                (16 << 20) + 1,
                1 << 62,
                (1 << 64) - 1,
            ]
            data[:8] = rng.choice(lengths).to_bytes(8, "little")
    return f"file {kind}", bytes(data)


def outcome(read: Callable[[], Iterator[tuple[str, torch.Tensor]]], subject: Subject, named: str) -> str:
    """Return "refused" or "decoded"; raise `Failure` for anything else."""
    start = time.process_time()
    try:
        for name, tensor in read():
            shape = subject.schema[name].shape
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape or not torch.isfinite(tensor).all():
                raise Failure(f"{name}: {tensor.dtype} {list(tensor.shape)}, for {list(shape)}, or not finite")
        result = "decoded"
    except (InvalidDelta, InputError) as err:
        if not err.message.startswith(f"delta: {named}"):
            raise Failure(f"the message does not name {named}: {err.message}") from err
        result = "refused"
    except Failure:
        raise
    except Exception as err:
        raise Failure(f"{type(err).__name__}: {err}") from err
    if time.process_time() - start > MAX_CASE_S:
        raise Failure(f"took {time.process_time() - start:.1f} s")
    return result


def cases(seed: int, subjects: dict[str, Subject]) -> Iterator[tuple[str, str, Callable[[], str]]]:
    """Make the file of `seed`, and yield what was mutated, how, and what returns the outcome, of each mutant in it."""
    rng = random.Random(seed)
    codec = list(subjects)[seed % len(subjects)]
    subject = subjects[codec]
    if rng.random() < 0.1:
        kind, data = mutated_file(subject, rng)
        subject.path.write_bytes(data)
        yield codec, kind, lambda: outcome(lambda: iter(subject.open().items()), subject, "")
        return
    frames = {name: list(sections) for name, sections in subject.frames.items()}
    kinds = {}
    for name, sections in frames.items():
        if any(section.raw_bytes for section in sections):
            kinds[name] = rng.choice(FRAME_MUTATIONS)(sections, rng)
    table = table_of(frames, json.dumps(subject.header_of(frames)))
    subject.path.write_bytes(assembled(json.dumps(table), frames))
    try:
        delta = subject.open()
    except InvalidDelta as err:
        raise Failure(f"a right header was refused: {err.message}") from err
    for name, kind in kinds.items():
        yield (
            f"{codec}: {name}",
            kind,
            lambda name=name: outcome(lambda: iter([(name, delta[name])]), subject, f"{name}: "),
        )


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


def unchecked_expansion(put: Callable[[Any, str, Any], object]) -> None:
    def unzstd(coded: memoryview, raw_bytes: int) -> bytes:
        try:
            return zstandard.ZstdDecompressor().decompress(coded)[:raw_bytes].ljust(raw_bytes, b"\0")
        except zstandard.ZstdError as err:
            raise InvalidDelta(f"is not one zstd frame ({err})") from err

    put(frame, "DECODERS", {**frame.DECODERS, "zstd": unzstd})


PLANTED: dict[str, Callable[[Callable[[Any, str, Any], object]], None]] = {
    "indices": unchecked_indices,
    "expansion": unchecked_expansion,
}


class Fuzzer:
    """Runs files by their seeds, and counts outcomes by kind of mutation."""

    def __init__(self, directory: Path) -> None:
        self.subjects = {}
        for number, name in enumerate(CODECS):
            (directory / str(number)).mkdir()
            self.subjects[name] = Subject(name, directory / str(number))
        self.counts: Counter[tuple[str, str]] = Counter()
        self.slowest_s = 0.0
        for name, subject in self.subjects.items():
            outcome(lambda subject=subject: iter(subject.open().items()), subject, name)  # warm
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
