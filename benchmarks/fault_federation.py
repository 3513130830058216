"""A small federation of real processes, and what must hold of it whatever was done to them.

Processes are `fedmerge serve` and `fedmerge join`, forked from one that has imported and compiled everything, so that
one starts in a tenth of a second: it runs the command line's own `main`, and is killed, stopped and traced like any
other.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, TypeAlias

import torch
from processes import free_port
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file

from fedmerge.cli import main
from fedmerge.config import Config, load_config
from fedmerge.events import DeltaAccepted, RoundPublished
from fedmerge.sim import prepare_nodes, simulate
from fedmerge.statements import Receipt
from fedmerge.store.database import Database
from fedmerge.store.entries import LedgerEntry
from fedmerge.store.ledger import Ledger
from fedmerge.tensors import Checkpoint, model_digest
from fedmerge.training import TRAINERS, TrainResult, TrainTask
from fedmerge.trust.sign import SigningKey
from fedmerge.verify import replay, verify_directory

NODES = {"north": 1, "south": 3}  # and how many examples each has
NUM_ROUNDS = 2
PATIENCE_S = 180.0  # a busy machine is not a broken promise
POLL_S = 0.01
PR_SET_PDEATHSIG = 1
RESTART_S = 0.1
UNREACHABLE = 4  # a node's code when it never found its coordinator
LINES = 3 if "FEDMERGE_TRACEBACK" not in os.environ else 60
CONFIG = """
[federation]
name = "faults"
[model]
base = "{base}"
[rounds]
num_rounds = {rounds}
min_nodes = {nodes}
grace_s = 60
[train]
trainer = "known-step"
[delta]
sparsify = "seeded"
density = 0.9
values = "fp32"
max_noise_ratio = 1000000
[merge]
threads = 1
[outer]
name = "nesterov"
lr = 0.7
"""


class Settings(BaseModel):
    """What a plan may ask of `KnownStep`: nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class KnownStep(BaseModel):
    """A trainer that adds noise drawn from a seed: the same step each time, in no time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: Annotated[int, Field(ge=0)]

    def check(self) -> None:
        """Accept anything."""

    def train(self, task: TrainTask) -> TrainResult:
        """Write the model plus a step."""
        before, generator = Checkpoint(task.model_dir), torch.Generator().manual_seed(self.seed + task.round)
        out = task.workspace / "tuned"
        out.mkdir(exist_ok=True)
        tuned = {name: before[name] + 0.01 * torch.randn(before[name].shape, generator=generator) for name in before}
        save_file(tuned, out / "model.safetensors")
        return TrainResult(out, self.seed)

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        """Return a norm."""
        return {"norm": float(Checkpoint(model_dir)["matrix"].norm())}


TRAINERS["known-step"] = f"{__name__}:KnownStep"


def simulated_version(folder: Path) -> str:
    """Make the base model and the configuration in `folder`, and return the version that the federation ends with."""
    base = folder / "base"
    base.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (500, 1500), "vector": (300,)}
    save_file(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, base / "model.safetensors"
    )
    (base / "config.json").write_text('{"model_type": "made-up"}')
    path = folder / "undisturbed" / "fedmerge.toml"
    path.parent.mkdir()
    path.write_text(CONFIG.format(base=base, rounds=NUM_ROUNDS, nodes=len(NODES)))
    return simulate(load_config(path), base, {name: KnownStep(seed=seed) for name, seed in NODES.items()}).version


class Template:
    """A federation that is ready to begin: keys, certificate, configuration; and the version that it ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "template"
        self.folder.mkdir(parents=True)
        self.expected = simulated_version(folder)
        shutil.copy(folder / "undisturbed" / "fedmerge.toml", self.folder)
        config = load_config(self.folder / "fedmerge.toml")
        for name, key in prepare_nodes(config, list(NODES)).items():
            key.save(self.folder / name / "node.key")
        shutil.rmtree(self.folder / "state", ignore_errors=True)
        # One start makes the coordinator's key, certificate and bundle, so that nodes have them from the beginning.
        first = Run(self, self.folder)
        first.start("coordinator")
        first.await_ready()
        first.stop()
        for path in (self.folder / "state").glob("*"):
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith(("tls.", "coordinator.")):
                path.unlink()

    def new(self, folder: Path) -> Run:
        """Return a federation in a new folder, with nothing running yet."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("*.log", "*.out"))
        return Run(self, folder)


@dataclass(frozen=True)
class Before:
    """What a process does before anything else: `function(*arguments)`."""

    function: Callable[..., None]
    arguments: tuple[object, ...] = ()


os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}  # for what processes are forked from
_LOCK = threading.Lock()  # whoever starts a process also looks after everybody else's, which must not look then
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["fault_warm"])


def _command(
    arguments: Sequence[str], folder: Path, name: str, environ: Mapping[str, str], before: list[Before]
) -> None:
    """Be the command `fedmerge ARGUMENTS`, with its output in files of the folder."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # with whoever forked it
    os.chdir(folder)
    for number, file in ((1, f"{name}.out"), (2, f"{name}.log")):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if number == 1 else os.O_APPEND))
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.update(environ)
    if "LD_PRELOAD" in environ:  # which only a new program takes up
        names = [f"{each.function.__module__}.{each.function.__name__}" for each in before]
        modules = sorted({__name__, *(name.partition(".")[0] for name in names)})
        calls = [f"{name}(*{each.arguments})" for name, each in zip(names, before, strict=True)]
        code = f"import sys, {', '.join(modules)}; {'; '.join([*calls, f'sys.exit({__name__}.main(sys.argv[1:]))'])}"
        os.execv(sys.executable, [sys.executable, "-c", code, *arguments])
    faulthandler.enable()
    for each in before:
        each.function(*each.arguments)
    sys.exit(main(arguments))


