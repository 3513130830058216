"""Part 5 of `results.py`: every trainer in a federation of some length, beside its nodes training alone for as long.

`text-classification`, `checkpoint`, `torch` and `flower` run in this process, by the coordinator's and the nodes' own
code; `command` and `FedMergeCallback` by `fedmerge serve` and a process for each node, as they are deployed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple, TypeAlias

import fashion
from federated import CONTEXT, Texts
from minilm import encoder_directory
from processes import ONE_THREAD
from shared import DOMAINS, UNFINISHED, Runs, Sections, data_files, markdown, read_records, toml
from torch import nn

from fedmerge.config import Config, load_config
from fedmerge.sim import FederationResult, node_home, prepare_nodes, result_of, simulate
from fedmerge.sim.partition import share_out
from fedmerge.tensors import write_weights
from fedmerge.training import Trainer, load_trainer
from fedmerge_client.train.causal_lm import CausalLM
from fedmerge_client.train.label_head import build_classifier
from fedmerge_client.train.text_classification import TextClassification

APPS = Path(__file__).parents[1] / "clients" / "apps"
PATIENCE_S = 3600.0
LM_LR = 1e-3
CLASSIFY: dict[str, Any] = {
    "trainer": "text-classification",
    "batch_size": 16,
    "max_length": 32,
    "lr": 3e-4,
    "label_smoothing": 0.3,
    "freeze": ["bert.embeddings", "classifier"],
    "num_threads": 1,
}
ADAPTERS = CLASSIFY | {"lora_rank": 8, "lr": 2e-3}
SETTINGS = {"classifiers": CLASSIFY, "adapters": ADAPTERS}
COMMAND = {"trainer": "command"}

Figures: TypeAlias = dict[str, float]
# The command line of a node, from the coordinator's address, its bundle, and the node's home.
Command: TypeAlias = Callable[[str, str, Path], Sequence[str]]


class Length(NamedTuple):
    """How many nodes take part in how many rounds, and what the round's steps are."""

    num_nodes: int
    num_rounds: int
    steps: int


QUICK = Length(2, 2, 2)


class Case(NamedTuple):
    """A federation: its length, the model that it begins with, a trainer or a command by node, and its judge.

    `judge` returns a model's scores on each node's test data in turn.
    """

    length: Length
    base: Path
    nodes: Mapping[str, Trainer] | Mapping[str, Command]
    train: Mapping[str, Any]
    judge: Callable[[Path], list[float]]

    def run(self, folder: Path, names: Sequence[str]) -> FederationResult:
        """Federate some of the nodes."""
        config = configured(folder, self.base, self.length, len(names), self.train)
        chosen: Any = {name: self.nodes[name] for name in names}
        if self.train == COMMAND:
            return deployed(config, folder, chosen)
        return simulate(config, self.base, chosen)

    def compare(self, folder: Path) -> tuple[Figures, dict[str, Path]]:
        """Federate all nodes, and each by itself; return scores and bytes, and the models of those alone."""
        together = self.run(folder / "together", list(self.nodes))
        alone = {name: self.run(folder / name, [name]).model_dir for name in self.nodes}
        scores = [self.judge(model_dir) for model_dir in alone.values()]
        figures = {
            "before": mean(self.judge(self.base)),
            "own": mean(of_node[number] for number, of_node in enumerate(scores)),
            "alone": mean(map(mean, scores)),
            "merged": mean(self.judge(together.model_dir)),
            "up_bytes": mean(node.sent_bytes for node in together.nodes),
        }
        return figures, alone


def configured(
    folder: Path, base: Path, length: Length, num_nodes: int, train: Mapping[str, Any], *, method: str = "fedavg"
) -> Config:
    """Write the configuration of a federation into a new folder, and load it."""
    sections: Sections = {
        "federation": {"name": "benchmark"},
        "model": {"base": str(base)},
        "rounds": {"num_rounds": length.num_rounds, "min_nodes": num_nodes, "grace_s": 3600},
        "train": {key: value for key, value in train.items() if not isinstance(value, dict)},
        **{f"train.{key}": value for key, value in train.items() if isinstance(value, dict)},
        "delta": {"codec": "auto"},
        "merge": {"method": method},
        "screen": {"weighting": "equal"},
    }
    folder.mkdir(parents=True)
    (folder / "fedmerge.toml").write_text(toml(sections))
    return load_config(folder / "fedmerge.toml")


