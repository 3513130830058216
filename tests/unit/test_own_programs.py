"""The trainers that train nothing themselves: a partner's own program, and a fine-tune that exists already."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmerge.config import parse_config
from fedmerge.errors import ConfigError, InputError
from fedmerge.sim import simulate
from fedmerge.tensors import Checkpoint
from fedmerge.training import Trainer, TrainTask, load_trainer
from tests.conftest import make_base

# Knows nothing of fedmerge but three environment variables.
PROGRAM = """
import json, os, sys
from pathlib import Path
from safetensors.numpy import load_file, save_file

plan = json.loads(Path(os.environ["FEDMERGE_PLAN"]).read_text())
weights = load_file(Path(os.environ["FEDMERGE_MODEL"]) / "model.safetensors")
moved = {name: tensor + plan["settings"]["step"] * float(sys.argv[1]) if tensor.dtype.kind == 'f' else tensor
         for name, tensor in weights.items()}
out = Path(os.environ["FEDMERGE_OUTPUT"]) / (sys.argv[2] if len(sys.argv) > 2 else ".")
out.mkdir(exist_ok=True)
save_file(moved, out / "model.safetensors")
(Path(os.environ["FEDMERGE_OUTPUT"]) / "fedmerge.json").write_text(json.dumps({"num_examples": 40, "loss": 0.5}))
print("a line of log")
"""
SCORE = """
import os
from pathlib import Path
from safetensors.numpy import load_file

print("loading")
mean = float(load_file(Path(os.environ["FEDMERGE_MODEL"]) / "model.safetensors")["vector"].mean())
print('{"mean": %r}' % mean)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_base(tmp_path / "base")
    (tmp_path / "train.py").write_text(PROGRAM)
    (tmp_path / "score.py").write_text(SCORE)
    return tmp_path


def python(*words: object) -> str:
    return shlex.join([sys.executable, *map(str, words)])


def command(folder: Path, *words: object, **options: Any) -> Trainer:
    return load_trainer("command", {"command": python(folder / "train.py", *words), **options})


def task(folder: Path, round_number: int = 1, **settings: Any) -> TrainTask:
    workspace = folder / "workspace"
    workspace.mkdir(exist_ok=True)
    return TrainTask(folder / "base", settings, round=round_number, seed=5, workspace=workspace)


