"""What is signed about models: how a version was made, what a directory or an export holds."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from fedmerge.events import Digest
from fedmerge.statements.base import MODEL_DIGEST, Count, ModelRef, Size, Statement, Strict
from fedmerge.statements.rounds import SearchOutcome


class LocalInput(Strict):
    """A checkpoint that was merged: its directory's name, its model digest, its weight, which may vary by layer.

    `statistics` is the SHA-256 of a file with statistics of its data, for methods that need them.
    """

    name: str
    digest: Digest
    weight: float | list[float] | dict[str, float | list[float]]
    statistics: Digest | None = None


class Contribution(Strict):
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
    indent: ClassVar[int | None] = 2

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
    """What stands in an export's export.json: its files by digest, and what they are about (`publishing.export`).

    `num_events` is the size of the log in it, `rounds` are those whose receipts, publications and deltas are there. The
    blobs that deltas and updates are in are not among the files: their names are their digests, and merge records, in
    the log, say which there must be.
    """

    kind: ClassVar[str] = "export"
    indent: ClassVar[int | None] = 2

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
    indent: ClassVar[int | None] = 2

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
