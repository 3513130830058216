"""A partner site: what it does at each state of the federation, up to step 6, stream.

A node needs a `Link` to a coordinator (over gRPC, or in the same process), a trainer, a key, and a folder. All it knows
is in that folder, so it may be stopped at any moment: started again, it fetches what is missing, resumes an upload
where it stood, and never trains twice for a round whose delta is already signed.
"""

from __future__ import annotations

import logging
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any

from fedmerge.aggregation.fragments import Fragments
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
)
from fedmerge.files import replace_file
from fedmerge.node.chain import ChainMaker, ModelChain
from fedmerge.node.deltamaker import DeltaMaker
from fedmerge.node.evaluation import Evaluator
from fedmerge.node.events import NodeEvent
from fedmerge.node.link import Link, RoundView
from fedmerge.node.outbox import PAYLOAD, STATEMENT, forget_deltas
from fedmerge.node.witness import Witness
from fedmerge.statements import Candidates, DeltaStatement, MergeRecord, Receipt, Rejection, RoundSpec, digest_of
from fedmerge.statements.handover import Pin, pinned
from fedmerge.training import Trainer
from fedmerge.trust.sign import PublicKey, SigningKey

log = logging.getLogger(__name__)

# The folder in a node's with the signed records of merges that left out its delta, and signed rejections.
REFUSED = "refused"


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
    fine-tune is deleted once its delta is signed, unless `keep_tuned`. The deltas of the last `keep_rounds` rounds are
    kept, or all where that is 0, and always what was signed for them. With a `witness` the node checks and cosigns the
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
        keep_rounds: int = 0,
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
        self._evaluator = Evaluator(link, trainer, key, self._chain, self._emit)
        self._maker = DeltaMaker(
            trainer, key, self._chain, self._evaluator, self._emit, keep_tuned=keep_tuned, durable=durable
        )
        self._keep_rounds = keep_rounds
        self._durable = durable
        self._meanwhile = meanwhile
        self._witness = witness
        self._on_event = on_event
        # The newest views that it acted on, by what they show: a view comes again, but none of long ago.
        self._taken: deque[str] = deque(maxlen=256)
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
            self._taken.append(spec_digest)
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
        self._taken.append(moment)
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
        if self._keep_rounds:
            forget_deltas(self.home / "rounds", spec.round - self._keep_rounds + 1)

    def contribute(self, spec: RoundSpec, spec_digest: str) -> None:
        """Do steps 0 to 6 for one round, or what is left of them after a restart."""
        outbox = self.home / "rounds" / f"{spec.round:04d}-{spec_digest[:12]}"
        send, fragments = self._to_send(spec, spec_digest, outbox), Fragments.of(spec)
        if fragments is None or not fragments.overlap_steps or spec.round == spec.num_rounds:
            send()
            return
        sent = self._meanwhile(send)
        self._maker.train_ahead(spec, outbox, spec.round)
        sent()

    def _to_send(self, spec: RoundSpec, spec_digest: str, outbox: Path) -> Callable[[], None]:
        """Return what sends the round's delta, which is made unless it is there; once there is a receipt, nothing."""
        if (outbox / "receipt.json").exists():
            return lambda: None
        leaves = self._maker.make(spec, spec_digest, outbox)
        return lambda: self._deliver(spec, outbox, leaves)

    # 6 stream

    def _deliver(self, spec: RoundSpec, outbox: Path, leaves: list[bytes]) -> None:
        payload = outbox / PAYLOAD
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
        self._taken.append(digest)
        scratch = self.home / "candidates"
        try:
            for candidate in proposal.candidates:
                if self._evaluator.report_candidate(candidate, spec, spec_digest, scratch):
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
        self._evaluator.report_published(model_dir, record.model.digest, spec, record.round)
        self._emit("finished", record.round, version=record.model.digest, model_dir=str(model_dir))
        if view.phase == "failed":
            raise RoundFailed(
                f"round {view.round} failed: {view.failure}", hint=f"the last good model is in {model_dir}"
            )
        return model_dir

    def _announce_fetch(self, round_number: int, what: str, num_bytes: int) -> None:
        self._emit("fetch", round_number, what=what, num_bytes=num_bytes)

    def _emit(self, kind: str, round_number: int, **values: Any) -> None:
        self._on_event(NodeEvent(kind, round_number, values))
