"""`fedmerge merge --from`, against what mergekit made of the same configurations (tests/vectors)."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import yaml
from safetensors.torch import load_file, save_file

from fedmerge.errors import ConfigError
from fedmerge.interop.mergekit_yaml import FORMS, read_mergekit

Run: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]

VECTORS = Path(__file__).parents[1] / "vectors"
MANIFEST = json.loads((VECTORS / "manifest.json").read_text())
# Random masks are another generator's, and what merges task vectors alone has no configuration.
CASES: dict[str, dict[str, Any]] = {
    case["case"]: case
    for case in MANIFEST["cases"]
    if case["case"].startswith("mergekit_") and "masks" not in case["notes"] and case["kind"] == "weight"
}


def write_models(folder: Path, inputs: str) -> None:
    """Write the base and the fine-tunes of an input file as model directories."""
    models: dict[str, dict[str, Any]] = {}
    for key, tensor in load_file(VECTORS / inputs).items():
        model, name = key.split(".", 1)
        models.setdefault(model, {})[name] = tensor
    for model, tensors in models.items():
        (folder / model).mkdir()
        save_file(tensors, folder / model / "model.safetensors")


def configuration(case: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded case in the published form."""
    params = {key: value for key, value in case["params"].items() if key not in {"base", "n_models", "weight"}}
    weight = case["params"].get("weight")
    models: list[dict[str, Any]] = [{"model": f"ft{index}"} for index in range(case["params"]["n_models"])]
    if isinstance(weight, list):
        for entry, value in zip(models, weight, strict=True):
            entry["parameters"] = {"weight": value}
    elif weight is not None:
        params["weight"] = weight
    config = {"merge_method": case["method"], "models": models, "parameters": params, "dtype": case["dtype"]}
    if case["params"]["base"]:
        config["base_model"] = "base"
        models.insert(0, {"model": "base"})  # as published configurations list it
    return config


@pytest.mark.parametrize("name", CASES)
def test_gives_what_mergekit_gave(run: Run, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    write_models(tmp_path, case["inputs"])
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(configuration(case)))
    result = run("merge", "--from", "merge.yaml", "--out", "merged", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    recorded = load_file(VECTORS / case["file"])
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert {f"out.{key}" for key in merged} == {key for key in recorded if key.startswith("out.")}
    for key, ours in merged.items():
        expected = recorded[f"out.{key}"]
        assert ours.dtype == expected.dtype
        difference = (ours.double() - expected.double()).abs().max()
        assert difference <= case["atol"] + 1e-6 * expected.double().abs().max(), key


def test_the_recorded_cases_cover_every_method_without_random_masks() -> None:
    drawn = {"dare_linear", "dare_ties", "della", "della_linear"}
    assert {case["method"] for case in CASES.values()} == FORMS.keys() - drawn


def read(tmp_path: Path, config: dict[str, Any] | str) -> Any:
    path = tmp_path / "merge.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return read_mergekit(path)


def two(method: str, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"weight": 0.5} | parameters,
    }


@pytest.mark.parametrize(
    ("method", "normalize", "election"),
    [("dare_linear", False, None), ("dare_ties", False, "weighted"), ("della", True, "weighted"),
     ("della_linear", False, None)],
)  # fmt: skip
def test_methods_that_draw_masks_get_mergekits_switches(
    tmp_path: Path, method: str, normalize: bool, election: str | None
) -> None:
    job = read(tmp_path, two(method, density=0.5, int8_mask=True))
    assert (job.base, job.models, job.weights) == (Path("base"), (Path("a"), Path("b")), (0.5, 0.5))
    params = job.recipe.params
    assert job.recipe.method == method
    assert (params["density"], params["rescale"], params["normalize"]) == (0.5, "l1", normalize)
    assert params.get("election") == election
    assert params.get("epsilon") == (0.15 if "della" in method else None)
    assert read(tmp_path, two(method, density=0.5, rescale=False)).recipe.params["rescale"] == "none"
    assert read(tmp_path, two(method)).recipe.params["density"] == 1


def test_a_models_own_value_goes_first_and_all_must_agree(tmp_path: Path) -> None:
    config = two("ties", density=0.3)
    config["models"][0]["parameters"] = {"weight": 2, "density": 0.7}
    with pytest.raises(ConfigError, match="density: differs between models"):
        read(tmp_path, config)
    config["models"][1]["parameters"] = {"density": 0.7}
    job = read(tmp_path, config)
    assert (job.weights, job.recipe.params["density"]) == ((2.0, 0.5), 0.7)


