"""How fast is a merge? CPU seconds to merge four task vectors or fine-tunes, beside what the machine allows.

    python benchmarks/merge.py [--quick] [--json FILE]

Makes a Llama-shaped base and four fine-tunes of random numbers on disk, in bf16 and in fp32, and times two jobs:

    deltas     four task vectors in, the merged one out: a coordinator's step 10
    models     base and four fine-tunes in, merged model out: read, subtract, merge, add to the base, write

Beside each method stand

    limit      one streaming pass over the same files that adds them up and writes the sum: what reading, converting,
               accumulating and writing cost, whoever does it
    naive      the method as one would write it in torch: stack the models, sort to find the threshold
    mergekit   the same merge by mergekit, less its start-up, where it is installed (fedmerge does not depend on it)

CPU seconds at one thread are compared, since those change little when others use the machine. The page cache is warm.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmerge.delta import UpdatedModel, subtract
from fedmerge.merge import METHODS, Recipe, merge_deltas
from fedmerge.tensors import DTYPES, WEIGHTS, Checkpoint, write_weights

NUM_NODES = 4
DENSITY = {"ties": 0.2, "dare_linear": 0.5, "dare_ties": 0.5}
LINEAR = ("fedavg", "task_arithmetic")
CHUNK_ELEMENTS = 1 << 17
REPEATS = 3


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


def write_models(folder: Path, sizes: dict[str, int], dtype: torch.dtype) -> list[Path]:
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
    for index in range(NUM_NODES + 1):
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


# --- fedmerge


def recipe_of(method: str) -> Recipe:
    return Recipe(method, {"density": DENSITY[method]} if method in DENSITY else {})


def merge_models(directories: list[Path], out: Path, method: str) -> None:
    base, *tuned = map(Checkpoint, directories)
    deltas = [subtract(model, base) for model in tuned]
    merged = dict(merge_deltas(deltas, [1 / NUM_NODES] * NUM_NODES, recipe_of(method), seed=1))
    write_weights(UpdatedModel(base, [merged]), out, {WEIGHTS: list(base)})


def merge_task_vectors(directories: list[Path], out: Path, method: str) -> None:
    """Merge the fine-tunes as if they were task vectors, which have the same size, into one of the same dtype."""
    deltas = [Checkpoint(directory) for directory in directories[1:]]
    merged = merge_deltas(deltas, [1 / NUM_NODES] * NUM_NODES, recipe_of(method), seed=1)
    dtype = DTYPES[next(iter(deltas[0].schema.values())).dtype]
    write_weights({name: update.to(dtype) for name, update in merged}, out, {WEIGHTS: list(deltas[0])})


# --- the limit


def open_flat(path: Path, dtype: torch.dtype) -> Tensor:
    """Map all tensors of a safetensors file as one vector."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    stored = np.int16 if dtype == torch.bfloat16 else np.float32
    return torch.from_numpy(np.memmap(path, stored, mode="c", offset=start)).view(dtype)


def stream(directories: list[Path], out: Path, dtype: torch.dtype) -> None:
    """Add up the models chunk by chunk in fp32, and write the sum in their dtype."""
    inputs = [open_flat(directory / WEIGHTS, dtype) for directory in directories]
    scratch = torch.empty(CHUNK_ELEMENTS)
    with (out / WEIGHTS).open("wb") as file:
        for start in range(0, inputs[0].numel(), CHUNK_ELEMENTS):
            parts = [one[start : start + CHUNK_ELEMENTS] for one in inputs]
            total = parts[0].to(torch.float32, copy=True)
            for part in parts[1:]:
                total.add_(scratch[: part.numel()].copy_(part), alpha=1 / NUM_NODES)
            file.write(total.to(dtype).view(torch.uint8).numpy().data)


# --- the methods as one would write them down


