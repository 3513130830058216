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
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmerge.errors import BadSignature
from fedmerge.events import Digest
from fedmerge.trust.sign import PublicKey, Signed, SigningKey, open_envelope, parse_json_object

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_ROOT = "https://fedmerge.dev"
FORMAT_VERSION = 1

# Names in subjects for digests that are not plain SHA-256 of a file: `tensors.model_digest` and `merkle.merkle_root`.
MODEL_DIGEST = "fedmergeModelV1"
MERKLE_DIGEST = "rfc6962Sha256"

FILE_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}"
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=0, le=1 << 50)]


class Strict(BaseModel):
    """What a statement is made of: unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class FileRef(Strict):
    """A file by content: `root` is the RFC 6962 root of its 1 MiB leaves, `name` a plain file name."""

    name: Annotated[str, Field(pattern=rf"^{FILE_NAME}$")]
    root: Digest
    num_bytes: Size


class UpdateRef(Strict):
    """One round's published update: what to add to the model, and the codec and seed to decode it with."""

    round: Count
    root: Digest
    num_bytes: Size
    codec: dict[str, Any]
    seed: str


class StepRef(Strict):
    """A published way from one model version to another: a step file (`models.steps`) from `before` to `after`.

    `round` is that of `after`. One whose `before` is the base is a snapshot, for newcomers.
    """

    round: Count
    before: Digest
    after: Digest
    root: Digest
    num_bytes: Size


class ModelRef(Strict):
    """A model version: the base plus the updates of each published round, which must come to `digest`.

    `steps` are other ways to it, and to the versions on the way, without loss and often in fewer bytes.
    """

    digest: Digest
    base_digest: Digest
    updates: list[UpdateRef]
    steps: list[StepRef] = []


class Statement(Strict, ABC):
    """Base of all statements; a subclass is the predicate, and knows its subject."""

    kind: ClassVar[str]
    digest_algorithm: ClassVar[str] = "sha256"
    # Of those that also lie in a folder without their envelope, for people to read.
    indent: ClassVar[int | None] = None

    @abstractmethod
    def subject(self) -> dict[str, str]:
        """Return the digests this statement is about, by name."""

    @classmethod
    def payload_type(cls) -> str:
        """The DSSE payload type, which separates the kinds of statement from each other."""
        return f"application/vnd.fedmerge.{cls.kind}.v{FORMAT_VERSION}+json"

    def to_payload(self) -> bytes:
        """Return the JSON bytes to sign."""
        separators = (",", ":") if self.indent is None else None
        return json.dumps(self._body(), indent=self.indent, separators=separators).encode()

    def _body(self) -> dict[str, Any]:
        return {
            "_type": STATEMENT_TYPE,
            "subject": [
                {"name": name, "digest": {self.digest_algorithm: digest}} for name, digest in self.subject().items()
            ],
            "predicateType": f"{PREDICATE_ROOT}/{self.kind}/v{FORMAT_VERSION}",
            "predicate": self.model_dump(mode="json"),
        }

    @classmethod
    def from_payload(cls, payload: bytes, *, where: str) -> Self:
        """Parse verified bytes; raise `BadSignature` when they are not a statement of this kind."""
        try:
            statement = _parse(cls, payload)
        except BadSignature as err:
            raise BadSignature(f"{where}: {err.message}") from err
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


@lru_cache(maxsize=32)  # as `fedmerge.trust.sign` remembers what it has verified; statements are frozen
def _parse(cls: type[Statement], payload: bytes) -> Statement:
    body = parse_json_object(payload, where=cls.kind)
    try:
        statement = cls.model_validate_json(json.dumps(body["predicate"]))
    except (KeyError, ValidationError) as err:
        raise BadSignature(f"not a valid {cls.kind} statement ({_first_problem(err)})") from err
    if statement._body() != body:
        raise BadSignature(f"the {cls.kind} statement's subject or type does not match its predicate")
    return statement


def _first_problem(err: KeyError | ValidationError) -> str:
    if isinstance(err, KeyError):
        return f"no {err.args[0]}"
    first = err.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


@lru_cache(maxsize=32)
def digest_of(payload: bytes) -> str:
    """Return the SHA-256 (hex) by which a signed payload is named."""
    return hashlib.sha256(payload).hexdigest()
