"""Step 7, admit: is this statement for this round, from this node, about this base, within the limits?

Everything is decided from the signed statement before a byte of the payload is taken.
"""

from __future__ import annotations

from fedmerge.errors import BadSignature, InvalidDelta, NotAsked, QuotaExceeded, RoundClosed, StaleBase, UnknownRound
from fedmerge.statements import DeltaStatement, RoundSpec


def admit(statement: DeltaStatement, spec: RoundSpec, spec_digest: str, *, caller_id: str, is_open: bool) -> None:
    """Raise unless the statement may be uploaded to the round that `spec` describes.

    `caller_id` is the key id of the authenticated caller. Raises `BadSignature` when somebody else signed,
    `UnknownRound`, `RoundClosed`, `NotAsked`, `StaleBase`, `InvalidDelta` or `QuotaExceeded`.
    """
    if statement.node_id != caller_id:
        raise BadSignature(f"the delta says it is from {statement.node_id[:12]}, but {caller_id[:12]} sends it")
    if (statement.federation, statement.run) != (spec.federation, spec.run):
        raise StaleBase(
            f"the delta is for federation {statement.federation!r}, run {statement.run[:12]}; "
            f"this is {spec.federation!r}, run {spec.run[:12]}"
        )
    if statement.round > spec.round:
        raise UnknownRound(f"there is no round {statement.round} yet; the current one is {spec.round}")
    if statement.round < spec.round or not is_open:
        raise RoundClosed(f"round {statement.round} takes no more deltas", hint="wait for the next round")
    if not spec.asks(caller_id):
        raise NotAsked(f"round {spec.round} asks other nodes", hint="wait for the next round")
    # The nonce separates a round from a retry of the same round; the digest covers all that was promised for it.
    for name, found, expected in (
        ("round spec", statement.spec_digest, spec_digest),
        ("round nonce", statement.nonce, spec.nonce),
        ("base model", statement.base_digest, spec.model.digest),
        ("schema", statement.schema_digest, spec.schema_digest),
    ):
        if found != expected:
            raise StaleBase(
                f"the delta's {name} is {found[:12]}, this round's is {expected[:12]}",
                hint="fetch the current round and train from its model",
            )
    if statement.codec != spec.codec:
        raise InvalidDelta("the delta is encoded with another codec than the round asks for")
    if statement.payload_bytes > spec.max_payload_bytes:
        raise QuotaExceeded(
            f"the delta has {statement.payload_bytes} bytes; this federation takes at most {spec.max_payload_bytes}",
            hint="the operator can raise server.max_payload_bytes",
        )