def naive_ties(stack: Tensor, weights: Tensor, density: float) -> Tensor:
    flat = stack.flatten(1)
    num_kept = max(1, int(density * flat.shape[1]))
    order = flat.abs().sort(dim=1, descending=True).indices
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order[:, :num_kept], True)
    return naive_disjoint_mean(torch.where(mask, flat, 0), weights).view(stack.shape[1:])


def naive_disjoint_mean(flat: Tensor, weights: Tensor) -> Tensor:
    sign = torch.where(flat.sum(0) >= 0, 1.0, -1.0)
    agrees = flat.sign() == sign
    total = (flat * weights[:, None] * agrees).sum(0)
    divisor = (agrees * weights[:, None]).sum(0)
    return total / torch.where(divisor == 0, 1, divisor)


def naive_dare(stack: Tensor, density: float) -> Tensor:
    return stack * torch.bernoulli(torch.full_like(stack, density)) / density


def naive(method: str, stack: Tensor, weights: Tensor) -> Tensor:
    if method == "ties":
        return naive_ties(stack, weights, DENSITY[method])
    if method == "dare_ties":
        return naive_disjoint_mean(naive_dare(stack, DENSITY[method]).flatten(1), weights).view(stack.shape[1:])
    thinned = naive_dare(stack, DENSITY[method]) if method == "dare_linear" else stack
    return (thinned * weights.view(-1, *[1] * (stack.ndim - 1))).sum(0)


def merge_naively(directories: list[Path], out: Path, method: str) -> None:
    base, *tuned = (load_file(directory / WEIGHTS) for directory in directories)
    weights = torch.full((NUM_NODES,), 1 / NUM_NODES)
    merged = {}
    for name, tensor in base.items():
        stack = torch.stack([one[name].float() - tensor.float() for one in tuned])
        merged[name] = (tensor.float() + naive(method, stack, weights)).to(tensor.dtype)
    save_file(merged, out / WEIGHTS)


# --- mergekit


MERGEKIT = [sys.executable, "-m", "mergekit.scripts.run_yaml"]


def merge_with_mergekit(directories: list[Path], out: Path, method: str) -> float:
    """Return the CPU seconds that mergekit takes, starting it included."""
    base, *tuned = map(str, directories)
    weight: dict[str, Any] = {"weight": 1 / NUM_NODES} | ({"density": DENSITY[method]} if method in DENSITY else {})
    config: dict[str, Any] = {
        "merge_method": "linear" if method == "fedavg" else method,
        "models": [{"model": model, "parameters": weight} for model in tuned],
        "dtype": json.loads((directories[0] / "config.json").read_text())["torch_dtype"],
    }
    if method != "fedavg":
        config["base_model"] = base
    # JSON is YAML.
    (out / "config.yml").write_text(json.dumps(config))
    return cpu_of_children_s([*MERGEKIT, str(out / "config.yml"), str(out), "--no-copy-tokenizer", "--quiet"])


