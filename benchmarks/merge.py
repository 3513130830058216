"""How fast is a merge, and in how much memory? Beside mergekit, Flower, plain torch and what the machine allows.

    python benchmarks/merge.py [--quick] [--json FILE] [--mergekit DIR] [--keep DIR] [--parts PARTS]

Every case runs in a process of its own, one after the other, on one thread, with a warm page cache. Measured are its
CPU seconds and the most anonymous memory it holds, both above what it takes to start: imports, and kernels from their
cache.

    models   Llama-shaped base and four fine-tunes on disk, bf16, merged model out; GB/s is input over CPU time
    others   the same in fp32, and with eight fine-tunes, but for tsv
    deltas   the same fine-tunes as delta files, but for tsv
    fedavg   clients of 500 MB each, beside the FedAvg aggregation of Flower (if MemAvailable has room for it)
    growth   exponents fitted to CPU time and memory, over the number of fine-tunes and the number of parameters

`--mergekit` names the environment that mergekit is in, and makes it if it is not there. What starting mergekit takes is
measured and taken off. `--quick` merges 28 M parameters instead of 300 M. With `--keep DIR` peers are measured once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from merge_peers import DENSITY, NAIVE, NOT_THEIRS, Mergekit, merge_as_flower, merge_naively
from processes import ONE_THREAD, Cost, run_alone, status_bytes
from safetensors.torch import save_file
from shared import Kept, at_least, at_most, report

from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import DeltaFile, write_delta
from fedmerge.delta.task_vector import subtract
from fedmerge.merge import Recipe, merge_deltas, merge_models
from fedmerge.models.weights import writing_weights
from fedmerge.tensors import WEIGHTS, Checkpoint, TensorMap

NUM_NODES = 4
METHOD_NAMES = (
    "fedavg",
    "task_arithmetic",
    "ties",
    "dare_ties",
    "della",
    "breadcrumbs",
    "model_stock",
    "karcher",
    "tsv",
)
LINEAR = ("fedavg", "task_arithmetic")
# Minutes of LAPACK's singular values, which nobody else here computes: measured on the first set of models alone.
REPEATED = tuple(method for method in METHOD_NAMES if method != "tsv")
FIRST = ("bfloat16", NUM_NODES)
# Of mergekit's CPU seconds, at most so much; the other methods are shown only.
SHARE_OF_MERGEKIT = dict.fromkeys(LINEAR, 1 / 2) | dict.fromkeys(DENSITY, 1 / 5)
# Repeated, to take the cheapest, is what is over within so many CPU seconds.
SHORT_S = 20.0
REPEATS = 2


# --- the models


def llama_shapes(hidden: int, ffn: int, num_layers: int, vocab: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": (hidden // 2, hidden),
            f"{prefix}self_attn.v_proj.weight": (hidden // 2, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}mlp.gate_proj.weight": (ffn, hidden),
            f"{prefix}mlp.up_proj.weight": (ffn, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, ffn),
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
        }
    return shapes | {"model.norm.weight": (hidden,)}


def write_models(folder: Path, sizes: dict[str, int], dtype: torch.dtype, num_nodes: int) -> list[Path]:
    """Write a base and fine-tunes of it, and return their directories, the base first."""
    generator = torch.Generator().manual_seed(0)
    shapes = llama_shapes(**sizes)
    base = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": sizes["vocab"],
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    directories = []
    for index in range(num_nodes + 1):
        directory = folder / ("base" if index == 0 else f"ft{index}")
        directory.mkdir(parents=True)
        tensors = {
            name: (tensor + torch.randn(tensor.shape, generator=generator) * 1e-3 * (index > 0)).to(dtype)
            for name, tensor in base.items()
        }
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config))
        directories.append(directory)
    return directories


# --- one case in a process of its own


def measure(case: str, *, repeats: int = 1, folder: Path | None = None, **arguments: Any) -> Cost:
    """Run a function of `CASES` in a new process, on an empty folder `out`; return the cheapest of `repeats`."""
    found: list[Cost] = []
    while len(found) < repeats and (not found or found[-1].cpu_s < SHORT_S):
        with tempfile.TemporaryDirectory(dir=folder) as out:
            text = json.dumps({"case": case, "arguments": arguments | {"out": out}})
            whole, line = run_alone([sys.executable, __file__, "--case", text], dict(os.environ) | ONE_THREAD)
            own = json.loads(line)
            found.append(Cost(own["cpu_s"], own["wall_s"], max(0, whole.anonymous_bytes - own["before_bytes"])))
    return min(found)


def run_case(text: str) -> None:
    """Be the process of a case."""
    torch.set_num_threads(1)
    given = json.loads(text)
    work, arguments = CASES[given["case"]](**given["arguments"]), given["arguments"]
    if "method" in arguments:
        for dtype in (torch.bfloat16, torch.float32):
            tiny = {"w": torch.randn(8, 8).to(dtype)}
            recipe = recipe_of(arguments["method"])
            exhaust(merge_models([subtract(tiny, tiny)] * 2, [0.5, 0.5], recipe, tiny, lambda *_: None))
    before_bytes, cpu, wall = status_bytes("self"), time.process_time(), time.perf_counter()
    work()
    took = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall, "before_bytes": before_bytes}
    print(json.dumps(took))


def recipe_of(method: str) -> Recipe:
    return Recipe(method, {"density": DENSITY[method]} if method in DENSITY else {})


def merge_case(
    directories: list[str], out: str, method: str, threads: int = 1, keep: bool = True
) -> Callable[[], None]:
    """Merge model directories, the base first, and write the outcome, or only compute it."""
    base, *tuned = (Checkpoint(Path(directory)) for directory in directories)
    return lambda: merge_to(out if keep else None, base, [subtract(one, base) for one in tuned], method)


def merge_to(out: str | None, base: Checkpoint, deltas: Sequence[TensorMap], method: str) -> None:
    weights, recipe = [1 / len(deltas)] * len(deltas), recipe_of(method)
    if out is None:
        exhaust(merge_models(deltas, weights, recipe, base, lambda *_: None, seed=1))
        return
    with writing_weights(Path(out), base.schema, base.shards()) as writer:
        exhaust(merge_models(deltas, weights, recipe, base, writer.write, seed=1))


def exhaust(steps: Iterator[object]) -> None:
    for _ in steps:
        pass


def deltas_case(base: str, files: list[str], codec: dict[str, Any], out: str, method: str) -> Callable[[], None]:
    """Merge delta files, add to the base and write."""
    origin = Checkpoint(Path(base))
    made = Codec.from_dict(codec)
    deltas = [DeltaFile(Path(file), origin.schema, made, seed=seed) for seed, file in enumerate(files)]
    return lambda: merge_to(out, origin, deltas, method)


def naive_case(directories: list[str], out: str, method: str) -> Callable[[], None]:
    return lambda: merge_naively([Path(directory) for directory in directories], Path(out), method)


def fedavg_case(directories: list[str], out: str, method: str) -> Callable[[], None]:
    """Average clients' parameters, one tensor in memory at a time."""
    clients = [Checkpoint(Path(directory)) for directory in directories]

    def work() -> None:
        with writing_weights(Path(out), clients[0].schema, clients[0].shards()) as writer:
            for name, tensor in merge_deltas(clients, [1.0] * len(clients), recipe_of(method)):
                writer.write(name, 0, tensor.view(-1))

    return work


