"""An export (`fedmerge.publishing.export`), checked against nothing but the coordinator's public key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fedmerge.errors import BadSignature, DigestMismatch, VerificationError
from fedmerge.events import (
    CheckpointCosigned,
    DeltaAccepted,
    DeltaRejected,
    FederationCreated,
    HandedOver,
    MemberAdmitted,
    MergeFinished,
    RoundOpened,
    from_json,
)
from fedmerge.publishing.export import (
    BLOBS,
    CHECKPOINT,
    COORDINATOR,
    LOG,
    MANIFEST,
    MANIFEST_SIGNATURE,
    RECEIPTS,
    accepted_in,
    blob,
    blob_roots,
    file_digest,
    merge_records,
    publication,
)
from fedmerge.rounds.journal import receipt_of
from fedmerge.rounds.provenance import provenance_of
from fedmerge.rounds.state import FederationState, after
from fedmerge.statements import (
    DeltaStatement,
    Enrolment,
    Export,
    Lineage,
    MergeRecord,
    Receipt,
    Rejection,
    RoundSpec,
    digest_of,
)
from fedmerge.store.entries import GENESIS, LedgerEntry, chain_hash
from fedmerge.transparency.log import MAX_NOTE_BYTES, log_leaf, log_origin, open_by_any
from fedmerge.transparency.merkle import leaves_of, merkle_root
from fedmerge.trust.sign import PublicKey
from fedmerge.verify.checks import Checklist
from fedmerge.verify.history import Entry, History, Origin, read_history
from fedmerge.verify.keys import KeyLine
from fedmerge.verify.plain import MAX_TEXT_BYTES, PLAIN_FILES, open_manifest, read_plain


@dataclass(frozen=True)
class _Opened:
    """An export's folder, its list of files, the coordinator's keys, the events of its log and the merge records."""

    directory: Path
    manifest: Export
    own: Mapping[str, PublicKey]
    entries: Sequence[LedgerEntry]
    records: dict[int, MergeRecord]


def examine_export(
    directory: Path, trusted: Mapping[str, PublicKey], checks: Checklist
) -> tuple[Export, History] | None:
    """Check an export that lies in a folder, note what holds and what does not, and go on after it.

    `trusted` are the coordinators' keys by key id. Returns None when no trusted key signed it. Raises `InputError` when
    it is not an export.
    """
    handovers = KeyLine.read(_log_lines(directory / LOG), "kind", "handed_over", "handover")
    known = handovers.trusted(trusted)
    opened = open_manifest(directory / MANIFEST, directory / MANIFEST_SIGNATURE, Export, known, checks)
    if opened is None:
        handovers.note(checks)
        for name in ("files", "log", "history"):
            checks.skip(name, f"no trusted key says what the {name} should be")
        return None
    manifest, signer = opened
    _check_files(directory, manifest, checks)
    with checks.attempt("key"):
        if PublicKey.load(directory / COORDINATOR) != signer:
            raise VerificationError(f"{COORDINATOR}: is another key than the one that signed the export")
    entries = _read_log(directory, checks)
    nodes = _node_keys(entries, checks)
    origin = Origin(manifest.federation, manifest.run, handovers.up_to(signer, checks), nodes)
    _check_log(directory, manifest, origin.line, entries, checks)
    num_handovers, own = 0, {key.key_id: key for key in origin.line}
    for entry in entries:
        with checks.attempt("events"):
            _require_as_signed(entry, origin, num_handovers)
        num_handovers += isinstance(entry.event, HandedOver)
    _require_possible(entries, own, checks)
    history = _check_history(entries, origin, checks)
    export = _Opened(directory, manifest, own, entries, {})
    with checks.attempt("events"):
        export.records.update(merge_records(entries, own))
    _check_receipts(export, checks)
    _check_publications(export, history, checks)
    _check_blobs(export, checks)
    return manifest, history


def _log_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield places and lines before anything is checked; none where there is no such file."""
    if path.is_file() and not path.is_symlink():
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from ((f"{path.name}:{number}", line) for number, line in enumerate(file, start=1))


