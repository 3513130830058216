"""Check a published directory offline, without trusting whoever handed it over.

What is checked: the coordinator's signature, every file's digest, that the weights are the version they claim to be,
that each delta statement was signed by its node and each merge record follows from the one before. With the deltas at
hand, the whole history is computed again and compared bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from torch import Tensor

from fedmerge.aggregate import RoundUpdate, delta_key, open_delta, screen_round
from fedmerge.attest import MODEL_KEY, MODEL_SIGNATURE, check_model_signature
from fedmerge.codec import Codec
from fedmerge.delta import UpdatedModel, delta_schema
from fedmerge.errors import (
    BadSignature,
    DigestMismatch,
    InputError,
    InvalidDelta,
    UnknownVersion,
    VerificationError,
)
from fedmerge.frame import DeltaFile
from fedmerge.merge import Recipe
from fedmerge.merkle import leaves_of, merkle_root
from fedmerge.publish import ADAPTER, COSIGNATURE, LINEAGE, PROVENANCE, SIGNATURE, file_digests
from fedmerge.scoring import candidate_of, is_as_planned, outcome, proposed
from fedmerge.sign import MAX_ENVELOPE_BYTES, PublicKey
from fedmerge.statements import (
    PREDICATE_ROOT,
    Candidates,
    DeltaStatement,
    Enrolment,
    Lineage,
    LocalMerge,
    MergeRecord,
    MetricsStatement,
    ModelRef,
    Revocation,
    Rollback,
    RoundSpec,
    StepRef,
    digest_of,
)
from fedmerge.steps import SteppedModel
from fedmerge.store.blobs import BlobStore
from fedmerge.tensors import Checkpoint, TensorMap, model_digest
from fedmerge.translog import MEMBER_NAME, check_cosignature, open_checkpoint

PLAIN_FILES = "only plain files belong in a published model"

Published = TypeVar("Published", Lineage, LocalMerge)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `passed` is None when it could not be checked, and `detail` says why."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class History:
    """A directory's provenance, verified: round specs and delta statements by digest, merge records in order.

    The records are those that lead to the version; what `rollbacks` took back is not among them. Of rounds that
    searched for their merge also the candidates by digest, and what nodes reported about them, by round, candidate and
    node. `witnesses` has the size of log that each member cosigned last. `enrolments` and `revocations` are by node:
    what the coordinator says of whose keys these are.
    """

    specs: dict[str, RoundSpec]
    deltas: dict[str, DeltaStatement]
    records: list[MergeRecord]
    proposals: dict[str, Candidates]
    metrics: dict[tuple[int, str, str], MetricsStatement]
    witnesses: dict[str, int]
    enrolments: dict[str, Enrolment]
    revocations: dict[str, Revocation]
    rollbacks: list[Rollback]


def verify_directory(directory: Path, trusted: Mapping[str, PublicKey]) -> tuple[Lineage, History, list[Check]]:
    """Check everything that needs no other file, and return what was checked.

    `trusted` are the coordinators' keys by key id. Raises `VerificationError` (or a subclass) at the first thing that
    does not hold, naming the file; `InputError` when the directory is not a published model.
    """
    lineage, signer, checks = _check_directory(directory, Lineage, trusted)
    _require_version(directory, lineage.model.digest, checks)
    coordinator = {signer.key_id: signer}
    history = _read_history(directory / PROVENANCE, coordinator, lineage)
    chain = f"{len(history.records)} merge records form a chain from the base to this version"
    back = [f"; in round {each.round} rolled back to {each.to_round} ({each.reason})" for each in history.rollbacks]
    checks.append(Check("history", True, chain + "".join(back)))
    num_nodes = len({statement.node_id for statement in history.deltas.values()})
    checks.append(
        Check("deltas", True, f"{len(history.deltas)} delta statements verify under the keys of {num_nodes} nodes")
    )
    checks.append(_organisations(history))
    checks.append(_witnesses(history))
    checks += [
        Check("revoked", True, f"key {node_id[:12]} of {each.organisation} was revoked: {each.reason}")
        for node_id, each in sorted(history.revocations.items())
    ]
    searches = [record.search for record in history.records if record.search is not None]
    if searches:
        num_candidates = sum(len(search.scores) for search in searches)
        detail = f"the scores that nodes signed for {num_candidates} candidates lead to what was merged"
        checks.append(Check("search", True, detail))
    strangers = sorted(key_id for key_id in lineage.node_keys if key_id not in trusted)
    if strangers:
        detail = (
            f"the coordinator vouches for the node keys {', '.join(k[:12] for k in strangers)}; you do not know them"
        )
        checks.append(Check("node keys", None, detail))
    return lineage, history, checks


def _organisations(history: History) -> Check:
    """Say whose deltas were merged, by the coordinator's word."""
    merged = {c.node_id for record in history.records for c in record.contributions if c.accepted}
    known = {history.enrolments[node_id].organisation for node_id in merged if node_id in history.enrolments}
    missing = sorted(merged - history.enrolments.keys())
    if missing:
        return Check("members", None, f"nothing says whose key {missing[0][:12]} is")
    return Check("members", True, f"the deltas are of {len(known)} organisations: {', '.join(sorted(known))}")


