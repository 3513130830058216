"""What was signed on the way to a version: each statement by itself, and that one follows from the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from fedmerge.aggregation.scoring import candidate_of, is_as_planned, outcome, proposed
from fedmerge.errors import BadSignature, InvalidHandover, RevokedKey, VerificationError
from fedmerge.merge import Recipe
from fedmerge.rounds.provenance import COSIGNATURE
from fedmerge.statements import (
    Candidates,
    Contribution,
    DeltaStatement,
    Enrolment,
    Handover,
    MergeRecord,
    MetricsStatement,
    ModelRef,
    Rejection,
    Revocation,
    Rollback,
    RoundSpec,
    digest_of,
)
from fedmerge.statements.handover import read_handover
from fedmerge.transparency.log import MEMBER_NAME, LogCheckpoint, check_cosignature, log_origin, open_by_any
from fedmerge.trust.sign import PublicKey, claimed_signer
from fedmerge.verify.checks import Checklist, shortened

Told: TypeAlias = MergeRecord | Rollback


class Entry(NamedTuple):
    """A signed statement as it travelled, and the place where it was found."""

    where: str
    kind: str
    envelope: bytes


class Origin(NamedTuple):
    """Which federation's history this is, and the keys that may speak in it: the coordinator's in turn, and nodes'."""

    federation: str
    run: str
    line: tuple[PublicKey, ...]
    nodes: Mapping[str, PublicKey]

    def keys(self, num_handovers: int, envelope: bytes, where: str) -> dict[str, PublicKey]:
        """Return whose word is the coordinator's after so many hand-overs; raise `RevokedKey` for one given up."""
        signer = claimed_signer(envelope, where=where)
        if any(key.key_id == signer for key in self.line[:num_handovers]):
            raise RevokedKey(f"{where}: signed by key {signer[:12]}, after it was handed over")
        return {key.key_id: key for key in self.line[num_handovers : num_handovers + 1]}


@dataclass(frozen=True)
class History:
    """A version's provenance, verified: round specs and delta statements by digest, merge records in order.

    The records are those that lead to the version; what `rollbacks` took back is not among them. Of rounds that
    searched for their merge also the candidates by digest, and what nodes reported about them, by round, candidate and
    node. `witnesses` has the checkpoint of the log that each member cosigned last. `enrolments` and `revocations` are
    by node: what the coordinator says of whose keys these are. `rejections` are of deltas that could not be decoded,
    `handovers` those of the coordinator's own key. `unsound` are the rounds whose record does not hold.
    """

    specs: dict[str, RoundSpec] = field(default_factory=dict)
    deltas: dict[str, DeltaStatement] = field(default_factory=dict)
    records: list[MergeRecord] = field(default_factory=list)
    proposals: dict[str, Candidates] = field(default_factory=dict)
    metrics: dict[tuple[int, str, str], MetricsStatement] = field(default_factory=dict)
    witnesses: dict[str, LogCheckpoint] = field(default_factory=dict)
    enrolments: dict[str, Enrolment] = field(default_factory=dict)
    revocations: dict[str, Revocation] = field(default_factory=dict)
    rollbacks: list[Rollback] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    handovers: list[Handover] = field(default_factory=list)
    unsound: set[int] = field(default_factory=set)


def read_history(entries: Iterable[Entry], origin: Origin, end: ModelRef, checks: Checklist) -> History:
    """Verify statements, each by itself and then as a chain from the base to the version `end`.

    What does not hold is left out, and noted as `statements` or `history`.
    """
    history, told = History(), list[Told]()
    for entry in entries:
        with checks.attempt("statements"):
            _read(entry, origin, history, told)
    chain = _Chain(history, end.base_digest)
    for each in told:
        with checks.attempt("history"):
            chain.follow(each)
    with checks.attempt("history"):
        chain.require_end(end)
    if origin.line[len(history.handovers) :] != origin.line[-1:]:
        checks.fail("keys", InvalidHandover("not every hand-over of the coordinator's key is in its place"))
    elif history.handovers:
        shown = " to ".join(key.short for key in origin.line)
        checks.ok("keys", f"the coordinator's key was handed over: {shown}; each signed in its time")
    if checks.holds("history"):
        back = [f"; in round {each.round} rolled back to {each.to_round} ({each.reason})" for each in history.rollbacks]
        detail = f"{len(history.records)} merge records form a chain from the base to this version"
        checks.ok("history", detail + "".join(back))
    if checks.holds("statements"):
        num_nodes = len({statement.node_id for statement in history.deltas.values()})
        detail = f"{len(history.deltas)} delta statements verify under the keys of {num_nodes} nodes"
        checks.ok("deltas", detail)
    _report_members(history, checks)
    return history


