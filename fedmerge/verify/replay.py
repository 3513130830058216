"""The merge computed again from the deltas: every verdict, every version and every step, bit for bit."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file
from torch import Tensor

from fedmerge.aggregation.aggregate import (
    RoundUpdate,
    delta_key,
    known_from,
    open_delta,
    round_clip_norm,
    screen_round,
    weights_of,
)
from fedmerge.aggregation.scoring import candidate_of, proposed
from fedmerge.delta.task_vector import UpdatedModel, delta_schema
from fedmerge.errors import (
    ConfigError,
    DigestMismatch,
    FedmergeError,
    InputError,
    InvalidDelta,
    RoundFailed,
    UnknownVersion,
    VerificationError,
)
from fedmerge.models.steps import SteppedModel
from fedmerge.models.sums import RunningSum
from fedmerge.models.versions import open_model
from fedmerge.screening.verdicts import Verdict
from fedmerge.search import Candidate
from fedmerge.statements import MergeRecord, ModelRef, StepRef, UpdateRef
from fedmerge.store.blobs import BlobStore
from fedmerge.tensors import Checkpoint, TensorMap, model_digest
from fedmerge.transparency.merkle import leaves_of, merkle_root
from fedmerge.verify.checks import Check, Checklist
from fedmerge.verify.history import History


def replay(history: History, base: Checkpoint, blobs: BlobStore) -> Check:
    """Do as `replay_rounds`, and return its one check. Raises what keeps any round from being replayed."""
    checks = Checklist()
    replay_rounds(history, base, blobs, checks)
    checks.require()
    return checks.checks[-1]


def replay_rounds(history: History, base: Checkpoint, blobs: BlobStore, checks: Checklist) -> int:
    """Screen, merge and step every round again, and compare verdicts, versions and optimizer states bit for bit.

    The steps that records list are followed as well. Returns how many rounds could be replayed; each that could not,
    for want of a blob, is noted as not checked, and each that comes out otherwise as failed. Raises `InputError` when
    `base` is another model.
    """
    expected = history.records[0].before.base_digest if history.records else None
    if expected is not None and model_digest(base) != expected:
        raise InputError(
            f"{base.directory}: not the base model that this version was made from",
            hint=f"its version should be {expected[:12]}; fedmerge inspect shows a model's",
        )
    num_replayed, num_tried = 0, 0
    with TemporaryDirectory(prefix="fedmerge-replay-") as scratch:
        rounds = _Rounds(history, base, blobs, Path(scratch))
        for record in history.records:
            name = f"round {record.round}"
            try:
                rounds.replay(record)
                num_replayed += 1
            except UnknownVersion as err:
                checks.skip("replay", f"{name}: {err.message}", err)
            except VerificationError as err:
                num_tried += 1
                checks.fail("replay", type(err)(f"{name}: {err.message}", hint=err.hint))
            except (RoundFailed, InvalidDelta, InputError, ConfigError) as err:
                num_tried += 1
                checks.fail("replay", DigestMismatch(f"{name}: merging the same deltas again fails: {err.message}"))
    if num_replayed:
        num_steps = sum(len(record.model.steps) - len(record.before.steps) for record in history.records)
        also = f", and {num_steps} step files lead where they should" if num_steps and checks.holds("replay") else ""
        checks.ok("replay", f"merging the deltas of {num_replayed} rounds again gives the same bits{also}")
    return num_replayed + num_tried


class _Rounds:
    """A history that is computed again, each round from what the one before left or, if need be, published."""

    def __init__(self, history: History, base: Checkpoint, blobs: BlobStore, scratch: Path) -> None:
        self._history, self._base, self._blobs, self._scratch = history, base, blobs, scratch
        self._schema = delta_schema(base.schema)
        self._updates: dict[str, Path] = {}  # the file of each update by its root, made again where it could be
        self._sum = RunningSum(scratch / "sum")
        self._state: dict[str, Tensor] = {}
        self._unknown: FedmergeError | None = None

    def replay(self, record: MergeRecord) -> None:
        """Compute a round again. Raises `UnknownVersion` for want of a file, and `DigestMismatch`."""
        try:
            if record.round in self._history.unsound:
                raise UnknownVersion("its merge record does not hold")
            if self._unknown is not None:
                raise UnknownVersion(f"the version that it starts from is not there ({self._unknown.message})")
            self._replay(record)
        except (UnknownVersion, VerificationError, RoundFailed, InvalidDelta, InputError, ConfigError) as err:
            self._take_published(record, err)
            raise

    def _take_published(self, record: MergeRecord, err: FedmergeError) -> None:
        """Go on from what was published, where this round was not made again."""
        try:
            self._updates = {update.root: _checked(self._blobs, update.root) for update in record.model.updates}
            state = _checked(self._blobs, record.outer_state_root) if record.outer_state_root else None
            self._require(record.model, "the published updates lead to")
            self._state, self._unknown = load_file(state) if state is not None else {}, None
        except (UnknownVersion, VerificationError, InvalidDelta, OSError, ValueError) as problem:
            self._unknown = problem if isinstance(problem, FedmergeError) else err

    def _model(self, ref: ModelRef) -> UpdatedModel:
        return open_model(ref, self._base, self._find_update, self._sum)

    def _find_update(self, ref: UpdateRef) -> Path:
        return self._updates.get(ref.root) or _checked(self._blobs, ref.root)

    def _require(self, ref: ModelRef, how: str) -> None:
        with self._sum.keeping(ref.updates, self._model(ref)) as model:
            require_version(model, ref.digest, how)

    def _replay(self, record: MergeRecord) -> None:
        history, spec = self._history, self._history.specs[record.spec_digest]
        signed = {delta_key(c.node_id, c.staleness): history.deltas[c.statement_digest] for c in record.contributions}
        deltas = {
            key: open_delta(
                history.specs[each.spec_digest], each.node_id, _checked(self._blobs, each.payload_root), self._schema
            )
            for key, each in signed.items()
        }
        counts = {key: each.num_examples for key, each in signed.items()}
        earlier = [each for each in history.records if each.model == record.before]
        known = known_from(spec, record, earlier[-1] if earlier else None)
        verdicts = screen_round(spec, deltas, counts, self._schema, known)
        candidate = None
        if record.search is not None:
            candidates = proposed([history.proposals[digest] for digest in record.search.proposals])
            candidate = candidate_of(candidates[record.search.chosen])
        _require_verdicts(record, verdicts, candidate)
        if (clip_norm := round_clip_norm(spec, verdicts, known)) != record.clip_norm:
            raise DigestMismatch(f"deltas are to be clipped to a norm of {clip_norm}, not {record.clip_norm}")
        before = self._model(record.before)
        update = RoundUpdate(spec, verdicts, deltas, before, self._state, candidate=candidate)
        path = self._scratch / f"update-{record.round}"
        update.write(path, self._schema)
        self._updates, self._state = {**self._updates, record.model.updates[-1].root: path}, update.state
        self._require(record.model, "merging the same deltas again gives")
        state_path = self._scratch / "state"
        state_root = merkle_root(leaves_of(state_path)).hex() if update.write_state(state_path) else None
        if state_root != record.outer_state_root:
            raise DigestMismatch("merging the same deltas again leaves another state of the outer optimizer")
        for step in record.model.steps[len(record.before.steps) :]:
            start: TensorMap = self._base if step.before == record.before.base_digest else before
            _require_step(step, start, self._base, self._blobs)


def _require_verdicts(record: MergeRecord, verdicts: list[Verdict], candidate: Candidate | None) -> None:
    """Raise unless screening the deltas again comes to the verdicts, weights and scales that the record has."""
    recorded = {delta_key(c.node_id, c.staleness): c for c in record.contributions}
    accepted = {verdict.node_id for verdict in verdicts if verdict.accepted}
    if accepted != {key for key, each in recorded.items() if each.accepted}:
        raise DigestMismatch("screening the same deltas again accepts other nodes")
    weights = weights_of(verdicts, candidate)
    for verdict in verdicts:
        each = recorded[verdict.node_id]
        found = {
            "reason": (verdict.reason, each.reason),
            "value": (verdict.value, each.value),
            "limit": (verdict.limit, each.limit),
            "norm": (verdict.norm, each.norm),
            "weight": (weights.get(verdict.node_id, verdict.weight), each.weight),
            "scale": (verdict.scale, each.scale),
        }
        for what, (computed, said) in found.items():
            if computed != said:
                raise DigestMismatch(
                    f"screening the same deltas again gives node {each.node_id[:12]} {what} {computed!r}, "
                    f"and the merge record says {said!r}"
                )


def require_version(model: TensorMap, expected: str, how: str) -> None:
    """Raise `DigestMismatch` unless `model` is the version `expected`."""
    found = model_digest(model)
    if found != expected:
        raise DigestMismatch(f"{how} version {found[:12]}, but {expected[:12]} was published")


def _require_step(step: StepRef, start: TensorMap, base: Checkpoint, blobs: BlobStore) -> None:
    where = f"the step file {step.root[:12]} from version {step.before[:12]}"
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
