"""Statements: what is signed comes back whole, and nothing else does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.errors import BadSignature
from fedmerge.statements import DeltaStatement, MetricsStatement, Receipt, digest_of
from fedmerge.trust.sign import SigningKey

KEY = SigningKey.generate()
TRUSTED = {KEY.public.key_id: KEY.public}

digests = st.text("0123456789abcdef", min_size=64, max_size=64)
small_json = st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=8) | st.booleans(), max_size=4)
statements = st.builds(
    DeltaStatement,
    federation=st.text(max_size=20),
    run=st.text(max_size=20),
    round=st.integers(1, 1000),
    spec_digest=digests,
    nonce=digests,
    base_digest=digests,
    schema_digest=digests,
    node_id=digests,
    submission_id=st.text("abcdef", min_size=8, max_size=64),
    codec=small_json,
    payload_bytes=st.integers(1, 1 << 50),
    payload_root=digests,
    num_examples=st.integers(1, 1 << 50),
    metrics=st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    software=st.text(max_size=20),
)


@given(statements)
def test_a_statement_survives_signing_and_opening(statement: DeltaStatement) -> None:
    opened, signed = DeltaStatement.open(statement.sign(KEY), TRUSTED, where="test")
    assert opened == statement
    assert digest_of(signed.payload) == digest_of(statement.to_payload())


@given(statements)
def test_a_statement_has_the_in_toto_shape(statement: DeltaStatement) -> None:
    body = json.loads(statement.to_payload())
    assert body["_type"] == "https://in-toto.io/Statement/v1"
    assert body["subject"] == [{"name": "payload", "digest": {"rfc6962Sha256": statement.payload_root}}]
    assert body["predicateType"].endswith("/delta/v1")
    assert set(body) == {"_type", "subject", "predicateType", "predicate"}


EXAMPLE: dict[str, Any] = {
    "federation": "f",
    "run": "r",
    "round": 1,
    "node_id": "a" * 64,
    "statement_digest": "b" * 64,
    "event": 3,
    "event_hash": "c" * 64,
}

CHANGES: dict[str, Any] = {
    "a number as text": lambda body: body["predicate"].update(round="1"),
    "round 0": lambda body: body["predicate"].update(round=0),
    "a short digest": lambda body: body["predicate"].update(node_id="abc"),
    "an unknown key": lambda body: body["predicate"].update(more=1),
    "a missing key": lambda body: body["predicate"].pop("event"),
    "another subject": lambda body: body["subject"][0]["digest"].update(sha256="d" * 64),
    "another predicate type": lambda body: body.update(predicateType="https://fedmerge.dev/delta/v1"),
    "no predicate": lambda body: body.pop("predicate"),
    "an unknown version": lambda body: body.update(_type="https://in-toto.io/Statement/v2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_signed_statement_that_is_not_well_formed_is_refused(change: str) -> None:
    body = json.loads(Receipt(**EXAMPLE).to_payload())
    CHANGES[change](body)
    envelope = KEY.sign(Receipt.payload_type(), json.dumps(body).encode())
    with pytest.raises(BadSignature):
        Receipt.open(envelope, TRUSTED, where="receipt")


def test_kinds_do_not_mix() -> None:
    with pytest.raises(BadSignature):
        MetricsStatement.open(Receipt(**EXAMPLE).sign(KEY), TRUSTED, where="metrics")


@pytest.mark.parametrize("payload", [b"[]", b"1", b"not json", b"[" * 100_000, b""])
def test_a_signed_payload_that_is_no_object_is_refused(payload: bytes) -> None:
    with pytest.raises(BadSignature):
        Receipt.open(KEY.sign(Receipt.payload_type(), payload), TRUSTED, where="receipt")
