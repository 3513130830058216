"""Coordinator and nodes as processes of their own, over gRPC and TLS on loopback, by the commands that deploy them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from fedmerge.config import Config
from fedmerge.errors import ConfigError, RoundFailed
from fedmerge.node.events import EVENT_FIELD, NodeEvent
from fedmerge.sim.adversary import bad_nodes
from fedmerge.sim.inline import prepare_nodes
from fedmerge.sim.results import FederationResult, result_of
from fedmerge.sim.sites import node_home
from fedmerge.sim.trainers import num_threads

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 30.0
# What [simulate] says about time and who is there.
VIRTUAL = {
    "availability", "availability_period_s", "down_mbit_s", "dropout", "latency_s", "online", "spread",
    "straggler_factor", "stragglers", "train_s", "up_mbit_s",
}  # fmt: skip


def simulate_processes(
    config: Config,
    config_path: Path,
    *,
    keep_tuned: bool = False,
    on_event: Callable[[str, NodeEvent], None] = lambda name, event: None,
) -> FederationResult:
    """Run a federation to its end, one process for the coordinator and one for each of the configuration's nodes.

    The coordinator takes a free port on loopback. Raises `RoundFailed`, with its last line, when a process fails.
    """
    names = [node.name for node in config.nodes]
    if bad_nodes(config.simulate, names) and config.simulate.attack != "label_flip":
        raise ConfigError(
            "simulate.bad_nodes: nodes that are processes of their own can only have flipped labels",
            hint='attack = "label_flip", or a simulation in one process',
        )
    ignored = sorted(VIRTUAL & config.simulate.model_fields_set)
    if ignored:
        log.warning("processes run in real time, so these settings say nothing: simulate.%s", ", ".join(ignored))
    prepare_nodes(config, names)
    environ = {**os.environ, "FEDMERGE_SERVER__LISTEN": "127.0.0.1:0"}
    ended: SimpleQueue[_Process] = SimpleQueue()
    processes: list[_Process] = []

    def start(*arguments: Any) -> None:
        # On a thread: Ctrl-C, which interrupts this one, loses no process between its start and the list.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(lambda: processes.append(_Process(*arguments))).result()

    try:
        start("the coordinator", ["serve", str(config_path), "--json"], environ, ended)
        (coordinator,) = processes
        ready = json.loads(coordinator.first_line())
        for node in config.nodes:
            home = node_home(config, node.name)
            arguments = ["join", "--coordinator", ready["address"], "--trust", ready["bundle"], "--name", node.name]
            arguments += ["--home", str(home), "--key", str(home / "node.key")]
            arguments += ["--trainer", config.train.trainer, "--keep-rounds", str(config.publish.keep_rounds), "--json"]
            if keep_tuned:
                arguments.append("--keep-tuned")
            for name, path in (("--data", node.data), ("--test", node.test)):
                arguments += [name, str(path)] if path is not None else []
            for key, value in node.extras.items():
                for name, setting in _flat(key, value):
                    arguments += ["--option", f"{name}={setting}"]
            threads = {"OMP_NUM_THREADS": str(num_threads(config.simulate))}
            start(node.name, arguments, os.environ | threads, ended, on_event)
        # In the order in which they end, or one that failed would leave the others waiting for it.
        for _ in config.nodes:
            process = ended.get()
            process.wait()
            if process is coordinator:
                raise RoundFailed("the coordinator was stopped before the last round")
    finally:
        for process in reversed(processes):
            process.stop()
    return result_of(config)


class _Process:
    """A fedmerge command as a child. Its log, JSON lines on stderr, is read as it comes."""

    def __init__(
        self,
        name: str,
        arguments: list[str],
        environ: dict[str, str],
        ended: SimpleQueue[_Process],
        on_event: Callable[[str, NodeEvent], None] = lambda name, event: None,
    ) -> None:
        self.name = name
        self._ended = ended
        self._on_event = on_event
        self._last_line = "no output"
        self._child = subprocess.Popen(
            [sys.executable, "-m", "fedmerge", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environ,
            text=True,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def first_line(self) -> str:
        """Return the first line of stdout; raise `RoundFailed` when the process ends without one."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            self.wait()
            raise RoundFailed(f"{self.name} ended before it was ready")
        return line

    def wait(self) -> None:
        """Wait for the process to end; raise `RoundFailed` unless it succeeded."""
        code = self._child.wait()
        self._reader.join()
        if code != 0:
            raise RoundFailed(f"{self.name} failed with exit code {code}: {self._last_line}")

    def stop(self) -> None:
        """End the process if it still runs: politely first."""
        if self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._reader.join()
        for stream in (self._child.stdout, self._child.stderr):
            if stream is not None:
                stream.close()

    def _read_log(self) -> None:
        assert self._child.stderr is not None
        try:
            for line in self._child.stderr:
                record = _parse(line)
                fields = record.get(EVENT_FIELD)
                if isinstance(fields, dict):
                    self._on_event(self.name, NodeEvent(**fields))
                elif line.strip() and not line.startswith("hint: "):
                    self._last_line = record.get("message", line.strip())
        finally:
            self._ended.put(self)


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _flat(key: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield a trainer's option as `fedmerge join --option` takes it: a table as one option per key."""
    if isinstance(value, dict):
        yield from ((f"{key}.{name}", setting) for name, setting in value.items())
    else:
        yield key, value
