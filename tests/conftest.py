"""A small federation for tests: a model of 600,000 numbers, and a trainer that moves it by a known step."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file

from fedmerge.config import Config, parse_config
from fedmerge.tensors import Checkpoint
from fedmerge.training import TrainResult, TrainTask
from fedmerge.trust.keys import TrustStore
from fedmerge.trust.sign import SigningKey
from tests import warm
from tests.buckets import BucketServer
from tests.databases import PostgresServer

# A machine that is busy is no finding.
settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")


def make_base(directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model with a matrix of 2.4 MB (so that payloads have several leaves), a vector, and an integer buffer."""
    generator = torch.Generator().manual_seed(0)
    directory.mkdir(parents=True)
    tensors = {
        "matrix": torch.randn(300, 2000, generator=generator).to(dtype),
        "vector": torch.randn(300, generator=generator).to(dtype),
        "ids": torch.arange(5),
    }
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "made-up"}')
    return directory


@dataclass
class StepTrainer:
    """Adds noise drawn from `seed` to every float tensor; its metric is a norm that a test can compute itself."""

    seed: int
    num_examples: int = 10
    scale: float = 0.01

    def check(self) -> None:
        """Accept anything."""

    def step(self, name: str, like: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed + len(name))
        return self.scale * torch.randn(like.shape, generator=generator)

    def train(self, task: TrainTask) -> TrainResult:
        before = Checkpoint(task.model_dir)
        out = task.workspace / "tuned"
        out.mkdir(exist_ok=True)
        tuned = {}
        for name in before:
            tensor = before[name]
            tuned[name] = tensor + self.step(name, tensor) if tensor.is_floating_point() else tensor
        save_file(tuned, out / "model.safetensors")
        return TrainResult(out, self.num_examples)

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        return {"norm": float(Checkpoint(model_dir)["matrix"].norm())}


TOML = """
[federation]
name = "test"
[model]
base = "base"
[server]
listen = "127.0.0.1:0"
{server}
[rounds]
num_rounds = {num_rounds}
min_nodes = {min_nodes}
{rounds}
[train]
trainer = "text-classification"
{extra}
"""


def make_config(
    folder: Path,
    *,
    num_rounds: int = 1,
    min_nodes: int = 2,
    rounds: str = "grace_s = 60",
    server: str = "",
    extra: str = "",
) -> tuple[Config, Path]:
    """Write a fedmerge.toml beside a base model and return it, loaded, with its path.

    `rounds` and `server` are further lines of these sections, `extra` further sections.
    """
    if not (folder / "base").exists():
        make_base(folder / "base")
    text = TOML.format(num_rounds=num_rounds, min_nodes=min_nodes, rounds=rounds, server=server, extra=extra)
    path = folder / "fedmerge.toml"
    path.write_text(text)
    return parse_config(text, folder=folder, where="fedmerge.toml"), path


class ServerProcess:
    """`fedmerge serve` as a child process; `address` and `bundle` are what it announced."""

    def __init__(
        self, config_path: Path, *, listen: str = "127.0.0.1:0", environ: Mapping[str, str] | None = None
    ) -> None:
        folder = config_path.parent
        said, self.log = folder / f"serve-{len(list(folder.glob('serve-*.json')))}.json", folder / "serve.log"
        self.child = warm.fedmerge(
            "serve",
            config_path,
            "--json",
            folder=folder,
            environ={**os.environ, "FEDMERGE_SERVER__LISTEN": listen, "OMP_NUM_THREADS": "1", **(environ or {})},
            stdout=said,
            stderr=self.log,
        )
        while not (line := said.read_text()).endswith("\n"):
            assert self.child.poll() is None, self.log.read_text()
            time.sleep(0.01)
        ready = json.loads(line)
        self.address: str = ready["address"]
        self.bundle = Path(ready["bundle"])

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        self.child.send_signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> int:
        """Ask it to end, and return its exit code."""
        self.child.terminate()
        return self.wait()

    def wait(self) -> int:
        """Wait until it has ended, and return its exit code."""
        return self.child.wait(30)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for `condition`; fail when it does not come."""
    give_up_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.02)


@dataclass
class Federation:
    """A federation's folder and the keys of its nodes, which the coordinator trusts."""

    folder: Path
    config: Config
    config_path: Path
    keys: dict[str, SigningKey]

    def serve(self, *, listen: str = "127.0.0.1:0") -> ServerProcess:
        return ServerProcess(self.config_path, listen=listen)


def make_federation(folder: Path, names: tuple[str, ...] = ("north", "south"), **settings: object) -> Federation:
    """Make a federation whose coordinator trusts a new key for each of `names`."""
    config, path = make_config(folder, **settings)  # type: ignore[arg-type]
    keys = {name: SigningKey.generate() for name in names}
    for name, key in keys.items():
        TrustStore(config.federation.trusted).add(key.public, name)
    return Federation(folder, config, path, keys)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    # fp32, so that a payload has several leaves.
    return make_federation(tmp_path, extra="[delta]\nvalues = 'fp32'")


@pytest.fixture
def server(federation: Federation) -> Iterator[ServerProcess]:
    process = federation.serve()
    yield process
    if process.child.poll() is None:
        process.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server; the test is skipped where none is installed."""
    server = PostgresServer()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def bucket_server() -> Iterator[BucketServer]:
    """A server that speaks S3."""
    server = BucketServer()
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'deep' / 'ledger.sqlite'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()
