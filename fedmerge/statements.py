"""What gets signed: one in-toto statement type for each thing that organisations must be able to hold each other to.

Every statement has the in-toto v1 shape (https://in-toto.io/Statement/v1: subject digests, predicate type, predicate)
and travels in a DSSE envelope under a payload type of its own. Parsing happens after verification, on the
verified bytes, and is strict: unknown keys, missing keys and wrong types are errors.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmerge.errors import BadSignature
from fedmerge.events import Digest
from fedmerge.seeds import derive_seed
from fedmerge.sign import PublicKey, Signed, SigningKey, open_envelope, parse_json_object

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_ROOT = "https://fedmerge.dev"
FORMAT_VERSION = 1

# Names in subjects for digests that are not plain SHA-256 of a file: `tensors.model_digest` and `merkle.merkle_root`.
MODEL_DIGEST = "fedmergeModelV1"
MERKLE_DIGEST = "rfc6962Sha256"

FILE_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}"
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=0, le=1 << 50)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class FileRef(_Strict):
    """A file by content: `root` is the RFC 6962 root of its 1 MiB leaves, `name` a plain file name."""

    name: Annotated[str, Field(pattern=rf"^{FILE_NAME}$")]
    root: Digest
    num_bytes: Size


class UpdateRef(_Strict):
    """One round's published update: what to add to the model, and the codec and seed to decode it with."""

    round: Count
    root: Digest
    num_bytes: Size
    codec: dict[str, Any]
    seed: str


class StepRef(_Strict):
    """A published way from one model version to another: a step file (`fedmerge.steps`) from `before` to `after`.

    `round` is that of `after`. One whose `before` is the base is a snapshot, for newcomers.
    """

    round: Count
    before: Digest
    after: Digest
    root: Digest
    num_bytes: Size


class ModelRef(_Strict):
    """A model version: the base plus the updates of each published round, which must come to `digest`.

    `steps` are other ways to it, and to the versions on the way, without loss and often in fewer bytes.
    """

    digest: Digest
    base_digest: Digest
    updates: list[UpdateRef]
    steps: list[StepRef] = []


class LocalInput(_Strict):
    """A checkpoint that was merged: its directory's name, its model digest, its weight, which may vary by layer.

    `statistics` is the SHA-256 of a file with statistics of its data, for methods that need them.
    """

    name: str
    digest: Digest
    weight: float | list[float] | dict[str, float | list[float]]
    statistics: Digest | None = None


class Statement(_Strict, ABC):
    """Base of all statements; a subclass is the predicate, and knows its subject."""

    kind: ClassVar[str]
    digest_algorithm: ClassVar[str] = "sha256"

    @abstractmethod
    def subject(self) -> dict[str, str]:
        """Return the digests this statement is about, by name."""

    @classmethod
    def payload_type(cls) -> str:
        """The DSSE payload type, which separates the kinds of statement from each other."""
        return f"application/vnd.fedmerge.{cls.kind}.v{FORMAT_VERSION}+json"

    def to_payload(self) -> bytes:
        """Return the JSON bytes to sign."""
        body = {
            "_type": STATEMENT_TYPE,
            "subject": [
                {"name": name, "digest": {self.digest_algorithm: digest}} for name, digest in self.subject().items()
            ],
            "predicateType": f"{PREDICATE_ROOT}/{self.kind}/v{FORMAT_VERSION}",
            "predicate": self.model_dump(mode="json"),
        }
        return json.dumps(body, indent=2).encode()

    @classmethod
    def from_payload(cls, payload: bytes, *, where: str) -> Self:
        """Parse verified bytes; raise `BadSignature` when they are not a statement of this kind."""
        statement = _parse(cls, payload, where)
        assert isinstance(statement, cls)
        return statement

    def sign(self, key: SigningKey) -> bytes:
        """Return the signed envelope."""
        return key.sign(self.payload_type(), self.to_payload())

    @classmethod
    def open(cls, envelope: bytes, trusted: Mapping[str, PublicKey], *, where: str) -> tuple[Self, Signed]:
        """Verify an envelope, then parse it. Raises `UntrustedKey` or `BadSignature`."""
        signed = open_envelope(envelope, cls.payload_type(), trusted, where=where)
        return cls.from_payload(signed.payload, where=where), signed


