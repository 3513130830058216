"""A coordinator as a child process, and nodes that upload by hand: what `load.py` and its parts share."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from processes import ONE_THREAD, status_bytes
from safetensors.torch import save_file
from shared import Sections, toml

from fedmerge.config import load_config
from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import write_delta
from fedmerge.delta.task_vector import delta_schema
from fedmerge.statements import DeltaStatement, RoundSpec, digest_of
from fedmerge.tensors import Checkpoint
from fedmerge.transparency.merkle import LEAF_BYTES, leaf_hash, leaves_of, merkle_root
from fedmerge.trust.keys import TrustStore
from fedmerge.trust.sign import SigningKey
from fedmerge.v1 import delta_pb2
from fedmerge.wire import Chunk
from fedmerge_client.link import GrpcLink

COLUMNS, LAYER_ROWS = 4096, 1024
# Random fp32 values, coded, take so many bytes each.
CODED_BYTES = 3.326
PLAN: Sections = {
    "federation": {"name": "load"},
    "model": {"base": "base"},
    "server": {"listen": "127.0.0.1:0"},
    "rounds": {"num_rounds": 1, "deadline_s": 86400},
    "delta": {"values": "fp32"},
}


class Usage(NamedTuple):
    """Wall seconds, and CPU seconds at either end."""

    wall_s: float
    client_s: float
    server_s: float

    @property
    def cpu_s(self) -> float:
        """CPU seconds at both ends."""
        return self.client_s + self.server_s


class Stopwatch:
    """Measures this process, and the one at the other end, if there is one."""

    def __init__(self, pid: int | None) -> None:
        self._other = psutil.Process(pid) if pid is not None else None
        self._began = self._now()

    def read(self) -> Usage:
        """Return what was used since it was made."""
        return Usage(*(now - then for now, then in zip(self._now(), self._began, strict=True)))

    def _now(self) -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time(), cpu_s(self._other) if self._other else 0.0


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def zeros(payload_bytes: int) -> dict[str, torch.Tensor]:
    """Return a model of layers, with as many parameters as make a delta of `payload_bytes`."""
    rows = max(1, round(payload_bytes / CODED_BYTES / COLUMNS))
    base = {"marker": torch.zeros(COLUMNS)}
    for first in range(0, rows, LAYER_ROWS):
        base[f"layer.{first // LAYER_ROWS}"] = torch.zeros(min(LAYER_ROWS, rows - first), COLUMNS)
    return base


class Site:
    """A federation in a folder with the model `base`, whose coordinator trusts `names`, and runs.

    Its one round waits for more nodes than there are, unless `plan` says otherwise, which replaces sections of `PLAN`
    or adds to them.
    """

    def __init__(
        self, folder: Path, names: Iterable[str], base: dict[str, torch.Tensor], plan: Sections | None = None
    ) -> None:
        self.folder = folder
        (folder / "base").mkdir(parents=True)
        save_file(base, folder / "base" / "model.safetensors")
        (folder / "base" / "config.json").write_text("{}")
        self.base = Checkpoint(folder / "base")
        self.keys = {name: SigningKey.generate() for name in names}
        default = PLAN | {"rounds": PLAN["rounds"] | {"min_nodes": len(self.keys) + 1}}
        plan = default | {name: default.get(name, {}) | section for name, section in (plan or {}).items()}
        (folder / "fedmerge.toml").write_text(toml(plan))
        self.config = load_config(folder / "fedmerge.toml")
        trust = TrustStore(self.config.federation.trusted)
        for name, key in self.keys.items():
            trust.add(key.public, name)
        self._log = (folder / "serve.log").open("wb")
        self.child = subprocess.Popen(
            [sys.executable, "-m", "fedmerge", "serve", str(folder / "fedmerge.toml"), "--json"],
            stdout=subprocess.PIPE, stderr=self._log, env={**os.environ, **ONE_THREAD},
        )  # fmt: skip
        assert self.child.stdout is not None
        ready = json.loads(self.child.stdout.readline())
        self.address, self.bundle = ready["address"], Path(ready["bundle"])
        self.process = psutil.Process(self.child.pid)

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.terminate()
        self.child.communicate(timeout=60)
        self._log.close()

    def link(self, name: str) -> GrpcLink:
        """Return a node's connection."""
        return GrpcLink(self.address, self.bundle, self.keys[name], patience_s=120)

    def memory(self, key: str = "VmRSS") -> int:
        """Return the coordinator's memory in bytes; `VmHWM` is the most that `VmRSS` ever was."""
        return status_bytes(self.child.pid, key)

    def command(self, *words: str) -> None:
        """Have an operator's command carried out."""
        command = [sys.executable, "-m", "fedmerge", *words]
        subprocess.run(
            command, check=True, cwd=self.folder, env={**os.environ, **ONE_THREAD}, stdout=subprocess.DEVNULL
        )

    def blob(self, root: str) -> Path:
        """Return where the coordinator keeps a file."""
        return self.config.federation.state / "blobs" / root[:2] / root

    def spec(self) -> tuple[RoundSpec, str]:
        """Return the plan of the open round, and its digest."""
        link = self.link(next(iter(self.keys)))
        view = next(view for view in link.watch() if view.spec_envelope)
        link.close()
        trusted = {link.coordinator.key_id: link.coordinator}
        spec, signed = RoundSpec.open(view.spec_envelope, trusted, where="spec")
        return spec, digest_of(signed.payload)


