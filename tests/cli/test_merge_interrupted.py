"""A merge that is stopped on the way leaves nothing that looks finished, and the next one is as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmerge.tensors import INDEX, WEIGHTS
from tests.cli.commands import Running

Run: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")

SIDE, NUM_TENSORS = 512, 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folders `base`, `a` and `b`, models whose decomposition takes some seconds."""
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        (tmp_path / name).mkdir()
        tensors = {f"{i:02d}": torch.randn(SIDE, SIDE, generator=generator) for i in range(NUM_TENSORS)}
        save_file(tensors, tmp_path / name / WEIGHTS, metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text('{"model_type": "bert"}')
    return tmp_path


def merge(folder: Path, clean_environment: dict[str, str], *more: str) -> Running:
    """Start a merge into `out`, and return when it is writing."""
    running = Running(folder, clean_environment, "merge", "a", "b", "--base=base", "--out=out", "--method=tsv", *more)
    give_up_s = time.monotonic() + 60
    while not (folder / ".out.partial" / WEIGHTS).exists():
        assert running.child.poll() is None, running.log
        assert time.monotonic() < give_up_s
        time.sleep(0.01)
    return running


def test_ctrl_c_leaves_nothing(folder: Path, clean_environment: dict[str, str]) -> None:
    code, _ = merge(folder, clean_environment, "--threads=2").stop(signal.SIGINT)
    assert code == 130
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "base"]


SWALLOWED = """
import os, signal, sys, torch
from fedmerge.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)
storage_item = torch.UntypedStorage.__getitem__

def interrupted(self, index):
    if isinstance(index, int):
        os.kill(os.getpid(), signal.{name})
    return storage_item(self, index)

torch.UntypedStorage.__getitem__ = interrupted
sys.exit(main(["merge", "a", "b", "--base=base", "--out=out", "--threads=1"]))
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interruption_that_an_extension_makes_an_error_of_is_one(
    folder: Path, clean_environment: dict[str, str], name: str, code: int
) -> None:
    """`torch.asarray` takes what is raised while it asks an object for its items for "not a sequence"."""
    command = [sys.executable, "-c", SWALLOWED.format(name=name)]
    done = subprocess.run(command, cwd=folder, env=clean_environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "internal error" not in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "base"]


def test_a_killed_merge_leaves_no_model_and_does_not_matter_to_the_next(
    folder: Path, clean_environment: dict[str, str], run: Run
) -> None:
    assert merge(folder, clean_environment, "--threads=1").stop(signal.SIGKILL)[0] == -signal.SIGKILL
    assert sorted(path.name for path in folder.iterdir()) == [".out.partial", "a", "b", "base"]
    # No tool opens it: there is no config beside the weights.
    assert [path.name for path in (folder / ".out.partial").iterdir()] == [WEIGHTS]
    arguments = ["merge", "a", "b", "--base=base", "--seed=3", "--method=dare_ties", "--json"]
    versions = []
    for place, more in (("out", []), ("again", ["--threads=3", "--memory=1MB", "--max-shard-size=3MB"])):
        result = run(*arguments, f"--out={place}", *more)
        assert result.returncode == 0, result.stderr
        versions.append(json.loads(result.stdout)["version"])
    # The version is the digest of the tensors: neither the remains nor threads, memory or shards have a part in it.
    assert versions[0] == versions[1]
    assert not (folder / ".out.partial").exists()
    assert (folder / "out" / WEIGHTS).exists()
    shards = sorted(path.name for path in (folder / "again").glob("*.safetensors"))
    assert shards[0] == "model-00001-of-00012.safetensors"
    weight_map = json.loads((folder / "again" / INDEX).read_text())["weight_map"]
    whole = load_file(folder / "out" / WEIGHTS)
    for name, tensor in whole.items():
        assert torch.equal(load_file(folder / "again" / weight_map[name])[name], tensor)


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("--device=tpu", "--device tpu: no such device"),
        ("--device=meta", "--device meta: merges run on cpu or cuda"),
        ("--memory=plenty", "--memory plenty: expected a size such as 500MB or 5GB"),
        ("--max-shard-size=0GB", "--max-shard-size 0GB: expected a size"),
        ("--threads=0", "Must be >= 1"),
    ],
)
def test_resources_that_are_not_there(folder: Path, run: Run, option: str, problem: str) -> None:
    result = run("merge", "a", "b", "--base=base", "--out=out", option)
    assert result.returncode == 2, result.stderr
    assert problem in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(folder: Path, run: Run) -> None:
    result = run("merge", "a", "b", "--base=base", "--out=out", "--device=cuda")
    assert (result.returncode, result.stdout) == (2, "")
    assert "finds 0 CUDA devices" in result.stderr
    assert "hint: leave --device out" in result.stderr