@lru_cache(maxsize=32)  # as `fedmerge.sign` remembers what it has verified; statements are frozen
def _parse(cls: type[Statement], payload: bytes, where: str) -> Statement:
    body = parse_json_object(payload, where=where)
    try:
        statement = cls.model_validate_json(json.dumps(body["predicate"]))
    except (KeyError, ValidationError) as err:
        raise BadSignature(f"{where}: not a valid {cls.kind} statement ({_first_problem(err)})") from err
    if json.loads(statement.to_payload()) != body:
        raise BadSignature(f"{where}: the {cls.kind} statement's subject or type does not match its predicate")
    return statement


def _first_problem(err: KeyError | ValidationError) -> str:
    if isinstance(err, KeyError):
        return f"no {err.args[0]}"
    first = err.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


class RoundSpec(Statement):
    """What the coordinator promises and asks in a round; a node's delta is bound to its digest.

    `sample` are the nodes that are asked, sorted; when it is empty, every node that the coordinator trusts is. A delta
    that comes too late for the round counts in a later merge, up to `max_staleness` rounds on. `steps` are those of the
    nodes that are asked for another number of them than `train` says. With `streaming` a part of the model travels
    (`fedmerge.streaming`).
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


class ProposedMerge(_Strict):
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


class SearchOutcome(_Strict):
    """How a search ended: its generations by statement digest, and the candidates' mean scores over the `panel`.

    The panel are the nodes that scored every candidate. A score is None when it is not finite. `chosen` is the number
    of the candidate that was merged, over all generations.
    """

    proposals: list[Digest]
    panel: list[Digest]
    scores: list[float | None]
    chosen: Count


class SessionProof(Statement):
    """A node's answer to a coordinator's nonce; names the coordinator, so that it is worth nothing elsewhere."""

    kind: ClassVar[str] = "session"

    coordinator_key: Digest
    nonce: Digest

    def subject(self) -> dict[str, str]:
        """The nonce."""
        return {"nonce": self.nonce}


class EnrolmentRequest(Statement):
    """A newcomer's proof that it holds a key; `nonce` is the coordinator's, `token` the SHA-256 of a join token."""

    kind: ClassVar[str] = "enrolmentrequest"

    coordinator_key: Digest
    nonce: Digest
    token: Digest
    node_id: Digest

    def subject(self) -> dict[str, str]:
        """The key, by its id."""
        return {"key": self.node_id}


class Enrolment(Statement):
    """The coordinator's word for whose key `key` (PEM) is."""

    kind: ClassVar[str] = "enrolment"

    federation: str
    run: str
    name: str
    organisation: str
    role: Literal["node", "auditor"]
    node_id: Digest
    key: str

    def subject(self) -> dict[str, str]:
        """The key, by its id."""
        return {"key": self.node_id}


class Revocation(Statement):
    """The coordinator's word that a key is trusted no more; its deltas are in the models of `rounds`."""

    kind: ClassVar[str] = "revocation"

    federation: str
    run: str
    name: str
    organisation: str
    node_id: Digest
    reason: str
    rounds: list[Count]

    def subject(self) -> dict[str, str]:
        """The key, by its id."""
        return {"key": self.node_id}


class KeyRotation(Statement):
    """A node's word that `new_key` (PEM) takes its key's place at one coordinator; signed by the old and by the new."""

    kind: ClassVar[str] = "keyrotation"

    coordinator_key: Digest
    old_key: Digest
    new_key: str

    def subject(self) -> dict[str, str]:
        """The key that is given up."""
        return {"key": self.old_key}


