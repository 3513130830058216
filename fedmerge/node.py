"""Steps 0 to 6, read top to bottom: train, subtract, sparsify, quantise, frame, sign, stream.

A node needs a `Link` to a coordinator (over gRPC, or in the same process), a trainer, a key, and a folder. All it knows
is in that folder, so it may be stopped at any moment: started again, it fetches what is missing, resumes an upload
where it stood, and never trains twice for a round whose delta is already signed.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from fedmerge.adapter import open_tuned
from fedmerge.chain import ChainMaker, ModelChain
from fedmerge.codec import Codec
from fedmerge.delta import UpdatedModel, delta_schema
from fedmerge.errors import (
    ConflictingSubmission,
    DigestMismatch,
    InvalidDelta,
    NotAsked,
    NothingDue,
    RoundClosed,
    RoundFailed,
    StaleBase,
    UnknownRound,
    UnknownVersion,
    UntrustedKey,
    reporting_os_errors,
)
from fedmerge.feedback import RESIDUAL, carry_over, previous_residual, unsent, write_residual
from fedmerge.files import replace_file, sync_directory, sync_tree
from fedmerge.frame import DeltaFile, write_delta
from fedmerge.handover import Pin, pinned
from fedmerge.merge import Recipe
from fedmerge.merkle import leaves_of, merkle_root
from fedmerge.outbox import STATEMENT
from fedmerge.sign import PublicKey, SigningKey
from fedmerge.statements import (
    Candidates,
    DeltaStatement,
    MergeRecord,
    MetricsStatement,
    ModelRef,
    Receipt,
    Rejection,
    RoundSpec,
    digest_of,
)
from fedmerge.statistics import side_tensors, statistics_schema
from fedmerge.streaming import Fragments, Start, ahead_of, keep_own, own_start, travelling
from fedmerge.tensors import Checkpoint, Computed, TensorMap, model_digest, reporting_save_errors
from fedmerge.training import STATE, Trainer, TrainResult, TrainTask, require_statistics
from fedmerge.versions import write_model
from fedmerge.witness import Witness

log = logging.getLogger(__name__)

# The folder in a node's with the signed records of merges that left out its delta, and signed rejections.
REFUSED = "refused"
# The file in a round's folder that says what the node's own model scored.
OWN_METRICS = "metrics.json"
# The field of a node's log records that holds the event: `fedmerge join` writes it, a simulation in processes reads it.
EVENT_FIELD = "node_event"


@dataclass(frozen=True)
class RoundView:
    """The federation's state as a node sees it; envelopes are not verified yet, and empty when there is nothing."""

    round: int
    phase: str
    spec_envelope: bytes
    record_envelope: bytes
    candidates_envelope: bytes
    num_deltas: int
    finished: bool
    failure: str


class Link(Protocol):
    """What a node asks of a coordinator. Errors are those of `fedmerge.errors`, whatever lies between."""

    def keep_trying(self, patience_s: float) -> None:
        """Be told how long it is worth trying to reach a coordinator that does not answer."""
        ...

    def watch(self) -> Iterator[RoundView]:
        """Yield the state now and after every change, until the last round has ended."""
        ...

    def fetch(self, root: str, target: Path) -> list[bytes]:
        """Fetch a file into `target`, continuing what is there, and hash its leaves. The caller checks the root."""
        ...

    def submit(self, envelope: bytes, payload: Path, leaves: list[bytes], sent: Callable[[int], None]) -> bytes:
        """Upload a payload from wherever it stands and commit it; return the receipt. `sent` is told the progress."""
        ...

    def report_metrics(self, envelope: bytes) -> None:
        """Hand in a signed evaluation."""
        ...


@dataclass(frozen=True)
class NodeEvent:
    """Something worth showing: `kind` is fetch, train, encoded, upload, delivered, evaluated, cosigned, excluded (its
    delta was not merged), waiting (not asked in a round), missed or finished."""

    kind: str
    round: int
    values: Mapping[str, Any] = field(default_factory=dict)


