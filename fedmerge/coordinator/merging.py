"""Steps 9 to 11 on the coordinator: screen a sealed round's deltas, merge them, step the outer optimizer, and store.

All of it can be done again at any time, to the same bits: the round's statements and the deltas say everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

from safetensors.torch import load_file
from torch import Tensor

from fedmerge.aggregation.aggregate import (
    RoundUpdate,
    delta_key,
    next_clip_norm,
    node_of,
    open_delta,
    require_enough,
    round_clip_norm,
    screen_round,
    staleness_of,
    weights_of,
)
from fedmerge.aggregation.scoring import candidate_of, outcome, proposed, resume
from fedmerge.delta.task_vector import UpdatedModel
from fedmerge.errors import InputError, RoundFailed, reporting_os_errors
from fedmerge.events import (
    CandidatesProposed,
    DeltaAccepted,
    DeltasScreened,
    DeltaVerdict,
    MergeFinished,
)
from fedmerge.merge import Recipe, Workers
from fedmerge.merge.statistics import task_vector_of
from fedmerge.models.steps import write_steps
from fedmerge.models.sums import RunningSum
from fedmerge.models.versions import open_model, write_model
from fedmerge.publishing.publish import software_versions
from fedmerge.rounds.journal import Journal
from fedmerge.screening.checks import GAIN, Known, Owner
from fedmerge.screening.verdicts import Inspection
from fedmerge.search import Candidate, SearchSettings, score_of
from fedmerge.search.local import Evaluate
from fedmerge.statements import (
    Candidates,
    Contribution,
    MergeRecord,
    MetricsStatement,
    ModelRef,
    ProposedMerge,
    SearchOutcome,
    StepRef,
    UpdateRef,
)
from fedmerge.store.blobs import BlobStore
from fedmerge.tensors import Checkpoint, Schema, TensorMap, model_digest
from fedmerge.trust.sign import PublicKey

# A delta by its round, its node and its Merkle root: what decides what it decodes to.
Inspected: TypeAlias = tuple[int, str, str]


@dataclass(frozen=True)
class Made:
    """A model version that was made of a round's deltas: its update, steps to it, and its optimizer state."""

    version: str
    update: UpdateRef
    steps: list[StepRef]
    state_root: str | None


@dataclass(frozen=True)
class Probe:
    """How the coordinator scores a model on data of its own: `evaluate` gets a directory below `scratch`."""

    evaluate: Evaluate
    metric: str
    scratch: Path

    def score(self, model: TensorMap, base: Checkpoint) -> float:
        """Return a model's score, minus infinity if it is not finite. Raises `InputError` when there is none."""
        with (
            reporting_os_errors(self.scratch),
            TemporaryDirectory(prefix=".fedmerge-probe-", dir=self.scratch) as folder,
        ):
            write_model(model, base, Path(folder) / "model")
            metrics = self.evaluate(Path(folder) / "model")
        score = score_of(metrics, self.metric)
        if score is None:
            raise InputError(f"the probe gave {', '.join(metrics) or 'no metrics'}, not {self.metric}")
        return score