def _witnesses(history: History) -> Check:
    """Say who cosigned the coordinator's log."""
    if not history.witnesses:
        return Check("witnesses", None, "no member cosigned the coordinator's log; compare checkpoints: fedmerge audit")
    size = max(history.witnesses.values())
    return Check("witnesses", True, f"{len(history.witnesses)} members cosigned the log, the last at {size} events")


def verify_local(directory: Path, trusted: Mapping[str, PublicKey]) -> tuple[LocalMerge, list[Check]]:
    """Check a directory that `fedmerge merge --key` wrote, as `verify_directory` does a federation's."""
    merge, _, checks = _check_directory(directory, LocalMerge, trusted)
    _require_version(directory, merge.model_digest, checks)
    return merge, checks


def is_local(directory: Path) -> bool:
    """Whether a directory says it was merged locally; its signature must then be one over such a statement."""
    return f"{PREDICATE_ROOT}/{LocalMerge.kind}/".encode() in _read(directory / LINEAGE)


def replay(history: History, base: Checkpoint, blobs: BlobStore) -> Check:
    """Compute every version again from the base and the stored deltas, and compare bit for bit.

    The steps that records list are followed as well. Raises `InputError` when `base` is another model, `UnknownVersion`
    when a delta is not in `blobs`, `DigestMismatch` when one was changed, a round comes out otherwise, or a step is not
    stored or does not lead to the version that it should.
    """
    expected = history.records[0].before.base_digest
    if model_digest(base) != expected:
        raise InputError(
            f"{base.directory}: not the base model that this version was made from",
            hint=f"its version should be {expected[:12]}; fedmerge inspect shows a model's",
        )
    schema = delta_schema(base.schema)
    state: dict[str, Tensor] = {}
    updates: list[DeltaFile] = []
    with TemporaryDirectory(prefix="fedmerge-replay-") as scratch:
        for record in history.records:
            spec = history.specs[record.spec_digest]
            statements = {
                delta_key(c.node_id, c.staleness): history.deltas[c.statement_digest] for c in record.contributions
            }
            deltas = {
                key: open_delta(
                    history.specs[signed.spec_digest], signed.node_id, _checked(blobs, signed.payload_root), schema
                )
                for key, signed in statements.items()
            }
            counts = {key: signed.num_examples for key, signed in statements.items()}
            verdicts = screen_round(spec, deltas, counts, schema)
            candidate = None
            if record.search is not None:
                accepted = {verdict.node_id for verdict in verdicts if verdict.accepted}
                if accepted != {c.node_id for c in record.contributions if c.accepted}:
                    raise DigestMismatch(f"round {record.round}: screening the same deltas again accepts other nodes")
                candidates = proposed([history.proposals[digest] for digest in record.search.proposals])
                candidate = candidate_of(candidates[record.search.chosen])
            update = RoundUpdate(spec, verdicts, deltas, UpdatedModel(base, updates), state, candidate=candidate)
            path = Path(scratch) / f"update-{record.round}"
            update.write(path, schema)
            state = update.state
            ref = record.model.updates[-1]
            before = UpdatedModel(base, updates)
            updates = [*updates, DeltaFile(path, schema, Codec.from_dict(ref.codec), seed=int(ref.seed))]
            found = model_digest(UpdatedModel(base, updates))
            if found != record.model.digest:
                raise DigestMismatch(
                    f"round {record.round}: merging the same deltas again gives version {found[:12]}, "
                    f"but {record.model.digest[:12]} was published"
                )
            for step in record.model.steps[len(record.before.steps) :]:
                start = base if step.before == record.before.base_digest else before
                _require_step(step, start, base, blobs)
    num_steps = len(history.records[-1].model.steps)
    also = f", and {num_steps} step files lead where they should" if num_steps else ""
    return Check("replay", True, f"merging the deltas of {len(history.records)} rounds again gives the same bits{also}")


