"""Steps 9 to 11 as one pure computation: screen the deltas, merge them, step the outer optimizer.

The coordinator runs it to make a model, an auditor runs it again to check one. Both get the same bits from the same
round spec, deltas and optimizer state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedmerge.aggregation.fragments import travelling
from fedmerge.aggregation.outer import OUTER
from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import DeltaFile, write_delta
from fedmerge.errors import ConfigError, RoundFailed
from fedmerge.merge import Plan, Recipe, Workers, merge_deltas
from fedmerge.merge.layers import Value, leaves
from fedmerge.merge.statistics import statistics_of, statistics_schema, task_vector_of
from fedmerge.screening.checks import Known, Owner, ScreenPolicy
from fedmerge.screening.robust import Inputs, harden
from fedmerge.screening.verdicts import Inspection, Verdict, adapted_clip_norm, clip_norm, inspect, screen
from fedmerge.search import Candidate
from fedmerge.seeds import derive_seed
from fedmerge.statements import MergeRecord, RoundSpec
from fedmerge.tensors import Computed, Schema, TensorMap, reporting_save_errors

STATE_SEPARATOR = ":"
LATE = "+"


def delta_key(node_id: str, staleness: int) -> str:
    """Return the key of a delta among those that are merged: the node's id, and how late it is if it is."""
    return f"{node_id}{LATE}{staleness}" if staleness else node_id


def node_of(key: str) -> str:
    """Return the node of a delta's key."""
    return key.partition(LATE)[0]


def staleness_of(key: str) -> int:
    """Return for how many rounds before the merge's a delta was made, from its key."""
    return int(key.partition(LATE)[2] or 0)


def open_delta(spec: RoundSpec, node_id: str, path: Path, schema: Schema) -> DeltaFile:
    """Return what a node sent for a round, as the plan has it: its task vector and the statistics that the merge needs.

    Raises `InvalidDelta` when the file does not fit the plan.
    """
    schema = travelling(spec, schema)
    side = statistics_schema(Recipe.from_dict(spec.merge).statistics, schema)
    return DeltaFile(path, schema, Codec.from_dict(spec.codec), seed=spec.mask_seed(node_id), side=side)


def inspect_delta(spec: RoundSpec, sent: DeltaFile, schema: Schema) -> Inspection:
    """Return what `screen_round` has to know of a delta by itself, as its round's plan has it. Reads all of it."""
    return inspect(task_vector_of(sent, Recipe.from_dict(spec.merge).statistics), travelling(spec, schema))


def screen_round(
    spec: RoundSpec,
    deltas: Mapping[str, TensorMap],
    num_examples: Mapping[str, int],
    schema: Schema,
    known: Known,
    *,
    inspected: Mapping[str, Inspection] | None = None,
) -> list[Verdict]:
    """Step 9: one verdict and weight per delta, sorted by key (`delta_key`, here and wherever deltas are merged).

    A delta that is s rounds late is scaled by 1 / sqrt(1 + s), which is not made up for by the others (FedBuff, arXiv
    2106.06639): a step of late deltas only is a shorter one. Deltas that were `inspected` are not read again. Raises
    `RoundFailed` when too few pass for the caps on their weights.
    """
    kind = Recipe.from_dict(spec.merge).statistics
    deltas = {node_id: task_vector_of(sent, kind) for node_id, sent in deltas.items()}
    policy = ScreenPolicy.from_dict(spec.screen)
    verdicts = screen(deltas, num_examples, travelling(spec, schema), policy, known, inspected=inspected)
    return [
        replace(verdict, scale=verdict.scale / math.sqrt(1 + staleness_of(verdict.node_id))) for verdict in verdicts
    ]


def require_enough(spec: RoundSpec, verdicts: Sequence[Verdict]) -> None:
    """Raise `RoundFailed` when the deltas of fewer than the round's `min_nodes` passed, or not that of its root."""
    root = ScreenPolicy.from_dict(spec.screen).root
    accepted = {node_of(verdict.node_id) for verdict in verdicts if verdict.accepted} - {root}
    refused = "; ".join(f"{v.node_id[:12]}: {v.detail}" for v in verdicts if not v.accepted)
    if len(accepted) < spec.min_nodes:
        num_nodes = len({node_of(verdict.node_id) for verdict in verdicts} - {root})
        raise RoundFailed(f"the deltas of only {len(accepted)} of {num_nodes} nodes passed screening ({refused})")
    if root is not None and not any(verdict.node_id == root and verdict.accepted for verdict in verdicts):
        raise RoundFailed(f"the root of trust, node {root[:12]}, sent no delta that passed screening ({refused})")


def round_clip_norm(spec: RoundSpec, verdicts: Sequence[Verdict], known: Known) -> float | None:
    """Return the norm that a round's deltas were clipped to, for the record; None without clipping."""
    policy = ScreenPolicy.from_dict(spec.screen)
    norms = [each.norm or 0.0 for each in verdicts if each.accepted and node_of(each.node_id) != policy.root]
    return clip_norm(norms, policy, known)


def next_clip_norm(spec: RoundSpec, previous: MergeRecord | None) -> float | None:
    """Return the clipping norm that follows from the round before, where it follows a quantile; None at first."""
    policy = ScreenPolicy.from_dict(spec.screen)
    if policy.clip_quantile is None or previous is None or previous.clip_norm is None:
        return None
    norms = [each.norm or 0.0 for each in previous.contributions if each.accepted and each.node_id != policy.root]
    return adapted_clip_norm(previous.clip_norm, norms, policy)