def _report_members(history: History, checks: Checklist) -> None:
    """Note whose deltas were merged, by the coordinator's word, and who cosigned its log."""
    merged = {c.node_id for record in history.records for c in record.contributions if c.accepted}
    known = {history.enrolments[node_id].organisation for node_id in merged if node_id in history.enrolments}
    missing = sorted(merged - history.enrolments.keys())
    if missing:
        checks.skip("members", f"nothing says whose key {missing[0][:12]} is")
    else:
        checks.ok("members", f"the deltas are of {len(known)} organisations: {shortened(sorted(known))}")
    if history.witnesses:
        size = max(checkpoint.size for checkpoint in history.witnesses.values())
        # A member that replaced its key is one still: its name stays.
        num_members = len({history.enrolments[key_id].name for key_id in history.witnesses})
        checks.ok("witnesses", f"{num_members} members cosigned the log, the last at {size} events")
    else:
        checks.skip("witnesses", "no member cosigned the coordinator's log; compare checkpoints: fedmerge audit")
    for node_id, each in sorted(history.revocations.items()):
        checks.ok("revoked", f"key {node_id[:12]} of {each.organisation} was revoked: {each.reason}")
    for refused in history.rejections:
        detail = f"round {refused.round}: the delta of node {refused.node_id[:12]} was refused: {refused.detail}"
        checks.skip("rejected", f"{detail}; only its node has the bytes, and can show whether it decodes")
    searches = [record.search for record in history.records if record.search is not None]
    if searches and checks.holds("history"):
        num_candidates = sum(len(search.scores) for search in searches)
        detail = f"the scores that nodes signed for {num_candidates} candidates lead to what was merged"
        checks.ok("search", detail)
    num_scored = sum(each.gain is not None for record in history.records for each in record.contributions)
    if num_scored:
        detail = f"the coordinator says what {num_scored} deltas gained on data of its own; nobody else can measure it"
        checks.skip("probe", detail)


def _read(entry: Entry, origin: Origin, history: History, told: list[Told]) -> None:
    where, kind, envelope = entry
    if kind == COSIGNATURE:
        _read_cosignature(entry, origin, history)
    elif kind == Handover.kind:
        step = read_handover(envelope.decode(errors="replace"), where=where)
        _require_own(step.statement, origin, where)
        place = len(history.handovers)
        if (step.old, step.new) != origin.line[place : place + 2]:
            raise InvalidHandover(f"{where}: key {step.old.short} was not the coordinator's, or has handed over before")
        history.handovers.append(step.statement)
    elif kind == DeltaStatement.kind:
        statement, signed = DeltaStatement.open(envelope, origin.nodes, where=where)
        _require_own(statement, origin, where)
        if signed.signer.key_id != statement.node_id:
            raise BadSignature(f"{where}: the delta of node {statement.node_id[:12]} was signed by another node")
        history.deltas[digest_of(signed.payload)] = statement
    elif kind == MetricsStatement.kind:
        metrics, signed = MetricsStatement.open(envelope, origin.nodes, where=where)
        _require_own(metrics, origin, where)
        key = (metrics.round, metrics.digest, metrics.node_id)
        if signed.signer.key_id != metrics.node_id or metrics.model != "candidate" or key in history.metrics:
            raise BadSignature(f"{where}: not what node {metrics.node_id[:12]} said of a candidate, once")
        history.metrics[key] = metrics
    else:
        said = _KINDS.get(kind)
        if said is None:
            raise BadSignature(f"{where}: unknown kind of statement {kind!r}")
        if said is Candidates:  # these are listed when their round is merged, maybe after their key was given up
            trusted = {key.key_id: key for key in origin.line}
        else:
            trusted = origin.keys(len(history.handovers), envelope, where)
        opened, signed = said.open(envelope, trusted, where=where)
        _require_own(opened, origin, where)
        match opened:
            case RoundSpec():
                history.specs[digest_of(signed.payload)] = opened
            case Candidates():
                history.proposals[digest_of(signed.payload)] = opened
            case Enrolment():
                history.enrolments[opened.node_id] = opened
                history.revocations.pop(opened.node_id, None)
            case Revocation():
                history.revocations[opened.node_id] = opened
            case Rejection():
                history.rejections.append(opened)
            case _:
                told.append(opened)


# What the coordinator signs.
Said: TypeAlias = RoundSpec | Candidates | Enrolment | Revocation | Rejection | MergeRecord | Rollback
_SAID: tuple[type[Said], ...] = (RoundSpec, Candidates, Enrolment, Revocation, Rejection, MergeRecord, Rollback)
_KINDS: dict[str, type[Said]] = {each.kind: each for each in _SAID}


def _require_own(statement: Said | Handover | DeltaStatement | MetricsStatement, origin: Origin, where: str) -> None:
    if (statement.federation, statement.run) != (origin.federation, origin.run):
        raise VerificationError(
            f"{where}: the {statement.kind} statement is of federation {statement.federation!r}, run "
            f"{statement.run[:12]}, and this is {origin.federation!r}, run {origin.run[:12]}"
        )