def _require_step(step: StepRef, start: TensorMap, base: Checkpoint, blobs: BlobStore) -> None:
    where = f"round {step.round}: the step file {step.root[:12]} from version {step.before[:12]}"
    try:
        path = _checked(blobs, step.root)
        found = model_digest(SteppedModel(start, path, base.schema))
    except UnknownVersion as err:
        raise DigestMismatch(f"{where} is listed, but not stored") from err
    except InvalidDelta as err:
        raise DigestMismatch(f"{where} can't be followed ({err.message})") from err
    if found != step.after:
        raise DigestMismatch(f"{where} leads to version {found[:12]}, not {step.after[:12]}")


def _checked(blobs: BlobStore, root: str) -> Path:
    path = blobs.path(root)
    if merkle_root(leaves_of(path)).hex() != root:
        raise DigestMismatch(f"{path}: was changed after it was delivered")
    return path


def _check_directory(
    directory: Path, kind: type[Published], trusted: Mapping[str, PublicKey]
) -> tuple[Published, PublicKey, list[Check]]:
    payload = _read(directory / LINEAGE)
    if not (directory / SIGNATURE).exists():
        raise BadSignature(f"{directory}: not signed, has no {SIGNATURE}", hint="to sign a merge: fedmerge merge --key")
    envelope = _read(directory / SIGNATURE)
    lineage, signed = kind.open(envelope, trusted, where=str(directory / SIGNATURE))
    if signed.payload != payload:
        raise DigestMismatch(f"{directory / LINEAGE}: differs from what was signed")
    _require_files(directory, lineage.files)
    num_files = len(lineage.files)
    checks = [
        Check("signature", True, f"{LINEAGE} is signed by key {signed.signer.short}"),
        Check("files", True, f"all {num_files} files have their signed SHA-256, and no other file is there"),
    ]
    if MODEL_SIGNATURE in lineage.files:
        model_key, where = PublicKey.load(directory / MODEL_KEY), str(directory / MODEL_SIGNATURE)
        check_model_signature(_read(directory / MODEL_SIGNATURE), lineage.files, model_key, where=where)
        detail = f"{MODEL_SIGNATURE} names the same files, for OpenSSF model-signing tools and the key in {MODEL_KEY}"
        checks.append(Check("model.sig", True, detail))
    return lineage, signed.signer, checks


def _require_version(directory: Path, expected: str, checks: list[Check]) -> None:
    found = model_digest(Checkpoint(directory))
    if found != expected:
        raise DigestMismatch(f"{directory}: the weights are version {found[:12]}, not {expected[:12]}")
    checks.append(Check("version", True, f"the weights are version {found[:12]}"))


def _require_files(directory: Path, signed_files: Mapping[str, str]) -> None:
    for path in directory.iterdir():
        inner = list(path.iterdir()) if path.name == ADAPTER and path.is_dir() and not path.is_symlink() else [path]
        for each in inner:
            if each.is_symlink() or not each.is_file():
                raise VerificationError(f"{each}: {PLAIN_FILES}")
    found = file_digests(directory)
    for name in sorted(signed_files.keys() | found.keys()):
        if name not in found:
            raise DigestMismatch(f"{directory / name}: is missing")
        if name not in signed_files:
            raise DigestMismatch(f"{directory / name}: is not part of what was signed")
        if found[name] != signed_files[name]:
            raise DigestMismatch(
                f"{directory / name}: was changed after it was signed",
                hint="fetch the model again; do not use this copy",
            )


