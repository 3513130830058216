"""Streaming DiLoCo and asynchronous rounds as they are deployed: coordinator and nodes in processes of their own."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from fedmerge.store.blobs import BlobStore
from fedmerge.tensors import Checkpoint
from fedmerge.trust.keys import TrustStore
from fedmerge.verify import History, replay, verify_directory
from tests import warm
from tests.conftest import make_federation
from tests.e2e.test_federation import coordinator_key
from tests.e2e.test_outer_trajectories import INNER_LR, INNER_STEPS, streaming, target_of

LOSSLESS = "[delta]\nvalues = 'fp32'\ndownlink = 'fp32'\n"
SEEDS = {"north": 1, "south": 2}
CODE = f"""
import time
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.zeros(60, 50))
        self.vector = torch.nn.Parameter(torch.zeros(60))

def train(model, work):
    seed, pause_s = int(work.options["seed"]), float(work.options["pause_s"])
    with torch.no_grad():
        for parameter in model.parameters():
            target = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            for _ in range(work.settings["steps"]):
                parameter -= {INNER_LR} * (parameter - target)
    time.sleep(pause_s * work.settings["steps"])
    return 10
"""


def federate(
    folder: Path, *, num_rounds: int, num_steps: int, rounds: str, extra: str, pauses_s: dict[str, float]
) -> History:
    """Run coordinator and nodes as processes to the end; return what the last published model tells."""
    (folder / "own_training.py").write_text(CODE)
    (folder / "base").mkdir()
    generator = torch.Generator().manual_seed(9)
    tensors = {"matrix": torch.randn(60, 50, generator=generator), "vector": torch.randn(60, generator=generator)}
    save_file(tensors, folder / "base/model.safetensors")
    min_nodes = 1 if "async_buffer" in rounds else 2
    extra = f"steps = {num_steps}\n{extra}"
    made = make_federation(folder, num_rounds=num_rounds, min_nodes=min_nodes, rounds=rounds, extra=extra)
    text = made.config_path.read_text().replace('"text-classification"', '"torch"')
    made.config_path.write_text(text)
    server = made.serve()
    nodes = []
    try:
        for name, pause_s in pauses_s.items():
            home = folder / name
            made.keys[name].save(home / "node.key")
            words = ["join", "--coordinator", server.address, "--trust", server.bundle, "--home", home]
            words += ["--trainer", "torch", "--option", f"folder={folder}", "--option", "model=own_training:Model"]
            words += ["--option", "function=own_training:train"]
            words += ["--option", f"options.seed={SEEDS[name]}", "--option", f"options.pause_s={pause_s}"]
            log, environ = folder / f"{name}.log", {**os.environ, "OMP_NUM_THREADS": "1"}
            nodes.append(warm.fedmerge(*words, folder=folder, environ=environ, stdout=log, stderr=log))
        codes = [node.wait(120) for node in nodes]
        assert codes == [0, 0], [(folder / f"{name}.log").read_text() for name in pauses_s]
    finally:
        for node in nodes:
            node.kill()
        server.stop()
    _, history, checks = verify_directory(folder / f"state/models/round-{num_rounds:04d}", coordinator_key(folder))
    assert all(check.passed for check in checks if check.name in {"signature", "files", "version", "history"})
    assert replay(history, Checkpoint(folder / "base"), BlobStore(folder / "state/blobs")).passed
    return history


def doubles(folder: Path, number: int = 0) -> dict[str, torch.Tensor]:
    """Return a published version, that of 0 the base, in fp64."""
    model = Checkpoint(folder / (f"state/models/round-{number:04d}" if number else "base"))
    return {name: model[name].double() for name in model}


def test_streaming_diloco(tmp_path: Path) -> None:
    outer = "[outer]\nname = 'nesterov'\nlr = 0.7\n[streaming]\nfragments = 2\nmixing = 0.5\n"
    federate(
        tmp_path,
        num_rounds=4,
        num_steps=INNER_STEPS,
        rounds="grace_s = 60",
        extra=LOSSLESS + outer,
        pauses_s=dict.fromkeys(SEEDS, 0.0),
    )
    expected = streaming(doubles(tmp_path), ["matrix", "vector"], [list(SEEDS.values())] * 4, 0.5)
    for number, version in enumerate(expected, start=1):
        for name, tensor in doubles(tmp_path, number).items():
            assert float((tensor - version[name]).norm() / tensor.norm()) < 1e-6, (name, number)


def test_asynchronous_rounds_with_a_slow_node(tmp_path: Path) -> None:
    rounds = "async_buffer = 1\nmax_staleness = 9\ndynamic_steps = 0.25"
    outer = "[outer]\nname = 'delayed_nesterov'\nlr = 0.5\nmomentum = 0.8\ndelay = 2\n"
    history = federate(
        tmp_path,
        num_rounds=8,
        num_steps=20,
        rounds=rounds,
        extra=LOSSLESS + outer,
        pauses_s={"north": 0.03, "south": 0.12},
    )
    names = TrustStore(tmp_path / "trusted").names()
    slow = next(key_id for key_id, name in names.items() if name == "south")
    assert any(spec.steps.get(slow, 20) < 20 for spec in history.specs.values())  # DyLU
    versions = [doubles(tmp_path, number) for number in range(9)]
    theta = dict(versions[0])
    buffer, momentum = ({name: torch.zeros_like(tensor) for name, tensor in theta.items()} for _ in range(2))
    for number, record in enumerate(history.records, start=1):
        for name, tensor in theta.items():
            g = torch.zeros_like(tensor)
            for one in record.contributions:
                spec = history.specs[history.deltas[one.statement_digest].spec_digest]
                num_steps, start = spec.num_steps(one.node_id), versions[spec.round - 1][name]
                assert num_steps is not None
                moved = 1 - (1 - INNER_LR) ** num_steps
                target = target_of(SEEDS[names[one.node_id]], start.float()).double()
                g += moved * (start - target) / math.sqrt(1 + one.staleness) / len(record.contributions)
            # The server's loop of arXiv 2401.09135's delayed Nesterov, with c = 0 and n = 2.
            buffer[name] = buffer[name] + g
            step = g / 2
            if number % 2 == 0:
                momentum[name] = 0.8 * momentum[name] + buffer[name] / 2
                step, buffer[name] = step + 0.8 * momentum[name], torch.zeros_like(g)
            theta[name] = tensor - 0.5 * step
            found = versions[number][name]
            assert float((found - theta[name]).norm() / found.norm()) < 1e-5, (name, number)
