"""How late a coordinator answers while it merges: unary calls over TLS, every 20 ms, from a process of their own.

    python benchmarks/responsive.py [--quick] [--json FILE] [--method NAME]

Four nodes deliver deltas of a model of 50 million parameters in fp32 (--quick: 12 million); the coordinator screens,
merges, and publishes. What is timed is `BeginSession`, the call that needs nothing but the event loop. The peer is the
same coordinator in the same run while it waits for nodes. Latency is wall time: a busy machine makes all of it worse,
and the row of the peer says how much.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

import grpc
import numpy as np
import torch
from codec import Target
from safetensors.torch import save_file

from fedmerge.config import load_config
from fedmerge.node.node import Node
from fedmerge.sim.inline import prepare_nodes
from fedmerge.store.ledger import Ledger
from fedmerge.tensors import Checkpoint
from fedmerge.training import TrainResult, TrainTask
from fedmerge.trust.certificates import TLS_NAME
from fedmerge.v1 import session_pb2, session_pb2_grpc
from fedmerge_client.link import GrpcLink

NODES = ("north", "east", "south", "west")
INTERVAL_S = 0.02
GOAL_S = 0.05
CONFIG = """
[federation]
name = "responsive"
[model]
base = "base"
[rounds]
num_rounds = 1
min_nodes = 4
[merge]
method = "{method}"
"""


class NoiseTrainer:
    """Adds noise to every tensor."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def check(self) -> None:
        """Accept anything."""

    def train(self, task: TrainTask) -> TrainResult:
        """Write the base plus noise."""
        base, generator = Checkpoint(task.model_dir), torch.Generator().manual_seed(self._seed)
        tuned = {name: base[name] + 0.01 * torch.randn(base[name].shape, generator=generator) for name in base}
        out = task.workspace / "tuned"
        out.mkdir(exist_ok=True)
        save_file(tuned, out / "model.safetensors")
        return TrainResult(out, 10)

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        """Have nothing to say."""
        return {}


def ping(address: str, bundle: Path, out: Path) -> None:
    """Call until the parent closes stdin; write when each call was sent and how long it took."""
    pem = bundle.read_bytes()
    end = b"-----END CERTIFICATE-----"
    credentials = grpc.ssl_channel_credentials(pem[: pem.index(end) + len(end)] + b"\n")
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    times: list[tuple[float, float]] = []
    with grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", TLS_NAME)]) as channel:
        stub = session_pb2_grpc.SessionServiceStub(channel)
        stub.BeginSession(session_pb2.BeginSessionRequest())
        while not stop.wait(INTERVAL_S):
            sent_s, began_s = time.time(), time.perf_counter()
            stub.BeginSession(session_pb2.BeginSessionRequest())
            times.append((sent_s, time.perf_counter() - began_s))
    out.write_text(json.dumps(times))


def measure(folder: Path, num_parameters: int, method: str) -> dict[str, np.ndarray]:
    """Run a round and return the latencies while waiting for nodes and while merging, in seconds."""
    rows = num_parameters // 4096 // 8
    generator = torch.Generator().manual_seed(0)
    (folder / "base").mkdir()
    tensors = {f"layer.{n}.weight": torch.randn(rows, 4096, generator=generator) for n in range(8)}
    save_file(tensors, folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text("{}")
    path = folder / "fedmerge.toml"
    path.write_text(CONFIG.format(method=method))
    config = load_config(path)
    keys = prepare_nodes(config, list(NODES))
    environ = {**os.environ, "FEDMERGE_SERVER__LISTEN": "127.0.0.1:0", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "fedmerge", "serve", str(path), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ, text=True,
    )  # fmt: skip
    assert server.stdout is not None
    ready = json.loads(server.stdout.readline())
    address, bundle = ready["address"], Path(ready["bundle"])
    out = folder / "times.json"
    pinger = subprocess.Popen(
        [sys.executable, __file__, "--ping", address, str(bundle), str(out)], stdin=subprocess.PIPE
    )
    time.sleep(10)

    def take_part(number: int, name: str) -> None:
        link = GrpcLink(address, bundle, keys[name])
        Node(link, NoiseTrainer(number), keys[name], link.coordinator, folder / name, base=folder / "base").run()
        link.close()

    threads = [threading.Thread(target=take_part, args=(number, name)) for number, name in enumerate(NODES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pinger.communicate()
    server.terminate()
    server.wait()
    times = np.array(json.loads(out.read_text()))
    ledger = Ledger(config.federation.state / "ledger.sqlite")
    at_s = {entry.event.kind: entry.at_s for entry in ledger.entries}
    ledger.close()
    merging = (times[:, 0] >= at_s["round_sealed"]) & (times[:, 0] <= at_s["round_published"])
    print(f"merged and published in {at_s['round_published'] - at_s['round_sealed']:.1f} s")
    return {"waiting": times[times[:, 0] < times[0, 0] + 9, 1], "merging": times[merging, 1]}


def main() -> None:
    """Measure, print, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--method", default="ties")
    parser.add_argument("--ping", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ping:
        address, bundle, out = arguments.ping
        ping(address, Path(bundle), Path(out))
        return
    with tempfile.TemporaryDirectory(prefix="fedmerge-responsive-") as scratch:
        found = measure(Path(scratch), 12_500_000 if arguments.quick else 50_000_000, arguments.method)
    print(f"{'':10}{'calls':>8}{'p50 ms':>10}{'p99 ms':>10}{'max ms':>10}")
    rows = {}
    for name, seconds in found.items():
        p50, p99 = np.quantile(seconds, [0.5, 0.99])
        rows[name] = {"calls": len(seconds), "p50_s": p50, "p99_s": p99, "max_s": seconds.max()}
        print(f"{name:10}{len(seconds):8}{1e3 * p50:10.1f}{1e3 * p99:10.1f}{1e3 * seconds.max():10.1f}")
    p99 = rows["merging"]["p99_s"]
    target = Target("p99 of a call while merging, s, at most", p99, GOAL_S, bool(p99 <= GOAL_S))
    print(f"{target.name}: {target.value:.3f}, goal {target.goal}: {'reached' if target.holds else 'MISSED'}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "targets": [asdict(target)]}, indent=2, default=float))


if __name__ == "__main__":
    main()