GRADIENT = {"parameters": {"weight": 1, "density": [0, 0.5, 1]}}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"slices": []}, "slices: not supported"),
        ({"tokenizer_source": "union"}, "tokenizer_source: not supported"),
        ({"merge_metod": "ties"}, "merge_metod: not supported; did you mean 'merge_method'"),
        ({"merge_method": "passthrough"}, "merge_method: 'passthrough' is not supported"),
        ({"merge_method": "dare_tis"}, "did you mean 'dare_ties'"),
        ({"base_model": None}, "base_model: is missing; ties needs it"),
        ({"base_model": 3}, "base_model: expected a directory"),
        ({"models": []}, "models: expected a list"),
        ({"models": [3]}, r"models\[0\]: expected keys with values"),
        ({"models": [{"model": "base"}]}, "there is none beside the base"),
        ({"models": [{"model": "a", "lora": "b"}]}, r"models\[0\].lora: not supported"),
        ({"models": [{"model": "a", **GRADIENT}]}, "a: parameters.density: expected a number or a boolean"),
        (GRADIENT, "parameters.density: expected a number or a boolean"),
        ({"parameters": {"weight": [{"filter": "mlp", "value": 1}]}}, "parameters.weight: expected a number"),
        ({"parameters": {"weight": 1, "densty": 1}}, "parameters.densty: ties has no such parameter; did you mean"),
        ({"parameters": {"weight": 1, "normalize": 1}}, "normalize: expected a boolean, not 1"),
        ({"parameters": {"weight": 1, "density": True}}, "density: expected a number, not True"),
        ({"parameters": {"weight": 1, "density": 2}}, "density = 2 should be"),
        ({"parameters": {}}, "a: parameters.weight: is missing"),
        ({"parameters": {"weight": 10**400}}, "parameters.weight: too large"),
        ({"parameters": {"weight": math.nan}}, "a: parameters.weight: expected a number"),
        ({"parameters": {"weight": 1, "lambda": 10**400}}, "lambda: too large"),
        ({"parameters": {"weight": 1, "lambda": math.inf}}, "lambda = inf"),
        ({"parameters": {"weight": True}}, "a: parameters.weight: expected a number"),
        ({"dtype": "int8"}, "dtype: should be one of float32"),
        ({"merge_method": "slerp", "parameters": {"t": 0.5}}, "slerp merges two models, not 3"),
        ({"merge_method": "slerp", "models": [{"model": "a"}], "parameters": {}}, "parameters.t: is missing"),
        ({"merge_method": "linear", "parameters": {"weight": 1, "normalize": False}}, "normalize: false is supported"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read(tmp_path, two("ties") | change)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "[" * 5000,
        "{",
        "a: b: c",
        "!!python/object/apply:os.system ['true']",
        "\x00",
        "? [a]\n: 1",
        "x: 2020-99-99",
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"merge\.yaml"):
        read(tmp_path, text)


@pytest.mark.parametrize("key", ["merge_method", "dtype", "base_model", "parameters"])
def test_aliases_that_would_fill_the_memory_in_print_are_not_printed(tmp_path: Path, key: str) -> None:
    bomb = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    text = "\n".join(["name:", *(f"  {line}" for line in bomb), yaml.safe_dump(two("ties") | {key: 0})])
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text.replace(f"\n{key}: 0", f"\n{key}: *a59"))
    assert len(caught.value.message) < 300


def test_a_sum_of_models_that_is_a_mean_is_one(tmp_path: Path) -> None:
    assert read(tmp_path, two("linear", normalize=False)).recipe.method == "fedavg"


def test_mistakes_on_the_command_line(run: Run, tmp_path: Path) -> None:
    write_models(tmp_path, "inputs_bf16.safetensors")
    config = two("ties") | {"models": [{"model": "ft0"}, {"model": "ft1"}], "dtype": "float16"}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
    refused = run("merge", "--from", "merge.yaml", "--out", "m")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: merge.yaml: dtype: F16 is not the base's, which is BF16\nhint: ")
    both = run("merge", "ft0", "--from", "merge.yaml", "--out", "m")
    assert both.stderr.startswith("error: --from says what to merge and how")
    assert run("merge", "--from", "none.yaml", "--out", "m").stderr.startswith(
        "error: none.yaml: can't be read (No such"
    )
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(two("ties")))
    assert run("merge", "--from", "merge.yaml", "--out", "m").stderr == "error: a: no such model directory\n"
    assert not (tmp_path / "m").exists()


def test_without_pyyaml_it_says_what_to_install(run: Run, tmp_path: Path) -> None:
    (tmp_path / "merge.yaml").write_text("{}")
    program = "import sys; sys.modules['yaml'] = None; from fedmerge.cli import main\n"
    result = run(python=f"{program}sys.exit(main(['merge', '--from', 'merge.yaml', '--out', 'm']))")
    assert (result.returncode, result.stderr) == (
        6,
        "error: the package yaml is not installed\nhint: pip install pyyaml\n",
    )
