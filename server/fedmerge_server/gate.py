"""The gate before the services: while it is shut, every call is answered UNAVAILABLE, and when to come again.

A port is open before its coordinator leads, so that nodes hear from a standby at once; and in a drain it stays open for
the calls that are under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import grpc

from fedmerge.errors import Unreachable
from fedmerge.wire import STATUS_DETAILS_HEADER, status_of

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Gate(grpc.GenericRpcHandler):
    """Stands for the services added to it, as a server would: pass it to `add_..._to_server`."""

    def __init__(self, why_shut: str, retry_s: float) -> None:
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._answer: Handler | None = None
        self.shut(why_shut, retry_s)

    def open(self) -> None:
        """Let calls through."""
        self._answer = None

    def shut(self, why: str, retry_s: float) -> None:
        """Turn new calls away from now on; those under way go on."""
        status = status_of(Unreachable(why), retry_s=retry_s)

        async def turn_away(_requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            details = ((STATUS_DETAILS_HEADER, status.SerializeToString()),)
            await context.abort(grpc.StatusCode.UNAVAILABLE, status.message, details)

        # On the wire a call with one request looks like a stream of one.
        self._answer = grpc.stream_stream_rpc_method_handler(turn_away)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Take a service's handlers."""
        self._handlers += handlers

    def add_registered_method_handlers(self, service_name: str, method_handlers: object) -> None:
        """Leave those that would be found without asking the gate."""

    def service(self, details: grpc.HandlerCallDetails) -> Handler | None:
        """Return what answers a call."""
        if self._answer is not None:
            return self._answer
        return next((found for each in self._handlers if (found := each.service(details)) is not None), None)
