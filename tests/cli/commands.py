"""What the command-line tests share: a tiny text classifier with data for it, and ways to run commands."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from fedmerge.cli import main
from fedmerge_client.train.label_head import build_classifier
from tests import warm
from tests.unit.test_text_classification import ANIMALS, FRUIT, LABELS, TOOLS, make_encoder, write_rows

WORDS = dict(zip(LABELS, (FRUIT, TOOLS, ANIMALS), strict=True))

CONFIG = """\
[federation]
name = "tiny"
[model]
base = "base"
[server]
listen = "127.0.0.1:0"
[rounds]
num_rounds = {num_rounds}
grace_s = 60
[train]
steps = 3
batch_size = 4
num_threads = 1
"""

# Ctrl-C has no effect in a shell's background jobs, and what they start inherits that; a terminal's commands heed it.
AS_IN_A_TERMINAL = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
# Writing beyond this many bytes fails, as on a full disk.
NO_ROOM = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, output, and the paths in its folder that were not there before."""

    code: int
    stdout: str
    stderr: str
    left: list[str]


def run_session(folder: Path, environ: Mapping[str, str], commands: Sequence[Sequence[str | Path]]) -> list[Outcome]:
    """Run commands one after the other in one process."""
    with TemporaryDirectory() as scratch:
        found, printed = Path(scratch) / "outcomes.json", Path(scratch) / "printed"
        words = [[str(word) for word in command] for command in commands]
        process = warm.WarmProcess(
            _be_session, words, found, folder=folder, environ=environ, stdout=printed, stderr=printed
        )
        try:
            code = process.wait(240)
        finally:
            process.kill()
        # Anything here went past the command line's own output: gRPC's C++ log, a progress bar, a crash.
        assert (code, printed.read_text()) == (0, ""), f"exit code {code}\n{printed.read_text()}"
        return [Outcome(*outcome) for outcome in json.loads(found.read_text())]


def _be_session(commands: list[list[str]], found: Path) -> int:
    def tree() -> set[str]:
        return {str(path) for path in Path().rglob("*")}

    outcomes = []
    for words in commands:
        before, out, err = tree(), io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
        outcomes.append([code, out.getvalue(), err.getvalue(), sorted(tree() - before)])
    found.write_text(json.dumps(outcomes))
    return 0


class Running:
    """A command that runs until it is asked to stop, as in a terminal; `log` is what it has printed."""

    def __init__(self, folder: Path, environ: Mapping[str, str], *arguments: str | Path) -> None:
        self._log = folder.with_name(f"{folder.name}-{len(list(folder.parent.iterdir()))}.log")
        self.child = warm.fedmerge(*arguments, folder=folder, environ=environ, stdout=self._log, stderr=self._log)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str) -> str:
        """Wait until `text` is in the log, and return the log."""
        give_up_s = time.monotonic() + 60
        while text not in self.log:
            assert self.child.poll() is None, self.log
            assert time.monotonic() < give_up_s, self.log
            time.sleep(0.05)
        return self.log

    def stop(self, number: signal.Signals) -> tuple[int, float]:
        """Send a signal; return the exit code and how many seconds it took."""
        started_s = time.monotonic()
        self.child.send_signal(number)
        return self.wait(), time.monotonic() - started_s

    def wait(self) -> int:
        try:
            return self.child.wait(60)
        finally:
            self.child.kill()


def make_classifier(directory: Path) -> Path:
    """Write a BERT classifier of 20,000 numbers."""
    build_classifier(make_encoder(directory.with_name("encoder")), LABELS, directory, num_probes=50)
    return directory


def fine_tune(base: Path, directory: Path, seed: int) -> Path:
    """Write a copy of a model, each of its numbers moved by a random step."""
    directory.mkdir()
    for path in base.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(base / "model.safetensors")
    moved = {name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    save_file(moved, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_data(folder: Path) -> None:
    """Write `north.jsonl`, `south.csv` and `test.jsonl`."""
    write_rows(folder / "north.jsonl", WORDS, ["the {} is here", "{}"])
    write_rows(folder / "test.jsonl", WORDS, ["is the {} here"])
    rows = [f"here is the {word},{label}" for label, words in WORDS.items() for word in words]
    (folder / "south.csv").write_text("\n".join(["text,label", *rows]) + "\n")


def write_config(folder: Path, *, num_rounds: int = 2, extra: str = "") -> Path:
    path = folder / "fedmerge.toml"
    path.write_text(CONFIG.format(num_rounds=num_rounds) + extra)
    return path
