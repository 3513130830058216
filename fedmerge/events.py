"""The closed set of facts. The ledger is a list of these; everything else about a federation is derived from it.

Events are committed before their effects are visible. Each is a frozen, strictly validated record, stored as JSON;
envelopes are kept as the text that travelled, so that an auditor verifies what was signed.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Digest: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class FederationCreated(_Event):
    """The ledger begins: one base model, one coordinator key, one run id that no other ledger has."""

    kind: Literal["federation_created"] = "federation_created"
    federation: str
    run: str
    base_digest: Digest
    schema_digest: Digest
    coordinator_key: str


class RoundOpened(_Event):
    """A signed round spec is out and deltas are taken, of the nodes of a `sample` if there is one.

    Made for this round, they count up to `max_staleness` rounds later.
    """

    kind: Literal["round_opened"] = "round_opened"
    round: int
    spec_digest: Digest
    spec_envelope: str
    sample: list[Digest] = []
    max_staleness: int = 0


class DeltaAccepted(_Event):
    """A node's delta is stored durably and will be merged: in the round it was made for or, when late, in the next."""

    kind: Literal["delta_accepted"] = "delta_accepted"
    round: int
    node_id: Digest
    node_key: str
    statement_digest: Digest
    payload_root: Digest
    payload_bytes: int
    num_examples: int
    statement_envelope: str


class DeltaRejected(_Event):
    """A delta was uploaded whole and refused when it was decoded; the envelope says so, signed."""

    kind: Literal["delta_rejected"] = "delta_rejected"
    round: int
    node_id: Digest
    statement_digest: Digest
    reason: str
    detail: str
    envelope: str


class RoundSealed(_Event):
    """The set of deltas is frozen: node ids, sorted, so that a merge can't depend on who arrived first.

    `carried` are late deltas of earlier rounds that are merged with them, by statement digest, sorted. `closed_by`,
    `quorum` and `grace_s` say why then, and what it took; `grace_s` may have been measured.
    """

    kind: Literal["round_sealed"] = "round_sealed"
    round: int
    node_ids: list[Digest]
    carried: list[Digest] = []
    closed_by: Literal["everyone", "grace", "deadline", "buffer", "operator"]
    quorum: int
    grace_s: float


class DeltaVerdict(_Event):
    """What screening says of one delta of a sealed round: see `fedmerge.screening.verdicts.Verdict`."""

    node_id: Digest
    statement_digest: Digest
    accepted: bool
    reason: str
    detail: str
    value: float | None
    limit: float | None
    gain: float | None


class DeltasScreened(_Event):
    """A sealed round's deltas were screened: which count, which do not and why, each with its number and limit."""

    kind: Literal["deltas_screened"] = "deltas_screened"
    round: int
    verdicts: list[DeltaVerdict]


class CandidatesProposed(_Event):
    """A generation of candidate merges is stored and out for scoring by `judges`; `num_bytes` is what each fetches."""

    kind: Literal["candidates_proposed"] = "candidates_proposed"
    round: int
    digests: list[Digest]
    judges: list[Digest]
    roots: list[Digest]
    num_bytes: int
    proposal_envelope: str


class CandidatesScored(_Event):
    """A generation's scores are closed: what a node reports from here on does not count."""

    kind: Literal["candidates_scored"] = "candidates_scored"
    round: int


class MergeStarted(_Event):
    """Screening and merging began. A coordinator that finds this as the last event merges again, to the same bytes."""

    kind: Literal["merge_started"] = "merge_started"
    round: int


class MergeFinished(_Event):
    """The round's update and steps are stored, and the merge record that says how they came about is signed."""

    kind: Literal["merge_finished"] = "merge_finished"
    round: int
    version: Digest
    update_root: Digest
    step_roots: list[Digest] = []
    record_envelope: str


class RoundPublished(_Event):
    """The model directory is complete and in place."""

    kind: Literal["round_published"] = "round_published"
    round: int
    version: Digest


class RoundFailed(_Event):
    """The round ended without a model."""

    kind: Literal["round_failed"] = "round_failed"
    round: int
    reason: str


class RoundsPaused(_Event):
    """The operator has no round open or close for a while."""

    kind: Literal["rounds_paused"] = "rounds_paused"
    reason: str


class RoundsResumed(_Event):
    """The operator ends a pause."""

    kind: Literal["rounds_resumed"] = "rounds_resumed"
    reason: str


class RoundCutShort(_Event):
    """The operator has the open round sealed with the deltas that it has."""

    kind: Literal["round_cut_short"] = "round_cut_short"
    round: int
    reason: str


class DeadlineExtended(_Event):
    """The operator moves the open round's deadline."""

    kind: Literal["deadline_extended"] = "deadline_extended"
    round: int
    extra_s: Annotated[float, Field(allow_inf_nan=False)]
    reason: str


class RetryOrdered(_Event):
    """A round that failed is to be opened again."""

    kind: Literal["retry_ordered"] = "retry_ordered"
    round: int
    reason: str


class RolledBack(_Event):
    """The next round starts from the version of `to_round`, which is 0 for the base; the envelope says so, signed."""

    kind: Literal["rolled_back"] = "rolled_back"
    round: int
    to_round: int
    version: Digest
    reason: str
    envelope: str


class MetricsReported(_Event):
    """A node's signed evaluation of a model on its own data; `candidate` is its digest if it is only a candidate."""

    kind: Literal["metrics_reported"] = "metrics_reported"
    round: int
    node_id: Digest
    candidate: Digest | None = None
    envelope: str


class MemberAdmitted(_Event):
    """A key is trusted from here on; `envelope` is the coordinator's word for whose it is."""

    kind: Literal["member_admitted"] = "member_admitted"
    node_id: Digest
    name: str
    organisation: str
    role: Literal["node", "auditor"] = "node"
    envelope: str


class MemberRevoked(_Event):
    """A key is trusted no more, and what it delivered to a round that is not being merged yet does not count."""

    kind: Literal["member_revoked"] = "member_revoked"
    node_id: Digest
    envelope: str


class CheckpointCosigned(_Event):
    """A member found that the log of `size` events continues what it knew, and has its receipts, and cosigned it."""

    kind: Literal["checkpoint_cosigned"] = "checkpoint_cosigned"
    node_id: Digest
    size: int
    note: str
    cosignature: str


class KeyRotated(_Event):
    """A node replaced its key by another one; `envelope` is its old key's word for it."""

    kind: Literal["key_rotated"] = "key_rotated"
    node_id: Digest
    new_node_id: Digest
    envelope: str


class HandedOver(_Event):
    """The coordinator has another key from here on; `handover` is signed by both (`fedmerge.statements.handover`)."""

    kind: Literal["handed_over"] = "handed_over"
    handover: str


Event: TypeAlias = (
    FederationCreated
    | RoundOpened
    | DeltaAccepted
    | DeltaRejected
    | RoundSealed
    | DeltasScreened
    | CandidatesProposed
    | CandidatesScored
    | MergeStarted
    | MergeFinished
    | RoundPublished
    | RoundFailed
    | RoundsPaused
    | RoundsResumed
    | RoundCutShort
    | DeadlineExtended
    | RetryOrdered
    | RolledBack
    | MetricsReported
    | MemberAdmitted
    | MemberRevoked
    | KeyRotated
    | HandedOver
    | CheckpointCosigned
)

_adapter: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


def to_json(event: Event) -> bytes:
    """Return the event as the JSON that the ledger stores and chains."""
    return event.model_dump_json().encode()


def from_json(body: bytes) -> Event:
    """Parse a stored event; raise `pydantic.ValidationError` when it is not one."""
    return _adapter.validate_json(body)
