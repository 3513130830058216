"""Steps 7 to 12, read top to bottom: admit and store (in `intake`), screen, merge, step, publish.

The coordinator has no socket and no clock of its own: a server hands it calls and asks it to `advance`. Calls come from
several threads; the journal's lock makes each state change one step, and the long work runs outside it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path

from fedmerge.aggregation.aggregate import inspect_delta, open_delta
from fedmerge.config import Config
from fedmerge.coordinator.intake import Intake
from fedmerge.coordinator.logkeeper import LogKeeper
from fedmerge.coordinator.members import Members
from fedmerge.coordinator.merging import Inspected, Probe, RoundMerge, drop_candidates
from fedmerge.coordinator.operator import Operator
from fedmerge.coordinator.ownership import create_or_check, open_seat
from fedmerge.coordinator.planner import Planner
from fedmerge.errors import BadSignature, InputError, InvalidDelta, RoundFailed, UnknownVersion
from fedmerge.events import (
    CandidatesScored,
    MergeFinished,
    MergeStarted,
    MetricsReported,
    RoundOpened,
    RoundPublished,
    RoundSealed,
)
from fedmerge.events import RoundFailed as RoundFailedEvent
from fedmerge.merge import Recipe
from fedmerge.merge.statistics import first_problem, statistics_of
from fedmerge.models.sums import RunningSum
from fedmerge.models.versions import open_model
from fedmerge.publishing.export import export
from fedmerge.publishing.provenance_file import PROVENANCE, ProvenanceFile
from fedmerge.publishing.publish import publish, thin_out
from fedmerge.rounds.journal import Journal
from fedmerge.rounds.policy import Action, Standing, next_action, next_due_s, standing
from fedmerge.rounds.state import Phase
from fedmerge.screening.verdicts import INVALID_DELTA, Inspection
from fedmerge.statements import (
    Candidates,
    DeltaStatement,
    MergeRecord,
    MetricsStatement,
    RoundSpec,
    UpdateRef,
    digest_of,
)
from fedmerge.store.seat import Seat
from fedmerge.tensors import Checkpoint
from fedmerge.trust.keys import Member, TrustStore
from fedmerge.trust.sign import SigningKey

log = logging.getLogger(__name__)


class Coordinator:
    """One federation: its journal, its blobs, and the round under way.

    `base_dir` is the base model's directory, `clock` returns the wall clock in seconds. Opening it replays the ledger,
    so a coordinator that was killed at any moment goes on where it was. `trust` has the nodes' keys, by default those
    in the configuration's folder. Raises `ConfigError` when the state folder belongs to another federation or base
    model, and `ResourceError` while another coordinator runs on it. A `seat` that leads is given by whoever may have to
    wait for it; without one, the coordinator takes it, and leaves it on `close`.
    """

    def __init__(
        self,
        config: Config,
        base_dir: Path,
        *,
        clock: Callable[[], float],
        seat: Seat | None = None,
        key: SigningKey | None = None,
        trust: TrustStore | None = None,
    ) -> None:
        self.config = config
        self.key = key or SigningKey.load_or_create(config.federation.key)
        self.trust = trust or TrustStore(config.federation.trusted)
        self.trust.keys()  # a file that is no key is reported now, not to every caller
        self.base = Checkpoint(base_dir)
        self.planner = Planner(config, self.base, self.trust)
        self.policy, self.schema = self.planner.policy, self.planner.schema
        self._probe: Probe | None = None
        if (evaluate := config.probe()) is not None:
            self._probe = Probe(evaluate, config.screen.probe_metric, config.federation.state)
        with ExitStack() as opened:
            if seat is None:
                seat = open_seat(config, clock)
                opened.callback(seat.close)
                seat.take()
            self.journal = Journal(seat.open_ledger(), self.key, clock)
            self._durable = seat.durable
            self.blobs = config.open_blobs(durable=seat.durable)
            self.running_sum = RunningSum(config.federation.state / "sum")
            self.running_sum.clear()  # it was never synced: what a power cut left of it can't be told
            self._provenance = ProvenanceFile(config.federation.state / PROVENANCE)
            self._inspected: dict[Inspected, Inspection] = {}  # what is known of deltas that are not merged yet
            create_or_check(self.journal, config, self.base)
            self.members = Members(self.journal, self.trust)
            self.operator = Operator(self.journal, self.policy, self._fail)
            self.log = LogKeeper(self.journal, self.trust)
            self.intake = Intake(
                self.journal,
                self.blobs,
                self.trust,
                decode=self._require_decodable,
            )
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Leave a seat that was not given."""
        self._opened.close()

    # What nodes are told

    def spec_envelope(self) -> bytes:
        """The signed spec of the current round; empty before the first."""
        opened = self.journal.state.opened
        return self.journal.as_now(RoundSpec, opened.spec_envelope) if opened else b""

    def record_envelope(self) -> bytes:
        """The signed merge record of the published version that counts; empty for the base."""
        published = self.journal.state.published
        return self.journal.as_now(MergeRecord, self.journal.record_envelope(published)) if published else b""

    def finished(self) -> bool:
        """Whether no further round will open."""
        return self.journal.state.phase in {Phase.PUBLISHED, Phase.FAILED} and self._due() == Action.FINISH

    def next_due_s(self) -> float | None:
        """Return when something will be due if nothing is now, and nothing happens until then; None if nothing will."""
        with self.journal.lock:
            return next_due_s(self.journal.state, self.policy, self.trust.keys(), self.journal.clock())

    def candidates_envelope(self) -> bytes:
        """The signed candidates that nodes are to score now; empty at other times."""
        state = self.journal.state
        generations = state.generations() if state.phase == Phase.SEARCHING else []
        return self.journal.as_now(Candidates, generations[-1].proposal_envelope) if generations else b""

    def artifact(self, root: str) -> Path:
        """Return a file for nodes: of the base model, an update, a step or a candidate. Raises `UnknownVersion`."""
        for ref in self.planner.base_files:
            if ref.root == root:
                return self.base.directory / ref.name
        state = self.journal.state
        if root in self.journal.index.published or any(root in generation.roots for generation in state.generations()):
            return self.blobs.path(root)
        raise UnknownVersion("no file with that root is served")

    def report_metrics(self, caller_id: str, envelope: bytes) -> None:
        """Record a node's signed evaluation. Raises `BadSignature` when somebody else signed it, or for another run."""
        statement, signed = MetricsStatement.open(envelope, self.trust.keys(), where="metrics statement")
        created = self.journal.created
        if signed.signer.key_id != caller_id or statement.node_id != caller_id:
            raise BadSignature("the metrics were signed by another node than the one that sends them")
        if (statement.federation, statement.run) != (created.federation, created.run):
            raise BadSignature("the metrics are for another federation or run")
        candidate = statement.digest if statement.model == "candidate" else None
        self.journal.append(
            MetricsReported(round=statement.round, node_id=caller_id, candidate=candidate, envelope=envelope.decode())
        )

    def follow_trust(self) -> None:
        """Put in the ledger whom the operator trusts since the last look, and whom not, and forget their uploads."""
        for node_id in self.members.sync():
            self.intake.forget_node(node_id)

    def welcome(self, member: Member) -> None:
        """Put a member in the ledger before its first call, so that who it is stands there before what it did."""
        if not self.members.is_on_record(member):
            self.follow_trust()

    # The course of a round

    def advance(self) -> bool:
        """Do what is due, if anything, and say whether something was done. Never called by two threads at once."""
        self.follow_trust()
        with self.journal.lock:  # what is due must still be when it is done
            due = self._due()
            match due:
                case Action.OPEN:
                    self._open_round()
                case Action.SEAL:
                    self._seal()
                case Action.FAIL:
                    found = self._standing()
                    self._fail(
                        f"{found.num_nodes} of at least {found.quorum} nodes delivered before the deadline"
                        f"{self._refused_too()}"
                    )
                case _:
                    pass
        match due:
            case Action.MERGE:
                try:
                    self._merge()
                except (RoundFailed, InputError) as err:
                    # Not to be tried again: the plan and the deltas are what they are.
                    self._fail(err.message)
            case Action.SCORE:
                self.journal.append(CandidatesScored(round=self.journal.state.round))
            case Action.PUBLISH:
                self._publish()
            case Action.WAIT | Action.FINISH:
                return False
            case _:
                pass
        return True

    def retry_failed(self) -> None:
        """Have the last round tried again if it failed: whoever starts a coordinator anew means to go on."""
        state = self.journal.state
        if state.phase == Phase.FAILED and not state.is_retried:
            self.operator.retry("the coordinator was started again")

    def _open_round(self) -> None:
        spec = self.planner.next_spec(self.journal)
        self.journal.append(
            RoundOpened(
                round=spec.round,
                spec_digest=digest_of(spec.to_payload()),
                spec_envelope=spec.sign(self.key).decode(),
                sample=spec.sample,
                max_staleness=spec.max_staleness,
            )
        )
        log.info("round %d open%s", spec.round, f" for {len(spec.sample)} nodes" if spec.sample else "")

    def _seal(self) -> None:
        state, found = self.journal.state, self._standing()
        if found.closed_by is None or found.action != Action.SEAL:
            return  # a key has ceased to be trusted since
        self.journal.append(
            RoundSealed(
                round=state.round,
                node_ids=sorted(state.deltas),
                carried=sorted(state.carried),
                closed_by=found.closed_by,
                quorum=found.quorum,
                grace_s=found.grace_s,
            )
        )
        self.intake.forget_closed()

    def _fail(self, reason: str) -> None:
        drop_candidates(self.journal, self.blobs)
        self._inspected.clear()
        with self.journal.lock:
            round_number = self.journal.state.round
            self.journal.append(RoundFailedEvent(round=round_number, reason=reason))
            self.intake.forget_closed()
        log.warning("round %d failed: %s", round_number, reason)

    # 9 screen, 10 merge, 11 step

    def _merge(self) -> None:
        """Make the round's model; or, where the plan is to search for it, the next candidates for nodes to score."""
        drop_candidates(self.journal, self.blobs)  # whichever wins is made again, to the same bits
        snapshot_every = self.config.delta.snapshot_every if self.config.takes_steps(self.schema) else None
        merge = RoundMerge(
            self.journal,
            self.blobs,
            self.base,
            self.schema,
            running=self.running_sum,
            inspected=self._inspected,
            snapshot_every=snapshot_every,
            workers=self.config.merge_workers(),
            probe=self._probe,
        )
        screened = merge.screened()
        if screened != self.journal.state.screened:
            self.journal.append(screened)
            for verdict in screened.verdicts:
                if not verdict.accepted:
                    log.warning("round %d: %s is left out: %s", screened.round, verdict.node_id[:12], verdict.detail)
        merge.require_enough()
        searching = bool(merge.spec.search)
        if self.journal.state.phase == Phase.SEALED:
            generation = merge.next_generation() if searching else None
            if generation is not None:
                self.journal.append(generation)
                log.info("round %d: %d candidates are out for scoring", generation.round, len(generation.digests))
                return
            self.journal.append(MergeStarted(round=merge.spec.round))
        candidate, outcome = merge.chosen() if searching else (None, None)
        made = merge.make(candidate, is_final=True)
        record = merge.record(made, candidate, outcome)
        envelope = record.sign(self.key).decode()
        self.journal.append(
            MergeFinished(
                round=record.round,
                version=made.version,
                update_root=made.update.root,
                step_roots=[step.root for step in made.steps],
                record_envelope=envelope,
            )
        )
        for each in record.contributions:
            self._inspected.pop((record.round - each.staleness, each.node_id, each.payload_root), None)
        log.info("round %d merged into version %s", record.round, made.version[:12])

    # 12 publish

    def published_dir(self, round_number: int) -> Path:
        """Return where a round's model directory is, or will be."""
        return self.config.federation.state / "models" / f"round-{round_number:04d}"

    def _publish(self) -> None:
        record = self.journal.record()
        assert record is not None
        target = self.published_dir(record.round)
        entries, merge_event = self.journal.ledger.entries, self.journal.state.merge_event
        publish(
            open_model(record.model, self.base, self._find_update, self.running_sum),
            self.base,
            record,
            target,
            base_name=self.config.model.name or self.config.model.base.name,
            key=self.key,
            model_key=self._model_key(),
            write_provenance=lambda path: self._provenance.write(entries, merge_event, path),
            node_keys=self.journal.index.node_keys,
            adapter_rank=self.config.publish.adapter_rank,
            durable=self._durable,
        )
        self.journal.append(RoundPublished(round=record.round, version=record.model.digest))
        log.info("round %d published in %s", record.round, target)
        if self.config.publish.keep_rounds:
            thin_out(target.parent, record.round, self.config.publish.keep_rounds)

    def export(self, target: Path, rounds: Collection[int] | None, *, with_deltas: bool) -> None:
        """Write what an auditor needs to check these rounds, or all, to `target`. Raises as `export` does."""
        models = self.published_dir(1).parent
        export(self.journal.ledger, self.blobs, models, self.key, target, rounds=rounds, with_deltas=with_deltas)

    def _model_key(self) -> SigningKey:
        """Return the key for model.sig, which must be a P-256 one: the coordinator's if it is, or one of its own."""
        if self.key.public.algorithm == "p256":
            return self.key
        return SigningKey.load_or_create(self.config.federation.state / "model-signing.key", "p256")

    # Helpers

    def _due(self) -> Action:
        with self.journal.lock:
            return next_action(self.journal.state, self.policy, self.trust.keys(), self.journal.clock())

    def _refused_too(self) -> str:
        state = self.journal.state
        rejected = {each.node_id for each in state.rejected.values() if each.round == state.round} - state.deltas.keys()
        return f"; the deltas of {len(rejected)} more could not be decoded" if rejected else ""

    def _standing(self) -> Standing:
        with self.journal.lock:
            return standing(self.journal.state, self.policy, self.trust.keys(), self.journal.clock())

    def _require_decodable(self, statement: DeltaStatement, path: Path) -> None:
        spec = self.journal.plan(statement.round)
        sent = open_delta(spec, statement.node_id, path, self.schema)
        found = inspect_delta(spec, sent, self.schema)
        if found.reason == INVALID_DELTA:
            raise InvalidDelta(found.detail)
        kind = Recipe.from_dict(spec.merge).statistics
        problem = None if kind is None else first_problem(statistics_of(sent, kind), kind)
        if problem is not None:
            raise InvalidDelta(f"node {statement.node_id[:12]}: {problem}")
        self._inspected[statement.round, statement.node_id, statement.payload_root] = found

    def _find_update(self, ref: UpdateRef) -> Path:
        return self.blobs.path(ref.root)