def deployed(config: Config, folder: Path, commands: Mapping[str, Command]) -> FederationResult:
    """Run `fedmerge serve` on the configuration in `folder`, and each node's command beside it, to the end."""
    prepare_nodes(config, list(commands))
    environ = {**os.environ, **ONE_THREAD, "FEDMERGE_SERVER__LISTEN": "127.0.0.1:0", "HF_HUB_OFFLINE": "1"}
    serve = [sys.executable, "-m", "fedmerge", "serve", str(folder / "fedmerge.toml"), "--json"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=log, env=environ)
        nodes: list[subprocess.Popen[bytes]] = []
        try:
            assert server.stdout is not None
            ready = json.loads(server.stdout.readline())
            for name, command in commands.items():
                words = command(ready["address"], ready["bundle"], node_home(config, name))
                nodes.append(subprocess.Popen(words, stdout=log, stderr=log, env=environ))
            if any(node.wait(PATIENCE_S) for node in nodes):
                sys.exit((folder / "log").read_text()[-2000:])
        finally:
            for process in (*nodes, server):
                process.terminate()
                process.communicate()
    return result_of(config)


def classifiers(folder: Path, length: Length, train: Mapping[str, Any]) -> dict[str, Figures]:
    """Tune MiniLM where each node has classes of its own; then merge once what the nodes came to alone."""
    (source,) = data_files("banking77.jsonl.gz")
    is_quick = length == QUICK
    rows = [row for row in read_records(source) if row["split"] == "train"][:: 20 if is_quick else 2]
    texts = [json.dumps({"text": row["text"], "label": row["label_name"]}) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(texts))
    numbers = range(length.num_nodes)
    files = [(folder / f"{number}-train.jsonl", folder / f"{number}-test.jsonl") for number in numbers]
    share_out(folder / "rows.jsonl", list(files), "group", "label", alpha=1.0, seed=1, test_share=0.1)
    base = folder / "base"
    labels = sorted({row["label_name"] for row in rows})
    build_classifier(encoder_directory(), labels, base, num_probes=100 if is_quick else 2000)
    judges = [TextClassification(data=test, test=test) for _, test in files]

    def judge(model_dir: Path) -> list[float]:
        return [100 * one.evaluate(model_dir)["accuracy"] for one in judges]

    nodes = {f"node-{number}": TextClassification(data=data) for number, (data, _) in enumerate(files)}
    figures, alone = Case(length, base, nodes, {**train, "steps": length.steps}, judge).compare(folder)
    once = configured(
        folder / "once", base, Length(len(nodes), 1, 0), len(nodes), {"trainer": "checkpoint"}, method="ties"
    )
    tuned = {name: load_trainer("checkpoint", {"model": path, "num_examples": 1}) for name, path in alone.items()}
    result = simulate(once, base, tuned)
    merged = {"merged": mean(judge(result.model_dir)), "up_bytes": mean(node.sent_bytes for node in result.nodes)}
    return {"rounds": figures, "once": figures | merged}


def networks(
    folder: Path, length: Length, module: nn.Module, case: Callable[[int], Trainer], train: Mapping[str, Any]
) -> dict[str, Figures]:
    """Train an untrained network on images, of which each node has mostly some classes."""
    base = folder / "base"
    base.mkdir()
    write_weights(module.state_dict(), base, {"model.safetensors": list(module.state_dict())})
    nodes = {f"node-{number}": case(number) for number in range(length.num_nodes)}

    def judge(model_dir: Path) -> list[float]:
        return [100 * node.evaluate(model_dir)["accuracy"] for node in nodes.values()]

    return {"rounds": Case(length, base, nodes, train, judge).compare(folder)[0]}


def by_function(folder: Path, length: Length) -> dict[str, Figures]:
    """Train by functions of `fashion.py`."""
    (images,) = data_files("fashion_mnist_6k.npz")

    def node(number: int) -> Trainer:
        own = {"function": "fashion:train", "model": "fashion:make_model", "evaluate_function": "fashion:evaluate"}
        site = {"site": number, "num_sites": length.num_nodes}
        return load_trainer("torch", {**own, "folder": Path(__file__).parent, "data": images, "options": site})

    train = {"trainer": "torch", "steps": length.steps, "lr": 0.05}
    return networks(folder, length, fashion.make_model(), node, train)


def by_flower(folder: Path, length: Length) -> dict[str, Figures]:
    """Train by the example Flower App, as many epochs as there are steps."""
    sys.path.insert(0, str(APPS / "flower"))
    from digits.task import make_model

    def node(number: int) -> Trainer:
        site = {"partition-id": number, "num-partitions": length.num_nodes}
        return load_trainer("flower", {"app": "digits.client_app:app", "node_config": site})

    train = {"trainer": "flower", "run_config": {"local-epochs": length.steps, "learning-rate": 0.1}}
    return networks(folder, length, make_model(), node, train)


