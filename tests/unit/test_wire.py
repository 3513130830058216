"""Errors that cross the wire: the class that was raised is the class that is caught."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.errors import BY_REASON, FedmergeError, Unreachable
from fedmerge.rounds.state import Phase
from fedmerge.v1 import delta_pb2
from fedmerge.wire import PHASE_NAMES, PHASES, UPLOADED, Chunk, error_of, status_of

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


# Fields of an UploadDeltaRequest by number, and others that it does not have, each encoded by protobuf's library.
FIELDS = st.one_of(
    st.builds(lambda text: delta_pb2.UploadDeltaRequest(upload_id=text), st.text(max_size=200)),
    st.builds(lambda number: delta_pb2.UploadDeltaRequest(offset=number), st.integers(-(2**63), 2**63 - 1)),
    st.builds(lambda data: delta_pb2.UploadDeltaRequest(data=data), st.binary(max_size=300)),
    st.builds(lambda text: status_pb2.Status(code=3, message=text), st.text(max_size=5)),
).map(lambda message: message.SerializeToString())


@given(st.text(max_size=100), st.integers(0, 2**63 - 1), st.binary(max_size=20_000))
def test_a_chunk_is_written_as_protobuf_reads_it(upload_id: str, offset: int, data: bytes) -> None:
    sent = UPLOADED.to_bytes(Chunk(delta_pb2.UploadDeltaRequest(upload_id=upload_id, offset=offset), data))
    expected = delta_pb2.UploadDeltaRequest(upload_id=upload_id, offset=offset, data=data)
    assert delta_pb2.UploadDeltaRequest.FromString(sent) == expected


def cut_off(message: bytes, keep: int) -> bytes:
    return message[:keep]


@given(
    st.lists(FIELDS, max_size=6).map(b"".join)
    | st.binary(max_size=40)
    | st.builds(cut_off, st.lists(FIELDS, min_size=1, max_size=3).map(b"".join), st.integers(0, 330))
)
def test_a_chunk_is_read_as_protobuf_reads_it(encoded: bytes) -> None:
    try:
        expected = delta_pb2.UploadDeltaRequest.FromString(encoded)
    except DecodeError:
        with pytest.raises(DecodeError):
            UPLOADED.from_bytes(encoded)
        return
    head, data = UPLOADED.from_bytes(encoded)
    assert (head.upload_id, head.offset, bytes(data)) == (expected.upload_id, expected.offset, expected.data)
