"""Run a coordinator: open the socket, serve calls, and move rounds along by the clock."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedmerge.config import Config
from fedmerge.coordinator import Coordinator
from fedmerge.errors import FedmergeError, ResourceError
from fedmerge.v1 import delta_pb2_grpc, log_pb2_grpc, model_pb2_grpc, round_pb2_grpc, session_pb2_grpc
from fedmerge.wire import MAX_MESSAGE_BYTES
from fedmerge_server.admin import open_admin
from fedmerge_server.service import Services
from fedmerge_server.tls import Certificates

log = logging.getLogger(__name__)

TICK_S = 0.5
RETRY_S = 5.0
GRACE_S = 5.0

# Measured on loopback and over simulated long links; the reasons are in docs/log.md.
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 16),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 600_000),
    # A connection whose other end is gone without a word is found out, and its calls are ended.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 30_000),
    # Two coordinators must not share a port, or nodes would reach either.
    ("grpc.so_reuseport", 0),
]


@dataclass(frozen=True)
class Listening:
    """Where a coordinator can be reached, and the file that partners need to trust it."""

    address: str
    bundle: Path


async def serve(config: Config, base_dir: Path, *, on_ready: Callable[[Listening], None]) -> Coordinator:
    """Serve until SIGTERM or SIGINT; return the coordinator as it was left, closed.

    `on_ready` is called once the port is open. A federation whose last round failed gets that round again. Raises
    `ResourceError` when the port can't be opened, and what opening a `Coordinator` raises.
    """
    coordinator = Coordinator(config, base_dir, clock=time.time)
    try:
        certificates = Certificates(config, coordinator.key.public, dt.datetime.now(dt.UTC))
        server, services, port = _open(config, coordinator, certificates)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        healthy = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        admin = open_admin(coordinator.operator, config.federation.state)
        await server.start()
        await admin.start()
        await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
        host = config.server.address[0]
        on_ready(Listening(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", certificates.bundle))
        coordinator.retry_failed()
        rounds = asyncio.create_task(_move_rounds(coordinator, services, stop))
        renewals = asyncio.create_task(_keep_certificates(certificates, stop))
        await stop.wait()
        await healthy.enter_graceful_shutdown()
        services.stop()
        await asyncio.gather(rounds, renewals)
        await admin.stop(None)
        await server.stop(GRACE_S)
    finally:
        coordinator.close()
    return coordinator


def _open(
    config: Config, coordinator: Coordinator, certificates: Certificates
) -> tuple[grpc.aio.Server, Services, int]:
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    services = Services(coordinator, certificates)
    session_pb2_grpc.add_SessionServiceServicer_to_server(services, server)
    round_pb2_grpc.add_RoundServiceServicer_to_server(services, server)
    delta_pb2_grpc.add_DeltaServiceServicer_to_server(services, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(services, server)
    log_pb2_grpc.add_LogServiceServicer_to_server(services, server)
    try:
        port = server.add_secure_port(config.server.listen, certificates.credentials())
    except RuntimeError as err:
        raise ResourceError(
            f"{config.server.listen}: can't listen there: another program has it, or this machine has no such address",
            hint="stop the other program, or change server.listen; fedmerge doctor tells which",
        ) from err
    return server, services, port


async def _keep_certificates(certificates: Certificates, stop: asyncio.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), TICK_S)
        await asyncio.to_thread(certificates.refresh, dt.datetime.now(dt.UTC))


async def _move_rounds(coordinator: Coordinator, services: Services, stop: asyncio.Event) -> None:
    while not stop.is_set():
        try:
            if not await asyncio.to_thread(coordinator.advance):
                await services.wait_for_change(TICK_S)
        except FedmergeError as err:
            # For instance a full disk: nothing is lost, and the same step is tried again.
            log.error("round %d: %s", coordinator.journal.state.round, err.message)
            await services.wait_for_change(RETRY_S)
        except Exception:
            log.exception("round %d: internal error", coordinator.journal.state.round)
            await services.wait_for_change(RETRY_S)
