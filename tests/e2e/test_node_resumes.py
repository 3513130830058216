"""A node that is killed in the middle of training, and nodes that a batch scheduler starts now and then."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmerge.cli import main
from fedmerge.config import Config
from fedmerge.sim import node_home, prepare_nodes, simulate
from fedmerge.tensors import Checkpoint, model_digest
from fedmerge_client.train.checkpoints import FOLDER, STATE_FILE
from fedmerge_client.train.label_head import build_classifier
from fedmerge_client.train.text_classification import TextClassification
from tests.conftest import ServerProcess, make_config
from tests.unit.test_text_classification import ANIMALS, FRUIT, LABELS, TOOLS, make_encoder, write_rows

PATTERNS = {"north": ["the {} is here", "{}"], "south": ["here is the {}", "is the {} here"]}
TRAIN = "steps = 12\nbatch_size = 4\nlr = 1e-3\nmax_length = 12\nnum_threads = 1\n[delta]\nvalues = 'fp32'\n"

# A node that dies, as by kill -9, when it has taken so many steps.
DIES = """
import os, signal, sys
from pathlib import Path
from fedmerge.node.node import Node
from fedmerge.trust.sign import SigningKey
from fedmerge_client.link import GrpcLink
from fedmerge_client.train.text_classification import TextClassification

address, bundle, home, data, step = sys.argv[1:]
key = SigningKey.load(Path(home) / "node.key")
link = GrpcLink(address, Path(bundle), key)

def watch(event):
    if event.kind == "train" and event.values["step"] == int(step):
        os.kill(os.getpid(), signal.SIGKILL)

trainer = TextClassification(data=Path(data), checkpoint_steps=3)
Node(link, trainer, key, link.coordinator, Path(home), on_event=watch).run()
"""


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    build_classifier(make_encoder(folder / "encoder"), LABELS, folder / "base", num_probes=200)
    return folder / "base"


def federation(folder: Path, classifier: Path) -> tuple[Config, Path, dict[str, Path]]:
    folder.mkdir(exist_ok=True)
    (folder / "base").symlink_to(classifier)
    config, path = make_config(folder, extra=TRAIN)
    words = dict(zip(LABELS, (FRUIT, TOOLS, ANIMALS), strict=True))
    data = {name: write_rows(folder / f"{name}.jsonl", words, patterns) for name, patterns in PATTERNS.items()}
    prepare_nodes(config, list(data))
    return config, path, data


def join_once(server: ServerProcess, config: Config, name: str, data: Path) -> int:
    home = node_home(config, name)
    arguments = ["join", "--coordinator", server.address, "--trust", str(server.bundle), "--home", str(home)]
    arguments += ["--key", str(home / "node.key"), "--data", str(data), "--option", "checkpoint_steps=3"]
    return main([*arguments, "--once", "--json"])


def test_a_node_killed_while_it_trains_goes_on_at_its_checkpoint_to_the_same_model(
    tmp_path: Path, classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _, data = federation(tmp_path / "undisturbed", classifier)
    trainers = {name: TextClassification(data=path) for name, path in data.items()}
    undisturbed = simulate(config, config.model.base, trainers)

    config, path, data = federation(tmp_path / "killed", classifier)
    server = ServerProcess(path)
    try:
        home = node_home(config, "north")
        child = subprocess.run(
            [sys.executable, "-c", DIES, server.address, str(server.bundle), str(home), str(data["north"]), "8"],
            check=False,
        )
        assert child.returncode == -signal.SIGKILL
        assert list(home.glob(f"rounds/*/{FOLDER}/{STATE_FILE}"))
        capsys.readouterr()
        assert join_once(server, config, "north", data["north"]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["model_dir"] is None
        assert "training goes on after step 6, where it was interrupted" in said.err
        assert not list(home.glob(f"rounds/*/{FOLDER}"))
        assert join_once(server, config, "north", data["north"]) == 9
        assert "nothing is due" in capsys.readouterr().err
        assert join_once(server, config, "south", data["south"]) == 0
        give_up_s = time.monotonic() + 60
        while (code := join_once(server, config, "north", data["north"])) == 9 and time.monotonic() < give_up_s:
            time.sleep(0.2)
        assert code == 0
        model_dir = Path(json.loads(capsys.readouterr().out.splitlines()[-1])["model_dir"])
        assert model_digest(Checkpoint(model_dir)) == undisturbed.version
    finally:
        server.stop()
