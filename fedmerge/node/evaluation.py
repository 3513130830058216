"""What a node says of models by its own test data: evaluations, signed, and each of them once.

Beside what it reports it keeps a file that says so; a node that is started again goes on after the last of them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from fedmerge.errors import reporting_os_errors
from fedmerge.node.chain import ModelChain
from fedmerge.node.events import Emit
from fedmerge.node.link import Link
from fedmerge.statements import MetricsStatement, ModelRef, ProposedMerge, RoundSpec
from fedmerge.tensors import TensorMap, model_digest
from fedmerge.training import Trainer
from fedmerge.trust.sign import SigningKey

# The file in a round's folder that says what the node's own model scored.
OWN_METRICS = "metrics.json"


class Evaluator:
    """Scores models with a node's trainer, and hands what it finds in over `link`, signed with `key`.

    What it has said already stands in the folder of the node's `chain` of models.
    """

    def __init__(self, link: Link, trainer: Trainer, key: SigningKey, chain: ModelChain, emit: Emit) -> None:
        self._link = link
        self._trainer = trainer
        self._key = key
        self._chain = chain
        self._emit = emit

    def report_published(self, model_dir: Path, digest: str, spec: RoundSpec, round_number: int) -> None:
        """Report a published model, the one that a round made; 0 is for the base."""
        done = self._chain.home / "metrics" / f"{spec.run[:12]}-{round_number:04d}-global-{digest[:12]}.json"
        if not done.exists() and (scores := self._scores(model_dir)):
            self._report("global", scores, digest, spec, round_number, done=done)

    def report_own(self, model_dir: Path, tuned: TensorMap, spec: RoundSpec, outbox: Path) -> None:
        """Report what the node tuned for a round: `tuned`, which stands whole in `model_dir`."""
        done = outbox / OWN_METRICS
        if not done.exists() and (scores := self._scores(model_dir)):
            self._report("own", scores, model_digest(tuned), spec, spec.round, done=done)

    def report_candidate(self, candidate: ProposedMerge, spec: RoundSpec, spec_digest: str, scratch: Path) -> bool:
        """Report a candidate for a round's model, which is made in `scratch`; return False if that was done before.

        Raises `UnknownVersion` when the coordinator does not have it any more.
        """
        done = self._chain.home / "metrics" / f"{spec_digest[:12]}-candidate-{candidate.digest[:12]}.json"
        if done.exists():
            return False
        updates = [*spec.model.updates, candidate.update]
        steps = [*spec.model.steps, *([candidate.step] if candidate.step else [])]
        ref = ModelRef(digest=candidate.digest, base_digest=spec.model.base_digest, updates=updates, steps=steps)
        model_dir = self._chain.materialise(ref, spec, scratch)
        # To have nothing to say about one is an answer that is waited for.
        self._report("candidate", self._scores(model_dir), candidate.digest, spec, spec.round, done=done)
        self._chain.drop_update(candidate.update)
        return True

    def _scores(self, model_dir: Path) -> dict[str, float]:
        # A model that diverged has metrics that no statement can carry: JSON knows finite numbers only.
        return {name: value for name, value in self._trainer.evaluate(model_dir).items() if math.isfinite(value)}

    def _report(
        self, which: str, scores: dict[str, float], digest: str, spec: RoundSpec, round_number: int, *, done: Path
    ) -> None:
        statement = MetricsStatement.model_validate(
            {
                "federation": spec.federation,
                "run": spec.run,
                "round": round_number,
                "node_id": self._key.public.key_id,
                "model": which,
                "digest": digest,
                "values": scores,
            }
        )
        self._link.report_metrics(statement.sign(self._key))
        with reporting_os_errors(done):
            done.parent.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps(scores))
        self._emit("evaluated", round_number, model=which, **scores)