def _read_history(path: Path, coordinator: Mapping[str, PublicKey], lineage: Lineage) -> History:
    node_keys = {
        key_id: PublicKey.from_pem(pem, where=f"{LINEAGE}: node key {key_id[:12]}")
        for key_id, pem in lineage.node_keys.items()
    }
    history = History({}, {}, [], {}, {}, {}, {}, {}, [])
    told: list[MergeRecord | Rollback] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
            kind, envelope = entry["kind"], entry["envelope"].encode()
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise BadSignature(f"{where}: not a provenance entry") from err
        if kind == RoundSpec.kind:
            spec, signed = RoundSpec.open(envelope, coordinator, where=where)
            history.specs[digest_of(signed.payload)] = spec
        elif kind == DeltaStatement.kind:
            statement, signed = DeltaStatement.open(envelope, node_keys, where=where)
            if signed.signer.key_id != statement.node_id:
                raise BadSignature(f"{where}: the delta of node {statement.node_id[:12]} was signed by another node")
            history.deltas[digest_of(signed.payload)] = statement
        elif kind == Candidates.kind:
            candidates, signed = Candidates.open(envelope, coordinator, where=where)
            history.proposals[digest_of(signed.payload)] = candidates
        elif kind == MetricsStatement.kind:
            metrics, signed = MetricsStatement.open(envelope, node_keys, where=where)
            key = (metrics.round, metrics.digest, metrics.node_id)
            if signed.signer.key_id != metrics.node_id or metrics.model != "candidate" or key in history.metrics:
                raise BadSignature(f"{where}: not what node {metrics.node_id[:12]} said of a candidate, once")
            history.metrics[key] = metrics
        elif kind == COSIGNATURE:
            _read_cosignature(envelope, coordinator, history, where)
        elif kind == Enrolment.kind:
            enrolment, _ = Enrolment.open(envelope, coordinator, where=where)
            history.enrolments[enrolment.node_id] = enrolment
            history.revocations.pop(enrolment.node_id, None)
        elif kind == Revocation.kind:
            revocation, _ = Revocation.open(envelope, coordinator, where=where)
            history.revocations[revocation.node_id] = revocation
        elif kind == MergeRecord.kind:
            told.append(MergeRecord.open(envelope, coordinator, where=where)[0])
        elif kind == Rollback.kind:
            told.append(Rollback.open(envelope, coordinator, where=where)[0])
        else:
            raise BadSignature(f"{where}: unknown kind of statement {kind!r}")
    _require_chain(history, told, lineage, path)
    return history


def _read_cosignature(line: bytes, coordinator: Mapping[str, PublicKey], history: History, where: str) -> None:
    """Check a checkpoint of the log, and which enrolled member cosigned it: that is its last line."""
    note, blank, cosignature = line.rstrip(b"\n").rpartition(b"\n")
    note, cosignature = note + blank, cosignature + b"\n"
    (own,) = coordinator.values()
    checkpoint = open_checkpoint(note, own, where=where)
    name = cosignature.partition(b" ")[2].partition(b" ")[0].decode(errors="replace").removeprefix(MEMBER_NAME)
    enrolment = history.enrolments.get(name)
    if enrolment is None:
        raise BadSignature(f"{where}: cosigned by nobody who was enrolled")
    key = PublicKey.from_pem(enrolment.key, where=where)
    check_cosignature(note, cosignature, key, where=where)
    history.witnesses[key.key_id] = checkpoint.size


