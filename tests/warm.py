"""Commands as processes of their own that start at once: forked from one that has imported what they import.

They have their own signals, files and exit codes, as ever. Importing takes seconds each time, of which the tests would
spend minutes; how a command starts from nothing is seen by the tests of the README's commands and of what is imported.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fedmerge.cli import main

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["tests.warm_imports"])


class WarmProcess:
    """A process that calls `target` with `arguments` in a `folder` and ends with the exit code that comes back.

    It has the environment `environ`; what it prints goes to the end of the files named. Like `subprocess.Popen`. Ctrl-C
    stops it, as it would in a terminal.
    """

    def __init__(
        self,
        target: Callable[..., int],
        *arguments: Any,
        folder: Path,
        environ: Mapping[str, str],
        stdout: Path,
        stderr: Path,
    ) -> None:
        for path in (stdout, stderr):
            path.touch()
        place = {"folder": folder, "environ": dict(environ), "stdout": stdout, "stderr": stderr}
        self._process = _FORKING.Process(target=_call, args=(target, *arguments), kwargs=place)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs; that of a process which signal N ended is -N."""
        return self._process.exitcode

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait until it has ended, and return its exit code. Raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout_s or 0.0)
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def fedmerge(*words: str | Path, folder: Path, environ: Mapping[str, str], stdout: Path, stderr: Path) -> WarmProcess:
    """Start `fedmerge WORDS` as a `WarmProcess`."""
    return WarmProcess(main, [*map(str, words)], folder=folder, environ=environ, stdout=stdout, stderr=stderr)


def _call(
    target: Callable[..., int], *arguments: Any, folder: Path, environ: dict[str, str], stdout: Path, stderr: Path
) -> None:
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Read from the environment when torch is imported, which was long ago.
    torch.set_num_threads(int(environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    sys.argv = ["fedmerge"]
    raise SystemExit(target(*arguments))
