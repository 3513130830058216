"""A Flower Strategy that merges as fedmerge does: steps 9 to 11 on the replies of Flower's clients."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from fedmerge.aggregation.outer import OUTER, parameters
from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import DeltaFile
from fedmerge.delta.task_vector import apply_one, delta_schema, working_dtype
from fedmerge.errors import ConfigError, FedmergeError, InvalidDelta
from fedmerge.interop.flower.arrays import DELTA_KEY, PLAN_KEY, Plan, is_delta, num_bytes, to_record, to_tensors
from fedmerge.interop.flower.mod import only_arrays
from fedmerge.merge import Plan as MergePlan
from fedmerge.merge import Recipe, merge_deltas
from fedmerge.merge.methods import IN_TIME
from fedmerge.merge.parameters import resolve
from fedmerge.screening.checks import ScreenPolicy
from fedmerge.screening.verdicts import screen
from fedmerge.seeds import derive_seed
from fedmerge.tensors import TensorMap, require_same_schema, schema_of

log = logging.getLogger(__name__)


class MergeStrategy(FedAvg):
    """FedAvg's sampling and evaluation, with fedmerge's screening, merging and outer optimizer in place of its mean.

    `recipe` is what merges the clients' task vectors (`fedmerge.merge`), its steps over rounds included, `outer` the
    optimizer that steps with the merged one, as `{"name": "nesterov", "lr": 0.7, "momentum": 0.9}`
    (`fedmerge.aggregation.outer`), `screen` what a task vector must be and then weighs. With a `codec`, clients that
    have the mod `fedmerge_delta` reply with encoded task vectors, with `error_feedback` above 0 at that decay; clients
    without it go on replying with whole models. `options` are FedAvg's own. A reply that can't be merged is left out
    and logged, and the round goes on. Integer arrays stay as the server has them. The same replies give the same bits,
    in whatever order they arrive.

    Raises `ConfigError` for a recipe, outer optimizer or codec that does not exist, or that do not go together.
    """

    def __init__(
        self,
        recipe: Recipe | str = "fedavg",
        *,
        outer: Mapping[str, Any] | None = None,
        screen: ScreenPolicy | None = None,
        codec: Codec | None = None,
        error_feedback: float = 0.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.recipe = Recipe(recipe) if isinstance(recipe, str) else recipe
        if self.recipe.method in IN_TIME:
            raise ConfigError(
                f"{self.recipe.method} averages over time, and clients have no order",
                hint=f'put it behind a method: Recipe.from_steps([("fedavg", {{}}), ("{self.recipe.method}", {{}})])',
            )
        settings = dict(outer or {"name": "sgd"})
        self.outer_name = str(settings.pop("name"))
        self.outer_params = resolve(f"outer optimizer {self.outer_name}", parameters(self.outer_name), settings)
        if error_feedback and (
            codec is None or codec.sparsify not in {"topk", "layerwise_topk"} or self.outer_name != "sgd"
        ):
            raise ConfigError(
                "error_feedback needs a topk codec and the outer optimizer sgd",
                hint="residuals on top of momentum diverge; without topk little is left unsent",
            )
        averages = [step.name for step in self.recipe.after if step.name in IN_TIME]
        if error_feedback and averages:
            raise ConfigError(
                f"error_feedback does not go with {averages[0]} over rounds",
                hint="residuals on top of momentum diverge, and an average over rounds carries the past on as it does",
            )
        self.screen_policy = screen or ScreenPolicy()
        self.codec = codec
        self.error_feedback = error_feedback
        self.seed = seed
        self._before: dict[str, Tensor] = {}
        self._state: dict[str, dict[str, Tensor]] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember the model that this round starts from, and send it with the plan for the mod."""
        self._before = to_tensors(arrays)
        if self.codec is not None:
            config[PLAN_KEY] = self._plan(self.codec, server_round).to_json()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Screen and merge the replies, and step from the model that the round started from.

        Returns (None, None) when no reply can be merged; the model then stays as it is. The metrics also hold
        `fedmerge-payload-bytes`, what the clients' arrays came to, and `fedmerge-refused`, how many were left out.
        """
        contents = {str(reply.metadata.src_node_id): reply for reply in replies}
        with TemporaryDirectory() as folder:
            deltas: dict[str, TensorMap] = {}
            counts: dict[str, int] = {}
            for node_id, reply in sorted(contents.items()):
                try:
                    counts[node_id] = self._num_examples(reply)
                    deltas[node_id] = self._open(reply, server_round, Path(folder) / f"{node_id}.safetensors")
                except FedmergeError as err:
                    log.warning("round %d: node %s is left out: %s", server_round, node_id, err.message)
            schema = schema_of(self._before)
            verdicts = screen(deltas, counts, schema, self.screen_policy)
            for verdict in verdicts:
                if not verdict.accepted:
                    log.warning("round %d: node %s is left out: %s", server_round, verdict.node_id, verdict.detail)
            accepted = [verdict for verdict in verdicts if verdict.accepted]
            if not accepted:
                return None, None
            merged = merge_deltas(
                [deltas[verdict.node_id] for verdict in accepted],
                [verdict.weight for verdict in accepted],
                self.recipe,
                base=self._before,
                seed=derive_seed("merge", self.seed, server_round),
                scales=[verdict.scale for verdict in accepted],
            )
            plan = MergePlan(self.recipe, [verdict.weight for verdict in accepted], delta_schema(schema))
            after = {**self._before, **{name: self._step(plan, name, task_vector) for name, task_vector in merged}}
        merged_contents = [contents[verdict.node_id].content for verdict in accepted]
        metrics = self.train_metrics_aggr_fn(merged_contents, self.weighted_by_key)
        metrics["fedmerge-payload-bytes"] = sum(num_bytes(only_arrays(content)[1]) for content in merged_contents)
        metrics["fedmerge-refused"] = len(contents) - len(accepted)
        return to_record(after), metrics

    def _plan(self, codec: Codec, server_round: int) -> Plan:
        return Plan(codec, self.error_feedback, derive_seed("flower", self.seed, server_round))

    def _num_examples(self, reply: Message) -> int:
        """Return the weight that a client gives its reply."""
        if reply.has_error():
            raise InvalidDelta(f"the ClientApp failed: {reply.error.reason}")
        values = [record.get(self.weighted_by_key) for record in reply.content.metric_records.values()]
        if len(values) != 1 or not isinstance(values[0], int | float) or values[0] != int(values[0]):
            raise InvalidDelta(f"the reply needs one MetricRecord with a whole number {self.weighted_by_key!r}")
        return int(values[0])

    def _open(self, reply: Message, server_round: int, path: Path) -> TensorMap:
        """Return the task vector of a reply, which was encoded or is the difference to a whole model."""
        _, record = only_arrays(reply.content)
        if not is_delta(record):
            tuned = to_tensors(record)
            require_same_schema(schema_of(self._before), schema_of(tuned), where="the reply")
            # Differences as they are: what is not finite in them is the screen's to find, and to tell from the rest.
            floats = {name: self._before[name] for name in delta_schema(schema_of(self._before))}
            return {name: tuned[name].to(working_dtype(before)) - before for name, before in floats.items()}
        if self.codec is None:
            raise InvalidDelta("the reply is an encoded task vector, which this strategy did not ask for")
        path.write_bytes(record[DELTA_KEY].data)
        seed = derive_seed("flower", self._plan(self.codec, server_round).seed, reply.metadata.src_node_id)
        return DeltaFile(path, schema_of(self._before), self.codec, seed=seed)

    def _step(self, plan: MergePlan, name: str, task_vector: Tensor) -> Tensor:
        """Return the parameter after the outer optimizer's step and the recipe's steps over rounds."""
        optimizer, recorded = OUTER[self.outer_name], self._state.get(name, {})
        # Steps over rounds keep theirs apart: their kinds hold a dot, an optimizer's do not.
        previous = {kind: tensor for kind, tensor in recorded.items() if "." not in kind} or optimizer.init(task_vector)
        step, state = optimizer.update(-task_vector, previous, **self.outer_params)
        step, further = plan.follow(name, step, recorded)
        self._state[name] = state | further
        return apply_one(self._before[name], step)