def _require_chain(history: History, told: list[MergeRecord | Rollback], lineage: Lineage, path: Path) -> None:
    base = lineage.model.base_digest
    start = before = ModelRef(digest=base, base_digest=base, updates=[])
    counted: set[tuple[int, str]] = set()
    lines: dict[int, list[MergeRecord]] = {0: []}
    line = lines[0]
    for record in told:
        if isinstance(record, Rollback):
            line = lines.get(record.to_round, [])
            before = line[-1].model if line else start
            if record.to_round not in lines or before.digest != record.version:
                raise VerificationError(
                    f"{path}: rolled back to a version of round {record.to_round} that is not there"
                )
            history.rollbacks.append(record)
            continue
        spec = history.specs.get(record.spec_digest)
        where = f"{path}: merge record of round {record.round}"
        if spec is None or spec.round != record.round or spec.model != record.before:
            raise VerificationError(f"{where}: does not belong to a signed round spec")
        if (
            record.round in lines
            or record.before != before
            or record.model.updates[:-1] != before.updates
            or not _steps_follow(record)
        ):
            raise VerificationError(f"{where}: does not follow from the round before")
        merge = _require_search(record, spec, history, where) if spec.search else spec.merge
        promised = (merge, spec.merge_seed, spec.outer, spec.schema_digest)
        found = (record.merge, record.merge_seed, record.outer, record.schema_digest)
        if found != promised or bool(spec.search) != (record.search is not None):
            raise VerificationError(f"{where}: was not merged as its round spec promised")
        for contribution in record.contributions:
            statement = history.deltas.get(contribution.statement_digest)
            plan = history.specs.get(statement.spec_digest) if statement else None
            if (
                statement is None
                or plan is None
                or statement.node_id != contribution.node_id
                or statement.payload_root != contribution.payload_root
                or plan.round + contribution.staleness != record.round
                or (contribution.staleness == 0 and statement.spec_digest != record.spec_digest)
                or not plan.asks(statement.node_id)
            ):
                raise VerificationError(f"{where}: node {contribution.node_id[:12]} signed no such delta")
            if contribution.staleness > plan.max_staleness or (plan.round, statement.node_id) in counted:
                raise VerificationError(
                    f"{where}: the delta of node {contribution.node_id[:12]} came too late, or was merged before"
                )
            counted.add((plan.round, statement.node_id))
        before = record.model
        line = lines[record.round] = [*line, record]
    history.records.extend(line)
    if before != lineage.model or not history.records:
        raise VerificationError(f"{path}: the merge records do not lead to the version in {LINEAGE}")


def _require_search(record: MergeRecord, spec: RoundSpec, history: History, where: str) -> dict[str, Any]:
    """Check that what nodes signed leads to the candidate that was merged; return the recipe that it has."""
    if record.search is None:
        raise VerificationError(f"{where}: was not searched for, as its round spec promised")
    proposals = [history.proposals.get(digest) for digest in record.search.proposals]
    known = [each for each in proposals if each is not None and each.spec_digest == record.spec_digest]
    accepted = [contribution.node_id for contribution in record.contributions if contribution.accepted]
    if (
        not known
        or len(known) < len(proposals)
        or any(each.node_ids != accepted for each in known)
        or any(len(each.factors) != len(accepted) for each in proposed(known))
    ):
        raise VerificationError(f"{where}: its candidates were not signed in that round")

    def find(digest: str, node_id: str) -> MetricsStatement | None:
        return history.metrics.get((record.round, digest, node_id))

    if not is_as_planned(spec, len(accepted), known, find):
        raise VerificationError(f"{where}: its candidates are not those that the search in the round spec proposes")
    if record.search != outcome(spec, known, find):
        raise VerificationError(f"{where}: the scores that nodes signed do not lead to the candidate that was chosen")
    if len(record.search.panel) < spec.min_nodes:
        raise VerificationError(f"{where}: only {len(record.search.panel)} nodes scored every candidate")
    chosen = proposed(known)[record.search.chosen]
    if chosen.digest != record.model.digest:
        raise VerificationError(f"{where}: another model was merged than the candidate that was chosen")
    return candidate_of(chosen).recipe(Recipe.from_dict(spec.merge)).to_dict()


def _steps_follow(record: MergeRecord) -> bool:
    """Whether a record adds none but steps to its version, from the one before or the base."""
    before, steps = record.before, record.model.steps
    added = {(step.round, step.after) for step in steps[len(before.steps) :]}
    starts = {step.before for step in steps[len(before.steps) :]}
    return (
        steps[: len(before.steps)] == before.steps
        and added <= {(record.round, record.model.digest)}
        and starts <= {before.digest, before.base_digest}
    )


def _read(path: Path) -> bytes:
    """Read a small file that nobody has vouched for yet."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise VerificationError(f"{path}: {PLAIN_FILES}")
    try:
        with path.open("rb") as file:
            return file.read(MAX_ENVELOPE_BYTES + 1)
    except OSError as err:
        raise InputError(
            f"{path}: can't be read ({err.strerror})", hint="is this a directory that fedmerge published?"
        ) from err
