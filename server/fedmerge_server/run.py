"""Run a coordinator: open the socket, serve calls, and move rounds along by the clock."""

from __future__ import annotations

import asyncio
import ctypes
import datetime as dt
import logging
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedmerge.config import Config
from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.coordinator.ownership import check_standby, open_seat
from fedmerge.errors import Deposed, FedmergeError, ResourceError
from fedmerge.store.seat import Seat
from fedmerge.v1 import delta_pb2_grpc, log_pb2_grpc, model_pb2_grpc, round_pb2_grpc, session_pb2_grpc
from fedmerge.wire import MAX_MESSAGE_BYTES
from fedmerge_server.admin import open_admin
from fedmerge_server.gate import Gate
from fedmerge_server.service import Services, chunk_handlers
from fedmerge_server.tls import Certificates

log = logging.getLogger(__name__)

TICK_S = 0.5
RETRY_S = 5.0
GRACE_S = 5.0
_M_ARENA_MAX = -8  # of glibc's malloc.h

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


async def serve(config: Config, base_dir: Path, *, on_ready: Callable[[Listening], None]) -> None:
    """Lead the federation, or stand by until whoever does falls silent; serve until SIGTERM or SIGINT, then drain.

    `on_ready` is called once the port is open; before this coordinator leads, every call there is answered UNAVAILABLE.
    A federation whose last round failed gets that round again. Raises `ResourceError` when the port can't be opened,
    `Deposed` when another coordinator has taken over, and what opening a `Coordinator` raises.
    """
    _share_arenas()
    seat = open_seat(config, time.monotonic)
    # A thread of its own: signs of life must not wait for threads that wait for the database.
    with closing(seat), ThreadPoolExecutor(1) as lease_thread:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        clock = steady_clock()
        coordinator = Coordinator(config, base_dir, clock=clock, seat=seat) if seat.try_take() else None
        key = check_standby(config, base_dir, seat) if coordinator is None else coordinator.key
        gate = Gate("this coordinator stands by for another one", config.server.lease_s / 3)
        healthy = health.aio.HealthServicer()
        certificates = Certificates(config, key.public, dt.datetime.now(dt.UTC))
        server, listening = _open(config, certificates, gate, healthy)
        await healthy.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        await server.start()
        try:
            on_ready(listening)
            stood_by = coordinator is None
            if coordinator is None and await _stand_by(seat, config.server.lease_s, stop):
                opening = partial(Coordinator, config, base_dir, clock=clock, seat=seat, key=key)
                coordinator = await asyncio.to_thread(opening)
            if coordinator is None:
                return
            services = _add_services(coordinator, certificates, gate)
            admin = open_admin(coordinator.operator, config.federation.state)
            await admin.start()
            gate.open()
            await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
            if not stood_by:
                await asyncio.to_thread(coordinator.retry_failed)
            work = [
                asyncio.create_task(stop.wait()),
                asyncio.create_task(_move_rounds(coordinator, services, stop)),
                asyncio.create_task(_keep_certificates(certificates, stop)),
                asyncio.create_task(_keep_lease(seat, config.server.lease_s, lease_thread)),
            ]
            ended, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            # Drain: nothing new, and what is under way has a while to end. Nodes go on from there with whoever is next.
            await healthy.enter_graceful_shutdown()
            gate.shut("the coordinator is stopping", GRACE_S)
            stop.set()
            services.stop()
            await server.stop(GRACE_S)
            await admin.stop(None)
            seat.database.abandon()
            work[-1].cancel()
            await asyncio.wait(work)
            for task in ended:
                task.result()
        finally:
            await server.stop(None)


def steady_clock() -> Callable[[], float]:
    """Return a clock that begins with the wall clock's time and goes on evenly, however that one is set later.

    A round whose deadline jumped by would fail, and one whose deadline jumped away would wait.
    """
    offset_s = time.time() - time.monotonic()
    return lambda: offset_s + time.monotonic()


async def _stand_by(seat: Seat, lease_s: float, stop: asyncio.Event) -> bool:
    """Wait until this coordinator leads; return whether it does, and not been stopped before."""
    log.info("standing by: %s leads", seat.lease.leader)
    while not stop.is_set():
        if await asyncio.to_thread(seat.try_take):
            log.warning("taking over")
            return True
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), lease_s / 6)
    return False


async def _keep_lease(seat: Seat, lease_s: float, thread: ThreadPoolExecutor) -> None:
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(lease_s / 3)
        try:
            await loop.run_in_executor(thread, seat.lease.renew)
        except Deposed:
            raise
        except ResourceError as err:
            log.error("can't renew the lease: %s", err.message)


def _open(
    config: Config, certificates: Certificates, gate: Gate, healthy: health.aio.HealthServicer
) -> tuple[grpc.aio.Server, Listening]:
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    server.add_generic_rpc_handlers((gate,))
    try:
        port = server.add_secure_port(config.server.listen, certificates.credentials())
    except RuntimeError as err:
        raise ResourceError(
            f"{config.server.listen}: can't listen there: another program has it, or this machine has no such address",
            hint="stop the other program, or change server.listen; fedmerge doctor tells which",
        ) from err
    host = config.server.address[0]
    return server, Listening(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", certificates.bundle)


def _add_services(coordinator: Coordinator, certificates: Certificates, gate: Gate) -> Services:
    services = Services(coordinator, certificates)
    gate.add_generic_rpc_handlers(chunk_handlers(services))
    server = cast("grpc.aio.Server", gate)  # which it is, as far as these functions go
    session_pb2_grpc.add_SessionServiceServicer_to_server(services, server)
    round_pb2_grpc.add_RoundServiceServicer_to_server(services, server)
    delta_pb2_grpc.add_DeltaServiceServicer_to_server(services, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(services, server)
    log_pb2_grpc.add_LogServiceServicer_to_server(services, server)
    return services


async def _keep_certificates(certificates: Certificates, stop: asyncio.Event) -> None:
    while not stop.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), TICK_S)
        await asyncio.to_thread(certificates.refresh, dt.datetime.now(dt.UTC))


async def _move_rounds(coordinator: Coordinator, services: Services, stop: asyncio.Event) -> None:
    while not stop.is_set():
        try:
            if not await asyncio.to_thread(coordinator.advance):
                await services.wait_for_change(TICK_S)
        except Deposed:
            raise
        except FedmergeError as err:
            # For instance a full disk: nothing is lost, and the same step is tried again.
            log.error("round %d: %s", coordinator.journal.state.round, err.message)
            await services.wait_for_change(RETRY_S)
        except Exception:
            log.exception("round %d: internal error", coordinator.journal.state.round)
            await services.wait_for_change(RETRY_S)


def _share_arenas() -> None:
    """Have glibc's threads share two arenas: by default each keeps in one of its own what a delta took there."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)