@dataclass(frozen=True)
class Payload:
    """A delta that shares its file with others, but for the leaves in `own`."""

    file: Path
    num_bytes: int
    leaves: list[bytes]
    own: dict[int, bytes]

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """Yield offsets and leaves."""
        with self.file.open("rb") as file:
            for number in range(len(self.leaves)):
                data = file.read(LEAF_BYTES)
                yield number * LEAF_BYTES, self.own.get(number, data)

    def leaf(self, number: int) -> bytes:
        """Return one leaf."""
        with self.file.open("rb") as file:
            file.seek(number * LEAF_BYTES)
            return self.own.get(number) or file.read(LEAF_BYTES)

    def write(self, path: Path) -> Path:
        """Write it to a file of its own."""
        with path.open("wb") as file:
            for _, data in self.chunks():
                file.write(data)
        return path

    @property
    def root(self) -> str:
        """The Merkle root."""
        return merkle_root(self.leaves).hex()


def payloads(site: Site, spec: RoundSpec, count: int) -> list[Payload]:
    """Make different deltas that all decode, in little more space than one takes: a single small tensor differs."""
    schema = delta_schema(site.base.schema)
    generator = torch.Generator().manual_seed(0)
    delta = {name: torch.randn(site.base[name].shape, generator=generator) for name in site.base}
    first, made = site.folder / "payload", []
    shared: list[bytes] = []
    for number in range(count):
        path = first if number == 0 else site.folder / "other-payload"
        delta["marker"].fill_(number + 1)
        write_delta(path, delta, schema, Codec.from_dict(spec.codec), seed=0)
        leaves, own = leaves_of(path), {}
        shared = shared or leaves
        assert path.stat().st_size == first.stat().st_size
        with path.open("rb") as file:
            for index in (i for i, pair in enumerate(zip(leaves, shared, strict=True)) if pair[0] != pair[1]):
                file.seek(index * LEAF_BYTES)
                own[index] = file.read(LEAF_BYTES)
                assert leaf_hash(own[index]) == leaves[index]
        made.append(Payload(first, path.stat().st_size, leaves, own))
    (site.folder / "other-payload").unlink(missing_ok=True)
    return made


def signed(payload: Payload, key: SigningKey, spec: RoundSpec, spec_digest: str) -> delta_pb2.BeginUploadRequest:
    """Return the statement that a node makes about its payload, as it begins an upload with it."""
    statement = DeltaStatement(
        federation=spec.federation,
        run=spec.run,
        round=spec.round,
        spec_digest=spec_digest,
        nonce=spec.nonce,
        base_digest=spec.model.digest,
        schema_digest=spec.schema_digest,
        node_id=key.public.key_id,
        submission_id=secrets.token_hex(16),
        codec=spec.codec,
        payload_bytes=payload.num_bytes,
        payload_root=payload.root,
        num_examples=1,
        metrics={},
        software="load",
    )
    return delta_pb2.BeginUploadRequest(envelope=statement.sign(key), leaf_hashes=b"".join(payload.leaves))


def upload(link: GrpcLink, begin: delta_pb2.BeginUploadRequest, payload: Payload) -> bytes:
    """Upload a payload as a link does, without its going on after breaks; return its upload's id."""
    upload_id = link.connection.call(lambda stubs: stubs.deltas.BeginUpload, begin).upload_id
    requests = (
        Chunk(delta_pb2.UploadDeltaRequest(upload_id=upload_id, offset=offset), data)
        for offset, data in payload.chunks()
    )
    link.connection.stubs.upload(requests, metadata=link.connection.metadata())
    return str(upload_id)


def commit(link: GrpcLink, upload_id: str) -> None:
    """Make an upload count."""
    link.connection.stubs.deltas.CommitDelta(
        delta_pb2.CommitDeltaRequest(upload_id=upload_id), metadata=link.connection.metadata()
    )
