"""Forge what a federation published and exported, in every way that a file can be, and see what `fedmerge verify` says.

    python benchmarks/forged.py [--quick] [--every K] [--plant] [--json FILE]

A federation of three nodes and two rounds on a model of 50 numbers, which its members witness, is published and
exported with its deltas. Then, one at a time:

- `byte`: a bit of every byte of every file (of every K-th byte with --every, every 97th with --quick) is flipped;
- `swap`: any two deltas, updates or states change places;
- `drop`: a file, a delta, a line of the provenance, a receipt is left out;
- `order`: two neighbouring lines change places;
- `event dropped`, `events swapped`, `event changed`: the coordinator itself forges its log, chains it again, and signs
  all that it signs: an event is gone, two neighbours are exchanged, each value in an event is another, and so is each
  in the statements that the coordinator signed in it: recipe, seeds, weights, counts, verdicts.

A forgery is detected when a check fails, and rightly named when a check fails that is about the file that was forged,
or, of the log, about events and what follows from them. Of the coordinator's own forgeries the run also says how many
would be found without what members cosigned.

`--plant` blinds the verifier to one file first: the run must find it. Without it, that is done in a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from shared import at_least, at_most, print_table

from fedmerge.config import parse_config
from fedmerge.errors import VerificationError
from fedmerge.events import DeltaAccepted, FederationCreated, from_json
from fedmerge.publishing.export import BLOBS, CHECKPOINT, LOG, MANIFEST, MANIFEST_SIGNATURE, RECEIPTS, export
from fedmerge.publishing.publish import LINEAGE, SIGNATURE
from fedmerge.rounds.journal import receipt_of
from fedmerge.sim import simulate
from fedmerge.statements import Enrolment, Export, MergeRecord, RoundSpec, Statement
from fedmerge.store.blobs import BlobStore
from fedmerge.store.database import Database
from fedmerge.store.entries import GENESIS, LedgerEntry, chain_hash
from fedmerge.store.ledger import Ledger
from fedmerge.store.shelves import FolderShelf
from fedmerge.tensors import Checkpoint
from fedmerge.training import TrainResult, TrainTask
from fedmerge.transparency.log import LogCheckpoint, log_leaf, log_origin, sign_checkpoint
from fedmerge.transparency.merkle import merkle_root
from fedmerge.trust.sign import PublicKey, SigningKey
from fedmerge.verify import Check, Checklist, directory, examine_directory, examine_export, replay_rounds

TOML = """
[federation]
name = "forged"
[model]
base = "base"
[rounds]
num_rounds = 2
min_nodes = 3
publish_after_cosignatures = 2
[train]
trainer = "text-classification"
[delta]
values = "fp32"
[outer]
name = "momentum"
lr = 0.7
"""
QUICK_EVERY = 97
SIGNED: dict[str, tuple[str, type[Statement]]] = {
    "round_opened": ("spec_envelope", RoundSpec),
    "merge_finished": ("record_envelope", MergeRecord),
    "member_admitted": ("envelope", Enrolment),
}
BLIND = "README.md"


@dataclass
class StepTrainer:
    """Moves every tensor by noise of its own."""

    seed: int

    def check(self) -> None:
        """Accept anything."""

    def train(self, task: TrainTask) -> TrainResult:
        """Leave a model that is a little off."""
        before, out = Checkpoint(task.model_dir), task.workspace / "tuned"
        out.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(self.seed + task.round)
        tuned = {name: before[name] + 0.01 * torch.randn(before[name].shape, generator=generator) for name in before}
        save_file(tuned, out / "model.safetensors")
        return TrainResult(out, 10 * self.seed)

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        """Measure nothing."""
        return {}


@dataclass(frozen=True)
class Federation:
    """What an outsider has of it, and the coordinator's key for the coordinator's own forgeries."""

    base: Path
    published: Path
    exported: Path
    key: SigningKey

    @property
    def trusted(self) -> dict[str, PublicKey]:
        """Whom the outsider trusts."""
        return {self.key.public.key_id: self.key.public}


def run_federation(folder: Path) -> Federation:
    """Run it, and export it."""
    (folder / "base").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {"matrix": torch.randn(5, 8, generator=generator), "vector": torch.randn(10, generator=generator)}
    save_file(tensors, folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text('{"model_type": "made-up"}')
    config = parse_config(TOML, folder=folder, where="forged.toml")
    trainers = {name: StepTrainer(number) for number, name in enumerate(("north", "south", "west"), start=1)}
    published = simulate(config, folder / "base", trainers).model_dir
    key, state = SigningKey.load(config.federation.key), config.federation.state
    with closing(Ledger(Database(config.database_url()))) as ledger:
        export(ledger, config.open_blobs(), state / "models", key, folder / "export", with_deltas=True)
    return Federation(folder / "base", published, folder / "export", key)


def verified(federation: Federation, folder: Path, *, replay: bool) -> list[Check]:
    """Check a published directory or an export, as `fedmerge verify` does; return what failed."""
    checks = Checklist()
    with checks.attempt("unreadable"):
        if not (folder / MANIFEST).exists() and not (folder / MANIFEST_SIGNATURE).exists():
            examine_directory(folder, federation.trusted, checks)
        else:
            found = examine_export(folder, federation.trusted, checks)
            if replay and found is not None:
                with tempfile.TemporaryDirectory() as scratch:
                    blobs = BlobStore(Path(scratch), FolderShelf(folder / BLOBS))
                    replay_rounds(found[1], Checkpoint(federation.base), blobs, checks)
    return checks.failures


@dataclass
class Tally:
    """What became of the forgeries of one kind."""

    num_tried: int = 0
    num_detected: int = 0
    num_named: int = 0
    num_without_members: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    undetected: list[str] = field(default_factory=list)

    def add(
        self, what: str, failed: list[Check], is_about: Callable[[Check], bool], *, by_members: bool = False
    ) -> None:
        """Count a forgery and what failed of it."""
        self.num_tried += 1
        self.num_detected += bool(failed)
        self.num_named += any(map(is_about, failed))
        alone = [check for check in failed if not (by_members and is_of_members(check))]
        self.num_without_members += bool(alone)
        if not failed:
            self.undetected.append(what)
        first = (alone or failed)[:1]
        self.reasons.update(f"{check.name}: {check.reason}" for check in first)


def is_of_members(check: Check) -> bool:
    """Whether a failure shows only by what members cosigned."""
    return "events that its checkpoint was signed for" in check.detail or "cosigned" in check.detail


def flip_bytes(federation: Federation, source: Path, scratch: Path, every: int, tally: Tally) -> None:
    """Flip a bit of every `every`-th byte of each file of a folder."""
    folder = scratch / "bytes"
    shutil.copytree(source, folder)
    manifests = {LINEAGE, SIGNATURE, MANIFEST, MANIFEST_SIGNATURE}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, original = path.relative_to(folder).as_posix(), path.read_bytes()
        for position in range(len(original) // 2 % every, len(original), every):
            changed = bytearray(original)
            changed[position] ^= 1 << position % 8
            path.write_bytes(changed)
            about = blames(path.name, *(("signature",) if name in manifests else ("files", "blobs")))
            failed = verified(federation, folder, replay=False)
            tally.add(f"{source.name}/{name}, byte {position}", failed, about)
        path.write_bytes(original)
    shutil.rmtree(folder)


def forge_files(federation: Federation, scratch: Path, tallies: dict[str, Tally]) -> None:
    """Swap, drop and reorder what is in files, with nobody signing anything again."""
    for source in (federation.published, federation.exported):
        folder = scratch / "files"
        shutil.copytree(source, folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        blobs = [path for path in paths if path.relative_to(folder).parts[0] == BLOBS]
        for one, other in combinations(blobs, 2):
            kept = one.read_bytes(), other.read_bytes()
            one.write_bytes(kept[1])
            other.write_bytes(kept[0])
            failed = verified(federation, folder, replay=True)
            tallies["swap"].add(f"{one.name[:12]} and {other.name[:12]}", failed, blames(one.name, "blobs"))
            one.write_bytes(kept[0])
            other.write_bytes(kept[1])
        for path in paths:
            original = path.read_bytes()
            path.unlink()
            failed = verified(federation, folder, replay=False)
            tallies["drop"].add(f"{source.name}/{path.name}", failed, blames(path.name))
            path.write_bytes(original)
            if path.suffix == ".jsonl":
                reorder(federation, folder, path, tallies)
        shutil.rmtree(folder)


def reorder(federation: Federation, folder: Path, path: Path, tallies: dict[str, Tally]) -> None:
    """Leave out each line of a file, and exchange each with the one before."""
    original = path.read_bytes()
    lines = original.splitlines(keepends=True)
    for number, line in enumerate(lines):
        what, before, behind = f"{path.name}:{number + 1}", lines[:number], lines[number + 1 :]
        path.write_bytes(b"".join(before + behind))
        tallies["drop"].add(what, verified(federation, folder, replay=False), blames(path.name, "files"))
        if before and before[-1] != line:
            path.write_bytes(b"".join([*before[:-1], line, before[-1], *behind]))
            tallies["order"].add(what, verified(federation, folder, replay=False), blames(path.name, "files"))
    path.write_bytes(original)


def blames(name: str, *checks: str) -> Callable[[Check], bool]:
    """Return whether a failure is of one of these checks, or of any if there are none, and names the file."""
    return lambda check: (not checks or check.name in checks) and name in check.detail


class OwnLog:
    """An export whose log the coordinator itself forges, chains and signs again."""

    def __init__(self, federation: Federation, scratch: Path) -> None:
        self.federation, self.folder = federation, scratch / "log"
        shutil.copytree(federation.exported, self.folder)
        self.lines = [json.loads(line) for line in (self.folder / LOG).read_text().splitlines()]
        self.events = [json.loads(line["event"]) for line in self.lines]
        self.heads = {line["hash"] for line in self.lines}
        self.created = FederationCreated.model_validate(self.events[0])
        cosigned = [event["size"] for event in self.events if event["kind"] == "checkpoint_cosigned"]
        self.num_witnessed = max(cosigned)
        self.manifest = Export.from_payload((self.folder / MANIFEST).read_bytes(), where=MANIFEST)

    def judge(self, events: list[dict[str, Any]], tally: Tally, what: str) -> None:
        """Sign a log of these events as far as the coordinator can, receipts and what records say of it too; verify."""
        head, entries, lines, sealed = GENESIS, list[LedgerEntry](), list[str](), ""
        for number, given in enumerate(events):
            event = self.resealed(given, sealed) if given["kind"] == "merge_finished" else given
            at_s, body = self.lines[min(number, len(self.lines) - 1)]["at_s"], json.dumps(event).encode()
            head = chain_hash(head, number, float.fromhex(at_s), body)
            sealed = head if event["kind"] == "round_sealed" else sealed
            lines.append(json.dumps({"at_s": at_s, "hash": head, "event": body.decode()}) + "\n")
            with suppress(ValueError):
                entries.append(LedgerEntry(number, 0.0, from_json(body), head))
        created = self.created
        receipts = [receipt_of(each, created) for each in entries if isinstance(each.event, DeltaAccepted)]
        signed = [{"envelope": receipt.sign(self.federation.key).decode()} for receipt in receipts]
        (self.folder / RECEIPTS).write_text("".join(json.dumps(each) + "\n" for each in signed))
        leaves = [log_leaf(json.loads(line)["hash"]) for line in lines]
        (self.folder / LOG).write_text("".join(lines))
        key, origin = self.federation.key, log_origin(self.manifest.federation, self.manifest.run)
        note = sign_checkpoint(LogCheckpoint(origin, len(leaves), merkle_root(leaves)), key)
        (self.folder / CHECKPOINT).write_bytes(note)
        digests = {name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in self.manifest.files}
        manifest = self.manifest.model_copy(update={"files": digests, "num_events": len(events)})
        (self.folder / MANIFEST).write_bytes(manifest.to_payload())
        (self.folder / MANIFEST_SIGNATURE).write_bytes(manifest.sign(key))
        failed = verified(self.federation, self.folder, replay=True)
        about = ("log", "events", "history", "statements", "receipts", "published", "blobs", "replay")
        tally.add(what, failed, lambda check: check.name in about, by_members=True)

    def resealed(self, event: dict[str, Any], head: str) -> dict[str, Any]:
        """Return a merge's event whose record says that it is of the round that was sealed with the hash `head`."""
        trusted = self.federation.trusted
        with suppress(VerificationError, ValueError):
            record, _ = MergeRecord.open(event["record_envelope"].encode(), trusted, where="event")
            if record.ledger_head in self.heads:
                record = record.model_copy(update={"ledger_head": head})
                return {**event, "record_envelope": record.sign(self.federation.key).decode()}
        return event

    def resigned(self, number: int, change: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        """Return an event whose statement the coordinator changed and signed again; None where that is no statement."""
        event = json.loads(json.dumps(self.events[number]))
        field, kind = SIGNED[event["kind"]]
        statement, _ = kind.open(event[field].encode(), self.federation.trusted, where="event")
        said = statement.model_dump(mode="json")
        change(said)
        try:
            event[field] = kind.model_validate_json(json.dumps(said)).sign(self.federation.key).decode()
        except ValueError:
            return None
        return event


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield where the numbers, texts and switches are in what JSON holds."""
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*path, number))
    elif value is not None:
        yield path


def changed(value: Any, path: tuple[str | int, ...]) -> None:
    """Put something else at a place."""
    for step in path[:-1]:
        value = value[step]
    old = value[path[-1]]
    if isinstance(old, bool):
        value[path[-1]] = not old
    elif isinstance(old, (int, float)):
        value[path[-1]] = old + 1
    else:
        value[path[-1]] = ("0" if old[:1] != "0" else "1") + old[1:] if old else "x"


def forge_log(federation: Federation, scratch: Path, tallies: dict[str, Tally], every: int) -> None:
    """Do what only the coordinator can: drop, swap and change events of the log, of which members cosigned the size."""
    log = OwnLog(federation, scratch)
    for number in range(log.num_witnessed):
        rest = log.events[:number] + log.events[number + 1 :]
        log.judge(rest, tallies["event dropped"], f"event {number} ({log.events[number]['kind']})")
        if number:
            swapped = [*log.events[: number - 1], log.events[number], log.events[number - 1], *log.events[number + 1 :]]
            log.judge(swapped, tallies["events swapped"], f"events {number - 1} and {number}")
    done = 0
    for number, event in enumerate(log.events[: log.num_witnessed]):
        for path in places(event):
            done += 1
            if path[0] == "kind" or done % every:
                continue
            other = json.loads(json.dumps(event))
            changed(other, path)
            forged = [*log.events[:number], other, *log.events[number + 1 :]]
            log.judge(forged, tallies["event changed"], f"event {number}: {'.'.join(map(str, path))}")
        if event["kind"] not in SIGNED:
            continue
        field, kind = SIGNED[event["kind"]]
        statement, _ = kind.open(event[field].encode(), federation.trusted, where="event")
        for path in places(statement.model_dump(mode="json")):
            done += 1
            if done % every:
                continue
            resigned = log.resigned(number, lambda said, path=path: changed(said, path))  # type: ignore[misc]
            if resigned is not None:
                forged = [*log.events[:number], resigned, *log.events[number + 1 :]]
                what = f"event {number}: {kind.kind}.{'.'.join(map(str, path))}"
                log.judge(forged, tallies["event changed"], what)


def plant(federation: Federation) -> None:
    """Blind the verifier to one file."""
    seen = directory.file_digests
    held = seen(federation.published)[BLIND]

    def blind(folder: Path) -> dict[str, str]:
        return {**seen(folder), BLIND: held}

    directory.file_digests = blind


def main() -> int:
    """Forge, verify, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--every", type=int, default=1, help="flip every K-th byte only")
    parser.add_argument("--plant", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    every = QUICK_EVERY if arguments.quick else arguments.every
    tallies: dict[str, Tally] = defaultdict(Tally)
    began_s = time.process_time()
    with tempfile.TemporaryDirectory(prefix="fedmerge-forged-") as folder:
        federation = run_federation(Path(folder) / "federation")
        for source in (federation.published, federation.exported):
            failures = verified(federation, source, replay=True)
            assert not failures, failures
        if arguments.plant:
            plant(federation)
            flip_bytes(federation, federation.published, Path(folder), every, tallies["byte"])
        else:
            for source in (federation.published, federation.exported):
                flip_bytes(federation, source, Path(folder), every, tallies["byte"])
            forge_files(federation, Path(folder), tallies)
            forge_log(federation, Path(folder), tallies, max(1, every // 16))
    rows = []
    for kind, tally in tallies.items():
        alone = f"{tally.num_without_members:,}" if "event" in kind else ""
        rows.append([kind, f"{tally.num_tried:,}", f"{tally.num_detected:,}", f"{tally.num_named:,}", alone])
    print_table(["forged", "tried", "detected", "rightly named", "without members"], rows)
    for kind, tally in tallies.items():
        print(f"{kind}: " + ", ".join(f"{reason} {number:,}" for reason, number in tally.reasons.most_common()))
        for what in tally.undetected[:20]:
            print(f"  UNDETECTED: {what}")
    num_undetected = sum(len(tally.undetected) for tally in tallies.values())
    num_unnamed = sum(tally.num_tried - tally.num_named for tally in tallies.values())
    print(
        f"{sum(tally.num_tried for tally in tallies.values()):,} forgeries, {num_undetected} undetected, "
        f"in {time.process_time() - began_s:.0f} CPU seconds"
    )
    if arguments.plant:
        return 0 if num_undetected else 1
    command = [sys.executable, __file__, "--plant", "--every", str(QUICK_EVERY)]
    is_found = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
    print(f"planted: blind to {BLIND}: {'found' if is_found else 'NOT FOUND'}")
    targets = [
        at_most(0.0, "undetected forgeries", float(num_undetected)),
        at_most(0.0, "forgeries that another reason was given for", float(num_unnamed)),
        at_least(1.0, "planted blind spot is found", float(is_found)),
    ]
    for target in targets:
        mark = "holds " if target["holds"] else "MISSED"
        print(f"{mark} {target['name']}: {target['value']:g}, goal {target['goal']:g}")
    if arguments.json:
        kinds = {
            kind: {
                "tried": tally.num_tried,
                "detected": tally.num_detected,
                "named": tally.num_named,
                "without_members": tally.num_without_members,
                "reasons": dict(tally.reasons),
                "undetected": tally.undetected,
            }
            for kind, tally in tallies.items()
        }
        arguments.json.write_text(json.dumps({"every": every, "kinds": kinds, "targets": targets}, indent=1))
    return 0 if all(target["holds"] for target in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
