"""The three ways in, with a tiny classifier: a coordinator with nodes, a simulation, and a merge of local models."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fedmerge.tensors import Checkpoint, model_digest
from tests.cli.commands import Running, fine_tune, make_classifier, run_session, write_config, write_data

SPARSE = '[delta]\nsparsify = "seeded"\ndensity = 0.5\n[outer]\nname = "nesterov"\nlr = 0.7\n'
NODES = """\
[[nodes]]
name = "north"
data = "north.jsonl"
test = "test.jsonl"
[[nodes]]
name = "south"
data = "south.csv"
test = "test.jsonl"
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_classifier(folder / "base")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def environ() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FEDMERGE_")}
    return kept | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def deployed(
    models: Path, environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Path]]:
    """A federation of three organisations in folders of their own, run by hand to its end: the folder that holds them,
    and where each node has the merged model.
    """
    folder = tmp_path_factory.mktemp("deployed")
    operator = folder / "operator"
    for site, data in (("north", "north.jsonl"), ("south", "south.csv")):
        (folder / site).mkdir()
        for name in (data, "test.jsonl"):
            shutil.copy(models / name, folder / site / name)
        # Each site makes its key, and sends the operator the public half.
        run_all(folder / site, environ, f"keys new {site}.key")
    shutil.copytree(models / "base", operator / "base")
    write_config(operator, extra=SPARSE)
    for site in ("north", "south"):
        shutil.copy(folder / site / f"{site}.key.pub", operator)
        run_all(operator, environ, f"keys trust {site}.key.pub --name {site}")
    server = Running(operator, environ, "serve")
    try:
        server.wait_for("they join with")
        # The line that the operator passes on, and the file.
        address = shlex.split(next(line for line in server.log.splitlines() if "fedmerge join" in line))[3]
        nodes: dict[str, Running] = {}
        for site, data in (("north", "north.jsonl"), ("south", "south.csv")):
            shutil.copy(operator / "state" / "coordinator.pem", folder / site)
            arguments = f"join --coordinator {address} --trust coordinator.pem --key {site}.key --data {data}"
            nodes[site] = Running(folder / site, environ, *arguments.split(), "--test", "test.jsonl", "--json")
        codes = {site: node.wait() for site, node in nodes.items()}
        assert codes == {"north": 0, "south": 0}, [node.log for node in nodes.values()]
    finally:
        server.child.terminate()
        assert server.wait() == 0
    said = {site: json.loads(node.log.splitlines()[-1]) for site, node in nodes.items()}
    return folder, {site: folder / site / said[site]["model_dir"] for site in nodes}


def run_all(folder: Path, environ: dict[str, str], *commands: str) -> list[str]:
    """Run commands in one process; return their outputs."""
    outcomes = run_session(folder, environ, [shlex.split(command) for command in commands])
    assert [outcome.code for outcome in outcomes] == [0] * len(commands), outcomes
    return [outcome.stdout for outcome in outcomes]


def test_both_nodes_end_with_the_published_version(deployed: tuple[Path, dict[str, Path]]) -> None:
    folder, model_dirs = deployed
    published = folder / "operator" / "state" / "models" / "round-0002"
    version = model_digest(Checkpoint(published))
    assert {model_dir.name for model_dir in model_dirs.values()} == {version}
    assert {model_digest(Checkpoint(model_dir)) for model_dir in model_dirs.values()} == {version}
    assert version != model_digest(Checkpoint(folder / "operator" / "base"))


def test_transformers_opens_the_published_directory(deployed: tuple[Path, dict[str, Path]]) -> None:
    folder, model_dirs = deployed
    opened: list[dict[str, torch.Tensor]] = []
    for directory in (folder / "operator" / "state" / "models" / "round-0002", *model_dirs.values()):
        model: Any = AutoModelForSequenceClassification.from_pretrained(directory)
        assert model.config.id2label == {0: "things.fruit", 1: "things.tool", 2: "things.animal"}
        opened.append(model.state_dict())
    for name, tensor in opened[0].items():
        assert all(torch.equal(tensor, other[name]) for other in opened[1:])


def test_a_partner_checks_the_published_directory_with_the_coordinators_pem(
    deployed: tuple[Path, dict[str, Path]], environ: dict[str, str]
) -> None:
    folder, _ = deployed
    verify = "verify operator/state/models/round-0002 --key north/coordinator.pem"
    replay = f"{verify} --replay operator/state --base operator/base --json"
    text, replayed = run_all(folder, environ, verify, replay)
    version = model_digest(Checkpoint(folder / "operator" / "state" / "models" / "round-0002"))
    assert text.splitlines()[-1] == f"verified: version {version}"
    checks = {check["name"]: check["outcome"] for check in json.loads(replayed)["checks"]}
    assert checks["replay"] == "ok"
    assert "failed" not in checks.values()