class TestCommand:
    def test_takes_what_the_program_leaves(self, folder: Path) -> None:
        result = command(folder, 2).train(task(folder, step=0.25))
        moved = Checkpoint(result.model_dir)["vector"] - Checkpoint(folder / "base")["vector"]
        torch.testing.assert_close(moved, torch.full_like(moved, 0.5))
        assert (result.num_examples, result.metrics) == (40, {"loss": 0.5})
        assert (folder / "workspace" / "command.log").read_text() == "a line of log\n"

    def test_takes_the_last_of_a_trainers_checkpoints(self, folder: Path) -> None:
        program = PROGRAM + (
            "\nearlier = out.with_name('checkpoint-9')"
            "\nearlier.mkdir()"
            "\nsave_file(weights, earlier / 'model.safetensors')"
        )
        (folder / "train.py").write_text(program)
        result = command(folder, 2, "checkpoint-10").train(task(folder, step=0.25))
        assert not Checkpoint(result.model_dir)["vector"].equal(Checkpoint(folder / "base")["vector"])

    def test_a_second_attempt_starts_from_nothing(self, folder: Path) -> None:
        (folder / "workspace" / "output").mkdir(parents=True)
        save_file({"old": torch.ones(1)}, folder / "workspace" / "output" / "adapter_model.safetensors")
        result = command(folder, 1).train(task(folder, step=1.0))
        assert [path.name for path in result.model_dir.glob("*.safetensors")] == ["model.safetensors"]

    def test_evaluates(self, folder: Path) -> None:
        trainer = command(folder, 1, evaluate_command=python(folder / "score.py"))
        expected = float(load_file(folder / "base" / "model.safetensors")["vector"].mean())
        assert trainer.evaluate(folder / "base") == {"mean": pytest.approx(expected, rel=1e-4)}
        assert command(folder, 1).evaluate(folder / "base") == {}

    @pytest.mark.parametrize(
        ("program", "options", "message"),
        [
            ("raise SystemExit('no GPU here')", {}, "ended with exit code 1: no GPU here"),
            ("import time; time.sleep(60)", {"timeout_s": 0.5}, "was ended after 0.5 s"),
            ("", {}, "nothing says how many examples"),
            ("", {"num_examples": 3}, "holds no model"),
            (
                "import os; open(os.environ['FEDMERGE_OUTPUT'] + '/fedmerge.json', 'w').write('{\"loss\": NaN}')",
                {},
                "loss is nan, not a finite number",
            ),
            (
                "import os; open(os.environ['FEDMERGE_OUTPUT'] + '/fedmerge.json', 'w').write('[1]')",
                {},
                "not a JSON object",
            ),
        ],
    )
    def test_programs_that_fail(self, folder: Path, program: str, options: dict[str, Any], message: str) -> None:
        (folder / "train.py").write_text(program)
        with pytest.raises(InputError, match=message):
            command(folder, **options).train(task(folder))

    def test_what_can_not_be_started(self, folder: Path) -> None:
        with pytest.raises(InputError, match="can't be started"):
            load_trainer("command", {"command": "no-such-program"}).train(task(folder))
        with pytest.raises(ConfigError, match="can't be split into words"):
            load_trainer("command", {"command": "python 'train.py"}).check()
        with pytest.raises(ConfigError, match="no such directory"):
            load_trainer("command", {"command": "python", "folder": folder / "nowhere"}).check()

    def test_a_federation_of_programs(self, folder: Path) -> None:
        text = (
            '[federation]\nname = "own"\n[model]\nbase = "base"\n[rounds]\nnum_rounds = 2\nmin_nodes = 2\n'
            '[train]\ntrainer = "command"\nstep = 0.01\n[delta]\nvalues = "fp32"\ndownlink = "fp32"\n'
        )
        config = parse_config(text, folder=folder, where="fedmerge.toml")
        trainers = {name: command(folder, factor) for name, factor in (("a", 1), ("b", 3))}
        result = simulate(config, folder / "base", trainers)
        moved = Checkpoint(result.model_dir)["vector"] - Checkpoint(folder / "base")["vector"]
        # The mean of both steps, twice.
        torch.testing.assert_close(moved, torch.full_like(moved, 0.04), rtol=1e-4, atol=1e-6)


class TestCheckpoint:
    def test_is_contributed_and_stays(self, folder: Path) -> None:
        tuned = folder / "tuned"
        tuned.mkdir()
        base = load_file(folder / "base" / "model.safetensors")
        save_file({**base, "vector": base["vector"] + 1}, tuned / "model.safetensors")
        (tuned / "config.json").write_text(json.dumps({}))
        text = '[federation]\nname = "once"\n[model]\nbase = "base"\n[rounds]\nnum_rounds = 1\nmin_nodes = 2\n'
        text += '[train]\ntrainer = "checkpoint"\n[delta]\nvalues = "fp32"\ndownlink = "fp32"\n'
        config = parse_config(text, folder=folder, where="fedmerge.toml")
        trainers = {
            name: load_trainer("checkpoint", {"model": model, "num_examples": 10})
            for name, model in (("tuned", tuned), ("same", folder / "base"))
        }
        result = simulate(config, folder / "base", trainers)
        moved = Checkpoint(result.model_dir)["vector"] - base["vector"]
        torch.testing.assert_close(moved, torch.full_like(moved, 0.5))
        assert sorted(path.name for path in tuned.iterdir()) == ["config.json", "model.safetensors"]

    def test_takes_part_once(self, folder: Path) -> None:
        trainer = load_trainer("checkpoint", {"model": folder / "base", "num_examples": 10})
        with pytest.raises(InputError, match="took part in round 1, and this is round 2"):
            trainer.train(task(folder, round_number=2))

    def test_needs_a_model(self, folder: Path) -> None:
        with pytest.raises(InputError, match="nowhere: no such directory"):
            load_trainer("checkpoint", {"model": folder / "nowhere", "num_examples": 1}).check()
        with pytest.raises(InputError, match="holds no model"):
            load_trainer("checkpoint", {"model": folder, "num_examples": 1}).check()