def flower_case(directories: list[str], out: str) -> Callable[[], None]:
    return lambda: merge_as_flower(directories, Path(out))


def read_case(directories: list[str], out: str) -> Callable[[], None]:
    """Read the files from the page cache into one small buffer."""
    buffer = bytearray(1 << 20)

    def work() -> None:
        for directory in directories:
            with (Path(directory) / WEIGHTS).open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return work


def write_case(num_bytes: int, out: str) -> Callable[[], None]:
    """Write so many bytes to a new file."""
    data = bytes(1 << 17)

    def work() -> None:
        with (Path(out) / WEIGHTS).open("wb", buffering=0) as file:
            for _ in range(num_bytes // len(data)):
                file.write(data)

    return work


def copy_case(num_bytes: int, out: str) -> Callable[[], None]:
    """Copy so many bytes in memory that was touched before, as often as it takes."""
    source, target = np.ones(1 << 26, dtype=np.uint8), np.zeros(1 << 26, dtype=np.uint8)

    def work() -> None:
        for _ in range(num_bytes // source.nbytes):
            np.copyto(target, source)

    return work


CASES: dict[str, Callable[..., Callable[[], None]]] = {
    "merge": merge_case,
    "deltas": deltas_case,
    "naive": naive_case,
    "fedavg": fedavg_case,
    "flower": flower_case,
    "read": read_case,
    "write": write_case,
    "copy": copy_case,
}


# --- the parts

Targets = list[dict[str, Any]]


@dataclass(frozen=True)
class Peers:
    """What we are measured beside; what was measured is kept."""

    mergekit: Mergekit | None
    kept: Kept

    def cost(self, asked: dict[str, Any], work: Callable[[], Cost]) -> Cost:
        """Return what something took when it was asked for before, or takes now."""
        return Cost(**self.kept.get(asked, lambda: work()._asdict()))


def compare_models(folder: Path, sizes: dict[str, int], num_nodes: int, dtype_name: str, peers: Peers) -> Targets:
    """Print the table of one dtype and number of fine-tunes."""
    directories = write_models(folder, sizes, getattr(torch, dtype_name), num_nodes)
    names = [str(directory) for directory in directories]
    schema = Checkpoint(directories[0]).schema
    file_bytes = (directories[0] / WEIGHTS).stat().st_size
    input_bytes, largest = file_bytes * len(directories), max(spec.num_elements for spec in schema.values())
    read = measure("read", directories=names, repeats=REPEATS)
    write = measure("write", num_bytes=file_bytes, repeats=REPEATS, folder=folder)
    copy = measure("copy", num_bytes=2 << 30, repeats=REPEATS)
    read_rate = input_bytes / read.cpu_s / 1e9
    num_parameters = sum(spec.num_elements for spec in schema.values())
    print(
        f"\n{dtype_name}, {num_parameters / 1e6:.0f} M parameters, {num_nodes} fine-tunes, {input_bytes / 1e9:.2f} GB; "
        f"page cache read {read_rate:.1f} GB/s, written {file_bytes / write.cpu_s / 1e9:.1f}, "
        f"copied {(2 << 30) / copy.cpu_s / 1e9:.1f}; reading and writing alone {read.cpu_s + write.cpu_s:.2f} CPU s"
    )
    print(
        f"{'':<16} {'CPU s':>7} {'wall s':>7} {'MB':>6} {'stacks':>6} {'GB/s':>6} {'unwritten':>9}"
        f" {'naive s':>8} {'mergekit s':>10} {'wall s':>7} {'MB':>6} {'ratio':>6}"
    )
    targets = []
    for method in METHOD_NAMES if (dtype_name, num_nodes) == FIRST else REPEATED:
        ours = measure("merge", directories=names, method=method, repeats=REPEATS, folder=folder)
        stacks = ours.anonymous_bytes / (4 * num_nodes * largest)
        rate, computed_rate = f"{input_bytes / ours.cpu_s / 1e9:.2f}", "-"
        where = f"{method}, {num_nodes} {dtype_name} models"
        targets.append(at_most(4, f"{where}: memory, in stacks of the largest tensor", stacks))
        if method in LINEAR:
            computed = measure("merge", directories=names, method=method, repeats=REPEATS, keep=False)
            computed_rate = f"{input_bytes / computed.cpu_s / 1e9:.2f}"
            share = read.cpu_s / computed.cpu_s
            targets.append(at_least(0.5, f"{where}: of the page cache's read rate", share))
        asked = {"method": method, "sizes": sizes, "num_nodes": num_nodes, "dtype": dtype_name}
        naive = "-"
        if method in NAIVE:
            cost = peers.cost({"naive": asked}, lambda m=method: measure("naive", directories=names, method=m))
            naive = f"{cost.cpu_s:.2f}"
        line = (
            f"{method:<16} {ours.cpu_s:>7.2f} {ours.wall_s:>7.2f} {ours.anonymous_bytes / 1e6:>6.0f} {stacks:>6.2f}"
            f" {rate:>6} {computed_rate:>9} {naive:>8}"
        )
        if (mergekit := peers.mergekit) is not None and method not in NOT_THEIRS:
            theirs = peers.cost({"mergekit": asked}, lambda m=method: mergekit.merge(directories, folder, m))
            line += f" {theirs.cpu_s:>10.2f} {theirs.wall_s:>7.2f} {theirs.anonymous_bytes / 1e6:>6.0f}"
            line += f" {ours.cpu_s / theirs.cpu_s:>6.3f}"
            if method in SHARE_OF_MERGEKIT:
                goal, share = SHARE_OF_MERGEKIT[method], ours.cpu_s / theirs.cpu_s
                targets.append(at_most(goal, f"{where}: of mergekit's CPU seconds", share))
        print(line, flush=True)
    return targets


CODECS = {
    "int8": {"values": "int8"},
    "seeded 10 %, int8": {"values": "int8", "sparsify": "seeded", "density": 0.1},
    "topk 64 of 4096, sign": {"values": "sign", "sparsify": "topk", "density": 64 / 4096},
}


def compare_deltas(folder: Path, sizes: dict[str, int]) -> Targets:
    """Print what merging delta files costs; there is no peer that reads them."""
    directories = write_models(folder, sizes, torch.bfloat16, NUM_NODES)
    base = Checkpoint(directories[0])
    num_parameters = sum(spec.num_elements for spec in base.schema.values())
    print(f"\n{NUM_NODES} delta files of {num_parameters / 1e6:.0f} M parameters; CPU s, and MB of memory")
    print(f"{'':<24}" + "".join(f"{method:>22}" for method in REPEATED))
    for label, settings in CODECS.items():
        codec, files = Codec.from_dict(Codec(**settings).to_dict()), []
        for seed, directory in enumerate(directories[1:]):
            files.append(folder / f"{seed}.delta")
            write_delta(files[-1], subtract(Checkpoint(directory), base), base.schema, codec, seed=seed)
        line = f"{label:<24}"
        for method in REPEATED:
            arguments = {"base": str(directories[0]), "files": list(map(str, files)), "codec": codec.to_dict()}
            cost = measure("deltas", method=method, folder=folder, **arguments)
            line += f"{cost.cpu_s:>14.2f}{cost.anonymous_bytes / 1e6:>8.0f}"
        print(line, flush=True)
    return []


def compare_fedavg(folder: Path, num_clients: int, client_bytes: int, peers: Peers) -> Targets:
    """Print FedAvg beside Flower's."""
    side = 2048
    num_tensors = max(1, client_bytes // (4 * side * side))
    for client in range(num_clients):
        (folder / f"{client}").mkdir(parents=True)
        generator = torch.Generator().manual_seed(client)
        tensors = {f"{i:03d}": torch.randn(side, side, generator=generator) for i in range(num_tensors)}
        save_file(tensors, folder / f"{client}" / WEIGHTS)
    names = [str(folder / f"{client}") for client in range(num_clients)]
    ours = measure("fedavg", directories=names, method="fedavg", repeats=REPEATS, folder=folder)
    # Flower holds what came in, and each of it once more, weighted.
    needed_bytes = 2.2 * num_clients * client_bytes
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    available_bytes = next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable"))
    where = f"FedAvg of {num_clients} x {client_bytes / 1e6:.0f} MB"
    print(f"\n{where}: {ours.cpu_s:.2f} CPU s, {ours.anonymous_bytes / 1e6:.0f} MB", end="", flush=True)
    if needed_bytes > available_bytes:
        print(f"; Flower left out: it needs {needed_bytes / 1e9:.0f} GB of memory")
        return []
    asked = {"flower": {"num_clients": num_clients, "client_bytes": client_bytes}}
    theirs = peers.cost(asked, lambda: measure("flower", directories=names, folder=folder))
    print(f"; Flower {theirs.cpu_s:.2f} CPU s, {theirs.anonymous_bytes / 1e6:.0f} MB")
    return [
        at_most(1 / 3, f"{where}: of Flower's CPU seconds", ours.cpu_s / theirs.cpu_s),
        at_most(1 / 10, f"{where}: of Flower's memory", ours.anonymous_bytes / theirs.anonymous_bytes),
    ]


def exponent(sizes: list[float], costs: list[float]) -> float:
    """Return the slope of a straight line through the logarithms, by least squares."""
    return float(np.polyfit([math.log(size) for size in sizes], [math.log(max(cost, 1e-9)) for cost in costs], 1)[0])


def measure_growth(folder: Path, quick: bool) -> Targets:
    """Print how cost grows with the number of fine-tunes, and of parameters."""
    targets = []
    sizes = {"hidden": 1024, "ffn": 2816, "num_layers": 1, "vocab": 8000}
    nodes = [2, 4, 8, 16] if quick else [2, 4, 8, 16, 32]
    directories = [str(one) for one in write_models(folder / "nodes", sizes, torch.bfloat16, nodes[-1])]
    layers = [1, 4] if quick else [1, 8, 20, 76]
    for method in ("task_arithmetic", "ties"):
        over_nodes = [
            measure("merge", directories=directories[: k + 1], method=method, repeats=REPEATS, folder=folder)
            for k in nodes
        ]
        slope = exponent(list(map(float, nodes)), [cost.cpu_s for cost in over_nodes])
        print(f"\n{method} over {nodes} fine-tunes: exponent {slope:.2f}")
        print(f"  {[round(cost.cpu_s, 2) for cost in over_nodes]} CPU s")
        print(f"  memory {[round(cost.anonymous_bytes / 1e6) for cost in over_nodes]} MB")
        targets.append(at_most(1.1, f"{method}: growth of CPU time with the number of fine-tunes", slope))
    over_sizes: dict[str, list[tuple[float, Cost]]] = {"task_arithmetic": [], "ties": []}
    for num_layers in layers:
        with tempfile.TemporaryDirectory(dir=folder) as inner:
            made = write_models(Path(inner), sizes | {"num_layers": num_layers}, torch.bfloat16, 2)
            num_parameters = (made[0] / WEIGHTS).stat().st_size / 2
            for method, found in over_sizes.items():
                cost = measure("merge", directories=list(map(str, made)), method=method, repeats=REPEATS, folder=folder)
                found.append((num_parameters, cost))
    for method, found in over_sizes.items():
        slope = exponent([size for size, _ in found], [cost.cpu_s for _, cost in found])
        print(f"{method} over {[round(size / 1e6) for size, _ in found]} M parameters: exponent {slope:.2f}")
        print(f"  memory {[round(cost.anonymous_bytes / 1e6) for _, cost in found]} MB")
        targets.append(at_most(1.1, f"{method}: growth of CPU time with the number of parameters", slope))
    return targets


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="28 M parameters instead of 300 M")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the targets and whether they are met")
    parser.add_argument("--mergekit", type=Path, metavar="DIR", help="mergekit's environment, made if it is not there")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep what peers took in DIR, and take that there")
    parser.add_argument("--parts", default="models,others,deltas,fedavg,growth", help="which parts to run")
    parser.add_argument("--folder", type=Path, help="where to put models meanwhile (full: 12 GB) [default: /tmp]")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run_case(arguments.case)
        return
    parts = arguments.parts.split(",")
    mergekit = Mergekit(arguments.mergekit.absolute()) if arguments.mergekit else None
    if mergekit is None:
        print("mergekit is left out (--mergekit DIR)")
    # One layer with tensors of full size: small ones would measure Python.
    sizes = {"hidden": 1024, "ffn": 2816, "num_layers": 1, "vocab": 8_000}
    if not arguments.quick:
        sizes |= {"num_layers": 20, "vocab": 32_000}
    jobs: list[Callable[[Path, Peers], Targets]] = []
    sets = [FIRST] if "models" in parts else []
    if "others" in parts:
        sets += [("float32", 4)] if arguments.quick else [("float32", 4), ("bfloat16", 8), ("float32", 8)]
    jobs += [lambda f, p, d=d, n=n: compare_models(f, sizes, n, d, p) for d, n in sets]
    if "deltas" in parts:
        jobs.append(lambda folder, _: compare_deltas(folder, sizes))
    if "fedavg" in parts:
        client_bytes = (100 if arguments.quick else 500) * 10**6
        jobs += [lambda f, p, n=n: compare_fedavg(f, n, client_bytes, p) for n in (8, 16)]
    if "growth" in parts:
        jobs.append(lambda folder, _: measure_growth(folder, arguments.quick))
    targets: Targets = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        peers = Peers(mergekit, Kept(arguments.keep or Path(scratch) / "kept"))
        for job in jobs:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                targets += job(Path(folder), peers)
    report(targets, {}, arguments.json)


if __name__ == "__main__":
    main()
