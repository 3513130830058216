"""What simulated nodes cost beside what they compute: our engines and Flower's simulation, in the same run.

    python benchmarks/scale.py [--quick] [--parts NAMES] [--limit S] [--json FILE]

Nodes are tiny (1,024 parameters, a step drawn at random), so that what is measured is everything else: for us keys,
signed plans and deltas, checks, the ledger, witnesses and signed models; for Flower messages, Ray and FedAvg. Beside
them stands the limit: importing torch, and of each node's round only signatures, transactions and files.
Each case runs in a process of its own. CPU seconds and memory (the sum of proportional set sizes) are those of that
process and all that it starts, Ray's included, sampled ten times a second; wall seconds are what a user waits for. A
round is the mean of the later ones, of five and with 1,000 nodes of three; start-up is what comes before the second,
less one round. --quick leaves 1,000 nodes out. Then 10,000 nodes, of which 100 are asked in each round; what late
rounds of a long federation cost beside early ones; and Flower's digits app with its own FedAvg and with our strategy
and mod. --parts takes some of overhead,many,long,digits. A case that fails, or has not ended after --limit seconds, is
left out, and why is said.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from processes import Sampler
from shared import at_least, at_most, print_table, report

ROOT = Path(__file__).parents[1]
NUM_ROUNDS, SHAPE = 5, (64, 16)
HEADINGS = ["nodes, engine", "CPU s: start-up", "round", "wall s: start-up", "round", "peak MB"]
CONFIG = """
[federation]
name = "scale"
[model]
base = "base"
[rounds]
num_rounds = {num_rounds}
min_nodes = {min_nodes}
{sample}
[simulate]
engine = "{engine}"
train_s = 100.0
spread = 0.5
"""


@dataclass(frozen=True)
class StepTrainer:
    """Adds a step drawn from its seed."""

    seed: int

    def check(self) -> None:
        """Accept anything."""

    def train(self, task: Any) -> Any:
        """Write the model plus the step."""
        import torch
        from safetensors.torch import save_file

        from fedmerge.tensors import Checkpoint
        from fedmerge.training import TrainResult

        before, out = Checkpoint(task.model_dir), task.workspace / "tuned"
        out.mkdir(exist_ok=True)
        step = torch.from_numpy(draw(self.seed))
        save_file({name: before[name] + step for name in before}, out / "model.safetensors")
        return TrainResult(out, 10)

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        """Have nothing to say."""
        return {}


def draw(seed: int) -> np.ndarray:
    return 0.01 * np.random.Generator(np.random.PCG64(seed)).standard_normal(SHAPE, dtype=np.float32)


class Marks:
    """When each round began, by the wall clock."""

    def __init__(self) -> None:
        self.at_s: dict[int, float] = {}

    def __call__(self, round_number: int) -> None:
        self.at_s.setdefault(round_number, time.time())


def ours(folder: Path, engine: str, num_nodes: int, num_rounds: int, sample: int) -> dict[str, Any]:
    """Simulate a federation."""
    import torch
    from safetensors.torch import save_file

    from fedmerge.config import parse_config
    from fedmerge.sim import open_engine, simulate

    (folder / "base").mkdir()
    save_file({"weight": torch.zeros(SHAPE)}, folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text("{}")
    asked = f"sample = {sample}" if sample else ""
    text = CONFIG.format(engine=engine, num_rounds=num_rounds, min_nodes=sample or num_nodes, sample=asked)
    config = parse_config(text, folder=folder, where="fedmerge.toml")
    marks = Marks()

    def on_event(name: str, event: Any) -> None:
        if event.kind == "encoded":
            marks(event.round)

    trainers = {f"node-{number:05}": StepTrainer(number) for number in range(num_nodes)}
    with closing(open_engine(config.simulate)) as opened:
        simulate(config, folder / "base", trainers, engine=opened, on_event=on_event)
    return {"marks": marks.at_s}


def limit(folder: Path, num_nodes: int, num_rounds: int) -> dict[str, Any]:
    """Do what is left when nothing is computed or checked: import torch, and for each node and round sign, and so on.

    A node signs its delta and cosigns the log, the coordinator signs a receipt and a checkpoint, each is verified;
    the ledger takes the delta and the cosignature; delta, statement, receipt and checkpoint are files of the node's,
    and the delta one of the coordinator's.
    """
    import sqlite3

    import torch  # noqa: F401
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, marks, said = Ed25519PrivateKey.generate(), Marks(), bytes(1500)
    public = key.public_key()
    with closing(sqlite3.connect(folder / "ledger.sqlite", isolation_level=None)) as ledger:
        ledger.execute("PRAGMA journal_mode = wal")
        ledger.execute("PRAGMA synchronous = off")
        ledger.execute("CREATE TABLE events (number INTEGER PRIMARY KEY, body BLOB)")
        for number in range(1, num_rounds + 1):
            marks(number)
            for node in range(num_nodes):
                for _ in range(4):
                    public.verify(key.sign(said), said)
                for _ in range(2):
                    ledger.execute("INSERT INTO events (body) VALUES (?)", (said,))
                home = folder / f"{number}-{node}"
                home.mkdir()
                for file in range(5):
                    (home / str(file)).write_bytes(said)
    return {"marks": marks.at_s}


def flower(folder: Path, num_nodes: int, num_rounds: int) -> dict[str, Any]:
    """Run FedAvg under Flower's simulation engine."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp.strategy import FedAvg

    client_app, marks = ClientApp(), Marks()

    @client_app.train()
    def train(message: Message, context: Any) -> Message:
        weight = message.content["arrays"]["weight"].numpy() + draw(int(context.node_config["partition-id"]))
        content = {"arrays": ArrayRecord({"weight": Array(weight)}), "metrics": MetricRecord({"num-examples": 10})}
        return Message(RecordDict(content), reply_to=message)

    class Marked(FedAvg):
        def configure_train(self, server_round: int, *arguments: Any) -> Iterable[Message]:
            marks(server_round)
            return super().configure_train(server_round, *arguments)

    strategy = Marked(fraction_evaluate=0.0, min_train_nodes=num_nodes, min_available_nodes=num_nodes)
    initial = ArrayRecord({"weight": Array(np.zeros(SHAPE, dtype=np.float32))})
    play(client_app, num_nodes, lambda grid: strategy.start(grid=grid, initial_arrays=initial, num_rounds=num_rounds))
    return {"marks": marks.at_s}