def known_from(spec: RoundSpec, record: MergeRecord, previous: MergeRecord | None) -> Known:
    """Return what a round was screened by beside its deltas, as its record and that of the round before have it."""
    by_key = {delta_key(each.node_id, each.staleness): each for each in record.contributions}
    return Known(
        owners={key: Owner(each.node_id, each.organisation) for key, each in by_key.items()},
        clip_norm=next_clip_norm(spec, previous),
        gains={key: each.gain for key, each in by_key.items()},
    )


def weights_of(verdicts: Sequence[Verdict], candidate: Candidate | None) -> dict[str, Value]:
    """Return the weight of each accepted node by node id: its verdict's, with the candidate's factor on it."""
    plain = {verdict.node_id: verdict.weight for verdict in verdicts if verdict.accepted}
    if candidate is None:
        return dict(plain)
    return dict(zip(plain, candidate.weights(list(plain.values())), strict=True))


class RoundUpdate(Mapping[str, Tensor]):
    """Steps 10 and 11: the round's update as a tensor map that is computed while it is read.

    It is the outer optimizer's step, changed by the steps over rounds that the recipe ends with, if any.

    Its tensors, fp32 (or fp64), are what to add to the parameters. They can be read once, in the order of their names,
    since a merge streams; `state` then holds the optimizer state that goes with them, and that of tensors that do not
    travel in this round, as it was. `candidate` says how to merge
    where a search found it, instead of the spec and the verdicts alone; `workers`, which change no bit, where.
    """

    def __init__(
        self,
        spec: RoundSpec,
        verdicts: list[Verdict],
        deltas: Mapping[str, TensorMap],
        before: TensorMap,
        previous_state: Mapping[str, Tensor],
        *,
        candidate: Candidate | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.spec = spec
        self._previous_state = previous_state
        recipe, weights = Recipe.from_dict(spec.merge), weights_of(verdicts, candidate)
        if candidate is not None:
            recipe = candidate.recipe(recipe)
        scales = {verdict.node_id: verdict.scale for verdict in verdicts}
        # Weights of zero: a search left the node out, and methods that look at all deltas must not see this one.
        merged = [node_id for node_id, weight in weights.items() if any(leaves(weight))]
        policy = ScreenPolicy.from_dict(spec.screen)
        root = None if policy.root is None else task_vector_of(deltas[policy.root], recipe.statistics)
        sent = [deltas[node_id] for node_id in merged]
        inputs = Inputs(
            [task_vector_of(one, recipe.statistics) for one in sent],
            [weights[node_id] for node_id in merged],
            [scales[node_id] for node_id in merged],
        )
        self._names = sorted(inputs.deltas[0])
        moved = set(self._names)
        self.state = {key: tensor for key, tensor in previous_state.items() if _parameter_of(key) not in moved}
        if policy.robust and recipe.statistics:
            # What the rules answer with are combinations of deltas, of which no node has statistics.
            raise RoundFailed(f"robust rules do not go with {recipe.method}, which needs statistics of every delta")
        try:
            inputs = harden(inputs, policy.robust, policy.max_bad, root=root)
        except ConfigError as err:
            raise RoundFailed(f"after screening, {err.message}") from err
        self._plan = Plan(recipe, inputs.weights, self._names)
        self._merged = merge_deltas(
            inputs.deltas,
            inputs.weights,
            recipe,
            base=before,
            seed=derive_seed("merge", spec.merge_seed, spec.round),
            scales=inputs.scales,
            statistics=[statistics_of(one, recipe.statistics) for one in sent] if recipe.statistics else None,
            workers=workers or Workers(),
        )

    def __getitem__(self, name: str) -> Tensor:
        merged_name, task_vector = next(self._merged)
        if merged_name != name:
            raise KeyError(f"{name} was asked for out of order")
        settings = dict(self.spec.outer)
        optimizer = OUTER[settings.pop("name")]
        recorded = dict(self._previous(name))
        # Steps over rounds keep theirs apart: their kinds hold a dot, an optimizer's do not.
        previous = {kind: tensor for kind, tensor in recorded.items() if "." not in kind} or optimizer.init(task_vector)
        step, state = optimizer.update(-task_vector, previous, **settings)
        step, further = self._plan.follow(name, step, recorded)
        self.state.update({f"{kind}{STATE_SEPARATOR}{name}": tensor for kind, tensor in (state | further).items()})
        return step

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def write(self, path: Path, schema: Schema) -> None:
        """Encode the update with the round's downlink codec into a delta file at `path`, zeros for the rest."""
        own = set(self._names)
        whole = Computed(schema, lambda name: self[name] if name in own else torch.zeros(schema[name].shape))
        write_delta(path, whole, schema, Codec.from_dict(self.spec.downlink), seed=self.spec.update_seed())

    def write_state(self, path: Path) -> bool:
        """Write the optimizer state, if there is any, and say whether there is. Raises `ResourceError`."""
        if self.state:
            with reporting_save_errors(path):
                save_file(self.state, path)
        return bool(self.state)

    def _previous(self, name: str) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in self._previous_state.items():
            if _parameter_of(key) == name:
                yield key.partition(STATE_SEPARATOR)[0], tensor


def _parameter_of(state_key: str) -> str:
    return state_key.partition(STATE_SEPARATOR)[2]
