"""Tables 1 and 4 of `results.py`: a language model trained by several nodes, by each rule and on unlike data.

The model, its start and the texts are those of `federated.py`, whose runs are longer and go by bytes; every run is a
federation in this process, by the coordinator's and the nodes' own code.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from federated import CONTEXT, Texts
from shared import DOMAINS, Runs, Sections, markdown, shown, toml, walk

from fedmerge.config import parse_config
from fedmerge.sim import simulate
from fedmerge.sim.partition import share_out
from fedmerge.training import Trainer, TrainTask
from fedmerge.trust.sign import SigningKey
from fedmerge.verify import verify_directory
from fedmerge_client.train.causal_lm import CausalLM

# Rounds and steps in table 1, nodes, rounds and steps in table 4.
ROUNDS, STEPS = 8, 20
NUM_NODES, NUM_ROUNDS, NUM_STEPS = 5, 6, 10
# Outer learning rates to choose from, each about 1.4 times the one before.
SGD_LRS, NESTEROV_LRS = (0.5, 0.7, 1.0, 1.4, 2.0), (0.25, 0.35, 0.5, 0.7, 1.0)
BATCH_SIZE = 8
TRAIN = {
    "trainer": "causal-lm",
    "batch_size": BATCH_SIZE,
    "context_length": CONTEXT,
    "lr": 1e-3,
    "warmup": 0.0,
    "num_threads": 1,
}
DENSE = {"values": "fp32", "downlink": "fp32"}
TOPK = {
    "sparsify": "topk",
    "density": 64 / 4096,
    "values": "sign",
    "block_size": 4096,
    "error_feedback": 0.95,
    "downlink": "int8",
}
# Two of the four nodes need three times as long.
SLOW = {"train_s": 100.0, "stragglers": 0.5, "straggler_factor": 3.0, "seed": 4}
POOLED = "pooled.txt"
ALL_DATA = "all data in one place"


@dataclass(frozen=True)
class Rule:
    """A way to train together: rounds of so many steps, and what its plan says beside; outer rates to choose from."""

    name: str
    num_rounds: int
    steps: int
    sections: Sections = field(default_factory=dict)
    lrs: tuple[float, ...] = (1.0,)

    def plan(self, lr: float, seed: int) -> Sections:
        """Return the sections of the plan."""
        plan: Sections = {
            "federation": {"name": "benchmark"},
            "model": {"base": "base"},
            "rounds": {"num_rounds": self.num_rounds, "min_nodes": 1, "grace_s": 3600},
            "train": {**TRAIN, "steps": self.steps},
            "delta": dict(DENSE),
            "merge": {"seed": seed},
            "screen": {"weighting": "equal"},
            "outer": {"lr": lr},
            "simulate": SLOW,
        }
        for name, section in self.sections.items():
            plan[name] = section if name == "delta" else plan.get(name, {}) | section
        return plan


def federation(
    rule: Rule, lr: float, seed: int, texts: Texts, trainers: Mapping[str, Trainer], *, num_points: int = 4
) -> dict[str, Any]:
    """Run one to its end; return losses by domain, and the mean loss, tokens and kB up of a node along the way."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = parse_config(toml(rule.plan(lr, seed)), folder=folder, where="plan")
        result = simulate(config, texts.base, trainers)
        key = SigningKey.load(config.federation.key).public
        _, history, _ = verify_directory(result.model_dir, {key.key_id: key})
        rounds = sorted({-(-rule.num_rounds * point // num_points) for point in range(1, num_points + 1)})
        tokens = num_bytes = 0
        curve = []
        for record in history.records:
            for one in record.contributions:
                plan = history.specs[history.deltas[one.statement_digest].spec_digest]
                tokens += (plan.num_steps(one.node_id) or 0) * plan.train["batch_size"] * CONTEXT
                num_bytes += one.payload_bytes
            if record.round in rounds:
                losses = texts.losses(config.federation.state / "models" / f"round-{record.round:04d}", "test")
                curve.append([record.round, tokens / len(trainers), num_bytes / len(trainers), mean(losses.values())])
        return {
            "validation": mean(texts.losses(result.model_dir, "validation").values()),
            "test": losses,
            "curve": curve,
            "down_bytes": result.fetched_bytes,
            "virtual_s": result.rounds[-1].published_s,
        }


class Bench:
    """Federations of the four nodes, and one model on all data."""

    def __init__(self, texts: Texts, runs: Runs) -> None:
        self.texts, self._runs = texts, runs

    def get(self, name: str, asked: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Return what a run came to; None where there was no time for it."""
        return self._runs.get(name, {**asked, "base": [self.texts.base_steps, self.texts.width], "train": TRAIN}, work)

    def run(self, rule: Rule, lr: float, seed: int) -> dict[str, Any] | None:
        """Run a federation of the four nodes."""
        trainers = {domain: self.texts.trainer(domain) for domain in DOMAINS}
        name = f"{rule.name}, lr {lr:g}, seed {seed}"
        return self.get(name, {"plan": rule.plan(lr, seed)}, lambda: federation(rule, lr, seed, self.texts, trainers))

    def best_lr(self, rule: Rule, seed: int) -> float | None:
        """Return the outer rate with the least validation loss, None where there was no time to look."""

        def loss(lr: float) -> float | None:
            found = self.run(rule, lr, seed)
            return found and found["validation"]

        return walk(rule.lrs, loss, start=len(rule.lrs) // 2)

    def pooled(self, num_steps: int, seed: int) -> dict[str, Any] | None:
        """Train one model on all data, with as many steps as a node takes and the batches of all four together."""

        def work() -> dict[str, Any]:
            curve = []
            with tempfile.TemporaryDirectory() as name:
                for part in range(1, 5):
                    settings = {key: value for key, value in TRAIN.items() if key != "trainer"}
                    settings |= {"batch_size": len(DOMAINS) * BATCH_SIZE, "steps": num_steps // 4}
                    workspace = Path(name) / str(part)
                    workspace.mkdir()
                    start = self.texts.base if part == 1 else Path(name) / str(part - 1) / "tuned"
                    state = None if part == 1 else Path(name) / str(part - 1) / "trainer-state"
                    task = TrainTask(start, settings, part, seed, workspace, num_rounds=4, previous_state=state)
                    tuned = CausalLM(data=self.texts.folder / POOLED).train(task).model_dir
                    losses = self.texts.losses(tuned, "test")
                    tokens = part * num_steps // 4 * TRAIN["batch_size"] * CONTEXT
                    curve.append([part, tokens, 0, mean(losses.values())])
            return {"test": losses, "curve": curve}

        return self.get(f"all data, seed {seed}", {"pooled": num_steps, "seed": seed}, work)


# --- 1. training together


def rules(num_rounds: int, steps: int) -> list[Rule]:
    late = {"async_buffer": 2, "max_staleness": 9, "dynamic_steps": 0.25}
    sparse: Sections = {"delta": TOPK, "merge": {"method": "contributor_mean"}}
    nesterov: Sections = {"outer": {"name": "nesterov"}}
    streaming: Sections = {**nesterov, "streaming": {"fragments": 4}}
    overlapping: Sections = {**nesterov, "streaming": {"fragments": 4, "mixing": 0.5, "overlap_steps": steps // 4}}
    delayed: Sections = {"outer": {"name": "delayed_nesterov", "delay": 2}, "rounds": late}
    more, fewer = 2 * num_rounds, steps // 2
    return [
        Rule("FedAvg", num_rounds, steps, {}, SGD_LRS),
        Rule("DiLoCo", num_rounds, steps, nesterov, NESTEROV_LRS),
        Rule("SparseLoCo: top 64 of 4096", more, fewer, sparse, SGD_LRS),
        Rule("streaming: 4 parts", more, fewer, streaming, NESTEROV_LRS),
        Rule(f"the same, {fewer // 2} steps of overlap", more, fewer, overlapping, NESTEROV_LRS),
        Rule("asynchronous", more, steps, delayed, NESTEROV_LRS),
    ]


def training_table(bench: Bench, seeds: Sequence[int], plots: Path | None, *, is_quick: bool) -> str:
    """Train by each rule what there is time for, draw the plots into `plots`, and return the table in Markdown."""
    print("1. training together")
    num_rounds, steps = (2, 2) if is_quick else (ROUNDS, STEPS)
    num_steps = num_rounds * steps
    wanted = [replace(rule, lrs=rule.lrs[2:3]) if is_quick else rule for rule in rules(num_rounds, steps)]
    # One after the other at the middle rate first, so that where time is short all have something.
    curves: dict[str, list[dict[str, Any]]] = {}
    first = bench.pooled(num_steps, seeds[0])
    for rule in wanted:
        bench.run(rule, rule.lrs[len(rule.lrs) // 2], seeds[0])
    lrs = {rule.name: bench.best_lr(rule, seeds[0]) for rule in wanted}
    curves[ALL_DATA] = [found for found in (first, *(bench.pooled(num_steps, seed) for seed in seeds[1:])) if found]
    for seed in seeds:
        for rule in wanted:
            lr = lrs[rule.name]
            found = None if lr is None else bench.run(rule, lr, seed)
            curves.setdefault(rule.name, []).extend([found] if found else [])
    base = mean(bench.texts.losses(bench.texts.base, "test").values())
    rows = [["the model they start from", "", "", "", "", f"{base:.3f}", ""]]
    pooled = curves[ALL_DATA]
    rows.append([ALL_DATA, f"{num_steps} steps", "", _kilo(pooled, 1), "", _losses(pooled), ""])
    for rule in wanted:
        runs, lr = curves[rule.name], lrs[rule.name]
        # A simulated round takes as long whatever its steps, and nothing else takes time.
        took = f"{mean(one['virtual_s'] for one in runs) * rule.steps / steps:,.0f} s" if runs else ""
        rate = "" if lr is None else f"{lr:g}"
        rounds = f"{rule.num_rounds} x {rule.steps}"
        rows.append([rule.name, rounds, rate, _kilo(runs, 1), _kilo(runs, 2), _losses(runs), took])
    if plots is not None:
        plot(curves, base, plots / "results-tokens.svg", 1, "tokens of a node, thousands")
        plot(curves, base, plots / "results-bytes.svg", 2, "kB that a node sent")
    headings = ["", "rounds x steps", "outer rate", "k tokens of a node", "kB up", "nats per byte", "simulated time"]
    return markdown(headings, rows)


def _losses(runs: Sequence[dict[str, Any]]) -> str:
    return shown([mean(one["test"].values()) for one in runs])


def _kilo(runs: Sequence[dict[str, Any]], column: int) -> str:
    return f"{mean(one['curve'][-1][column] for one in runs) / 1000:,.0f}" if runs else ""


def plot(curves: Mapping[str, list[dict[str, Any]]], base: float, file: Path, column: int, label: str) -> None:
    """Draw mean losses against a column of the curves, which is logarithmic where it has bytes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fedmerge", "font.size": 9})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, runs in curves.items():
        if not runs or not runs[0]["curve"][-1][column]:
            continue
        points = [
            (mean(point[column] for point in same) / 1000, mean(point[3] for point in same))
            for same in zip(*(one["curve"] for one in runs), strict=True)
        ]
        points = points if column == 2 else [(0.0, base), *points]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set_xlabel(label)
    axes.set_ylabel("test loss, nats per byte")
    if column == 2:
        axes.set_xscale("log")
    axes.legend(fontsize=7)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


# --- 4. unlike data, and part of the nodes


def unlike_table(bench: Bench, seeds: Sequence[int], *, is_quick: bool) -> str:
    """Run what there is time for on unlike data, and with part of the nodes; return the table in Markdown."""
    print("4. unlike data, and part of the nodes")
    texts, rows = bench.texts, []
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "all.jsonl"
        with source.open("w") as file:
            for domain in DOMAINS:
                text = (texts.folder / f"{domain}-train.txt").read_text()
                for start in range(0, len(text), 2048):
                    file.write(json.dumps({"text": text[start : start + 2048], "domain": domain}) + "\n")
        severities = [(0.1, 1.0), (1.0, 1.0), (10.0, 1.0), (0.1, 0.2), (0.1, 0.6), (10.0, 0.2)]
        for alpha, asked in severities[:1] if is_quick else severities:
            runs = []
            for seed in seeds:
                num_rounds, steps = (2, 2) if is_quick else (NUM_ROUNDS, NUM_STEPS)
                rule = Rule("", num_rounds, steps, {"rounds": {"sample": asked}} if asked < 1 else {})

                def work(rule: Rule = rule, alpha: float = alpha, seed: int = seed) -> dict[str, Any]:
                    files = [(Path(name) / f"node-{number}.jsonl", None) for number in range(NUM_NODES)]
                    share_out(source, files, "dirichlet", "domain", alpha=alpha, seed=seed, test_share=0.0)
                    trainers = {path.stem: CausalLM(data=path) for path, _ in files}
                    return federation(rule, 1.0, seed, texts, trainers, num_points=1)

                wanted = {"plan": rule.plan(1.0, seed), "alpha": alpha, "nodes": NUM_NODES}
                if found := bench.get(f"alpha {alpha:g}, {asked:.0%} asked, seed {seed}", wanted, work):
                    runs.append(found)
            rows.append([f"{alpha:g}", f"{asked:.0%}", _kilo(runs, 1), _losses(runs)])
    return markdown(["Dirichlet alpha", "nodes asked", "k tokens of a node", "nats per byte"], rows)