class Run:
    """The processes of one federation in `folder`: a coordinator, and nodes by name."""

    def __init__(self, template: Template, folder: Path) -> None:
        self.folder = folder
        self.template = template
        self.address = f"127.0.0.1:{free_port()}"
        self.node_addresses = dict.fromkeys(NODES, self.address)  # others where something stands between
        self.patience_s = PATIENCE_S
        self.processes: dict[str, multiprocessing.process.BaseProcess] = {}
        self.before: dict[str, list[Before]] = {}
        self.environ: dict[str, dict[str, str]] = {}
        self.cleanup = ExitStack()  # what is to be undone when all have ended
        self._helpers: list[multiprocessing.process.BaseProcess] = []

    def start(self, name: str) -> None:
        """Start the coordinator or a node, again or for the first time."""
        environ = {"FEDMERGE_SERVER__LISTEN": self.address, **self.environ.get(name, {})}
        if name not in NODES:
            arguments = ["serve", "fedmerge.toml", "--json"]
        else:
            arguments = [
                "join",
                "--coordinator",
                self.node_addresses[name],
                "--trust",
                "state/coordinator.pem",
                "--json",
            ]
            arguments += ["--key", f"{name}/node.key", "--home", name, "--trainer", "known-step"]
            arguments += ["--option", f"seed={NODES[name]}"]
        (self.folder / f"{name}.out").unlink(missing_ok=True)
        what = (arguments, self.folder, name, environ, self.before.get(name, []))
        process = _FORKED.Process(target=_command, args=what, daemon=True)
        with _LOCK:
            process.start()
        self.processes[name] = process

    def start_all(self) -> None:
        """Start the coordinator, and nodes when it listens."""
        self.start("coordinator")
        self.await_ready()
        for name in NODES:
            self.start(name)

    def help(self, function: Callable[..., None], *arguments: object) -> Connection:
        """Have `function(*arguments, connection)` run beside the federation; return the connection's other end."""
        here, there = _FORKED.Pipe()
        process = _FORKED.Process(target=function, args=(*arguments, there), daemon=True)
        with _LOCK:
            process.start()
        there.close()
        self._helpers.append(process)
        return here

    def pid(self, name: str) -> int:
        """A process's number."""
        pid = self.processes[name].pid
        assert pid is not None
        return pid

    def signal(self, name: str, number: int) -> None:
        os.kill(self.pid(name), number)

    def kill(self, name: str) -> None:
        """End a process as kill -9 does."""
        self.signal(name, signal.SIGKILL)
        self.await_end(name)

    def code(self, name: str) -> int | None:
        """A process's exit code, None while it runs."""
        with _LOCK:
            return self.processes[name].exitcode

    def await_end(self, name: str) -> int:
        """Wait until a process has ended, and return its exit code."""
        for _ in self.patiently(f"{name} to end"):
            if (code := self.code(name)) is not None:
                return code
        raise AssertionError("not reached")

    def await_ready(self, name: str = "coordinator", *, restarted: Sequence[int] = ()) -> None:
        """Wait until a coordinator says where it listens; `restarted` as in `finish`."""
        out = self.folder / f"{name}.out"
        for _ in self.patiently(f"the {name} to listen"):
            if out.exists() and out.read_text().endswith("\n"):
                return
            self.supervise(restarted)

    def finish(self, *, restarted: Sequence[int] = ()) -> None:
        """Wait until every node has ended well, and stop the coordinator.

        Whatever ends with a code among `restarted` is started again, as by a supervisor.
        """
        for _ in self.patiently("the nodes to end"):
            self.supervise(restarted)
            if all(self.code(name) == 0 for name in NODES):
                break
        coordinators = self.processes.keys() - NODES.keys()
        for name in coordinators:
            self.await_ready(name, restarted=restarted)
        for name in coordinators:
            self.stop(name, restarted=restarted)

    def patiently(self, what: str) -> Iterator[None]:
        """Go round until `patience_s` have passed, then raise `Failed`."""
        give_up_s = time.monotonic() + self.patience_s
        while time.monotonic() < give_up_s:
            yield
            time.sleep(POLL_S)
        self.check_acknowledged()
        raise Failed(f"waited {self.patience_s:g} s for {what}: {self.said(*self.processes)}")

    def supervise(self, restarted: Sequence[int] = ()) -> None:
        """Start again what has ended with a code among `restarted`. Raises `Failed` when anything ended otherwise."""
        for name in self.processes:
            code = self.code(name)
            if code is None or (code == 0 and name in NODES):
                continue
            if code not in (*restarted, *([UNREACHABLE] if name in NODES else [])):
                raise Failed(f"{name} ended with code {code}: {self.said(name)}")
            time.sleep(RESTART_S)
            self.start(name)

    def stop(self, name: str = "coordinator", *, restarted: Sequence[int] = ()) -> None:
        """Stop a coordinator as an operator does."""
        self.await_ready(name, restarted=restarted)
        self.signal(name, signal.SIGTERM)
        code = self.await_end(name)
        if code not in (0, *restarted):
            raise Failed(f"the {name} was stopped, and its code was {code}: {self.said(name)}")

    def end(self) -> None:
        """Leave nothing running."""
        processes = [*self.processes.values(), *self._helpers]
        with _LOCK:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
        self.processes.clear()
        self._helpers.clear()

    def log(self, name: str) -> str:
        """All that a process logged."""
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def said(self, *names: str) -> str:
        """The last lines of what processes logged."""
        found = []
        for name in names:
            for line in self.log(name).splitlines()[-LINES:]:
                found.append(f"{name}: {json.loads(line)['message'] if line.startswith('{') else line}")
        return " | ".join(found)

    def config(self) -> Config:
        """The coordinator's settings."""
        return load_config(self.folder / "fedmerge.toml", environ=self.environ.get("coordinator", {}))

    def entries(self) -> list[LedgerEntry]:
        """The ledger's events."""
        with closing(Ledger(Database(self.config().database_url()))) as ledger:
            return list(ledger.entries)

    def receipts(self) -> dict[Path, bytes]:
        """What the nodes hold of the coordinator's signed word that it has a delta."""
        return {path: path.read_bytes() for path in self.folder.glob("*/rounds/*/receipt.json")}

    def check_acknowledged(self, receipts: dict[Path, bytes] | None = None) -> None:
        """Every receipt, by default those that nodes hold now, is for an event in the ledger."""
        receipts = self.receipts() if receipts is None else receipts
        entries = self.entries()
        key = SigningKey.load(self.folder / "coordinator.key").public
        for path, envelope in receipts.items():
            receipt, _ = Receipt.open(envelope, {key.key_id: key}, where=str(path))
            known = receipt.event < len(entries) and entries[receipt.event].hash == receipt.event_hash
            if not known:
                raise Failed(f"an acknowledged delta is lost: {path.parent.parent.parent.name}, round {receipt.round}")

    def check(self) -> None:
        """All that is promised of a federation that has ended."""
        self.check_acknowledged()
        for name in self.processes:
            log = self.log(name)
            if found := re.search("internal error|Traceback", log):
                raise Failed(f"{name} met an error that it did not expect: {log[max(0, found.start() - 500) :][:5000]}")
        events = [entry.event for entry in self.entries()]
        published = [event.round for event in events if isinstance(event, RoundPublished)]
        if published != list(range(1, NUM_ROUNDS + 1)):
            raise Failed(f"published rounds {published}")
        accepted = sorted((event.round, event.node_id) for event in events if isinstance(event, DeltaAccepted))
        if len(set(accepted)) != len(accepted) or len(accepted) != NUM_ROUNDS * len(NODES):
            raise Failed(f"accepted {len(accepted)} deltas, {len(set(accepted))} of them different")
        key = SigningKey.load(self.folder / "coordinator.key").public
        config, name = self.config(), f"round-{NUM_ROUNDS:04d}"
        model_dir = next(self.folder.glob(f"*/models/{name}"))  # of whichever coordinator published it
        lineage, history, _ = verify_directory(model_dir, {key.key_id: key})
        if not replay(history, Checkpoint(config.model.base), config.open_blobs()).passed:
            raise Failed("the deltas that are stored do not lead to what is published")
        digests = {"the coordinator": lineage.model.digest}
        for name in NODES:
            model_dir = json.loads((self.folder / f"{name}.out").read_text().splitlines()[-1])["model_dir"]
            digests[name] = model_digest(Checkpoint(self.folder / model_dir))
        for name, digest in digests.items():
            if digest != self.template.expected:
                raise Failed(f"{name} has version {digest[:12]}, undisturbed it is {self.template.expected[:12]}")


class Failed(Exception):
    """A promise that was broken."""


# Takes a federation from its start to its end, and says whether the fault was brought about.
Trial: TypeAlias = Callable[[Run], bool]


@dataclass(frozen=True)
class Part:
    """A kind of fault: its trials, many or (`quick`) few, and a bug that one of the trials `planted` must find.

    `bug` is done in each process; `why_not` says why this machine does not allow it.
    """

    about: str
    trials: Callable[[Template, random.Random, bool], Sequence[Trial]]
    planted: Callable[[Template, random.Random], Sequence[Trial]] = lambda template, draw: []
    bug: Before | None = None
    why_not: Callable[[], str] = str


@contextmanager
def running(template: Template, folder: Path) -> Iterator[Run]:
    """A new federation, whose processes and folder are gone afterwards."""
    run = template.new(folder)
    try:
        yield run
    finally:
        run.end()
        run.cleanup.close()
        shutil.rmtree(folder, ignore_errors=True)