class _Gains(Mapping[str, float | None]):
    """What each delta adds to the model's score, measured when it is asked for unless it was before."""

    def __init__(self, found: dict[str, float | None], measure: Callable[[str], float | None]) -> None:
        self._found, self._measure = found, measure

    def __getitem__(self, key: str) -> float | None:
        if key not in self._found:
            self._found[key] = self._measure(key)
        return self._found[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


class RoundMerge:
    """A sealed round: its spec, its deltas and their verdicts. Raises `RoundFailed` when too few have a weight.

    `running` is the sum of the updates so far, `inspected` what is known of deltas by themselves already.
    `snapshot_every` is in rounds; None where nodes fetch updates and not steps. `workers` say where to merge. `probe`
    scores the deltas that pass all other checks, where the plan has it; scores that are on record are not taken again.
    """

    def __init__(
        self,
        journal: Journal,
        blobs: BlobStore,
        base: Checkpoint,
        schema: Schema,
        *,
        running: RunningSum,
        inspected: Mapping[Inspected, Inspection],
        snapshot_every: int | None,
        workers: Workers,
        probe: Probe | None = None,
    ) -> None:
        self._running = running
        self._snapshot_every, self._workers = snapshot_every, workers
        self._journal, self._blobs, self._base, self._schema = journal, blobs, base, schema
        spec = journal.spec()
        assert spec is not None
        self.spec = spec
        state = journal.state
        found = [*map(state.accepted, state.node_ids), *map(state.late, state.carried_in)]
        facts = [fact for fact in found if fact is not None]
        self._facts = {delta_key(fact.node_id, spec.round - fact.round): fact for fact in facts}
        plans = {fact.round: journal.plan(fact.round) for fact in facts}
        # As the plan has it that the delta was made for: its codec, and the mask of its round.
        self._deltas = {
            key: open_delta(plans[fact.round], fact.node_id, blobs.path(fact.payload_root), schema)
            for key, fact in self._facts.items()
        }
        counts = {key: fact.num_examples for key, fact in self._facts.items()}
        self._known = Known(
            owners=self._owners(),
            clip_norm=next_clip_norm(spec, journal.record()),
            gains=self._gains(probe) if probe is not None else {},
        )
        sources = {key: (fact.round, fact.node_id, fact.payload_root) for key, fact in self._facts.items()}
        seen = {key: known for key, source in sources.items() if (known := inspected.get(source))}
        self.verdicts = screen_round(spec, self._deltas, counts, schema, self._known, inspected=seen)
        self.node_ids = [verdict.node_id for verdict in self.verdicts if verdict.accepted]

    def _owners(self) -> dict[str, Owner]:
        """Return whose each delta is, by the newest word of whose key signed it."""
        organisations = self._journal.index.organisations
        return {
            key: Owner(fact.node_id, organisations.get(fact.node_id, fact.node_id)) for key, fact in self._facts.items()
        }

    def _gains(self, probe: Probe) -> Mapping[str, float | None]:
        before = open_model(self.spec.model, self._base, self._find_update, self._running)
        kind, start = Recipe.from_dict(self.spec.merge).statistics, math.nan

        def measure(key: str) -> float | None:
            nonlocal start
            start = probe.score(before, self._base) if math.isnan(start) else start
            if not math.isfinite(start):
                raise RoundFailed(f"the probe gives the model that round {self.spec.round} starts from no finite score")
            score = probe.score(UpdatedModel(before, [task_vector_of(self._deltas[key], kind)]), self._base)
            return score - start if math.isfinite(score) else None

        recorded = self._journal.state.screened
        known = {verdict.statement_digest: verdict for verdict in (recorded.verdicts if recorded else ())}
        found = {
            key: known[fact.statement_digest] for key, fact in self._facts.items() if fact.statement_digest in known
        }
        return _Gains({key: v.gain for key, v in found.items() if v.gain is not None or v.reason == GAIN}, measure)

    def screened(self) -> DeltasScreened:
        """Return the verdicts as they are put on record."""
        return DeltasScreened(
            round=self.spec.round,
            verdicts=[
                DeltaVerdict(
                    node_id=node_of(verdict.node_id),
                    statement_digest=self._facts[verdict.node_id].statement_digest,
                    accepted=verdict.accepted,
                    reason=verdict.reason,
                    detail=verdict.detail,
                    value=verdict.value,
                    limit=verdict.limit,
                    gain=verdict.gain,
                )
                for verdict in self.verdicts
            ],
        )

    def require_enough(self) -> None:
        """Raise `RoundFailed` when too few deltas passed."""
        require_enough(self.spec, self.verdicts)

    def make(self, candidate: Candidate | None = None, *, is_final: bool = False) -> Made:
        """Merge, step, and store the update and the steps.

        `candidate` says how, where it is not as the plan says; only a final version may have a snapshot.
        """
        spec = self.spec
        before = open_model(spec.model, self._base, self._find_update, self._running)
        update = RoundUpdate(
            spec,
            self.verdicts,
            self._deltas,
            before,
            self._outer_state(),
            candidate=candidate,
            workers=self._workers,
        )
        scratch = self._blobs.part_path(f"update-{spec.round}")
        update.write(scratch, self._schema)
        num_bytes = scratch.stat().st_size
        root = self._blobs.add(scratch)
        ref = UpdateRef(
            round=spec.round, root=root, num_bytes=num_bytes, codec=spec.downlink, seed=str(spec.update_seed())
        )
        state_root = self._blobs.add(scratch) if update.write_state(scratch) else None
        unnamed = spec.model.model_copy(update={"updates": [*spec.model.updates, ref]})
        after = open_model(unnamed, self._base, self._find_update, self._running)
        # A sum is kept for the version that the next round starts from, not for candidates.
        with self._running.keeping(unnamed.updates, after) if is_final else nullcontext(after) as read:
            version = model_digest(read)
        starts: dict[str, TensorMap] = {}
        if self._snapshot_every is not None:
            starts[spec.model.digest] = before
            if is_final and spec.round % self._snapshot_every == 0:
                starts[spec.model.base_digest] = self._base
        steps = [self._store_step(digest, start, version, after) for digest, start in starts.items()]
        return Made(version, ref, steps, state_root)

    def _store_step(self, digest: str, start: TensorMap, version: str, model: TensorMap) -> StepRef:
        scratch = self._blobs.part_path(f"step-{self.spec.round}")
        write_steps(scratch, start, model, self._base.schema)
        num_bytes = scratch.stat().st_size
        root = self._blobs.add(scratch)
        return StepRef(round=self.spec.round, before=digest, after=version, root=root, num_bytes=num_bytes)

    def record(self, made: Made, candidate: Candidate | None, search: SearchOutcome | None) -> MergeRecord:
        """Return the statement of how a version was made."""
        state = self._journal.state
        recipe, weights = Recipe.from_dict(self.spec.merge), weights_of(self.verdicts, candidate)
        if candidate is not None:
            recipe = candidate.recipe(recipe)
        assert state.opened is not None
        before, facts = self.spec.model, self._facts
        return MergeRecord(
            federation=self.spec.federation,
            run=self.spec.run,
            round=self.spec.round,
            spec_digest=state.opened.spec_digest,
            before=before,
            model=ModelRef(
                digest=made.version,
                base_digest=before.base_digest,
                updates=[*before.updates, made.update],
                steps=[*before.steps, *made.steps],
            ),
            schema_digest=self.spec.schema_digest,
            contributions=[
                Contribution(
                    node_id=node_of(verdict.node_id),
                    organisation=self._known.owner(verdict.node_id).organisation,
                    statement_digest=facts[verdict.node_id].statement_digest,
                    payload_root=facts[verdict.node_id].payload_root,
                    payload_bytes=facts[verdict.node_id].payload_bytes,
                    num_examples=verdict.num_examples,
                    staleness=staleness_of(verdict.node_id),
                    accepted=verdict.accepted,
                    reason=verdict.reason,
                    value=verdict.value,
                    limit=verdict.limit,
                    norm=verdict.norm,
                    gain=verdict.gain,
                    weight=weights.get(verdict.node_id, verdict.weight),
                    scale=verdict.scale,
                )
                for verdict in self.verdicts
            ],
            clip_norm=round_clip_norm(self.spec, self.verdicts, self._known),
            merge=recipe.to_dict(),
            merge_seed=self.spec.merge_seed,
            outer=self.spec.outer,
            outer_state_root=made.state_root,
            search=search,
            ledger_head=state.sealed_hash,
            software=software_versions(),
        )

    # A search for the merge: generations of candidates, each made as the round's update is

    def next_generation(self) -> CandidatesProposed | None:
        """Make the next generation of candidates from what nodes answered so far; None when the search has ended.

        Raises `RoundFailed` when fewer nodes than the round's `min_nodes` scored every candidate.
        """
        spec, proposals = self.spec, self._proposals()
        search = resume(spec, len(self.node_ids), proposals, self._find_metrics)
        judges = search.board.panel if proposals else self.node_ids
        if len(judges) < spec.min_nodes:
            metric = SearchSettings.from_dict(spec.search).metric
            raise RoundFailed(
                f"only {len(judges)} of at least {spec.min_nodes} nodes scored every candidate (metric: {metric})"
            )
        if not search.generation:
            return None
        made = [(candidate, self.make(candidate)) for candidate in search.generation]
        state = self._journal.state
        assert state.opened is not None
        statement = Candidates(
            federation=spec.federation,
            run=spec.run,
            round=spec.round,
            spec_digest=state.opened.spec_digest,
            node_ids=self.node_ids,
            judges=judges,
            candidates=[
                ProposedMerge(
                    digest=each.version,
                    update=each.update,
                    step=each.steps[0] if each.steps else None,
                    **candidate.to_dict(),
                )
                for candidate, each in made
            ],
        )
        fetched: dict[str, int] = {}
        for _, each in made:
            file: UpdateRef | StepRef = each.steps[0] if each.steps else each.update
            fetched[file.root] = file.num_bytes
        return CandidatesProposed(
            round=spec.round,
            digests=[each.version for _, each in made],
            judges=judges,
            roots=sorted(
                {root for _, each in made for root in (each.update.root, *(step.root for step in each.steps))}
            ),
            num_bytes=sum(fetched.values()),
            proposal_envelope=statement.sign(self._journal.key).decode(),
        )

    def chosen(self) -> tuple[Candidate, SearchOutcome]:
        """Return the candidate that the answers lead to, and how they do."""
        proposals = self._proposals()
        found = outcome(self.spec, proposals, self._find_metrics)
        return candidate_of(proposed(proposals)[found.chosen]), found

    def _proposals(self) -> list[Candidates]:
        return [
            Candidates.open(event.proposal_envelope.encode(), self._journal.own_keys, where="candidates")[0]
            for event in self._journal.state.generations()
        ]

    def _find_metrics(self, digest: str, node_id: str) -> MetricsStatement | None:
        envelope = self._journal.state.answers.get((digest, node_id))
        if envelope is None:
            return None
        # The key that the node delivered with: it may have left the trusted ones since.
        key = PublicKey.from_pem(self._facts[node_id].node_key, where=f"node {node_id[:12]}")
        return MetricsStatement.open(envelope.encode(), {key.key_id: key}, where="metrics statement")[0]

    def _find_update(self, ref: UpdateRef) -> Path:
        return self._blobs.path(ref.root)

    def _outer_state(self) -> dict[str, Tensor]:
        record = self._journal.record()
        if record is None or record.outer_state_root is None:
            return {}
        return load_file(self._blobs.path(record.outer_state_root))


def drop_candidates(journal: Journal, blobs: BlobStore) -> None:
    """Remove the stored candidates of the current round, but for blobs that stand for something else as well."""
    stale = {root for generation in journal.state.generations() for root in generation.roots}
    if not stale:
        return
    kept: set[str] = set()
    for entry in journal.ledger.entries:
        if isinstance(entry.event, DeltaAccepted):
            kept.add(entry.event.payload_root)
        elif isinstance(entry.event, MergeFinished):
            kept |= {entry.event.update_root, *entry.event.step_roots}
    journal.ledger.require_lease()
    for root in stale - kept:
        blobs.drop(root)