def _check_files(directory: Path, manifest: Export, checks: Checklist) -> None:
    found: set[str] = set()
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            checks.fail("files", VerificationError(f"{name}: {PLAIN_FILES}"))
        elif path.is_file() and name not in {MANIFEST, MANIFEST_SIGNATURE} and not name.startswith(f"{BLOBS}/"):
            found.add(name)
    for name in sorted(found | manifest.files.keys()):
        if name not in found:
            checks.fail("files", DigestMismatch(f"{name}: is missing"))
        elif name not in manifest.files:
            checks.fail("files", DigestMismatch(f"{name}: is not part of what was signed"))
        elif file_digest(directory / name) != manifest.files[name]:
            checks.fail("files", DigestMismatch(f"{name}: was changed after it was signed"))
    if checks.holds("files"):
        detail = f"all {len(manifest.files)} files have their signed SHA-256, and no other file is there"
        checks.ok("files", detail)


def _read_log(directory: Path, checks: Checklist) -> list[LedgerEntry]:
    """Return the events up to the first that does not continue the chain."""
    entries: list[LedgerEntry] = []
    head, data = GENESIS, b""
    with checks.attempt("log"):
        data = read_plain(directory / LOG, MAX_TEXT_BYTES)
        for number, line in enumerate(data.splitlines()):
            where = f"{LOG}:{number + 1}"
            try:
                fields = json.loads(line)
                at_s, body, said = float.fromhex(fields["at_s"]), fields["event"].encode(), fields["hash"]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
                raise DigestMismatch(f"{where}: not an event of a ledger") from err
            head = chain_hash(head, number, at_s, body)
            if head != said:
                raise DigestMismatch(f"{where}: event {number} does not continue the hash chain")
            try:
                entries.append(LedgerEntry(number, at_s, from_json(body), head))
            except ValidationError as err:
                raise DigestMismatch(f"{where}: event {number} is not one that this version knows") from err
    return entries


def _check_log(
    directory: Path,
    manifest: Export,
    line: tuple[PublicKey, ...],
    entries: Sequence[LedgerEntry],
    checks: Checklist,
) -> None:
    """Check that the events are those of the signed checkpoints, that they could happen, and whose they are."""
    leaves = [log_leaf(entry.hash) for entry in entries]
    name = log_origin(manifest.federation, manifest.run)

    def require(note: bytes, size: int, where: str) -> None:
        checkpoint = open_by_any(note, line, where=where)
        if (checkpoint.origin, checkpoint.size) != (name, size):
            raise DigestMismatch(
                f"{where}: is of {checkpoint.size} events of {checkpoint.origin}, not {size} of {name}"
            )
        if size > len(leaves) or checkpoint.root != merkle_root(leaves[:size]):
            raise DigestMismatch(f"{where}: the log does not have the {size} events that its checkpoint was signed for")

    with checks.attempt("log"):
        created = entries[0].event if entries else None
        if not isinstance(created, FederationCreated):
            raise DigestMismatch(f"{LOG}: does not begin with a federation")
        said = (manifest.federation, manifest.run, manifest.base_digest)
        if (created.federation, created.run, created.base_digest) != said:
            raise VerificationError(f"{LOG}: is the log of another federation, {created.federation!r}")
        if PublicKey.from_pem(created.coordinator_key, where=LOG) != line[0]:
            raise VerificationError(f"{LOG}: is the log of another coordinator than the one that signed the export")
    with checks.attempt("log"):
        require(read_plain(directory / CHECKPOINT, MAX_NOTE_BYTES), manifest.num_events, CHECKPOINT)
    for entry in entries:
        if isinstance(entry.event, CheckpointCosigned):
            with checks.attempt("log"):
                require(entry.event.note.encode(), entry.event.size, f"{LOG}:{entry.number + 1}")
    if checks.holds("log"):
        checks.ok("log", f"{len(entries)} events form one chain, which the signed checkpoints are of")


def _require_possible(entries: Sequence[LedgerEntry], own: Mapping[str, PublicKey], checks: Checklist) -> None:
    """Check that events could happen one after the other, deltas came from members, and merges took all of them."""
    state = FederationState()
    with checks.attempt("events"):
        for entry in entries:
            with checks.attempt("events"):
                _require_fair(state, entry, own)
            state = after(state, entry)
    if checks.holds("events"):
        detail = "deltas came from enrolled nodes, each merge took those that were sealed, and all of them"
        checks.ok("events", detail)


