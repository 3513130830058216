"""What a round takes beside training: our coordinator and nodes, and Flower's SuperLink and SuperNodes, as deployed.

Both federations run over TLS on loopback, one after the other, on the same models and with the same drawn steps.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import psutil
import torch
from load_many import Found
from load_site import Site
from load_step import SIZES, STEP_METRIC, first_model
from processes import ONE_THREAD, Sampler, free_port, status_bytes
from shared import at_most, print_table

from fedmerge.events import DeltaAccepted, RoundOpened, RoundPublished
from fedmerge.statements import DeltaStatement, RoundSpec
from fedmerge.store.database import Database
from fedmerge.store.ledger import Ledger
from fedmerge.trust.certificates import self_signed
from fedmerge.trust.keys import TrustStore
from fedmerge.trust.sign import PublicKey

NUM_ROUNDS = 4  # the first is not counted
# What must be left of the machine's memory, and how long nothing may happen.
SPARE_BYTES, PATIENCE_S = 3 << 30, 900
OURS = {"ours, int8": "int8", "ours, fp32": "fp32"}
FLOWER = "Flower, fp32"
GOAL = 0.1
BENCHMARKS = Path(__file__).parent
MARK = "FEDMERGE_LOAD_ROUNDS"
APP = """
[project]
name = "load-rounds"
version = "1.0.0"
description = "Rounds in which next to nothing is trained"
license = "Apache-2.0"
requires-python = ">=3.11"
dependencies = ["flwr"]
[tool.flwr.app]
publisher = "fedmerge"
[tool.flwr.app.components]
serverapp = "load_flower:server"
clientapp = "load_flower:client"
[tool.flwr.app.config]
num-rounds = {num_rounds}
num-nodes = {num_nodes}
size = "{size}"
notes = "{notes}"
"""


class CannotRun(Exception):
    """A federation that does not come to its end on this machine; says why."""


@dataclass
class Round:
    """When a round began and ended, the CPU seconds of all its nodes' steps, and what nodes sent and fetched."""

    began_s: float
    ended_s: float
    step_cpu_s: float
    up_bytes: int
    down_bytes: int


Run: TypeAlias = Callable[[Path, str, int], list[Round]]


