"""The examples of docs/recipes.md, run as they stand on small models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmerge.config import parse_config

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
pytestmark = pytest.mark.slow
BLOCKS = {(kind, name): text for kind, name, text in re.findall(r"<!-- (\w+): (\w+) -->\n```\w+\n(.*?)```", PAGE, re.S)}
MODELS = ("base", "north", "south", "king", "man", "woman", "step-1", "step-2", "step-3")
PARTS = ("mlp.down_proj.weight", "self_attn.q_proj.weight")


def read(folder: Path, model: str) -> dict[str, Tensor]:
    return load_file(folder / model / "model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all shell blocks of the page were run, one after the other."""
    folder = tmp_path_factory.mktemp("page")
    generator = torch.Generator().manual_seed(0)
    names = ["model.embed_tokens.weight", *(f"model.layers.{layer}.{part}" for layer in range(4) for part in PARTS)]
    base = {name: torch.randn(4, 4, generator=generator) for name in names}
    for model in MODELS:
        (folder / model).mkdir()
        step = 0.1 * (model != "base")
        tensors = {name: tensor + step * torch.randn(4, 4, generator=generator) for name, tensor in base.items()}
        save_file(tensors, folder / model / "model.safetensors")
        (folder / model / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 4}))
    (folder / "stack.yaml").write_text(BLOCKS["yaml", "stack"])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = "\n".join(text for (kind, _), text in BLOCKS.items() if kind == "run")
    subprocess.run(["bash", "-ec", script], cwd=folder, env={**os.environ, "PATH": path}, check=True)
    return folder


def test_every_shell_block_leaves_its_model(folder: Path) -> None:
    outs = re.findall(r"--out ([\w-]+)", PAGE)
    assert {key for kind, key in BLOCKS if kind == "run"} == {"layers", "scope", "steps", "time", "analogy", "stack"}
    assert all((folder / out / "lineage.json").exists() for out in outs)


def test_the_analogy_and_the_averages_are_what_the_page_says(folder: Path) -> None:
    base, king, man, woman, queen = (read(folder, name) for name in ("base", "king", "man", "woman", "queen"))
    steps = [read(folder, f"step-{index}") for index in (1, 2, 3)]
    averaged, halfway = read(folder, "averaged"), read(folder, "halfway")
    for name in base:
        torch.testing.assert_close(queen[name], king[name] - man[name] + woman[name], atol=1e-5, rtol=0)
        mean = (0.81 * steps[0][name] + 0.9 * steps[1][name] + steps[2][name]) / 2.71
        torch.testing.assert_close(averaged[name], mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(halfway[name], (base[name] + averaged[name]) / 2, atol=1e-5, rtol=0)


def test_the_stack_is_six_layers_deep(folder: Path) -> None:
    assert json.loads((folder / "deeper/config.json").read_text())["num_hidden_layers"] == 6
    assert {name.split(".")[2] for name in read(folder, "deeper") if "layers" in name} == set("012345")


@pytest.mark.parametrize("name", ["layers", "scope", "steps"])
def test_the_sections_of_fedmerge_toml_are_valid(tmp_path: Path, name: str) -> None:
    text = f'[federation]\nname = "x"\n[model]\nbase = "base"\n{BLOCKS["toml", name]}'
    assert parse_config(text, folder=tmp_path, where="fedmerge.toml").recipe().steps