def _require_fair(state: FederationState, entry: LedgerEntry, own: Mapping[str, PublicKey]) -> None:
    where = f"{LOG}:{entry.number + 1}"
    match entry.event:
        case DeltaAccepted(node_id=node_id):
            member = state.members.get(node_id)
            if member is None or member.role != "node":
                raise VerificationError(f"{where}: a delta of {node_id[:12]}, which was not enrolled as a node then")
        case MergeFinished(record_envelope=envelope):
            record, _ = MergeRecord.open(envelope.encode(), own, where=where)
            sealed = [*map(state.accepted, state.node_ids), *map(state.late, state.carried_in)]
            expected = {fact.statement_digest: fact.node_id for fact in sealed if fact is not None}
            taken = {each.statement_digest: each.node_id for each in record.contributions}
            for digest, node_id in sorted((expected | taken).items()):
                if digest not in taken:
                    raise VerificationError(
                        f"{where}: the merge of round {record.round} leaves out the delta of node {node_id[:12]}"
                    )
                if digest not in expected:
                    raise VerificationError(
                        f"{where}: the merge of round {record.round} has a delta of node {node_id[:12]} "
                        "that was not sealed for it"
                    )
            if record.ledger_head != state.sealed_hash:
                raise VerificationError(
                    f"{where}: the merge of round {record.round} is not of the round that was sealed"
                )
        case _:
            pass


def _node_keys(entries: Sequence[LedgerEntry], checks: Checklist) -> dict[str, PublicKey]:
    """Return the keys of nodes by id: an id is its key's digest, so whoever names the key can't lie about it."""
    keys: dict[str, PublicKey] = {}
    for entry in entries:
        if isinstance(entry.event, DeltaAccepted):
            with checks.attempt("events"):
                key = PublicKey.from_pem(entry.event.node_key, where=f"{LOG}:{entry.number + 1}")
                keys[key.key_id] = key
    return keys


def _require_as_signed(entry: LedgerEntry, origin: Origin, num_handovers: int) -> None:
    """Raise unless an event says what the statement in it says, and who signed it was the coordinator then."""
    where = f"{LOG}:{entry.number + 1}"
    pairs: list[tuple[object, object]] = []

    def own(envelope: str) -> dict[str, PublicKey]:
        return origin.keys(num_handovers, envelope.encode(), where)

    match entry.event:
        case RoundOpened() as event:
            spec, signed = RoundSpec.open(event.spec_envelope.encode(), own(event.spec_envelope), where=where)
            pairs = [
                (event.round, spec.round),
                (event.spec_digest, digest_of(signed.payload)),
                (event.sample, spec.sample),
                (event.max_staleness, spec.max_staleness),
            ]
        case DeltaAccepted() as event:
            statement, signed = DeltaStatement.open(event.statement_envelope.encode(), origin.nodes, where=where)
            names = ("round", "node_id", "payload_root", "payload_bytes", "num_examples")
            pairs = [(getattr(event, name), getattr(statement, name)) for name in names]
            pairs += [(event.statement_digest, digest_of(signed.payload)), (signed.signer.key_id, event.node_id)]
        case DeltaRejected() as event:
            rejection, _ = Rejection.open(event.envelope.encode(), own(event.envelope), where=where)
            names = ("round", "node_id", "statement_digest", "reason", "detail")
            pairs = [(getattr(event, name), getattr(rejection, name)) for name in names]
        case MergeFinished() as event:
            record, _ = MergeRecord.open(event.record_envelope.encode(), own(event.record_envelope), where=where)
            pairs = [
                (event.round, record.round),
                (event.version, record.model.digest),
                (event.update_root, record.model.updates[-1].root if record.model.updates else None),
            ]
        case MemberAdmitted() as event:
            enrolment, _ = Enrolment.open(event.envelope.encode(), own(event.envelope), where=where)
            pairs = [(getattr(event, name), getattr(enrolment, name)) for name in ("node_id", "organisation", "role")]
        case _:
            pass
    if any(found != said for found, said in pairs):
        raise VerificationError(f"{where}: the event {entry.event.kind} says something else than its statement")


