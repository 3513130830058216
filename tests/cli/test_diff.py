from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias
from xml.etree import ElementTree as ET

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import write_delta
from fedmerge.delta.task_vector import subtract
from fedmerge.tensors import Checkpoint

Run: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]

SVG = "{http://www.w3.org/2000/svg}"


def write_model(directory: Path, tensors: dict[str, Tensor]) -> None:
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base, two fine-tunes with cosine 0.6, one of them 5 times as long, and a copy of the base."""
    base = {"layers.0.w": torch.ones(2, 2), "head.w": torch.zeros(2), "ids": torch.arange(3)}
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "copy", base)
    write_model(tmp_path / "north", base | {"head.w": torch.tensor([1.0, 0.0])})
    write_model(tmp_path / "south", base | {"head.w": torch.tensor([3.0, 4.0])})
    write_model(tmp_path / "other/south", base | {"head.w": torch.tensor([0.0, -1.0])})
    return tmp_path


def test_delta_files_are_measured_as_the_models_that_they_came_from(run: Run, models: Path) -> None:
    base = Checkpoint(models / "base")
    for name in ("north", "south"):
        vector = subtract(Checkpoint(models / name), base)
        write_delta(models / f"{name}.delta", vector, base.schema, Codec(values="fp32"), seed=0)
        write_delta(models / f"{name}.seeded", vector, base.schema, Codec(sparsify="seeded", density=0.5), seed=0)
    of_models = run("diff", "north", "south", "--base", "base", "--json")
    result = run("diff", "north.delta", "south.delta", "--base", "base", "--json", "--plot", "map.png")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.replace(".delta", "") == of_models.stdout
    assert (models / "map.png").read_bytes().startswith(b"\x89PNG")
    mixed = run("diff", "north", "south.delta", "--base", "base", "--json")
    assert json.loads(mixed.stdout)["cosine"] == json.loads(of_models.stdout)["cosine"]

    whose = run("diff", "north.seeded", "south", "--base", "base")
    assert whose.returncode != 0
    assert "no statement.json beside it says whose" in whose.stderr
    (models / "noise.delta").write_bytes(b"\x07" * 100)
    noise = run("diff", "noise.delta", "south", "--base", "base")
    assert noise.returncode != 0
    assert "Traceback" not in noise.stderr


def test_reports_pairs_layers_and_warnings(run: Run, models: Path) -> None:
    result = run("diff", "north", "south", "--base", "base", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    pair = {"cosine": pytest.approx(0.6), "conflict": 0.0, "weighted_conflict": 0.0}
    assert found["pairs"] == [{"models": ["north", "south"]} | pair]
    assert found["models"] == [
        {"name": "north", "norm": 1.0, "share": pytest.approx(1 / 6), "unchanged": pytest.approx(5 / 6)},
        {"name": "south", "norm": 5.0, "share": pytest.approx(5 / 6), "unchanged": pytest.approx(4 / 6)},
    ]
    nothing = {"cosine": None, "conflict": None, "weighted_conflict": None}
    assert found["layers"] == [
        {"name": "head", "num_elements": 2, "norm_share": 1.0} | pair,
        {"name": "layers.0", "num_elements": 4, "norm_share": 0.0} | nothing,
    ]
    assert [warning.split(" and ")[0] for warning in found["warnings"]] == ["south moved 5.0 times as far as north"]

    text = run("diff", "north", "south", "--base", "base")
    assert text.returncode == 0
    assert re.search(r"north, south\W+0\.600\W+0\.0%", text.stdout)
    assert text.stderr.startswith("warning: south moved 5.0 times")


def test_a_bf16_model_that_moved_nothing_is_called_out(run: Run, tmp_path: Path) -> None:
    base = {"w": torch.ones(100, dtype=torch.bfloat16)}
    write_model(tmp_path / "base", base)
    steps = torch.where(torch.arange(100) < 90, 1e-4, 1e-1)  # those below 2**-9 are rounded away
    write_model(tmp_path / "tuned", {"w": base["w"] + steps.bfloat16()})
    found = json.loads(run("diff", "tuned", "--base", "base", "--json").stdout)
    assert found["models"][0]["unchanged"] == pytest.approx(0.9)
    assert [warning.split(":")[0] for warning in found["warnings"]] == ["tuned left 90% of its entries as they were"]


def test_the_heat_map_is_xml_with_a_number_in_every_cell(run: Run, models: Path) -> None:
    (models / "south").rename(models / "<s&\x1b'\">")
    arguments = ["diff", "north", "<s&\x1b'\">", "other/south", "copy", "--base", "base", "--plot", "new/map.svg"]
    result = run(*arguments)
    assert result.returncode == 0
    assert "\x1b" not in result.stdout + result.stderr
    root = ET.fromstring((models / "new/map.svg").read_bytes())
    assert root.tag == f"{SVG}svg"
    panels = root.findall(f"{SVG}g")
    texts = [[text.text for text in panel.iter(f"{SVG}text")] for panel in panels]
    assert [panel[0] for panel in texts] == [
        "Cosine of task vectors", "Sign conflict", "Sign conflict by magnitude", "Mean pair, by layer",
    ]  # fmt: skip
    cells = [[cell[-1].text for cell in panel.findall(f"{SVG}g")] for panel in panels]
    assert cells[0] == [
        "1.00", "0.60", "0.00", "-",
        "0.60", "1.00", "-0.80", "-",
        "0.00", "-0.80", "1.00", "-",
        "-", "-", "-", "1.00",
    ]  # fmt: skip
    assert cells[1][6] == "1.00"
    assert (len(cells[3]), cells[3][0][:2]) == (2 * 3, "-0")  # two groups of layers, three measures
    assert {"<s&?'\">", "north", "south", "copy"} <= set(texts[0])

    before = (models / "new/map.svg").read_bytes()
    again = run(*arguments)
    assert (again.returncode, (models / "new/map.svg").read_bytes()) == (8, before)
    assert again.stderr == "error: new/map.svg: already exists\nhint: choose another --plot\n"


def test_models_of_one_name_are_told_apart_by_their_paths(run: Run, models: Path) -> None:
    found = json.loads(run("diff", "south", "other/south", "--base", "base", "--json").stdout)
    assert found["pairs"][0]["models"] == ["south", "other/south"]
    assert found["pairs"][0]["cosine"] == pytest.approx(-0.8)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("north south", "--base is missing"),
        ("--base base", "MODEL is missing"),
        ("north nowhere --base base", "nowhere: no such model directory"),
        ("north north --base base", "north: given twice"),
        ("north smaller --base base", "smaller: not the same architecture: misses head.w"),
        ("north diverged --base base", "diverged: head.w holds 1 NaN or infinite values"),
    ],
)
def test_mistakes_are_one_line(run: Run, models: Path, arguments: str, error: str) -> None:
    write_model(models / "smaller", {"layers.0.w": torch.ones(2, 2), "ids": torch.arange(3)})
    write_model(models / "diverged", {"layers.0.w": torch.ones(2, 2), "head.w": torch.tensor([0.0, torch.nan])})
    result = run("diff", *arguments.split(), "--plot", "map.svg")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[0] == f"error: {error}"
    assert not (models / "map.svg").exists()


def test_the_same_map_as_a_picture(run: Run, models: Path) -> None:
    pytest.importorskip("matplotlib")
    (models / "south").rename(models / "s$x$<")
    result = run("diff", "north", "s$x$<", "copy", "--base", "base", "--plot", "map.png")
    assert result.returncode == 0, result.stderr
    data = (models / "map.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    assert width > height > 200
    assert run("diff", "north", "copy", "--base", "base", "--plot", "map.pdf").stderr == (
        "error: --plot map.pdf: expected a name that ends in .svg or .png\n"
    )


def test_without_matplotlib_it_says_what_to_install(run: Run, models: Path) -> None:
    program = "import sys; sys.modules['matplotlib'] = None; from fedmerge.cli import main\n"
    arguments = ["diff", "north", "south", "--base", "base", "--plot", "map.png"]
    result = run(python=f"{program}sys.exit(main({arguments}))")
    assert (result.returncode, result.stderr.splitlines()[-1]) == (6, "hint: pip install 'fedmerge[plots]'")
