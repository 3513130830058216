"""All that an outsider needs to check a federation's rounds without asking anybody: one folder, or one tar file.

    export.json, export.sig.json     a statement of the coordinator that names the others, but for blobs, by SHA-256
    log.jsonl                        the ledger: every event, as it is chained
    checkpoint.note                  the signed checkpoint of a log with just these events (C2SP)
    coordinator.pem                  the coordinator's public key, to compare with one from elsewhere
    receipts.jsonl                   the receipt of every delta that was accepted in these rounds
    publications/round-0001.json     the signed lineage of each published directory
    blobs/ab/ab12...                 with deltas: these, updates, steps and optimizer states, by Merkle root

The same ledger gives the same bytes. The log is whole whatever the rounds, since it shows nothing otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.archive import write_folder, write_tar
from fedmerge.errors import InputError, ResourceError, reporting_os_errors
from fedmerge.events import DeltaAccepted, FederationCreated, MergeFinished, RoundPublished
from fedmerge.files import sync_file
from fedmerge.publishing.publish import SIGNATURE, appearing_whole, software_versions
from fedmerge.rounds.journal import own_keys, receipt_of
from fedmerge.rounds.state import replay
from fedmerge.statements import Export, MergeRecord
from fedmerge.store.blobs import BlobStore
from fedmerge.store.entries import LedgerEntry
from fedmerge.transparency.log import LogCheckpoint, log_leaf, log_origin, sign_checkpoint
from fedmerge.transparency.merkle import merkle_root
from fedmerge.trust.sign import PublicKey, SigningKey

if TYPE_CHECKING:
    from fedmerge.store.ledger import Ledger  # needs what who only verifies may not have

MANIFEST = "export.json"
MANIFEST_SIGNATURE = "export.sig.json"
LOG = "log.jsonl"
CHECKPOINT = "checkpoint.note"
COORDINATOR = "coordinator.pem"
RECEIPTS = "receipts.jsonl"
BLOBS = "blobs"


def export(
    ledger: Ledger,
    blobs: BlobStore,
    models: Path,
    key: SigningKey,
    target: Path,
    *,
    rounds: Collection[int] | None = None,
    with_deltas: bool = False,
) -> Export:
    """Write a federation's export to `target`, a tar file if it is called so, or else a folder.

    `models` is the folder with the published directories. `rounds` are those of which receipts, publications and deltas
    are in it, by default all that were merged. Raises `InputError` when one of them was not, `UnknownVersion` when a
    blob is gone, or `ResourceError`.
    """
    entries = list(ledger.entries)
    bodies = ledger.bodies()[: len(entries)]
    created = entries[0].event if entries else None
    if not isinstance(created, FederationCreated):
        raise InputError("the ledger is empty: there is nothing to export")
    merged = {entry.event.round for entry in entries if isinstance(entry.event, MergeFinished)}
    chosen = sorted(merged if rounds is None else rounds)
    if missing := sorted(set(chosen) - merged):
        raise InputError(f"round {missing[0]} has no merge", hint=f"there are {len(merged)}; see: fedmerge rounds")
    leaves = [log_leaf(entry.hash) for entry in entries]
    checkpoint = LogCheckpoint(log_origin(created.federation, created.run), len(leaves), merkle_root(leaves))
    records = merge_records(entries, own_keys(replay(entries)))
    receipts = [receipt_of(entry, created).sign(key).decode() for entry in accepted_in(entries, chosen, records)]
    files: dict[str, Path | bytes] = {
        LOG: _lines([_line(entry, body) for entry, body in zip(entries, bodies, strict=True)]),
        CHECKPOINT: sign_checkpoint(checkpoint, key),
        COORDINATOR: key.public.pem().encode(),
        RECEIPTS: _lines([{"envelope": envelope} for envelope in receipts]),
    }
    for number in sorted({each.event.round for each in entries if isinstance(each.event, RoundPublished)} & {*chosen}):
        published = models / f"round-{number:04d}" / SIGNATURE
        if published.is_file():
            files[publication(number)] = published.read_bytes()
    statement = Export(
        federation=created.federation,
        run=created.run,
        base_digest=created.base_digest,
        num_events=len(entries),
        rounds=chosen,
        with_deltas=with_deltas,
        files={name: _digest(content) for name, content in sorted(files.items())},
        software=software_versions(),
    )
    if with_deltas:
        files |= {blob(root): blobs.path(root) for root in blob_roots(chosen, records)}
    files |= {MANIFEST: statement.to_payload(), MANIFEST_SIGNATURE: statement.sign(key)}
    _write(files, target)
    return statement


def _write(files: Mapping[str, Path | bytes], target: Path) -> None:
    if target.exists():
        raise ResourceError(f"{target}: already exists", hint="choose another name; exports are never overwritten")
    if target.suffix != ".tar":
        with appearing_whole(target) as partial:
            write_folder(files, partial)
        return
    partial = target.with_name(f".{target.name}.partial")
    with reporting_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_tar(files, partial)
        sync_file(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def merge_records(entries: Sequence[LedgerEntry], own: Mapping[str, PublicKey]) -> dict[int, MergeRecord]:
    """Return the merge record of each round, which the coordinator (by one of its `own` keys) signed."""
    return {
        entry.event.round: MergeRecord.open(entry.event.record_envelope.encode(), own, where="merge record")[0]
        for entry in entries
        if isinstance(entry.event, MergeFinished)
    }


def accepted_in(
    entries: Sequence[LedgerEntry], rounds: Sequence[int], records: Mapping[int, MergeRecord]
) -> list[LedgerEntry]:
    """Return the deltas that were delivered for these rounds, or merged in them."""
    chosen = [records[number] for number in rounds if number in records]
    merged = {each.statement_digest for record in chosen for each in record.contributions}
    return [
        entry
        for entry in entries
        if isinstance(entry.event, DeltaAccepted)
        and (entry.event.round in rounds or entry.event.statement_digest in merged)
    ]


def blob_roots(rounds: Sequence[int], records: Mapping[int, MergeRecord]) -> list[str]:
    """Return the blobs that it takes to compute these rounds again, from what was published before them."""
    roots = set[str]()
    for record in (records[number] for number in rounds if number in records):
        roots |= {each.payload_root for each in record.contributions}
        roots |= {step.root for step in record.model.steps[len(record.before.steps) :]}
        roots |= {update.root for update in record.model.updates}
        before = records.get(record.before.updates[-1].round) if record.before.updates else None
        roots |= {each.outer_state_root for each in (record, before) if each is not None and each.outer_state_root}
    return sorted(roots)


def _line(entry: LedgerEntry, body: bytes) -> dict[str, str]:
    return {"at_s": entry.at_s.hex(), "hash": entry.hash, "event": body.decode()}


def _lines(objects: Sequence[Mapping[str, str]]) -> bytes:
    return "".join(json.dumps(each, separators=(",", ":")) + "\n" for each in objects).encode()


def blob(root: str) -> str:
    """Return the name of a blob in an export."""
    return f"{BLOBS}/{root[:2]}/{root}"


def publication(round_number: int) -> str:
    """Return the name of a round's published lineage in an export."""
    return f"publications/round-{round_number:04d}.json"


def file_digest(path: Path) -> str:
    """Return a file's SHA-256 (hex)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: Path | bytes) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_digest(content)
