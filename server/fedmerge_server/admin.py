"""The operator's commands, over a Unix socket in the state folder: the coordinator's end and the command line's.

The socket is readable and writable by the coordinator's user alone, and that is all the authentication there is.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_status import rpc_status

from fedmerge.coordinator.operator import Operator
from fedmerge.errors import ResourceError, Unreachable
from fedmerge.v1 import admin_pb2, admin_pb2_grpc
from fedmerge.wire import error_of
from fedmerge_server.service import Context, answering

SOCKET = "admin.sock"
CALL_TIMEOUT_S = 30.0
# What a Unix socket's address holds: 108 bytes with the last one zero, and less on some systems.
MAX_PATH_BYTES = 100


class Admin(admin_pb2_grpc.AdminServiceServicer):
    """The service, for one operator."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator

    async def PauseRounds(  # noqa: N802 - named by the protocol
        self, request: admin_pb2.PauseRoundsRequest, context: Context
    ) -> admin_pb2.PauseRoundsResponse:
        """Pause."""
        return admin_pb2.PauseRoundsResponse(round=await _do(context, self._operator.pause, request.reason))

    async def ResumeRounds(  # noqa: N802
        self, request: admin_pb2.ResumeRoundsRequest, context: Context
    ) -> admin_pb2.ResumeRoundsResponse:
        """Go on."""
        return admin_pb2.ResumeRoundsResponse(round=await _do(context, self._operator.resume, request.reason))

    async def CloseRound(  # noqa: N802
        self, request: admin_pb2.CloseRoundRequest, context: Context
    ) -> admin_pb2.CloseRoundResponse:
        """Seal the open round."""
        return admin_pb2.CloseRoundResponse(round=await _do(context, self._operator.close, request.reason))

    async def ExtendRound(  # noqa: N802
        self, request: admin_pb2.ExtendRoundRequest, context: Context
    ) -> admin_pb2.ExtendRoundResponse:
        """Move the deadline."""
        done = await _do(context, self._operator.extend, request.extra_s, request.reason)
        return admin_pb2.ExtendRoundResponse(round=done)

    async def RetryRound(  # noqa: N802
        self, request: admin_pb2.RetryRoundRequest, context: Context
    ) -> admin_pb2.RetryRoundResponse:
        """Open a failed round again."""
        return admin_pb2.RetryRoundResponse(round=await _do(context, self._operator.retry, request.reason))

    async def RollBack(  # noqa: N802
        self, request: admin_pb2.RollBackRequest, context: Context
    ) -> admin_pb2.RollBackResponse:
        """Go back to an earlier version."""
        done = await _do(context, self._operator.roll_back, request.to_round, request.reason)
        return admin_pb2.RollBackResponse(round=done)


async def _do(context: Context, command: Callable[..., int], *arguments: object) -> int:
    async with answering(context):
        return await asyncio.to_thread(command, *arguments)
    raise AssertionError  # the block ends the call when it does not return


def open_admin(operator: Operator, state_dir: Path) -> grpc.aio.Server:
    """Return a server on the state folder's socket, to be started. Raises `ResourceError` when there can't be one."""
    server = grpc.aio.server()
    admin_pb2_grpc.add_AdminServiceServicer_to_server(Admin(operator), server)
    path = state_dir / SOCKET
    before = os.umask(0o177)  # from its first moment nobody else may open it
    try:
        with _address(path) as address:
            server.add_insecure_port(address)
    except RuntimeError as err:
        raise ResourceError(f"{path}: can't listen there", hint="is it on a file system that has sockets?") from err
    finally:
        os.umask(before)
    return server


class Commands:
    """The operator's commands, as `coordinator.operator.Operator` has them, to a coordinator in another process."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = admin_pb2_grpc.AdminServiceStub(channel)

    def pause(self, reason: str) -> int:
        """Open and close no rounds until `resume`."""
        return self._stub.PauseRounds(admin_pb2.PauseRoundsRequest(reason=reason), timeout=CALL_TIMEOUT_S).round

    def resume(self, reason: str) -> int:
        """End a pause."""
        return self._stub.ResumeRounds(admin_pb2.ResumeRoundsRequest(reason=reason), timeout=CALL_TIMEOUT_S).round

    def close(self, reason: str) -> int:
        """Seal the open round now."""
        return self._stub.CloseRound(admin_pb2.CloseRoundRequest(reason=reason), timeout=CALL_TIMEOUT_S).round

    def extend(self, extra_s: float, reason: str) -> int:
        """Move the open round's deadline."""
        request = admin_pb2.ExtendRoundRequest(extra_s=extra_s, reason=reason)
        return self._stub.ExtendRound(request, timeout=CALL_TIMEOUT_S).round

    def retry(self, reason: str) -> int:
        """Open a round that failed once more."""
        return self._stub.RetryRound(admin_pb2.RetryRoundRequest(reason=reason), timeout=CALL_TIMEOUT_S).round

    def roll_back(self, to_round: int, reason: str) -> int:
        """Start the next round from an earlier version."""
        request = admin_pb2.RollBackRequest(to_round=to_round, reason=reason)
        return self._stub.RollBack(request, timeout=CALL_TIMEOUT_S).round


@contextmanager
def commanding(state_dir: Path) -> Iterator[Commands]:
    """Connect to the coordinator that runs on a state folder.

    Raises `Unreachable` when none does, and what it answers.
    """
    path = state_dir / SOCKET
    missing = Unreachable(f"no coordinator is running on {state_dir}", hint="start it: fedmerge serve")
    if not path.exists():
        raise missing
    with _address(path) as address, grpc.insecure_channel(address) as channel:
        try:
            yield Commands(channel)
        except grpc.RpcError as err:
            status = rpc_status.from_call(err)
            raise (error_of(status) if status is not None else missing) from None


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """Give gRPC's name for a socket. Where the path is too long for one, it goes by the folder's descriptor."""
    if len(os.fsencode(path)) <= MAX_PATH_BYTES:
        yield f"unix:{path}"
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"unix:/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