class Contribution(_Strict):
    """What became of one node's delta: its screening verdict and, by digest, what it signed.

    `staleness` is how many rounds before the merge's the delta was made for; `scale` has the discount for it. `weight`
    is a list where a search found one for each part of the model's depth. Where a delta was refused, `value` is the
    number that the `reason` is about and `limit` what it was held against; `gain` is what the coordinator measured that
    the delta adds to the model's score, None where it did not or there was none.
    """

    node_id: Digest
    organisation: str
    statement_digest: Digest
    payload_root: Digest
    payload_bytes: Size
    num_examples: Count
    staleness: Count
    accepted: bool
    reason: str
    value: float | None
    limit: float | None
    norm: float | None
    gain: float | None
    weight: float | list[float]
    scale: float


class MergeRecord(Statement):
    """How a model version came about: inputs by digest, recipe, seeds, software. Enough to do it again, bit for bit.

    `clip_norm` is the norm that longer deltas were clipped to, None where none were.
    """

    kind: ClassVar[str] = "mergerecord"
    digest_algorithm: ClassVar[str] = MODEL_DIGEST

    federation: str
    run: str
    round: Annotated[int, Field(ge=1)]
    spec_digest: Digest
    before: ModelRef
    model: ModelRef
    schema_digest: Digest
    contributions: list[Contribution]
    clip_norm: float | None
    merge: dict[str, Any]
    merge_seed: Count
    outer: dict[str, Any]
    outer_state_root: Digest | None
    search: SearchOutcome | None
    ledger_head: Digest
    software: dict[str, str]

    def subject(self) -> dict[str, str]:
        """The new model version."""
        return {"model": self.model.digest}


class Rollback(Statement):
    """The coordinator's word that what followed `to_round` is not built upon: the next round starts from its version.

    `round` is the one it was decided in; `to_round` 0 is the base model.
    """

    kind: ClassVar[str] = "rollback"
    digest_algorithm: ClassVar[str] = MODEL_DIGEST

    federation: str
    run: str
    round: Count
    to_round: Count
    version: Digest
    reason: str

    def subject(self) -> dict[str, str]:
        """The version that counts again."""
        return {"model": self.version}


class Lineage(Statement):
    """What stands in a published directory as lineage.json: its files by digest, and the merge records behind it."""

    kind: ClassVar[str] = "lineage"

    federation: str
    run: str
    files: dict[str, Digest]
    model: ModelRef
    node_keys: dict[str, str]
    software: dict[str, str]

    def subject(self) -> dict[str, str]:
        """Every published file, by SHA-256."""
        return dict(sorted(self.files.items()))


class Export(Statement):
    """What stands in an export's export.json: its files by digest, and what they are about (`fedmerge.export`).

    `num_events` is the size of the log in it, `rounds` are those whose receipts, publications and deltas are there. The
    blobs that deltas and updates are in are not among the files: their names are their digests, and merge records, in
    the log, say which there must be.
    """

    kind: ClassVar[str] = "export"

    federation: str
    run: str
    base_digest: Digest
    num_events: Count
    rounds: list[Count]
    with_deltas: bool
    files: dict[str, Digest]
    software: dict[str, str]

    def subject(self) -> dict[str, str]:
        """Every file of the export, by SHA-256."""
        return dict(sorted(self.files.items()))


class LocalMerge(Statement):
    """What stands in the lineage.json of a directory that was merged from local checkpoints, without a federation."""

    kind: ClassVar[str] = "localmerge"

    files: dict[str, Digest]
    model_digest: Digest
    base_digest: Digest
    inputs: list[LocalInput]
    merge: dict[str, Any]
    merge_seed: Count
    software: dict[str, str]

    def subject(self) -> dict[str, str]:
        """Every file of the directory, by SHA-256."""
        return dict(sorted(self.files.items()))


def digest_of(payload: bytes) -> str:
    """Return the SHA-256 (hex) by which a signed payload is named."""
    return hashlib.sha256(payload).hexdigest()