def _check_history(entries: Sequence[LedgerEntry], origin: Origin, checks: Checklist) -> History:
    """Check that the merges follow from each other up to the version that counts at the end."""
    state, told = FederationState(), []
    with checks.attempt("history"):
        for entry in entries:
            state = after(state, entry)
        told = [Entry(f"{LOG}:{each.event + 1}", each.kind, each.envelope.encode()) for each in provenance_of(entries)]
    if state.current is None:
        checks.skip("history", "no round was merged, or the merges can't be followed")
        return History()
    with checks.attempt("history"):
        own = {key.key_id: key for key in origin.line}
        record, _ = MergeRecord.open(state.current.record_envelope(entries).encode(), own, where=LOG)
        return read_history(told, origin, record.model, checks)
    return History()


def _check_receipts(export: _Opened, checks: Checklist) -> None:
    """Check that there is a receipt of every delta, which names its place in the log."""
    entries = export.entries
    with checks.attempt("receipts"):
        created = entries[0].event if entries else None
        if not isinstance(created, FederationCreated):
            raise DigestMismatch(f"{LOG}: does not begin with a federation")
        accepted = accepted_in(entries, export.manifest.rounds, export.records)
        expected = {entry.number: receipt_of(entry, created) for entry in accepted}
        for number, line in enumerate(read_plain(export.directory / RECEIPTS, MAX_TEXT_BYTES).splitlines(), start=1):
            where = f"{RECEIPTS}:{number}"
            try:
                envelope = json.loads(line)["envelope"].encode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
                raise BadSignature(f"{where}: not a receipt") from err
            receipt, _ = Receipt.open(envelope, export.own, where=where)
            if expected.pop(receipt.event, None) != receipt:
                raise VerificationError(f"{where}: the log has no such delta at event {receipt.event}")
        for event in expected:
            raise VerificationError(f"{RECEIPTS}: has no receipt of the delta that was accepted as event {event}")
        checks.ok("receipts", "every delta that was accepted has a receipt that names its place in the log")


def _check_publications(export: _Opened, history: History, checks: Checklist) -> None:
    """Check that what was published in each round is what was merged."""
    manifest = export.manifest
    found = 0
    for record in history.records:
        name = publication(record.round)
        if record.round not in manifest.rounds:
            continue
        if name not in manifest.files:
            checks.skip("published", f"round {record.round}: the export does not have what was published")
            continue
        with checks.attempt("published"):
            lineage, _ = Lineage.open(read_plain(export.directory / name, MAX_TEXT_BYTES), export.own, where=name)
            if (lineage.federation, lineage.run) != (manifest.federation, manifest.run):
                raise VerificationError(f"{name}: is of another federation, {lineage.federation!r}")
            if lineage.model != record.model:
                raise VerificationError(
                    f"{name}: version {lineage.model.digest[:12]} was published, "
                    f"and {record.model.digest[:12]} was merged"
                )
            found += 1
    if found and checks.holds("published"):
        checks.ok("published", f"in {found} rounds what was published is what was merged")


def _check_blobs(export: _Opened, checks: Checklist) -> None:
    """Check that the blobs are those that the merge records ask for, by their Merkle roots."""
    directory, manifest = export.directory, export.manifest
    roots = blob_roots(manifest.rounds, export.records) if manifest.with_deltas else []
    expected = {blob(root) for root in roots}
    found = {path.relative_to(directory).as_posix() for path in (directory / BLOBS).rglob("*") if path.is_file()}
    for name in sorted(expected | found):
        if name not in found:
            checks.fail("blobs", DigestMismatch(f"{name}: is missing"))
        elif name not in expected:
            checks.fail("blobs", DigestMismatch(f"{name}: is not one that the merge records of these rounds ask for"))
        elif merkle_root(leaves_of(directory / name)).hex() != name.rpartition("/")[2]:
            checks.fail("blobs", DigestMismatch(f"{name}: was changed after it was delivered"))
    if manifest.with_deltas and checks.holds("blobs"):
        checks.ok("blobs", f"all {len(found)} deltas, updates and states have the Merkle roots that were signed")
