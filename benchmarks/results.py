"""What federations come to beside each other, and beside one model trained on all data: writes docs/results.md.

    FEDMERGE_DATA=DIR python benchmarks/results.py [--quick] [--json FILE] [--keep DIR] [--write docs] [--minutes N]
                                                   [--only PART ...] [--llm MODEL]

The page's parts are:

together  one model on all data, FedAvg, DiLoCo, SparseLoCo's top-k with error feedback, Streaming DiLoCo, and
          asynchronous rounds with two slow nodes (delayed Nesterov, DyLU): a small language model's loss against tokens
          and bytes. The outer learning rate of each is searched for on validation text with one seed (`together.py`).
experts   four fine-tunes of all-MiniLM-L6-v2 merged once by each method that needs no data, and over three rounds:
          accuracy by task, and what is kept of the experts' (`experts.py`).
unlike    how unlike the nodes' data are (Dirichlet), and how many of the nodes take part in a round (`together.py`).
tried     every trainer in a federation of a few rounds (`trainers.py`), and a language model of the size that --llm
          names, tuned by adapters on four domains (`tried.py`).

(LoRA's rules are compared by `lora.py`.) Finished runs are kept in DIR, and after N CPU minutes no further one begins:
what is missing is marked as such.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from experts import experts_table
from federated import BASE_STEPS, Texts
from shared import DOMAINS, UNFINISHED, Kept, Runs, report
from together import POOLED, Bench, training_table, unlike_table
from trainers import trainers_table
from tried import language_model

SEEDS = (1, 2, 3)
PARTS = ("together", "experts", "unlike", "tried")

PAGE = """\
# Results

Written by `{command}` with {software}, on {machine}.
Means and standard deviations over {num_seeds} seeds; what the run had no time for is marked *{unfinished}*.

## 1. Training together

A byte-level Llama of 836,736 parameters, trained for {base_steps} steps on four kinds of text (Shakespeare, Moby Dick,
State of the Union addresses, arithmetic word problems); then four nodes with a kind of text each, AdamW inside, its
state kept between rounds. The outer rate is the one of five with the least loss on validation text, walked to from the
middle one with the first seed; the loss is that on the test text of all four.

{together}

![loss against tokens](results-tokens.svg)
![loss against bytes](results-bytes.svg)

Two of the four nodes take 300 s for a round's steps, the others 100 s. All rules but the last wait for them.
Asynchronous rounds merge every two deltas, momentum moves once in two rounds (`delayed_nesterov`), and slow nodes are
asked for fewer steps (`dynamic_steps = 0.25`). They merge the two fast nodes' kinds of text more often than the
others', which the loss on all four shows.

## 2. Experts merged

all-MiniLM-L6-v2 (22.7 M parameters) tuned for 60 steps of AdamW at 3e-4 on each of four tasks: bank support (77
classes), question types (6), film reviews (2), medical abstracts (5); accuracy in percent on 250 test texts of each.
The experts are merged by each method that needs no data, with its defaults and weights of 1. The merged task vector is
added as it is (scale 1) and, where one of ten other scales does better on 100 validation texts of each task with the
first seed's experts, at that scale: the lambda that papers choose in this way, and `[outer] lr` in a federation, where
weights are shares that sum to 1, so that a sum is what it is here at a scale of 0.25. Below are the same steps in three
rounds, and one model on a batch of every task in each step. The gain kept is that in mean accuracy over the base, as a
share of the experts'; the last column is the mean over tasks of accuracy by the expert's.

{experts}

## 3. LoRA

`python benchmarks/lora.py` measures averaging by products against averaging by factors and whole models; its table is
in the [measurements](measured.md#lora).

## 4. Unlike data, and part of the nodes

Five nodes share the texts of part 1 by a Dirichlet draw over the kinds (alpha 0.1: nearly one kind each; 10: nearly
alike): FedAvg in 6 rounds of 10 steps, of which a part of the nodes is asked in each.

{unlike}

## 5. Every trainer

`causal-lm` is what parts 1 and 4 run, and with adapters the federation of a larger model below. The other trainers and
the callback (their [table](../clients/README.md) says what each is) federate nodes that have classes, or kinds of text,
of their own, with `codec = "auto"`, once; `command`'s script knows nothing of federations, and it and the callback run
as deployed, with `fedmerge serve` and a process for each node. Scores are means over all nodes' test data: of the model
that they begin with, of the nodes' models after training alone for as many steps (on their own data, and on all), and
of the merged one. Steps are epochs for `flower`; `checkpoint` takes the models trained alone, and merges them by TIES.

{trainers}

### A language model with adapters

SmolLM2-135M-Instruct (its weights were rounded to 4 bits, and are fp32 since), multiplied in bf16. Four nodes with a
kind of text each train LoRA adapters of rank 8 by `causal-lm`, and send their factors. Loss on 16 windows of 128 tokens
of each test text, beside that of adapters which were trained alone for as many steps:

{tried}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="very short runs: a check that all works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables to FILE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the finished runs in DIR, and take those there")
    parser.add_argument("--write", type=Path, metavar="DOCS", help="write results.md and its plots into DOCS")
    parser.add_argument("--minutes", type=float, default=120.0, metavar="N", help="begin no run after N CPU minutes")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="leave the other parts unfinished")
    parser.add_argument("--llm", type=Path, metavar="MODEL", help="a causal language model's directory, for `tried`")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = SEEDS[:1] if arguments.quick else SEEDS
    tables = dict.fromkeys(PARTS, UNFINISHED)
    with tempfile.TemporaryDirectory() as scratch:
        kept = Kept(arguments.keep or Path(scratch) / "kept")
        # Nothing begins in a part that is left out, but what it has come to before is shown.
        runs = {part: Runs(kept, 60 * arguments.minutes if part in arguments.only else 0.0) for part in PARTS}
        folder = Path(scratch) / "texts"
        folder.mkdir()
        texts = Texts(folder, kept, base_steps=20 if arguments.quick else BASE_STEPS)
        (folder / POOLED).write_text("".join((folder / f"{domain}-train.txt").read_text() for domain in DOMAINS))
        tables["together"] = training_table(
            Bench(texts, runs["together"]), seeds, arguments.write, is_quick=arguments.quick
        )
        tables["experts"] = experts_table(runs["experts"], seeds, is_quick=arguments.quick)
        tables["unlike"] = unlike_table(Bench(texts, runs["unlike"]), seeds, is_quick=arguments.quick)
        tables["trainers"] = trainers_table(texts, runs["tried"], is_quick=arguments.quick)
        if arguments.llm is not None:
            tables["tried"] = language_model(arguments.llm, runs["tried"])
    for table in tables.values():
        print("\n" + table)
    if arguments.write is not None:
        page = PAGE.format(
            command="python benchmarks/results.py --write docs",
            software=", ".join(f"{name} {version(name)}" for name in ("fedmerge", "torch", "transformers")),
            machine=machine(),
            num_seeds=len(seeds),
            unfinished=UNFINISHED,
            base_steps=BASE_STEPS,
            **tables,
        )
        (arguments.write / "results.md").write_text(page)
    report([], dict(tables), arguments.json)


def machine() -> str:
    """Return the processor's name and how many of its cores there are here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of an {names[0]}" if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