def cpu_of_children_s(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# --- the comparison


def cpu_s(work: Callable[[Path], None], folder: Path, repeats: int = 1) -> float:
    """Return the CPU seconds of `work` on an empty output directory, the least of `repeats`."""
    measured = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(dir=folder) as out:
            start = time.process_time()
            work(Path(out))
            measured.append(time.process_time() - start)
    return min(measured)


def compare(
    dtype_name: str, sizes: dict[str, int], folder: Path, mergekit_start_s: float | None
) -> list[dict[str, Any]]:
    """Print the two tables of one dtype, and return the targets they are held to."""
    dtype = getattr(torch, dtype_name)
    directories = write_models(folder / dtype_name, sizes, dtype)
    file_bytes = (directories[0] / WEIGHTS).stat().st_size
    num_parameters = sum(spec.num_elements for spec in Checkpoint(directories[0]).schema.values())
    print(f"\n{dtype_name}, {num_parameters / 1e6:.1f} M parameters, {NUM_NODES} nodes")
    targets = []

    input_bytes = file_bytes * NUM_NODES
    limit_s = cpu_s(lambda out: stream(directories[1:], out, dtype), folder, REPEATS)
    print(f"\ndeltas: {input_bytes / 1e9:.2f} GB in; limit {limit_s:.2f} CPU s, {input_bytes / limit_s / 1e9:.2f} GB/s")
    print(f"{'CPU s':<16} {'fedmerge':>9} {'GB/s':>7} {'x limit':>8}")
    for method in METHODS:
        ours_s = cpu_s(partial(merge_task_vectors, directories, method=method), folder, REPEATS)
        print(f"{method:<16} {ours_s:>9.2f} {input_bytes / ours_s / 1e9:>7.2f} {ours_s / limit_s:>8.1f}")
        if method in LINEAR:
            targets.append(at_most(2.0, f"{method} of {dtype_name} deltas: CPU time over the limit", ours_s / limit_s))

    input_bytes += file_bytes
    limit_s = cpu_s(lambda out: stream(directories, out, dtype), folder, REPEATS)
    print(f"\nmodels: {input_bytes / 1e9:.2f} GB in; limit {limit_s:.2f} CPU s, {input_bytes / limit_s / 1e9:.2f} GB/s")
    print(f"{'CPU s':<16} {'fedmerge':>9} {'GB/s':>7} {'x limit':>8} {'naive':>8} {'speed-up':>9} {'mergekit':>9}")
    for method in METHODS:
        ours_s = cpu_s(partial(merge_models, directories, method=method), folder, REPEATS)
        naive_s = cpu_s(partial(merge_naively, directories, method=method), folder)
        theirs = "-"
        if mergekit_start_s is not None:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                theirs = f"{merge_with_mergekit(directories, Path(out), method) - mergekit_start_s:.2f}"
        print(
            f"{method:<16} {ours_s:>9.2f} {input_bytes / ours_s / 1e9:>7.2f} {ours_s / limit_s:>8.1f} "
            f"{naive_s:>8.2f} {naive_s / ours_s:>8.1f}x {theirs:>9}"
        )
        if method in LINEAR:
            targets.append(at_most(2.0, f"{method} of {dtype_name} models: CPU time over the limit", ours_s / limit_s))
        if method == "ties":
            targets.append(at_least(3.0, f"ties of {dtype_name} models: times faster than sorting", naive_s / ours_s))
    return targets


def at_most(goal: float, name: str, value: float) -> dict[str, Any]:
    return {"name": name, "value": round(value, 3), "goal": goal, "holds": value <= goal}


def at_least(goal: float, name: str, value: float) -> dict[str, Any]:
    return {"name": name, "value": round(value, 3), "goal": goal, "holds": value >= goal}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="28 M parameters instead of 300 M; about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the targets and whether they are met")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    mergekit_start_s = None
    if arguments.quick:
        print("mergekit is left out: on a small model its start-up hides the merge")
    elif importlib.util.find_spec("mergekit") is None:
        print("mergekit is not installed, so its column stays empty (pip install mergekit)")
    else:
        mergekit_start_s = min(cpu_of_children_s([*MERGEKIT, "--help"]) for _ in range(REPEATS))
    sizes = {"hidden": 1024, "ffn": 2816, "num_layers": 20, "vocab": 32_000}
    if arguments.quick:
        # One layer with tensors of full size: small ones would measure Python.
        sizes |= {"num_layers": 1, "vocab": 8_000}
    targets = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype_name in ("bfloat16", "float32"):
            targets += compare(dtype_name, sizes, Path(folder), mergekit_start_s)

    print()
    for one in targets:
        print(f"{'met   ' if one['holds'] else 'MISSED'}  {one['name']}: {one['value']:.2f} (goal {one['goal']:g})")
    if arguments.json:
        arguments.json.write_text(json.dumps({"targets": targets}, indent=2) + "\n")


if __name__ == "__main__":
    main()