def play(client_app: Any, num_nodes: int, serve: Callable[[Any], Any]) -> None:
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    server_app = ServerApp()
    server_app.main()(lambda grid, context: serve(grid))
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"include_dashboard": False}}
    run_simulation(server_app, client_app, num_nodes, backend_config=resources)


def digits(folder: Path, method: str, codec: str, num_rounds: int) -> dict[str, Any]:
    """Run the digits app at ten sites, by Flower's FedAvg (method "flower") or ours."""
    sys.path.insert(0, str(ROOT / "clients" / "apps" / "flower"))
    import torch
    from digits.task import accuracy, load_site, make_model
    from digits.task import train as fit
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp.strategy import FedAvg

    from fedmerge.delta.codec import Codec
    from fedmerge.interop.flower import MergeStrategy, fedmerge_delta

    client_app, marks, num_sites = ClientApp(mods=[fedmerge_delta]), Marks(), 10
    num_bytes = []

    @client_app.train()
    def train(message: Message, context: Any) -> Message:
        site, model = int(context.node_config["partition-id"]), make_model()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        images, labels, _, _ = load_site(site, num_sites)
        torch.manual_seed(site)
        fit(model, images, labels, 2, 0.1)
        metrics = MetricRecord({"num-examples": len(labels)})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    class Counting:
        """Counts what clients send, and when rounds begin, whatever strategy it is mixed into."""

        def configure_train(self, server_round: int, *arguments: Any) -> Any:
            marks(server_round)
            return super().configure_train(server_round, *arguments)  # type: ignore[misc]

        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            replies = list(replies)
            records = [record for reply in replies for record in reply.content.array_records.values()]
            num_bytes.append(sum(len(array.data) for record in records for array in record.values()))
            return super().aggregate_train(server_round, replies)  # type: ignore[misc]

    options: dict[str, Any] = {
        "fraction_evaluate": 0.0, "min_train_nodes": num_sites, "min_available_nodes": num_sites
    }  # fmt: skip
    if method == "flower":
        strategy = type("Counted", (Counting, FedAvg), {})(**options)
    else:
        kind = type("Counted", (Counting, MergeStrategy), {})
        strategy = kind(method, codec=Codec(**CODECS[codec]) if codec in CODECS else None, **options)
    final: dict[str, Any] = {}

    def serve(grid: Any) -> None:
        initial = ArrayRecord(make_model().state_dict())
        result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=num_rounds)
        final.update(result.arrays.to_torch_state_dict())

    play(client_app, num_sites, serve)
    model = make_model()
    model.load_state_dict(final)
    _, _, images, labels = load_site(0, num_sites)
    return {"marks": marks.at_s, "accuracy": accuracy(model, images, labels), "sent_bytes": sum(num_bytes)}


