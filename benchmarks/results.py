"""What federations come to beside each other, and beside one model trained on all data: writes docs/results.md.

    FEDMERGE_DATA=DIR python benchmarks/results.py [--quick] [--json FILE] [--keep DIR] [--write docs] [--minutes N]

The models are byte-level Llamas of 4 layers and 64 channels, the nodes those of `federated.py`, each with another kind
of text; every run is a federation in this process, by the coordinator's and the nodes' own code. The page's tables are:

1. Training together: one model on all data, FedAvg, DiLoCo, SparseLoCo's top-k with error feedback, Streaming DiLoCo,
   and asynchronous rounds with two slow nodes (delayed Nesterov, DyLU): loss against tokens and bytes. The outer
   learning rate of each is searched for on validation text with one seed.
2. Experts on four kinds of text merged once by each method that needs no data, and over three rounds: the share of each
   expert's gain that the merged model keeps on its text. (3 is `lora.py`'s.)
4. How unlike the nodes' data are (Dirichlet), and how many of the nodes take part in a round.

Finished runs are kept in DIR, and after N CPU minutes no further one begins: what is missing is marked as such.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from federated import CONTEXT, DOMAINS, Texts
from shared import Kept, report

from fedmerge.config import parse_config
from fedmerge.delta import UpdatedModel, subtract
from fedmerge.merge import METHODS, Recipe, merge_deltas
from fedmerge.merge.methods import NEEDS_STATISTICS
from fedmerge.sign import SigningKey
from fedmerge.sim import simulate
from fedmerge.sim.partition import share_out
from fedmerge.tensors import Checkpoint
from fedmerge.training import Trainer, TrainTask
from fedmerge.verify import verify_directory
from fedmerge.versions import write_model
from fedmerge_client.train.causal_lm import CausalLM

WIDTH, BASE_STEPS = 64, 150
SEEDS = (1, 2)
SEARCH_SEED = SEEDS[0]
# The rounds and the steps in each of table 1, a node's steps in table 2, nodes and rounds in table 4.
ROUNDS, STEPS, EXPERT_STEPS = 8, 6, 24
NUM_NODES, NUM_ROUNDS = 5, 6
TRAIN = {
    "trainer": "causal-lm",
    "batch_size": 8,
    "context_length": CONTEXT,
    "lr": 2e-3,
    "warmup": 0.0,
    "num_threads": 1,
}
DENSE = {"values": "fp32", "downlink": "fp32"}
TOPK = {
    "sparsify": "topk",
    "density": 32 / 4096,
    "values": "sign",
    "block_size": 4096,
    "error_feedback": 0.95,
    "downlink": "int8",
}
# Two of the four nodes need three times as long.
SLOW = {"train_s": 100.0, "stragglers": 0.5, "straggler_factor": 3.0, "seed": 4}
# Methods that need data, or two models, or models in order of time, or are another's name.
NOT_HERE = {*NEEDS_STATISTICS, "slerp", "nuslerp", "ema", "lawa", "swa", "linear", "contributor_mean"}
# Of each kind of text, of which all runs together read less.
TEXT_CHARACTERS, POOLED = 250_000, "pooled.txt"
UNFINISHED = "unfinished"

Sections = dict[str, dict[str, Any]]


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


def toml(plan: Sections) -> str:
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in section.items())
        for name, section in plan.items()
    )


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
    """Runs that are done once, while there is time."""

    def __init__(self, texts: Texts, kept: Kept, most_s: float) -> None:
        self.texts, self.kept, self._most_s = texts, kept, most_s

    def get(self, name: str, asked: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Return what a run came to; None where there was no time for it."""
        asked = {**asked, "base": [self.texts.base_steps, WIDTH], "train": TRAIN}
        start = time.process_time()
        if start > self._most_s and not self.kept.has(asked):
            return None
        found = self.kept.get(asked, work)
        print(f"  {name}: {mean(found['test'].values()):.4f} ({time.process_time() - start:.0f} CPU s)", flush=True)
        return found

    def run(self, rule: Rule, lr: float, seed: int) -> dict[str, Any] | None:
        """Run a federation of the four nodes."""
        trainers = {domain: self.texts.trainer(domain) for domain in DOMAINS}
        asked = {"plan": rule.plan(lr, seed)}
        name = f"{rule.name}, lr {lr:g}, seed {seed}"
        return self.get(name, asked, lambda: federation(rule, lr, seed, self.texts, trainers))

    def tuned(self, rule: Rule) -> tuple[str, list[dict[str, Any]]]:
        """Return the rate with the least validation loss, of how many, and the runs with it that there was time for."""
        tried = {lr: self.run(rule, lr, SEARCH_SEED) for lr in rule.lrs}
        done = {lr: found["validation"] for lr, found in tried.items() if found is not None}
        if not done:
            return "", []
        best = min(done, key=lambda lr: done[lr])
        runs = [self.run(rule, best, seed) for seed in SEEDS]
        return f"{best:g} of {len(done)}", [found for found in runs if found is not None]

    def pooled(self, num_steps: int, seed: int) -> dict[str, Any] | None:
        """Train one model on all data, with as many steps as a node takes and the batches of all four together."""

        def work() -> dict[str, Any]:
            curve = []
            with tempfile.TemporaryDirectory() as name:
                for part in range(1, 5):
                    settings = {key: value for key, value in TRAIN.items() if key != "trainer"}
                    settings |= {"batch_size": 4 * TRAIN["batch_size"], "steps": num_steps // 4}
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


def shown(values: Sequence[float], digits: int = 3) -> str:
    """Return a mean, with the standard deviation where there are several."""
    if not values:
        return UNFINISHED
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else " (one seed)"
    return f"{mean(values):.{digits}f}{spread}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- 1. training together


def rules(num_rounds: int, steps: int) -> list[Rule]:
    nesterov = {"name": "nesterov"}
    late = {"async_buffer": 2, "max_staleness": 9, "dynamic_steps": 0.25}
    delayed = {"name": "delayed_nesterov", "delay": 2}
    sparse: Sections = {"delta": TOPK, "merge": {"method": "contributor_mean"}}
    streaming = {"fragments": 4}
    return [
        Rule("FedAvg", num_rounds, steps, {}, (1.0, 1.5)),
        Rule("DiLoCo", num_rounds, steps, {"outer": nesterov}, (0.35, 0.6)),
        Rule("SparseLoCo: top 32 of 4096", num_rounds, steps, sparse, (1.0, 1.5)),
        Rule(
            "streaming: 4 parts", 2 * num_rounds, steps // 2, {"outer": nesterov, "streaming": streaming}, (0.35, 0.6)
        ),
        Rule("asynchronous", 2 * num_rounds, steps, {"outer": delayed, "rounds": late}, (0.35, 0.6)),
    ]


def training_together(bench: Bench, num_rounds: int, steps: int, plots: Path | None) -> str:
    print("1. training together")
    base = mean(bench.texts.losses(bench.texts.base, "test").values())
    rows = [["the model they start from", "", "", "", "", f"{base:.3f}", ""]]
    num_steps = num_rounds * steps
    pooled = [found for seed in SEEDS if (found := bench.pooled(num_steps, seed))]
    curves = {"all data in one place": pooled}
    rows.append(["all data in one place", f"{num_steps} steps", "", _kilo(pooled, 1), "", _losses(pooled), ""])
    for rule in rules(num_rounds, steps):
        lr, runs = bench.tuned(rule)
        curves[rule.name] = runs
        # A simulated round takes as long whatever its steps, and nothing else takes time.
        took = f"{mean(one['virtual_s'] for one in runs) * rule.steps / steps:,.0f} s" if runs else ""
        rounds = f"{rule.num_rounds} x {rule.steps}"
        rows.append([rule.name, rounds, lr, _kilo(runs, 1), _kilo(runs, 2), _losses(runs), took])
    if plots is not None:
        plot(curves, base, plots / "results-tokens.svg", 1, "tokens of a node, thousands")
        plot(curves, base, plots / "results-bytes.svg", 2, "kB that a node sent")
    headings = ["", "rounds x steps", "outer rate", "k tokens of a node", "kB up", "nats per byte", "simulated time"]
    return table(headings, rows)


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


# --- 2. experts merged


def experts_merged(bench: Bench, num_steps: int) -> str:
    print("2. experts merged")
    texts, methods = bench.texts, [name for name in METHODS if name not in NOT_HERE]
    base = texts.losses(texts.base, "test")
    own: dict[int, dict[str, float]] = {}
    once: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as name:
            tuned = Tuned(texts, Path(name), num_steps, seed)
            found = bench.get(f"experts, seed {seed}", {"experts": num_steps, "seed": seed}, tuned.own)
            if found is None:
                break
            own[seed] = found["test"]
            for method in methods:
                asked = {"experts": num_steps, "seed": seed, "method": method}
                if merged := bench.get(f"{method}, seed {seed}", asked, partial(tuned.merged, method)):
                    once[method].append({**merged, "seed": seed})

    def kept(runs: Sequence[dict[str, Any]]) -> list[str]:
        shares = [
            [(base[d] - one["test"][d]) / (base[d] - own[one["seed"]][d]) for d in DOMAINS]
            for one in runs
            if one["seed"] in own
        ]
        cells = [f"{100 * mean(share):.0f}" for share in zip(*shares, strict=True)] or [UNFINISHED, *[""] * 3]
        return [*cells, shown([100 * mean(share) for share in shares], 1) if shares else ""]

    rows = [["once", name, *kept(runs)] for name, runs in once.items()]
    rows.sort(key=lambda row: -float(row[-1].split()[0] or 0) if row[-1] else 1e9)
    for method in ("fedavg", "ties", "rda"):
        rule = Rule(f"3 rounds, {method}", 3, num_steps // 3, {"merge": {"method": method}})
        runs = [{**found, "seed": seed} for seed in SEEDS if (found := bench.run(rule, 1.0, seed))]
        rows.append(["3 rounds", method, *kept(runs)])
    together = {seed: bench.pooled(num_steps, seed) for seed in SEEDS}
    pooled = [{**found, "seed": seed} for seed, found in together.items() if found]
    rows.append(["all data in one place", "", *kept(pooled)])
    return table(["", "method", *DOMAINS, "mean, %"], rows)


class Tuned:
    """Experts, trained when the first of them is asked for."""

    def __init__(self, texts: Texts, folder: Path, num_steps: int, seed: int) -> None:
        self.texts, self.folder, self._num_steps, self._seed = texts, folder, num_steps, seed

    def model(self, domain: str) -> Path:
        workspace = self.folder / domain
        if not (workspace / "tuned").exists():
            workspace.mkdir()
            settings = {key: value for key, value in TRAIN.items() if key != "trainer"} | {"steps": self._num_steps}
            self.texts.trainer(domain).train(TrainTask(self.texts.base, settings, 1, self._seed, workspace))
        return workspace / "tuned"

    def own(self) -> dict[str, Any]:
        """Return each expert's loss on its own text."""
        return {"test": {d: self.texts.trainer(d, "test").evaluate(self.model(d))["loss"] for d in DOMAINS}}

    def merged(self, method: str) -> dict[str, Any]:
        """Return the losses of all experts merged at equal weights, with the method's defaults."""
        base, target = Checkpoint(self.texts.base), self.folder / method
        deltas = [subtract(Checkpoint(self.model(domain)), base) for domain in DOMAINS]
        merged = dict(merge_deltas(deltas, [1.0] * len(DOMAINS), Recipe(method), base=base, seed=self._seed))
        write_model(UpdatedModel(base, [merged]), base, target)
        return {"test": self.texts.losses(target, "test")}


# --- 4. unlike data, and part of the nodes


def unlike_nodes(bench: Bench) -> str:
    print("4. unlike data, and part of the nodes")
    texts, rows = bench.texts, []
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "all.jsonl"
        with source.open("w") as file:
            for domain in DOMAINS:
                text = (texts.folder / f"{domain}-train.txt").read_text()
                for start in range(0, len(text), 2048):
                    file.write(json.dumps({"text": text[start : start + 2048], "domain": domain}) + "\n")
        for alpha, asked in [(0.1, 1.0), (1.0, 1.0), (10.0, 1.0), (0.1, 0.2), (0.1, 0.6), (10.0, 0.2)]:
            runs = []
            for seed in SEEDS:
                rule = Rule("", NUM_ROUNDS, 6, {"rounds": {"sample": asked}} if asked < 1 else {})

                def work(rule: Rule = rule, alpha: float = alpha, seed: int = seed) -> dict[str, Any]:
                    files = [(Path(name) / f"node-{number}.jsonl", None) for number in range(NUM_NODES)]
                    share_out(source, files, "dirichlet", "domain", alpha=alpha, seed=seed, test_share=0.0)
                    trainers = {path.stem: CausalLM(data=path) for path, _ in files}
                    return federation(rule, 1.0, seed, texts, trainers, num_points=1)

                wanted = {"plan": rule.plan(1.0, seed), "alpha": alpha, "nodes": NUM_NODES}
                if found := bench.get(f"alpha {alpha:g}, {asked:.0%} asked, seed {seed}", wanted, work):
                    runs.append(found)
            rows.append([f"{alpha:g}", f"{asked:.0%}", _kilo(runs, 1), _losses(runs)])
    return table(["Dirichlet alpha", "nodes asked", "k tokens of a node", "nats per byte"], rows)


PAGE = """\
# Results

Written by `{command}` with {software}, on {machine}.
Means and standard deviations over {num_seeds} seeds; what the run had no time for is marked *{unfinished}*. All models
are byte-level Llamas of 4 layers and 64 channels ({num_parameters:,} parameters), trained for {base_steps} steps on
four kinds of text (Shakespeare, Moby Dick, State of the Union addresses, arithmetic word problems) before the nodes
begin. They are small and trained briefly: compare within a table only.

## 1. Training together

Four nodes with a kind of text each, AdamW inside, its state kept between rounds. The outer rate is the better of two on
validation text, by the first seed ("of 1": one was tried); the loss is that on the test text of all four.

{together}

![loss against tokens](results-tokens.svg)
![loss against bytes](results-bytes.svg)

Two of the four nodes take 300 s for a round's steps, the others 100 s. All rules but the last wait for them.
Asynchronous rounds merge every two deltas, momentum moves once in two rounds (`delayed_nesterov`), and slow nodes are
asked for fewer steps (`dynamic_steps = 0.25`).

## 2. Experts merged

Four experts, {expert_steps} steps each on one kind of text, merged by each method that needs no data, with its defaults
and weights of 1; the same steps in three rounds; and one model on all data. What is kept of an expert's gain in loss on
its own text, in percent: 0 is the model they start from, 100 the expert, and below 0 worse than before.

{experts}

## 3. LoRA

`python benchmarks/lora.py` measures averaging by products against averaging by factors and whole models; its table is
in the [measurements](measured.md#lora).

## 4. Unlike data, and part of the nodes

{num_nodes} nodes share the same texts by a Dirichlet draw over the kinds (alpha 0.1: nearly one kind each; 10: nearly
alike): FedAvg in {num_rounds} rounds of 6 steps, of which a part of the nodes is asked in each.

{unlike}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="very short runs: a check that all works; about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the three tables to FILE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the finished runs in DIR, and take those there")
    parser.add_argument("--write", type=Path, metavar="DOCS", help="write results.md and its plots into DOCS")
    parser.add_argument("--minutes", type=float, default=60.0, metavar="N", help="begin no run after N CPU minutes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        kept = Kept(arguments.keep or Path(scratch) / "kept")
        folder = Path(scratch) / "texts"
        folder.mkdir()
        texts = Texts(folder, kept, base_steps=20 if arguments.quick else BASE_STEPS, width=WIDTH)
        pooled = folder / POOLED
        for domain in DOMAINS:
            path = folder / f"{domain}-train.txt"
            path.write_text(path.read_text()[:TEXT_CHARACTERS])
            with pooled.open("a") as file:
                file.write(path.read_text())
        bench = Bench(texts, kept, 60 * (1.0 if arguments.quick else arguments.minutes))
        together = training_together(bench, *((2, 2) if arguments.quick else (ROUNDS, STEPS)), arguments.write)
        experts = experts_merged(bench, 6 if arguments.quick else EXPERT_STEPS)
        unlike = unlike_nodes(bench)
        num_parameters = sum(tensor.numel() for tensor in Checkpoint(texts.base).values())
    for one in (together, experts, unlike):
        print("\n" + one)
    if arguments.write is not None:
        page = PAGE.format(
            command="python benchmarks/results.py --write docs",
            software=", ".join(f"{name} {version(name)}" for name in ("fedmerge", "torch", "transformers")),
            machine=machine(),
            num_seeds=len(SEEDS),
            unfinished=UNFINISHED,
            base_steps=texts.base_steps,
            num_parameters=num_parameters,
            expert_steps=EXPERT_STEPS,
            num_nodes=NUM_NODES,
            num_rounds=NUM_ROUNDS,
            together=together,
            experts=experts,
            unlike=unlike,
        )
        (arguments.write / "results.md").write_text(page)
    report([], {"together": together, "experts": experts, "unlike": unlike}, arguments.json)


def machine() -> str:
    """Return the processor's name and how many of its cores there are here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of an {names[0]}" if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