def test_inspect_reads_every_kind_of_artefact(deployed: tuple[Path, dict[str, Path]], environ: dict[str, str]) -> None:
    folder, model_dirs = deployed
    published = Path("operator/state/models/round-0002")
    outbox = next(path.relative_to(folder) for path in folder.glob("north/fedmerge-node/rounds/0002-*"))
    lineage = json.loads((folder / published / "lineage.json").read_bytes())
    root = lineage["predicate"]["model"]["updates"][-1]["root"]
    update = next(path.relative_to(folder) for path in folder.glob(f"operator/state/blobs/*/{root}"))
    artefacts = {
        published: "model",
        model_dirs["north"].relative_to(folder): "model",
        outbox / "delta.safetensors": "delta (as it claims)",
        update: "delta (as it claims)",
        outbox / "statement.json": "application/vnd.fedmerge.delta.v1+json",
        outbox / "receipt.json": "application/vnd.fedmerge.receipt.v1+json",
        published / "lineage.json": "statement",
        published / "lineage.sig.json": "application/vnd.fedmerge.lineage.v1+json",
        published / "provenance.jsonl.zst": "provenance",
    }
    outputs = run_all(folder, environ, *(f"inspect {path} --json" for path in artefacts))
    assert [json.loads(output)["kind"] for output in outputs] == list(artefacts.values())
    provenance = json.loads(outputs[-1])["statements"]
    kinds = [statement["kind"].removeprefix("application/vnd.fedmerge.").partition(".")[0] for statement in provenance]
    assert [kind for kind in kinds if kind not in {"enrolment", "cosignature"}] == 2 * [
        "roundspec",
        "delta",
        "delta",
        "mergerecord",
    ]
    assert kinds.count("enrolment") == 2
    assert "cosignature" in kinds
    # And for people: the same, as text.
    assert all(run_all(folder, environ, *(f"inspect {path}" for path in artefacts)))


@pytest.mark.slow
def test_a_simulation_gives_one_version_in_one_process_or_in_several(
    models: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    results: dict[str, dict[str, Any]] = {}
    bad = '\n[simulate]\nbad_nodes = 1\nattack = "label_flip"\n'
    for name, option in (("inline", ""), ("processes", "--processes")):
        shutil.copytree(models, tmp_path / name)
        write_config(tmp_path / name, extra=SPARSE + NODES + bad)
        (output,) = run_all(tmp_path / name, environ, f"simulate fedmerge.toml {option} --json")
        results[name] = json.loads(output)
    inline, processes = results["inline"], results["processes"]
    assert inline["version"] == processes["version"] == model_digest(Checkpoint(Path(inline["model_dir"])))
    assert inline["nodes"] == processes["nodes"]
    assert [node["name"] for node in inline["nodes"]] == ["north", "south"]
    assert sum(node["is_bad"] for node in processes["nodes"]) == 1
    assert all(node["sent_bytes"] < 2 * inline["dense_bytes"] for node in inline["nodes"])


def test_merge_is_task_arithmetic(models: Path, environ: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(models / "base", tmp_path / "base")
    for seed, name in enumerate("ab"):
        fine_tune(tmp_path / "base", tmp_path / name, seed)
    merge = "merge a b --base base --out m --weights 0.75,-0.5 --set lambda=0.8 --key m.key --json"
    _, output, verified = run_all(tmp_path, environ, "keys new m.key", merge, "verify m --key m.key.pub")
    base, merged = Checkpoint(tmp_path / "base"), Checkpoint(tmp_path / "m")
    a, b = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b")
    for name in base:
        start = base[name].double()
        expected = start + 0.8 * (0.75 * (a[name].double() - start) - 0.5 * (b[name].double() - start))
        torch.testing.assert_close(merged[name].double(), expected, atol=1e-6, rtol=0)
    version = model_digest(merged)
    assert json.loads(output)["version"] == version
    assert verified.splitlines()[-1] == f"verified: version {version}"
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")


def test_merge_by_layers_is_signed_as_given(models: Path, environ: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(models / "base", tmp_path / "base")
    for seed, name in enumerate("ab"):
        fine_tune(tmp_path / "base", tmp_path / name, seed)
    merge = """merge a b --base base --out m --key m.key --set 'lambda={"bert.*"=1,default=0}' --weights"""
    run_all(
        tmp_path, environ, "keys new m.key", merge + """ '{"*.bias"=2,default=0.5},[1]'""", "verify m --key m.key.pub"
    )
    base, merged, a, b = (Checkpoint(tmp_path / name) for name in ("base", "m", "a", "b"))
    for name in base:
        weight = 2 if name.endswith(".bias") else 0.5
        moved = weight * (a[name].double() - base[name].double()) + b[name].double() - base[name].double()
        expected = base[name].double() + (moved if name.startswith("bert.") else 0)
        torch.testing.assert_close(merged[name].double(), expected, atol=1e-6, rtol=0)
    lineage = json.loads((tmp_path / "m/lineage.json").read_text())["predicate"]
    assert lineage["merge"]["params"]["lambda"] == {"bert.*": 1.0, "default": 0.0}
    assert [item["weight"] for item in lineage["inputs"]] == [{"*.bias": 2.0, "default": 0.5}, [1.0]]


EXTRAS = {
    "client": ["transformers", "google.rpc", "grpc_status"],
    "server": ["sqlalchemy", "grpc_health", "google.rpc", "grpc_status"],
}


@pytest.mark.parametrize(
    ("installed", "modules"),
    [
        (
            [],
            [
                "fedmerge.cli.merge",
                "fedmerge.publishing.publish",
                "fedmerge.cli.verify",
                "fedmerge.verify",
                "fedmerge.cli.inspect",
            ],
        ),
        (["client"], ["fedmerge.cli.join", "fedmerge_client.link", "fedmerge_client.train.text_classification"]),
        (["server"], ["fedmerge.cli.serve", "fedmerge_server.run"]),
    ],
)
def test_each_way_in_needs_its_own_extra_alone(
    environ: dict[str, str], tmp_path: Path, installed: list[str], modules: list[str]
) -> None:
    present = {name for extra in installed for name in EXTRAS[extra]}
    missing = {name for names in EXTRAS.values() for name in names} - present
    program = f"import sys\nfor name in {sorted(missing)}: sys.modules[name] = None\nimport {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environ, check=True)