CODECS: dict[str, dict[str, Any]] = {
    "int8": {},
    "topk": {"sparsify": "topk", "density": 0.1, "values": "int4", "block_size": 64, "small_elements": 0},
}
CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "ours": ours, "limit": limit, "flower": flower, "digits": digits
}  # fmt: skip
PARTS = ("overhead", "many", "long", "digits")
DIGITS = {
    "Flower's FedAvg": ("flower", "none"), "ours": ("fedavg", "none"), "ours, int8": ("fedavg", "int8"),
    "ours, topk 10 %, int4": ("fedavg", "topk"),
}  # fmt: skip


class Missing(Exception):
    """A case that came to nothing, and why."""


class Cases:
    """Runs cases, and remembers why some are missing."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.missing: list[str] = []

    def run(self, label: str, *case: str | int, num_rounds: int) -> dict[str, Any] | None:
        """Return a case's figures; None where there are none."""
        try:
            found = measure(*case, num_rounds=num_rounds, limit_s=self.limit_s)
        except Missing as err:
            self.missing.append(f"{label}: {err}")
            print(self.missing[-1], file=sys.stderr, flush=True)
            return None
        print(f"{label}: {' '.join(seconds(found))}", file=sys.stderr, flush=True)
        return found


def measure(case: str, *arguments: str | int, num_rounds: int, limit_s: float) -> dict[str, Any]:
    """Run a case in a process of its own; return its figures: seconds and CPU seconds, by the marks it left."""
    with tempfile.TemporaryDirectory(prefix="fedmerge-scale-") as folder:
        out = Path(folder) / "result.json"
        asked = json.dumps([*arguments])
        environ = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "FEDMERGE_LOG_LEVEL": "ERROR"}
        environ["RAY_worker_niceness"] = "0"  # else a busy machine makes Flower wait, and not us
        began_s = time.time()
        child = subprocess.Popen(
            [sys.executable, __file__, "--case", case, asked, folder, str(out)],
            env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        sampler = Sampler(child.pid)
        try:
            _, problems = child.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired as err:
            end(child)
            raise Missing(f"no end after {limit_s:.0f} s") from err
        finally:
            samples = sampler.stop()
        ended_s = time.time()
        if child.returncode:
            raise Missing(f"ended with {child.returncode}: {problems.strip()[-1000:]}")
        disk_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        found = json.loads(out.read_text())
    marks = {int(number): at_s for number, at_s in found.pop("marks").items()}
    times, cpu, memory = map(np.array, zip(*samples, strict=True))

    def split(value_at: Callable[[float], float], whole: float) -> dict[str, float]:
        per_round = (value_at(marks[num_rounds]) - value_at(marks[2])) / (num_rounds - 2)
        start_up = value_at(marks[2]) - per_round
        return {"start_up": start_up, "round": per_round, "whole": whole}

    growth = float(np.interp(marks[num_rounds], times, memory) - np.interp(marks[2], times, memory)) / (num_rounds - 2)
    spent = np.interp([marks[number] for number in sorted(marks)], times, cpu)
    return {
        **found,
        "cpu_s_by_round": np.diff(spent).tolist(),
        "cpu_s": split(lambda at_s: float(np.interp(at_s, times, cpu)), float(cpu[-1])),
        "wall_s": split(lambda at_s: at_s - began_s, ended_s - began_s),
        "peak_bytes": int(memory.max()),
        "disk_bytes": disk_bytes,
        "grown_bytes_per_round": growth,
    }


def end(child: subprocess.Popen[str]) -> None:
    """End a process with all that it started."""
    root = psutil.Process(child.pid)
    for process in [*root.children(recursive=True), root]:
        with suppress(psutil.Error):
            process.kill()
    child.communicate()


def exponent(values: dict[int, float]) -> float:
    """Return the slope of the line through the logarithms."""
    x, y = [math.log(n) for n in values], [math.log(max(value, 1e-3)) for value in values.values()]
    return float(np.polyfit(x, y, 1)[0])


def seconds(found: dict[str, Any]) -> list[str]:
    cpu, wall = found["cpu_s"], found["wall_s"]
    return [f"{cpu['start_up']:.1f}", f"{cpu['round']:.3f}", f"{wall['start_up']:.1f}", f"{wall['round']:.3f}",
            f"{found['peak_bytes'] / 1e6:.0f}"]  # fmt: skip


def shares(own: dict[str, Any], peer: dict[str, Any]) -> list[str]:
    """Return what a case of ours takes of what Flower's does, in the order of `seconds`."""
    kinds = [(kind, part) for kind in ("cpu_s", "wall_s") for part in ("start_up", "round")]
    return [f"{own[kind][part] / peer[kind][part]:.2f}" for kind, part in kinds]


def measure_overhead(cases: Cases, counts: list[int]) -> dict[str, dict[int, dict[str, Any]]]:
    """Measure our engines and Flower's with tiny nodes, and print."""
    found: dict[str, dict[int, dict[str, Any]]] = {"inline": {}, "pool": {}, "the limit": {}, "Flower": {}}
    for num_nodes in counts:
        for name, own in found.items():
            rounds = NUM_ROUNDS if num_nodes <= 100 else 3
            cases_of = {"Flower": ("flower", num_nodes, rounds), "the limit": ("limit", num_nodes, rounds)}
            case = cases_of.get(name, ("ours", name, num_nodes, rounds, 0))
            if (figures := cases.run(f"{num_nodes} {name}", *case, num_rounds=rounds)) is not None:
                own[num_nodes] = figures
    print_table(
        HEADINGS, [[f"{n} {name}", *seconds(own[n])] for n in counts for name, own in found.items() if n in own]
    )
    print("\nshare of Flower's:")
    peer = found["Flower"]
    ours = [(n, name) for n in counts for name in found if n in peer and n in found[name] and name != "Flower"]
    print_table(HEADINGS[:-1], [[f"{n} {name}", *shares(found[name][n], peer[n])] for n, name in ours])
    return found


def growth_of(found: dict[str, dict[int, dict[str, Any]]]) -> dict[str, float]:
    """Return by engine how a round's CPU seconds grow from 10 nodes on, as an exponent, and print it."""
    rounds = {name: {n: own[n]["cpu_s"]["round"] for n in own if n >= 10} for name, own in found.items()}
    growth = {name: exponent(values) for name, values in rounds.items() if len(values) > 1}
    print("growth of a round with the number of nodes:", ", ".join(f"{k} n^{v:.2f}" for k, v in growth.items()))
    return growth


def overhead_targets(found: dict[str, dict[int, dict[str, Any]]], growth: dict[str, float]) -> list[dict[str, Any]]:
    """Return how ours compares at 100 nodes: the run whole, and its parts; and how a round grows."""
    targets = []
    if 100 in found["inline"] and 100 in found["Flower"]:
        own, peer = found["inline"][100], found["Flower"][100]
        targets = [
            at_most(0.2, f"overhead at 100 nodes, {label}{unit}", own[kind][part] / peer[kind][part])
            for part, label in (("whole", ""), ("round", "a round, "), ("start_up", "start-up, "))
            for kind, unit in (("wall_s", "wall"), ("cpu_s", "CPU"))
        ]
    if "inline" in growth:
        targets.append(at_most(1.1, "growth of a round's CPU s with nodes, exponent", growth["inline"]))
    return targets


def measure_long(cases: Cases, num_rounds: int) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Run a hundred nodes for so many rounds; print what the last rounds cost beside those at a tenth of it."""
    found = cases.run("long inline", "ours", "inline", 100, num_rounds, 0, num_rounds=num_rounds)
    if found is None:
        return None, []
    by_round, tenth = found["cpu_s_by_round"], num_rounds // 10
    early, late = (float(np.median(by_round[begin:][:tenth])) for begin in (tenth, -tenth))
    disk = found["disk_bytes"] / num_rounds
    print(f"\n100 nodes, {num_rounds} rounds:")
    print_table(
        ["CPU s of a round: early", "late", "grows a round by: MB of memory", "MB of disk"],
        [[f"{early:.3f}", f"{late:.3f}", f"{found['grown_bytes_per_round'] / 1e6:.2f}", f"{disk / 1e6:.1f}"]],
    )
    return found, [
        at_most(1.5, "100 nodes, many rounds: CPU s of a late round, of an early one", late / early),
        at_most(0.5e6, "100 nodes, many rounds: bytes of memory that a round adds", found["grown_bytes_per_round"]),
    ]


def measure_digits(cases: Cases) -> dict[str, dict[str, Any]]:
    """Run Flower's digits app with its own FedAvg and with ours, and print."""
    found = {
        label: figures
        for label, case in DIGITS.items()
        if (figures := cases.run(f"digits, {label}", "digits", *case, 8, num_rounds=8)) is not None
    }
    print("\nFlower's digits app at ten sites, 8 rounds:")
    print_table(
        ["", "bytes sent", "CPU s", "CPU s, round", "wall s", "accuracy"],
        [
            [name, f"{one['sent_bytes']:,}", f"{one['cpu_s']['whole']:.1f}", f"{one['cpu_s']['round']:.2f}",
             f"{one['wall_s']['whole']:.0f}", f"{one['accuracy']:.3f}"]
            for name, one in found.items()
        ],
    )  # fmt: skip
    return found


def digits_targets(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the mod saves and costs."""
    peer, own = found.get("Flower's FedAvg"), found.get("ours, int8")
    if peer is None or own is None:
        return []
    return [
        at_least(3, "digits through the mod, int8: times fewer bytes", peer["sent_bytes"] / own["sent_bytes"]),
        at_most(0.01, "digits through the mod, int8: accuracy lost", peer["accuracy"] - own["accuracy"]),
    ]


def main() -> None:
    """Measure, print, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--limit", type=float, default=900.0, metavar="S")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        case, asked, folder, out = arguments.case
        Path(out).write_text(json.dumps(CASES[case](Path(folder), *json.loads(asked))))
        return
    parts, cases = arguments.parts.split(","), Cases(arguments.limit)
    targets: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    if "overhead" in parts:
        found = measure_overhead(cases, [2, 10, 100] if arguments.quick else [2, 10, 100, 1000])
        growth = growth_of(found)
        targets += overhead_targets(found, growth)
        figures |= {"overhead": {k: {str(n): v for n, v in own.items()} for k, own in found.items()}, "growth": growth}
    if "many" in parts:
        rounds = 4 if arguments.quick else 12
        many = cases.run("10000 inline", "ours", "inline", 10_000, rounds, 100, num_rounds=rounds)
        if many is not None:
            print(f"\n10,000 nodes, 100 asked in each of {rounds} rounds:")
            print_table(HEADINGS, [["10000 inline", *seconds(many)]])
            print(f"memory grows by {many['grown_bytes_per_round'] / 1e6:.1f} MB in a round")
            targets.append(at_most(1e9, "10,000 nodes: peak bytes", many["peak_bytes"]))
            figures["many"] = many
    if "long" in parts:
        figures["long"], more = measure_long(cases, 40 if arguments.quick else 200)
        targets += more
    if "digits" in parts:
        figures["digits"] = measure_digits(cases)
        targets += digits_targets(figures["digits"])
    for reason in cases.missing:
        print(f"\nmissing: {reason}")
    report(targets, {**figures, "missing": cases.missing}, arguments.json)


if __name__ == "__main__":
    main()