def rounds(folder: Path, *, quick: bool) -> Found:
    """Have federations of each size do a few rounds, and compare what those take without training."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory does run out, it is not others that are killed
    cases = [("22M", 2)] if quick else [(size, num_nodes) for size in SIZES for num_nodes in (2, 8)]
    rows, targets, figures = [], [], {}
    for size, num_nodes in cases:
        case, found = f"{size}, {num_nodes} nodes", dict[str, dict[str, float]]()
        for name in (FLOWER, *OURS):
            try:
                found[name] = measured(name, folder / "run", size, num_nodes)
            except CannotRun as err:
                print(f"{case}, {name}: can't run here: {err}", flush=True)
                figures[f"{case}, {name}"] = {"cannot_run": str(err)}
                continue
            one = figures[f"{case}, {name}"] = found[name]
            keys = ("wall_s", "cpu_s", "step_cpu_s", "up_mb", "down_mb", "peak_mb")
            rows.append([f"{case}: {name}", *(f"{one[key]:.{2 if key.endswith('_s') else 0}f}" for key in keys)])
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
        if FLOWER in found:
            targets += [
                at_most(GOAL, f"wall seconds of a round, {case}, {name} to Flower", found[name]["wall_s"] / theirs)
                for theirs in [found[FLOWER]["wall_s"]]
                for name in OURS
                if name in found
            ]
    print_table(["a round without its steps", "wall s", "CPU s", "steps CPU s", "MB up", "MB down", "peak MB"], rows)
    return targets, figures


def measured(name: str, folder: Path, size: str, num_nodes: int) -> dict[str, float]:
    """Run a federation; return medians of its rounds but the first, without what their steps took."""
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        environ = stack.enter_context(our_processes())
        sampler = Sampler(os.getpid(), lambda pid: status_bytes(pid, "RssAnon"), only_children=True)
        try:
            if name == FLOWER:
                done = flower(folder, size, num_nodes, environ)
            else:
                done = ours(folder, size, num_nodes, environ, OURS[name])
        finally:
            samples = sampler.stop()
    times, cpu, memory = map(np.array, zip(*samples, strict=True))
    cores = min(num_nodes, len(os.sched_getaffinity(0)))
    later = done[1:]

    def median(value: Callable[[Round], float]) -> float:
        return statistics.median(map(value, later))

    return {
        # By the clock steps take what they would on idle cores.
        "wall_s": median(lambda one: one.ended_s - one.began_s - one.step_cpu_s / cores),
        "cpu_s": median(
            lambda one: float(np.interp([one.began_s, one.ended_s], times, cpu) @ [-1, 1]) - one.step_cpu_s
        ),
        "step_cpu_s": median(lambda one: one.step_cpu_s),
        "up_mb": median(lambda one: one.up_bytes) / 1e6,
        "down_mb": median(lambda one: one.down_bytes) / 1e6,
        "peak_mb": float(memory.max()) / 1e6,
    }


@contextmanager
def our_processes() -> Iterator[dict[str, str]]:
    """Yield the environment for processes, of which none is left afterwards, whoever started it by then."""
    mark = f"{os.getpid()}-{time.time()}"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    search = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    try:
        yield {**os.environ, **ONE_THREAD, "PATH": path, "PYTHONPATH": search, MARK: mark}
    finally:
        for end in (psutil.Process.terminate, psutil.Process.kill):
            left = [process for process in psutil.process_iter() if _has(process, mark)]
            for process in left:
                with suppress(psutil.Error):
                    end(process)
            psutil.wait_procs(left, timeout=10)


def _has(process: psutil.Process, mark: str) -> bool:
    with suppress(psutil.Error, OSError):
        return process.environ().get(MARK) == mark
    return False


def patiently(news: Callable[[], object], what: str) -> Iterator[None]:
    """Go round while there is news now and then. Raises `CannotRun` when there is none, or too little memory left."""
    last, since_s = news(), time.monotonic()
    while True:
        yield
        time.sleep(0.2)
        if (now := news()) != last:
            last, since_s = now, time.monotonic()
        if time.monotonic() > since_s + PATIENCE_S:
            raise CannotRun(f"nothing happened in {PATIENCE_S} s while {what}")
        if (left := psutil.virtual_memory().available) < SPARE_BYTES:
            total = psutil.virtual_memory().total
            raise CannotRun(f"while {what}, {left / 1e9:.1f} GB were left of the machine's {total / 1e9:.0f}")


def ours(folder: Path, size: str, num_nodes: int, environ: Mapping[str, str], values: str) -> list[Round]:
    """Run `fedmerge serve` and as many `fedmerge join`; read from the ledger what they did."""
    base = {name: torch.from_numpy(values) for name, values in first_model(size).items()}
    names = [f"node-{number}" for number in range(num_nodes)]
    plan: dict[str, dict[str, Any]] = {
        "rounds": {"num_rounds": NUM_ROUNDS, "min_nodes": num_nodes},
        "train": {"trainer": "torch"},
        "delta": {"values": values, "downlink": values},
    }
    with Site(folder / "site", names, base, plan) as site, ExitStack() as stack:
        del base
        nodes = []
        for name, key in site.keys.items():
            key.save(folder / name / "node.key")
            command = [sys.executable, "-m", "fedmerge", "join", "--coordinator", site.address, "--trust", site.bundle,
                       "--home", folder / name, "--trainer", "torch", "--option", "function=load_step:train",
                       "--option", f"model=load_step:module_{size.lower()}"]  # fmt: skip
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            nodes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environ))
        logs = [folder / f"{name}.log" for name in names]
        for _ in patiently(lambda: [log.stat().st_size for log in logs], f"{num_nodes} nodes worked"):
            codes = [node.poll() for node in nodes]
            if any(codes):
                failed = next(log for log, code in zip(logs, codes, strict=True) if code)
                raise CannotRun(f"a node ended: {failed.read_text()[-500:]}")
            if codes == [0] * num_nodes:
                break
        return read_ledger(site)


def read_ledger(site: Site) -> list[Round]:
    """Return what a federation's ledger says of its rounds."""
    key, keys = PublicKey.load(site.bundle), TrustStore(site.config.federation.trusted).keys()
    ledger, found = Ledger(Database(site.config.database_url())), list[Round]()
    coordinator = {key.key_id: key}
    for entry in ledger.entries:
        match entry.event:
            case RoundOpened(spec_envelope=envelope):
                spec, _ = RoundSpec.open(envelope.encode(), coordinator, where="spec")
                last = [refs[-1].num_bytes for refs in (spec.model.updates, spec.model.steps) if refs]
                found.append(Round(entry.at_s, entry.at_s, 0.0, 0, len(site.keys) * min(last, default=0)))
            case DeltaAccepted(statement_envelope=envelope, payload_bytes=num_bytes):
                statement, _ = DeltaStatement.open(envelope.encode(), keys, where="statement")
                found[-1].step_cpu_s += statement.metrics[STEP_METRIC]
                found[-1].up_bytes += num_bytes
            case RoundPublished():
                found[-1].ended_s = entry.at_s
            case _:
                pass
    ledger.close()
    return found