def _read_cosignature(entry: Entry, origin: Origin, history: History) -> None:
    """Check a checkpoint of the log, and which enrolled member cosigned it: that is its last line."""
    where = entry.where
    note, blank, cosignature = entry.envelope.rstrip(b"\n").rpartition(b"\n")
    note, cosignature = note + blank, cosignature + b"\n"
    checkpoint = open_by_any(note, origin.line[: len(history.handovers) + 1], where=where)
    if checkpoint.origin != log_origin(origin.federation, origin.run):
        raise VerificationError(f"{where}: the checkpoint is of another log, {checkpoint.origin}")
    name = cosignature.partition(b" ")[2].partition(b" ")[0].decode(errors="replace").removeprefix(MEMBER_NAME)
    enrolment = history.enrolments.get(name)
    if enrolment is None:
        raise BadSignature(f"{where}: cosigned by nobody who was enrolled")
    key = PublicKey.from_pem(enrolment.key, where=where)
    check_cosignature(note, cosignature, key, where=where)
    history.witnesses[key.key_id] = checkpoint


class _Chain:
    """Merge records, one after the other, each checked against the one before and what its round spec promised."""

    def __init__(self, history: History, base_digest: str) -> None:
        self._history = history
        self._start = self._before = ModelRef(digest=base_digest, base_digest=base_digest, updates=[])
        self._counted: set[tuple[int, str]] = set()
        self._line: list[MergeRecord] = []
        self._lines: dict[int, list[MergeRecord]] = {0: self._line}

    def follow(self, told: Told) -> None:
        """Go on by a record or a rollback, also when it does not hold and is raised about."""
        if isinstance(told, Rollback):
            self._line = self._lines.get(told.to_round, [])
            self._before = self._line[-1].model if self._line else self._start
            if told.to_round not in self._lines or self._before.digest != told.version:
                raise VerificationError(
                    f"rolled back in round {told.round} to a version of round {told.to_round} that is not there"
                )
            self._history.rollbacks.append(told)
            return
        try:
            self._require(told)
        except VerificationError:
            self._history.unsound.add(told.round)
            raise
        finally:
            self._before = told.model
            self._line = self._lines[told.round] = [*self._line, told]

    def require_end(self, end: ModelRef) -> None:
        """Raise unless the records lead to `end`, and keep those that do."""
        self._history.records.extend(self._line)
        if self._before != end or not self._line:
            raise VerificationError(
                f"the merge records do not lead to the version {end.digest[:12]}, but to {self._before.digest[:12]}"
            )

    def _require(self, record: MergeRecord) -> None:
        spec, before = self._history.specs.get(record.spec_digest), self._before
        where = f"merge record of round {record.round}"
        if spec is None or spec.round != record.round or spec.model != record.before:
            raise VerificationError(f"{where}: does not belong to a signed round spec")
        if record.round in self._lines:
            raise VerificationError(f"{where}: does not follow from the round before: that round is there already")
        if record.before != before:
            raise VerificationError(
                f"{where}: does not follow from the round before: it starts from version {record.before.digest[:12]}, "
                f"and the record before it leads to {before.digest[:12]}"
            )
        if not record.model.updates or record.model.updates[:-1] != before.updates or not _steps_follow(record):
            raise VerificationError(f"{where}: does not follow from the round before: other updates lead to it")
        merge = _require_search(record, spec, self._history, where) if spec.search else spec.merge
        promised = (merge, spec.merge_seed, spec.outer, spec.schema_digest)
        found = (record.merge, record.merge_seed, record.outer, record.schema_digest)
        if found != promised or bool(spec.search) != (record.search is not None):
            raise VerificationError(f"{where}: was not merged as its round spec promised")
        for contribution in record.contributions:
            self._require_contribution(contribution, record, where)

    def _require_contribution(self, contribution: Contribution, record: MergeRecord, where: str) -> None:
        statement = self._history.deltas.get(contribution.statement_digest)
        plan = self._history.specs.get(statement.spec_digest) if statement else None
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
        bound = (statement.round, statement.nonce, statement.base_digest, statement.schema_digest)
        if bound != (plan.round, plan.nonce, plan.model.digest, plan.schema_digest):
            raise VerificationError(
                f"{where}: the delta of node {contribution.node_id[:12]} was made for another round"
            )
        if contribution.num_examples != statement.num_examples:
            raise VerificationError(
                f"{where}: counts {contribution.num_examples} examples of node {contribution.node_id[:12]}, "
                f"which signed {statement.num_examples}"
            )
        if contribution.staleness > plan.max_staleness or (plan.round, statement.node_id) in self._counted:
            raise VerificationError(
                f"{where}: the delta of node {contribution.node_id[:12]} came too late, or was merged before"
            )
        self._counted.add((plan.round, statement.node_id))


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
