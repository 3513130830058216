"""What a command costs: it runs in a process of its own, and its CPU time and anonymous memory are measured."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

POLL_S = 0.01


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
