"""A Ray cluster: one that somebody started, or one of this machine's cores for as long as it is needed."""

from __future__ import annotations

import logging
import os
import socket

import ray

from fedmerge.errors import ResourceError

log = logging.getLogger(__name__)

CONNECT_S = 10.0
HINT = "start one with: ray start --head"


def connect(address: str | None) -> None:
    """Join the cluster at `address`, HOST:PORT or "auto" for one that this machine is part of, or start one here.

    Leave it with `ray.shutdown()`. Raises `ResourceError` when there is no cluster at the address.
    """
    if address is not None:
        _require_listening(address)
    # Else Ray warns everybody who asks for no accelerators.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as err:
        raise ResourceError(f"no Ray cluster at {address}: {err}", hint=HINT) from err


def require_room(num_cpus: float, num_gpus: float, *, may_grow: bool) -> None:
    """See that some machine on Ray has so many cores and accelerators; without one, Ray waits for it in silence.

    Raises `ResourceError`, unless the cluster `may_grow`: then it says so.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if any(each.get("CPU", 0) >= num_cpus and each.get("GPU", 0) >= num_gpus for each in machines):
        return
    most = [max(each.get(what, 0) for each in machines) for what in ("CPU", "GPU")]
    lacking = (
        f"no machine on Ray has {num_cpus:g} cores and {num_gpus:g} accelerators, which a node takes"
        f" (the most are {most[0]:g} and {most[1]:g})"
    )
    if may_grow:
        log.warning("%s; nodes wait until the cluster has one", lacking)
        return
    ray.shutdown()
    raise ResourceError(lacking, hint="lower simulate.ray_cpus or simulate.ray_gpus")


def _require_listening(address: str) -> None:
    """Find out at once that nobody is there, which takes Ray ten minutes."""
    host, separator, port = address.rpartition(":")
    if not (separator and port.isdecimal() and "/" not in host):
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as err:
        raise ResourceError(f"no Ray cluster at {address}: {err}", hint=HINT) from err