def on_a_thread(work: Callable[[], None]) -> Callable[[], None]:
    """Begin `work`; return a function that waits for it and raises what it raised. It does not outlive the process."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            work()
            outcome.set_result(None)
        except BaseException as err:
            outcome.set_exception(err)

    Thread(target=run, daemon=True).start()
    return outcome.result


class Node:
    """A partner site: takes part in rounds until the federation has finished.

    `home` is the node's folder, `base` a directory with the base model (fetched from the coordinator when None),
    `coordinator` the key that round specs must be signed with, or the pin that says which it is by now. A round's own
    fine-tune is deleted once its delta is signed, unless `keep_tuned`. With a `witness` the node checks and cosigns the
    coordinator's log. `make_chain` makes the node's models where they are not copies of its own. What it keeps is
    `durable` unless it is only simulated. `meanwhile` begins some work and returns a function that waits for it.
    """

    def __init__(
        self,
        link: Link,
        trainer: Trainer,
        key: SigningKey,
        coordinator: PublicKey | Pin,
        home: Path,
        *,
        base: Path | None = None,
        keep_tuned: bool = False,
        witness: Witness | None = None,
        on_event: Callable[[NodeEvent], None] = lambda event: None,
        make_chain: ChainMaker = ModelChain,
        durable: bool = True,
        meanwhile: Callable[[Callable[[], None]], Callable[[], None]] = on_a_thread,
    ) -> None:
        self.link = link
        self.trainer = trainer
        self.key = key
        self.node_id = key.public.key_id
        self.home = home
        self._pin = pinned(coordinator)
        # Whose word a view is: the key may be handed over while this site acts on it.
        self._said_by = self._pin.now
        self._chain = make_chain(home, link.fetch, self._announce_fetch, base)
        self._keep_tuned = keep_tuned
        self._durable = durable
        self._meanwhile = meanwhile
        self._witness = witness
        self._on_event = on_event
        self._taken: set[str] = set()
        self._num_done = 0

    def run(self) -> Path:
        """Take part until the last round has ended; return the final model's directory.

        Raises `RoundFailed` when the federation ended without a model.
        """
        self.trainer.check()
        for view in self.link.watch():
            final = self.react(view)
            if final is not None:
                return final
        raise RoundFailed("the coordinator ended the watch before the last round", hint="join again")

    def run_once(self) -> Path | None:
        """Do what is due of this site now, and no more; return the final model's directory once there is one.

        Raises `NothingDue` when that is nothing, or what was due was refused, and `RoundFailed` as `run` does.
        """
        self.trainer.check()
        view = next(iter(self.link.watch()))
        final = self.react(view)
        if final is None and not self._num_done:
            raise NothingDue(
                f"nothing is due of this node: round {view.round} is {view.phase}", hint="run it again later"
            )
        return final

    def react(self, view: RoundView) -> Path | None:
        """Do what a state of the federation asks of this site; return the final model's directory at the end."""
        if not view.spec_envelope:
            return None
        self._said_by = self._pin.now
        spec, signed = RoundSpec.open(view.spec_envelope, self._said_by, where="round spec")
        spec_digest = digest_of(signed.payload)
        self.link.keep_trying(spec.deadline_s * (1 + spec.max_staleness))
        # First: nothing more is given to a coordinator whose log is not in order.
        self._observe(view, spec, spec_digest)
        if view.phase == "open" and spec_digest not in self._taken:
            self._taken.add(spec_digest)
            if spec.asks(self.node_id):
                self._take_part(spec, spec_digest)
            else:
                self._emit("waiting", spec.round)
        if view.phase == "searching" and view.candidates_envelope:
            self._score(view.candidates_envelope, spec, spec_digest)
        return self._finish(view, spec) if view.finished else None

    def _observe(self, view: RoundView, spec: RoundSpec, spec_digest: str) -> None:
        """Check and cosign the log, once when a round is merged and once when its model is out; read the record."""
        record_digest = digest_of(view.record_envelope)
        moment = f"{spec_digest} {view.phase}" if view.phase == "publishing" else record_digest
        if moment in self._taken or not (view.record_envelope or view.phase == "publishing"):
            return
        self._taken.add(moment)
        checkpoint = self._witness.observe(spec.federation, spec.run) if self._witness else None
        if view.record_envelope:
            record, _ = MergeRecord.open(view.record_envelope, self._said_by, where="merge record")
            self._read_verdict(record, view.record_envelope)
            if self._witness and not spec.max_staleness:  # else its delta may be in a later merge
                self._witness.require_listed(record)
        if checkpoint is not None:
            self._emit("cosigned", view.round, log_events=checkpoint.size)

    def _read_verdict(self, record: MergeRecord, envelope: bytes) -> None:
        """Where a merge left out this site's delta, say why, and keep the record, which the coordinator has signed."""
        own = [verdict for verdict in record.contributions if verdict.node_id == self.node_id]
        for verdict in own:
            kept = self.home / REFUSED / f"{record.round:04d}-{verdict.statement_digest[:12]}.json"
            if not verdict.accepted and not kept.exists():
                replace_file(kept, envelope)
                found = "" if verdict.value is None else f", {verdict.value:.6g}"
                found += "" if verdict.limit is None else f" against a limit of {verdict.limit:.6g}"
                log.warning(
                    "round %d: this site's delta was not merged: %s%s; the signed record of it is in %s",
                    record.round,
                    verdict.reason,
                    found,
                    kept,
                )
                self._emit("excluded", record.round, reason=verdict.reason, value=verdict.value, limit=verdict.limit)

    def _read_rejection(self, envelope: bytes) -> None:
        """Say why the coordinator could not decode this site's delta, and keep its word for that."""
        rejection, _ = Rejection.open(envelope, self._pin.now, where="rejection")
        kept = self.home / REFUSED / f"{rejection.round:04d}-{rejection.statement_digest[:12]}-rejection.json"
        if rejection.node_id != self.node_id:
            raise DigestMismatch("the coordinator's rejection is of another node's delta")
        if not kept.exists():
            replace_file(kept, envelope)
            log.warning(
                "round %d: this site's delta was refused: %s; the signed rejection is in %s",
                rejection.round,
                rejection.detail,
                kept,
            )
            self._emit("excluded", rejection.round, reason=rejection.reason, value=None, limit=None)

    def _take_part(self, spec: RoundSpec, spec_digest: str) -> None:
        try:
            self.contribute(spec, spec_digest)
        except InvalidDelta as err:
            if not err.rejection:
                raise
            self._read_rejection(err.rejection.encode())
        except (RoundClosed, UnknownRound, NotAsked, StaleBase, ConflictingSubmission) as err:
            # The round went on without this delta; the next one is another chance.
            log.warning("round %d: %s", spec.round, err.message)
            self._emit("missed", spec.round, reason=err.message)

    def contribute(self, spec: RoundSpec, spec_digest: str) -> None:
        """Do steps 0 to 6 for one round, or what is left of them after a restart."""
        outbox = self.home / "rounds" / f"{spec.round:04d}-{spec_digest[:12]}"
        send, fragments = self._to_send(spec, spec_digest, outbox), Fragments.of(spec)
        if fragments is None or not fragments.overlap_steps or spec.round == spec.num_rounds:
            send()
            return
        sent = self._meanwhile(send)
        self._train_ahead(spec, outbox, spec.round)
        sent()

    def _to_send(self, spec: RoundSpec, spec_digest: str, outbox: Path) -> Callable[[], None]:
        """Return what sends the round's delta, which is made unless it is there; once there is a receipt, nothing."""
        if (outbox / "receipt.json").exists():
            return lambda: None
        with reporting_os_errors(outbox):
            outbox.mkdir(parents=True, exist_ok=True)
        payload = outbox / "delta.safetensors"
        if self._has_signed(outbox / STATEMENT):
            leaves = leaves_of(payload)
        else:
            leaves = self._make_delta(spec, spec_digest, payload)
        return lambda: self._deliver(spec, payload, leaves)

    def _has_signed(self, statement_file: Path) -> bool:
        """Whether the statement is there, and not of a key that this site has replaced since."""
        try:
            DeltaStatement.open(statement_file.read_bytes(), {self.node_id: self.key.public}, where=str(statement_file))
        except (FileNotFoundError, UntrustedKey):
            return False
        return True

    # 0 train, 1 subtract, 2 sparsify, 3 quantise, 4 frame, 5 sign

    def _make_delta(self, spec: RoundSpec, spec_digest: str, payload: Path) -> list[bytes]:
        """Make the delta and its statement; return the hashes of its leaves."""
        outbox, own = payload.parent, {self.node_id: self.key.public}
        recipe = Recipe.from_dict(spec.merge)
        kind = recipe.statistics
        measuring = None if kind is None else require_statistics(self.trainer, kind, recipe.method)
        model_dir = self._chain.materialise(spec.model, spec)
        self._evaluate("global", model_dir, spec.model.digest, spec, spec.round - 1)
        before, base = Checkpoint(model_dir), self._chain.require_base(spec)
        start = own_start(
            spec,
            before,
            base,
            outbox,
            self.key.public,
            train_on=lambda last, number: self._train_ahead(spec, last, number),
        )
        result = self._train(spec, start, outbox)
        tuned, to_send = open_tuned(result.model_dir, before)
        whole = self._whole(result.model_dir, tuned, spec, outbox)
        scored = outbox / OWN_METRICS
        if not scored.exists() and (scores := self._scores(whole)):
            self._report("own", scores, model_digest(tuned), spec, spec.round, done=scored)
        keep_own(spec, tuned, base, outbox)
        schema = travelling(spec, delta_schema(base.schema))
        codec = Codec.from_dict(spec.codec)
        seed = spec.mask_seed(self.node_id)
        if spec.error_feedback:
            residual = previous_residual(outbox, spec, own)
            to_send = carry_over(to_send, residual, spec.error_feedback)
        side = (
            None if kind is None or measuring is None else side_tensors(measuring.statistics(whole, kind), kind, schema)
        )
        if spec.streaming:
            to_send = Computed(schema, to_send.__getitem__)
        stats = write_delta(payload, to_send, schema, codec, seed=seed, base=before, side=side)
        notes = stats.notes(codec)
        for note in notes:
            log.warning("round %d: %s", spec.round, note)
        self._emit(
            "encoded",
            spec.round,
            payload_bytes=stats.payload_bytes,
            bits_per_parameter=stats.bits_per_parameter,
            encodings=stats.encodings,
            notes=notes,
        )
        if spec.error_feedback:
            sent = DeltaFile(payload, schema, codec, seed=seed, side=statistics_schema(kind, schema))
            write_residual(outbox, unsent(to_send, sent), base.shards())
        leaves = leaves_of(payload)
        statement = DeltaStatement(
            federation=spec.federation,
            run=spec.run,
            round=spec.round,
            spec_digest=spec_digest,
            nonce=spec.nonce,
            base_digest=spec.model.digest,
            schema_digest=spec.schema_digest,
            node_id=self.node_id,
            submission_id=secrets.token_hex(16),
            codec=spec.codec,
            payload_bytes=payload.stat().st_size,
            payload_root=merkle_root(leaves).hex(),
            num_examples=result.num_examples,
            metrics=result.metrics,
            software=_software(),
        )
        # The statement's presence says that the payload, and the residual and trainer's state beside it, are complete.
        if self._durable:
            with reporting_os_errors(outbox):
                for path in (payload, outbox / RESIDUAL, outbox / STATE):
                    if path.exists():
                        sync_tree(path)
                sync_directory(outbox)
        replace_file(outbox / STATEMENT, statement.sign(self.key), durable=self._durable)
        with reporting_os_errors(outbox):
            for directory in {result.model_dir, whole} if not self._keep_tuned else ():
                shutil.rmtree(directory)
            if start.model_dir != model_dir:
                shutil.rmtree(start.model_dir)
        return leaves

    def _train(self, spec: RoundSpec, start: Start, workspace: Path) -> TrainResult:
        steps, asked = spec.num_steps(self.node_id), spec.steps_share(self.node_id)
        task = TrainTask(
            model_dir=start.model_dir,
            settings=spec.train_settings(self.node_id),
            share=asked if start.part is None or not steps else asked * len(start.part) / steps,
            round=spec.round,
            seed=spec.train_seed(self.node_id),
            workspace=workspace,
            progress=lambda step, num_steps, loss: self._emit(
                "train", spec.round, step=step, num_steps=num_steps, loss=loss
            ),
            num_rounds=spec.num_rounds,
            previous_state=start.state,
            part=start.part,
        )
        with reporting_save_errors(workspace):
            return self.trainer.train(task)

    def _train_ahead(self, spec: RoundSpec, outbox: Path, number: int) -> Path:
        """Take the steps that the round after `number` begins with while that of `outbox` is under way, or was."""
        following = spec.model_copy(update={"round": number + 1})
        return ahead_of(
            spec,
            self._chain.require_base(spec),
            outbox,
            lambda start, workspace: self._train(following, start, workspace).model_dir,
            durable=self._durable,
        )

    def _whole(self, tuned_dir: Path, tuned: TensorMap, spec: RoundSpec, outbox: Path) -> Path:
        """Return a directory with the tuned model whole, which an adapter is not, to be evaluated as any other."""
        if not isinstance(tuned, UpdatedModel):
            return tuned_dir
        directory = outbox / "whole"
        with reporting_os_errors(directory):
            shutil.rmtree(directory, ignore_errors=True)
        write_model(tuned, self._chain.require_base(spec), directory)
        return directory

    # 6 stream

    def _deliver(self, spec: RoundSpec, payload: Path, leaves: list[bytes]) -> None:
        outbox = payload.parent
        envelope = (outbox / STATEMENT).read_bytes()
        num_bytes = payload.stat().st_size
        receipt = self.link.submit(
            envelope,
            payload,
            leaves,
            lambda sent: self._emit("upload", spec.round, sent_bytes=sent, payload_bytes=num_bytes),
        )
        _, own = DeltaStatement.open(envelope, {self.node_id: self.key.public}, where="own statement")
        signed_for, _ = Receipt.open(receipt, self._pin.now, where="receipt")
        if signed_for.statement_digest != digest_of(own.payload):
            raise DigestMismatch("the coordinator's receipt is for another delta than the one that was sent")
        kept = outbox / "receipt.json"
        replace_file(kept, receipt, durable=self._durable)
        if self._witness:
            self._witness.keep(kept, signed_for)
        self._num_done += 1
        self._emit("delivered", spec.round, payload_bytes=num_bytes, event=signed_for.event)

    # Where the plan searches for the merge: score candidates

    def _score(self, envelope: bytes, spec: RoundSpec, spec_digest: str) -> None:
        """Evaluate a generation of candidates on this site's own test data, if it is asked to, and report."""
        proposal, signed = Candidates.open(envelope, self._said_by, where="candidates")
        digest = digest_of(signed.payload)
        if proposal.spec_digest != spec_digest:
            raise DigestMismatch("the candidates are for another round than the one under way")
        if digest in self._taken or self.node_id not in proposal.judges:
            return
        self._taken.add(digest)
        scratch = self.home / "candidates"
        try:
            for candidate in proposal.candidates:
                reported = self.home / "metrics" / f"{spec_digest[:12]}-candidate-{candidate.digest[:12]}.json"
                if reported.exists():
                    continue
                updates = [*spec.model.updates, candidate.update]
                steps = [*spec.model.steps, *([candidate.step] if candidate.step else [])]
                ref = ModelRef(
                    digest=candidate.digest, base_digest=spec.model.base_digest, updates=updates, steps=steps
                )
                model_dir = self._chain.materialise(ref, spec, scratch)
                # To have nothing to say about one is an answer that is waited for.
                scores = self._scores(model_dir)
                self._report("candidate", scores, candidate.digest, spec, spec.round, done=reported)
                self._chain.drop_update(candidate.update)
                self._num_done += 1
        except UnknownVersion as err:
            # The search went on without this site's scores.
            log.warning("round %d: %s", spec.round, err.message)
            self._emit("missed", spec.round, reason="candidates were withdrawn before they were scored")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _finish(self, view: RoundView, spec: RoundSpec) -> Path:
        if not view.record_envelope:
            raise RoundFailed(f"round {view.round} failed: {view.failure}")
        record, _ = MergeRecord.open(view.record_envelope, self._said_by, where="merge record")
        if (record.federation, record.run) != (spec.federation, spec.run):
            raise DigestMismatch("the merge record is for another federation or run")
        model_dir = self._chain.materialise(record.model, spec)
        self._evaluate("global", model_dir, record.model.digest, spec, record.round)
        self._emit("finished", record.round, version=record.model.digest, model_dir=str(model_dir))
        if view.phase == "failed":
            raise RoundFailed(
                f"round {view.round} failed: {view.failure}", hint=f"the last good model is in {model_dir}"
            )
        return model_dir

    def _evaluate(self, which: str, model_dir: Path, digest: str, spec: RoundSpec, round_number: int) -> None:
        """Score a model on this site's own test data, once, and report it signed."""
        done = self.home / "metrics" / f"{spec.run[:12]}-{round_number:04d}-{which}-{digest[:12]}.json"
        if not done.exists() and (scores := self._scores(model_dir)):
            self._report(which, scores, digest, spec, round_number, done=done)

    def _scores(self, model_dir: Path) -> dict[str, float]:
        # A model that diverged has metrics that no statement can carry: JSON knows finite numbers only.
        return {name: value for name, value in self.trainer.evaluate(model_dir).items() if math.isfinite(value)}

    def _report(
        self, which: str, scores: dict[str, float], digest: str, spec: RoundSpec, round_number: int, *, done: Path
    ) -> None:
        statement = MetricsStatement.model_validate(
            {
                "federation": spec.federation,
                "run": spec.run,
                "round": round_number,
                "node_id": self.node_id,
                "model": which,
                "digest": digest,
                "values": scores,
            }
        )
        self.link.report_metrics(statement.sign(self.key))
        with reporting_os_errors(done):
            done.parent.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps(scores))
        self._emit("evaluated", round_number, model=which, **scores)

    def _announce_fetch(self, round_number: int, what: str, num_bytes: int) -> None:
        self._emit("fetch", round_number, what=what, num_bytes=num_bytes)

    def _emit(self, kind: str, round_number: int, **values: Any) -> None:
        self._on_event(NodeEvent(kind, round_number, values))


@cache
def _software() -> str:
    return f"fedmerge {version('fedmerge')}"