def flower(folder: Path, size: str, num_nodes: int, environ: Mapping[str, str]) -> list[Round]:
    """Run a SuperLink and as many SuperNodes, and read the ServerApp's notes."""
    app, home, notes = folder / "app", folder / "home", folder / "notes"
    app.mkdir()
    home.mkdir()
    (app / "pyproject.toml").write_text(APP.format(num_rounds=NUM_ROUNDS, num_nodes=num_nodes, size=size, notes=notes))
    shutil.copy(BENCHMARKS / "load_flower.py", app)
    pair = self_signed(["localhost", "127.0.0.1"], dt.datetime.now(dt.UTC), dt.timedelta(days=1))
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(pair.certificate)
    key.write_bytes(pair.key)
    link, *ports = [free_port() for _ in range(1 + num_nodes)]
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "load"\n[superlink.load]\naddress = "127.0.0.1:{link}"\n'
        f'root-certificates = "{certificate}"\n'
    )
    environ = {**environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    tls = ["--ssl-certfile", certificate, "--ssl-keyfile", key, "--ssl-ca-certfile", certificate]
    commands: list[list[Any]] = [
        ["flower-superlink", "--port", str(link), *tls, "--disable-runtime-dependency-installation"]
    ]
    for number, port in enumerate(ports):
        where = ["--superlink", f"127.0.0.1:{link}", "--root-certificates", certificate, "--port", str(port)]
        commands.append(["flower-supernode", *where, *tls, "--node-config", f"partition-id={number}"])
    with (folder / "log").open("wb") as log:
        children = [subprocess.Popen(command, stdout=log, stderr=log, env=environ) for command in commands]
        for _ in patiently(lambda: None, "SuperLink started"):
            with suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", link)).close()
                break
        subprocess.run(["flwr", "run", str(app), "load"], check=True, stdout=log, stderr=log, env=environ)
        for _ in patiently(
            lambda: notes.exists() and notes.stat().st_size, f"SuperLink and {num_nodes} SuperNodes worked"
        ):
            found = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
            ends = [note for note in found if "ends" in note]
            if any(child.poll() is not None for child in children) or "finished:failed" in read_end(folder / "log"):
                raise CannotRun(f"Flower's run failed: {read_end(folder / 'log')[-500:]}")
            if short := [note for note in ends if note["replies"] < num_nodes]:
                raise CannotRun(f"only {short[0]['replies']} of {num_nodes} SuperNodes replied")
            if len(ends) == NUM_ROUNDS:
                begins = [note["at_s"] for note in found if "begins" in note]
                return [
                    Round(begun_s, end["at_s"], end["step_cpu_s"], end["up_bytes"], end["down_bytes"])
                    for begun_s, end in zip(begins, ends, strict=True)
                ]
    raise AssertionError("not reached")


def read_end(log: Path) -> str:
    """Return the last 4,000 bytes of a log."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        return file.read().decode(errors="replace")
