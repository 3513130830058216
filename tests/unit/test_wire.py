"""Errors that cross the wire: the class that was raised is the class that is caught."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.errors import BY_REASON, FedmergeError, Unreachable
from fedmerge.rounds import Phase
from fedmerge.wire import PHASE_NAMES, PHASES, error_of, status_of

CODES = {code.value[0] for code in grpc.StatusCode}


@given(st.sampled_from(sorted(BY_REASON)), st.text(max_size=100), st.none() | st.text(min_size=1, max_size=100))
def test_every_error_arrives_as_what_it_was(reason: str, message: str, hint: str | None) -> None:
    sent = BY_REASON[reason](message, hint=hint)
    status = status_pb2.Status.FromString(status_of(sent).SerializeToString())
    received = error_of(status)
    assert type(received) is type(sent)
    assert (received.message, received.hint) == (message, hint)
    assert status.code in CODES - {0}


@pytest.mark.parametrize("err", [ValueError("secret"), KeyError("secret"), RuntimeError("secret")])
def test_an_unexpected_exception_travels_without_its_text(err: Exception) -> None:
    assert b"secret" not in status_of(err).SerializeToString()


@given(st.integers(1, 16), st.text(max_size=50))
def test_a_status_that_is_not_ours_is_still_an_error(code: int, message: str) -> None:
    received = error_of(status_pb2.Status(code=code, message=message))
    assert isinstance(received, FedmergeError)
    assert isinstance(received, Unreachable) == (code in {4, 14})


def test_every_phase_has_a_number_of_its_own() -> None:
    assert set(PHASES) == {str(phase) for phase in Phase}
    assert {PHASE_NAMES[number] for number in PHASES.values()} == set(PHASES)
