"""What commands cost: processes of their own, whose CPU time and memory are measured."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

POLL_S = 0.01
SAMPLE_S = 0.1


class Cost(NamedTuple):
    """What a case took, above what its process takes to start."""

    cpu_s: float
    wall_s: float
    anonymous_bytes: int


ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def status_bytes(process: int | str, key: str = "RssAnon") -> int:
    """Return a number from a process's status, 0 when it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_alone(command: list[str], environment: dict[str, str]) -> tuple[Cost, str]:
    """Run a command; return what all of it took, and the last line it printed."""
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        while True:
            peak = max(peak, status_bytes(child.pid))
            pid, code, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                child.returncode = os.waitstatus_to_exitcode(code)
                break
            time.sleep(POLL_S)
        output.seek(0)
        text = output.read()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text[-2000:]}")
    wall_s = time.perf_counter() - start
    return Cost(usage.ru_utime + usage.ru_stime, wall_s, peak), text.strip().splitlines()[-1] if text.strip() else ""


def proportional_bytes(pid: int) -> int:
    """Return a process's share of the memory that it has together with others. It takes milliseconds in large ones."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


class Sampler:
    """Watches a process and all that it starts, or only the latter: CPU seconds so far, and memory now."""

    def __init__(
        self, pid: int, memory: Callable[[int], int] = proportional_bytes, *, only_children: bool = False
    ) -> None:
        self._root, self._memory = psutil.Process(pid), memory
        self._also = [] if only_children else [self._root]
        self._cpu_s: dict[tuple[int, float], float] = {}
        self._samples: list[tuple[float, float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> list[tuple[float, float, float]]:
        """Return the moments, by the wall clock, with the CPU seconds and the bytes at each."""
        self._stop.set()
        self._thread.join()
        return self._samples

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            num_bytes = 0
            with suppress(psutil.Error):
                for process in [*self._also, *self._root.children(recursive=True)]:
                    with suppress(psutil.Error, OSError):
                        spent = process.cpu_times()
                        self._cpu_s[process.pid, process.create_time()] = spent.user + spent.system
                        num_bytes += self._memory(process.pid)
            if num_bytes:
                self._samples.append((time.time(), sum(self._cpu_s.values()), num_bytes))