def by_script(folder: Path, length: Length, texts: Texts, *, has_callback: bool) -> dict[str, Figures]:
    """Train the language model of `federated.py` by one of the example scripts, on a kind of text at each node."""
    domains = DOMAINS[-length.num_nodes :]
    judges = [
        CausalLM(
            data=texts.folder / f"{domain}-train.txt",
            test=texts.folder / f"{domain}-test.txt",
            eval_context_length=CONTEXT,
            eval_windows=64,
        )
        for domain in domains
    ]

    def node(domain: str) -> Command:
        def words(address: str, bundle: str, home: Path) -> list[str]:
            text, lengths = str(texts.folder / f"{domain}-train.txt"), f"--steps {length.steps} --lr {LM_LR}"
            if has_callback:
                own = [str(APPS / "trainer" / "finetune.py"), str(texts.base), text, address, bundle, str(home)]
                return [sys.executable, *own, *lengths.split(), "--window", str(CONTEXT)]
            # The script draws what it trains on from a seed, which is to be another one in each round.
            script = f"{sys.executable} {APPS / 'command' / 'finetune.py'} train $FEDMERGE_MODEL {text}"
            shell = f"exec {script} $FEDMERGE_OUTPUT {lengths} --seed $(cksum < $FEDMERGE_PLAN | cut -c 1-6)"
            join = ["join", "--coordinator", address, "--trust", bundle, "--home", str(home), "--trainer", "command"]
            options = ["--option", f"command=sh -c '{shell}'", "--option", "num_examples=8000"]
            return [sys.executable, "-m", "fedmerge", *join, *options]

        return words

    nodes = {domain: node(domain) for domain in domains}

    def judge(model_dir: Path) -> list[float]:
        return [one.evaluate(model_dir)["byte_loss"] for one in judges]

    return {"rounds": Case(length, texts.base, nodes, COMMAND, judge).compare(folder)[0]}


# Trainer, model and data, what a score is; the job that it is of, and which of its results.
CLASSES, BYTES = "MiniLM (22.7 M); bank support", "Llama (0.8 M); three kinds of text"
ROWS = (
    ("`text-classification`", CLASSES, "accuracy, %", "classifiers", "rounds"),
    ("`text-classification`, LoRA", CLASSES, "accuracy, %", "adapters", "rounds"),
    ("`checkpoint`, of those alone", CLASSES, "accuracy, %", "classifiers", "once"),
    ("`torch`", "convolutions (20 k); Fashion-MNIST", "accuracy, %", "function", "rounds"),
    ("`flower`", "two layers (5 k); digits", "accuracy, %", "flower", "rounds"),
    ("`command`", BYTES, "nats per byte", "command", "rounds"),
    ("`FedMergeCallback`", BYTES, "nats per byte", "callback", "rounds"),
)
LENGTHS = {
    "classifiers": Length(4, 3, 50),
    "adapters": Length(4, 3, 50),
    "function": Length(4, 5, 100),
    "flower": Length(4, 5, 2),
    "command": Length(3, 4, 25),
    "callback": Length(3, 4, 25),
}


def trainers_table(texts: Texts, runs: Runs, *, is_quick: bool) -> str:
    """Run all that there is time for; return the table in Markdown."""
    print("5. every trainer")
    jobs: dict[str, Callable[[Path, Length], dict[str, Figures]]] = {
        "function": by_function,
        "flower": by_flower,
        "command": partial(by_script, texts=texts, has_callback=False),
        "callback": partial(by_script, texts=texts, has_callback=True),
        **{name: partial(classifiers, train=train) for name, train in SETTINGS.items()},
    }
    lengths = dict.fromkeys(jobs, QUICK) if is_quick else LENGTHS
    found: dict[str, dict[str, Any] | None] = {}
    for name, job in jobs.items():

        def work(name: str = name, job: Callable[[Path, Length], dict[str, Figures]] = job) -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder:
                return dict(job(Path(folder), lengths[name]))

        found[name] = runs.get(name, {"trainer": name, "length": lengths[name], "train": SETTINGS.get(name)}, work)
    rows = []
    for trainer, what, score, name, result in ROWS:
        length, figures = lengths[name], (found[name] or {}).get(result)
        steps = "1" if result == "once" else f"{length.num_rounds} x {length.steps}"
        cells = [UNFINISHED] * 5
        if figures is not None:
            digits = 1 if score == "accuracy, %" else 3
            cells = [f"{figures[key]:.{digits}f}" for key in ("before", "own", "alone", "merged")]
            cells.append(f"{figures['up_bytes'] / 1e6:.2f}")
        rows.append([trainer, what, f"{length.num_nodes}", steps, score, *cells])
    headings = ["trainer", "model; data", "nodes", "rounds x steps", "score", "before"]
    return markdown([*headings, "alone: own data", "alone: all", "merged", "MB sent"], rows)
