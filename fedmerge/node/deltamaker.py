"""Steps 0 to 5 on a node, read top to bottom: train, subtract, sparsify, quantise, frame, sign.

All that comes of them is in the round's outbox. Once the statement is there the rest is complete, and nothing is made a
second time.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from functools import cache
from importlib.metadata import version
from pathlib import Path

from fedmerge.aggregation.fragments import travelling
from fedmerge.delta.adapter import open_tuned
from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import DeltaFile, write_delta
from fedmerge.delta.task_vector import UpdatedModel, delta_schema
from fedmerge.errors import InputError, UntrustedKey, reporting_os_errors
from fedmerge.files import replace_file, sync_directory, sync_tree
from fedmerge.merge import Recipe
from fedmerge.merge.statistics import side_tensors, statistics_schema
from fedmerge.models.versions import write_model
from fedmerge.node.chain import ModelChain
from fedmerge.node.evaluation import Evaluator
from fedmerge.node.events import Emit
from fedmerge.node.feedback import RESIDUAL, carry_over, previous_residual, unsent, write_residual
from fedmerge.node.outbox import PAYLOAD, STATEMENT
from fedmerge.node.streaming import Start, ahead_of, keep_own, own_start
from fedmerge.statements import DeltaStatement, RoundSpec
from fedmerge.tensors import Checkpoint, Computed, TensorMap, reporting_save_errors
from fedmerge.training import STATE, Trainer, TrainResult, TrainTask, require_statistics
from fedmerge.transparency.merkle import leaves_of, merkle_root
from fedmerge.trust.sign import SigningKey

log = logging.getLogger(__name__)


class DeltaMaker:
    """Makes a node's deltas, of what `trainer` makes of the models in `chain`, and signs them with `key`.

    A round's own fine-tune is deleted once its delta is signed, unless `keep_tuned`. What is made is `durable` unless
    it is only simulated.
    """

    def __init__(
        self,
        trainer: Trainer,
        key: SigningKey,
        chain: ModelChain,
        evaluator: Evaluator,
        emit: Emit,
        *,
        keep_tuned: bool,
        durable: bool,
    ) -> None:
        self._trainer = trainer
        self._key = key
        self._node_id = key.public.key_id
        self._own = {self._node_id: key.public}
        self._chain = chain
        self._evaluator = evaluator
        self._emit = emit
        self._keep_tuned = keep_tuned
        self._durable = durable

    def make(self, spec: RoundSpec, spec_digest: str, outbox: Path) -> list[bytes]:
        """Make a round's delta and its statement, unless they are there; return the hashes of the payload's leaves."""
        with reporting_os_errors(outbox):
            outbox.mkdir(parents=True, exist_ok=True)
        if self._has_signed(outbox / STATEMENT):
            return leaves_of(outbox / PAYLOAD)
        recipe = Recipe.from_dict(spec.merge)
        kind = recipe.statistics
        measuring = None if kind is None else require_statistics(self._trainer, kind, recipe.method)
        model_dir = self._chain.materialise(spec.model, spec)
        self._evaluator.report_published(model_dir, spec.model.digest, spec, spec.round - 1)
        before, base = Checkpoint(model_dir), self._chain.require_base(spec)
        start = own_start(
            spec,
            before,
            base,
            outbox,
            self._key.public,
            train_on=lambda last, number: self.train_ahead(spec, last, number),
        )
        result = self._train(spec, start, outbox)
        tuned, to_send = open_tuned(result.model_dir, before)
        whole = self._whole(result.model_dir, tuned, spec, outbox)
        self._evaluator.report_own(whole, tuned, spec, outbox)
        keep_own(spec, tuned, base, outbox)
        schema = travelling(spec, delta_schema(base.schema))
        codec = Codec.from_dict(spec.codec)
        seed = spec.mask_seed(self._node_id)
        if spec.error_feedback:
            residual = previous_residual(outbox, spec, self._own)
            to_send = carry_over(to_send, residual, spec.error_feedback)
        side = (
            None if kind is None or measuring is None else side_tensors(measuring.statistics(whole, kind), kind, schema)
        )
        if spec.streaming:
            to_send = Computed(schema, to_send.__getitem__)
        stats = write_delta(outbox / PAYLOAD, to_send, schema, codec, seed=seed, base=before, side=side)
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
            sent = DeltaFile(outbox / PAYLOAD, schema, codec, seed=seed, side=statistics_schema(kind, schema))
            write_residual(outbox, unsent(to_send, sent), base.shards())
        leaves = leaves_of(outbox / PAYLOAD)
        self._sign(spec, spec_digest, result, outbox, leaves)
        with reporting_os_errors(outbox):
            for directory in {result.model_dir, whole} if not self._keep_tuned else ():
                shutil.rmtree(directory)
            if start.model_dir != model_dir:
                shutil.rmtree(start.model_dir)
        return leaves

    def train_ahead(self, spec: RoundSpec, outbox: Path, number: int) -> Path:
        """Take the steps that the round after `number` begins with while that of `outbox` is under way, or was."""
        following = spec.model_copy(update={"round": number + 1})
        return ahead_of(
            spec,
            self._chain.require_base(spec),
            outbox,
            lambda start, workspace: self._train(following, start, workspace).model_dir,
            durable=self._durable,
        )

    def _has_signed(self, statement_file: Path) -> bool:
        """Whether the statement is there, and not of a key that this site has replaced since."""
        try:
            DeltaStatement.open(statement_file.read_bytes(), self._own, where=str(statement_file))
        except (FileNotFoundError, UntrustedKey):
            return False
        return True

    def _train(self, spec: RoundSpec, start: Start, workspace: Path) -> TrainResult:
        steps, asked = spec.num_steps(self._node_id), spec.steps_share(self._node_id)
        task = TrainTask(
            model_dir=start.model_dir,
            settings=spec.train_settings(self._node_id),
            share=asked if start.part is None or not steps else asked * len(start.part) / steps,
            round=spec.round,
            seed=spec.train_seed(self._node_id),
            workspace=workspace,
            progress=lambda step, num_steps, loss: self._emit(
                "train", spec.round, step=step, num_steps=num_steps, loss=loss
            ),
            num_rounds=spec.num_rounds,
            previous_state=start.state,
            part=start.part,
        )
        with reporting_save_errors(workspace):
            result = self._trainer.train(task)
        if result.num_examples < 1:
            raise InputError(
                f"the trainer says that it trained on {result.num_examples} examples, so there is nothing to send",
                hint="give it data, or leave the node out",
            )
        return result

    def _whole(self, tuned_dir: Path, tuned: TensorMap, spec: RoundSpec, outbox: Path) -> Path:
        """Return a directory with the tuned model whole, which an adapter is not, to be evaluated as any other."""
        if not isinstance(tuned, UpdatedModel):
            return tuned_dir
        directory = outbox / "whole"
        with reporting_os_errors(directory):
            shutil.rmtree(directory, ignore_errors=True)
        write_model(tuned, self._chain.require_base(spec), directory)
        return directory

    def _sign(self, spec: RoundSpec, spec_digest: str, result: TrainResult, outbox: Path, leaves: list[bytes]) -> None:
        """Sign for the payload in the outbox, which is complete from then on."""
        payload = outbox / PAYLOAD
        statement = DeltaStatement(
            federation=spec.federation,
            run=spec.run,
            round=spec.round,
            spec_digest=spec_digest,
            nonce=spec.nonce,
            base_digest=spec.model.digest,
            schema_digest=spec.schema_digest,
            node_id=self._node_id,
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
        replace_file(outbox / STATEMENT, statement.sign(self._key), durable=self._durable)


@cache
def _software() -> str:
    return f"fedmerge {version('fedmerge')}"
