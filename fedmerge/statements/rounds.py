"""What is signed in a round: its plan, what nodes contribute and measure, and what they are given for it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedmerge.events import Digest
from fedmerge.seeds import derive_seed
from fedmerge.statements.base import (
    MERKLE_DIGEST,
    MODEL_DIGEST,
    Count,
    FileRef,
    ModelRef,
    Size,
    Statement,
    StepRef,
    Strict,
    UpdateRef,
)


class RoundSpec(Statement):
    """What the coordinator promises and asks in a round; a node's delta is bound to its digest.

    `sample` are the nodes that are asked, sorted; when it is empty, every node that the coordinator trusts is. A delta
    that comes too late for the round counts in a later merge, up to `max_staleness` rounds on. `steps` are those of the
    nodes that are asked for another number of them than `train` says. With `streaming` a part of the model travels
    (`fedmerge.aggregation.fragments`).
    `visibility` says who sees single deltas: the coordinator does.
    """

    kind: ClassVar[str] = "roundspec"
    digest_algorithm: ClassVar[str] = MODEL_DIGEST

    federation: str
    run: str
    round: Annotated[int, Field(ge=1)]
    num_rounds: Annotated[int, Field(ge=1)]
    nonce: Digest
    model: ModelRef
    schema_digest: Digest
    base_files: list[FileRef]
    train: dict[str, Any]
    codec: dict[str, Any]
    error_feedback: Annotated[float, Field(ge=0, le=1)]
    downlink: dict[str, Any]
    merge: dict[str, Any]
    merge_seed: Count
    screen: dict[str, Any]
    search: dict[str, Any]
    outer: dict[str, Any]
    streaming: dict[str, Any]
    min_nodes: Annotated[int, Field(ge=1)]
    sample: list[Digest]
    max_staleness: Count
    steps: dict[Digest, Annotated[int, Field(ge=1)]]
    deadline_s: float
    max_payload_bytes: Size
    publish_after_cosignatures: Count = 0
    visibility: Literal["visible"] = "visible"

    def subject(self) -> dict[str, str]:
        """The model the round starts from."""
        return {"model": self.model.digest}

    def asks(self, node_id: str) -> bool:
        """Whether the round asks this node for a delta."""
        return not self.sample or node_id in self.sample

    def num_steps(self, node_id: str) -> int | None:
        """Return how many steps a node is asked to train for; None where the plan does not say."""
        steps = self.steps.get(node_id, self.train.get("steps"))
        return steps if isinstance(steps, int) else None

    def steps_share(self, node_id: str) -> float:
        """Return which share of the steps in `train` a node is asked for."""
        return self.steps[node_id] / self.train["steps"] if node_id in self.steps else 1.0

    def train_settings(self, node_id: str) -> dict[str, Any]:
        """Return what the plan says to a node's trainer."""
        settings = {key: value for key, value in self.train.items() if key != "trainer"}
        return settings | ({"steps": self.steps[node_id]} if node_id in self.steps else {})

    # Seeds come from what the plan fixes, not from the nonce, so that the same plan and nodes replay to the same bits.

    def train_seed(self, node_id: str) -> int:
        """Return the seed of a node's training in this round."""
        return derive_seed("train", self.merge_seed, self.round, node_id)

    def mask_seed(self, node_id: str) -> int:
        """Return the seed of the mask with which a node's delta travels in this round."""
        return derive_seed("mask", self.merge_seed, self.round, node_id)

    def update_seed(self) -> int:
        """Return the seed with which the round's published update is encoded."""
        return derive_seed("update", self.merge_seed, self.round)

    def search_seed(self) -> int:
        """Return the seed of the round's search for a merge."""
        return derive_seed("search", self.merge_seed, self.round)


class DeltaStatement(Statement):
    """A node's word for its delta: exactly these bytes, made for exactly this round from exactly this base."""

    kind: ClassVar[str] = "delta"
    digest_algorithm: ClassVar[str] = MERKLE_DIGEST

    federation: str
    run: str
    round: Annotated[int, Field(ge=1)]
    spec_digest: Digest
    nonce: Digest
    base_digest: Digest
    schema_digest: Digest
    node_id: Digest
    submission_id: Annotated[str, Field(min_length=8, max_length=64)]
    codec: dict[str, Any]
    payload_bytes: Annotated[int, Field(ge=1, le=1 << 50)]
    payload_root: Digest
    num_examples: Annotated[int, Field(ge=1, le=1 << 50)]
    metrics: dict[str, float]
    software: str

    def subject(self) -> dict[str, str]:
        """The payload, by its Merkle root."""
        return {"payload": self.payload_root}


class Receipt(Statement):
    """The coordinator's word that a delta is stored and counts; `event` is its place in the ledger."""

    kind: ClassVar[str] = "receipt"

    federation: str
    run: str
    round: Annotated[int, Field(ge=1)]
    node_id: Digest
    statement_digest: Digest
    event: Count
    event_hash: Digest

    def subject(self) -> dict[str, str]:
        """The delta statement that was accepted."""
        return {"statement": self.statement_digest}


class Rejection(Statement):
    """The coordinator's word that a delta, which it has whole, can't be decoded as the plan says, and why."""

    kind: ClassVar[str] = "rejection"

    federation: str
    run: str
    round: Annotated[int, Field(ge=1)]
    node_id: Digest
    statement_digest: Digest
    reason: str
    detail: str

    def subject(self) -> dict[str, str]:
        """The delta statement that was refused."""
        return {"statement": self.statement_digest}


class MetricsStatement(Statement):
    """A node's evaluation of a model on its own data: `model` says which one, `digest` exactly which one."""

    kind: ClassVar[str] = "metrics"
    digest_algorithm: ClassVar[str] = MODEL_DIGEST

    federation: str
    run: str
    round: Count
    node_id: Digest
    model: Literal["global", "own", "candidate"]
    digest: Digest
    values: dict[str, float]

    def subject(self) -> dict[str, str]:
        """The model that was evaluated."""
        return {"model": self.digest}


class ProposedMerge(Strict):
    """A candidate: its model version, the update and step that lead to it, and how it is merged (`fedmerge.search`)."""

    digest: Digest
    update: UpdateRef
    step: StepRef | None
    factors: list[float | list[float]]
    params: dict[str, float]


class Candidates(Statement):
    """A generation of candidate merges, out for scoring by `judges`; `factors` are those of `node_ids`, in order."""

    kind: ClassVar[str] = "candidates"
    digest_algorithm: ClassVar[str] = MODEL_DIGEST

    federation: str
    run: str
    round: Annotated[int, Field(ge=1)]
    spec_digest: Digest
    node_ids: list[Digest]
    judges: list[Digest]
    candidates: Annotated[list[ProposedMerge], Field(min_length=1)]

    def subject(self) -> dict[str, str]:
        """The candidate models."""
        return {f"candidate-{number}": each.digest for number, each in enumerate(self.candidates)}


class SearchOutcome(Strict):
    """How a search ended: its generations by statement digest, and the candidates' mean scores over the `panel`.

    The panel are the nodes that scored every candidate. A score is None when it is not finite. `chosen` is the number
    of the candidate that was merged, over all generations.
    """

    proposals: list[Digest]
    panel: list[Digest]
    scores: list[float | None]
    chosen: Count
