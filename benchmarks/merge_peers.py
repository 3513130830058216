"""What merges are measured beside: mergekit, Flower's aggregation, and methods as one writes them in plain torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from processes import ONE_THREAD, Cost, run_alone
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmerge.tensors import WEIGHTS

DENSITY = {"ties": 0.2, "dare_ties": 0.5, "della": 0.5, "breadcrumbs": 0.85}
NAIVE = ("fedavg", "ties", "dare_ties")

# --- plain torch, as one would write it down


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
    weights = torch.full((len(tuned),), 1 / len(tuned))
    merged = {}
    for name, tensor in base.items():
        stack = torch.stack([one[name].float() - tensor.float() for one in tuned])
        merged[name] = (tensor.float() + naive(method, stack, weights)).to(tensor.dtype)
    save_file(merged, out / WEIGHTS)


# --- Flower


def merge_as_flower(directories: Sequence[str], out: Path) -> None:
    """Average clients as Flower's strategies do, from arrays in memory; reading is in the price."""
    from flwr.server.strategy.aggregate import aggregate

    results = []
    for directory in directories:
        tensors = load_file(Path(directory) / WEIGHTS)
        # As they come from a message: in memory of their own.
        results.append(([tensors[name].numpy().copy() for name in sorted(tensors)], 1))
    merged = aggregate(results)
    save_file({f"{i}": torch.from_numpy(array) for i, array in enumerate(merged)}, out / WEIGHTS)


# --- mergekit

PINS = ("mergekit==0.1.5", "torch==2.13.0")
THEIR_NAMES = {"fedavg": "linear"}
NOT_THEIRS = {"tsv"}


class Mergekit:
    """mergekit in an environment of its own, made in `folder` if it is not there: its pins do not agree with ours."""

    def __init__(self, folder: Path) -> None:
        python = folder / "bin" / "python"
        if not python.exists():
            print(f"installing {' '.join(PINS)} in {folder}", flush=True)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PINS], check=True)
        self._command = [str(python), "-m", "mergekit.scripts.run_yaml"]
        self._environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | ONE_THREAD
        self._start = min(run_alone([*self._command, "--help"], self._environment)[0] for _ in range(2))

    def merge(self, directories: list[Path], folder: Path, method: str) -> Cost:
        """Return what a merge costs above what it takes to start."""
        base, *tuned = map(str, directories)
        weight: dict[str, Any] = {"weight": 1 / len(tuned)} | (
            {"density": DENSITY[method]} if method in DENSITY else {}
        )
        config: dict[str, Any] = {
            "merge_method": THEIR_NAMES.get(method, method),
            "models": [{"model": model, "parameters": weight} for model in tuned],
            "dtype": json.loads((directories[0] / "config.json").read_text())["torch_dtype"],
        }
        if method != "fedavg":
            config["base_model"] = base
        with tempfile.TemporaryDirectory(dir=folder) as out:
            # JSON is YAML.
            (Path(out) / "config.yml").write_text(json.dumps(config))
            arguments = [f"{out}/config.yml", out, "--no-copy-tokenizer", "--quiet"]
            whole = run_alone([*self._command, *arguments], self._environment)[0]
        return Cost(*(took - start for took, start in zip(whole, self._start, strict=True)))
