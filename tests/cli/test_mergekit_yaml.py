"""`fedmerge merge --from`, against what mergekit made of the same configurations (tests/vectors)."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fedmerge.errors import ConfigError, InputError, ModelMismatch
from fedmerge.interop.mergekit_forms import FORMS
from fedmerge.interop.mergekit_yaml import read_mergekit
from fedmerge.local.assemble import Assembly, MergeJob
from fedmerge.merge import Recipe, Workers
from fedmerge.models.weights import writing_weights

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
    assert {case["method"] for case in CASES.values()} == FORMS.keys() - drawn - {"passthrough"}


# Configurations with slices, gradients, filters and models' own parameters, and what mergekit 0.1.5 made of them.
LAYERED: dict[str, dict[str, Any]] = json.loads((VECTORS / "layers/mergekit.json").read_text())


@pytest.fixture
def llamas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four models of four layers, as directories in the working directory."""
    models: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(VECTORS / "layers/mergekit.safetensors").items():
        case, _, rest = key.partition("/")
        if case == "input":
            model, name = rest.split("/")
            models.setdefault(model, {})[name] = tensor
    for model, tensors in models.items():
        (tmp_path / model).mkdir()
        save_file(tensors, tmp_path / model / "model.safetensors")
        config = {"model_type": "llama", "num_hidden_layers": 4, "torch_dtype": "float32", "layer_types": [*"wxyz"]}
        (tmp_path / model / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assembled(job: MergeJob) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Merge, and return the tensors and what changes in the config."""
    assembly, out = Assembly(job), Path("assembled")
    out.mkdir()
    with writing_weights(out, assembly.schema, {"model.safetensors": list(assembly.schema)}) as writer:
        assert set(assembly.merge(writer.write, seed=0, workers=Workers())) == assembly.schema.keys()
    return load_file(out / "model.safetensors"), assembly.config_changes()


@pytest.mark.parametrize("name", LAYERED)
def test_layers_come_out_as_mergekit_made_them(llamas: Path, name: str) -> None:
    recorded = {
        key.removeprefix(f"{name}/"): tensor
        for key, tensor in load_file(VECTORS / "layers/mergekit.safetensors").items()
        if key.startswith(f"{name}/")
    }
    merged, changes = assembled(read(llamas, LAYERED[name]))
    assert merged.keys() == recorded.keys()
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, recorded[key], atol=2e-7, rtol=1e-6)
    if "slices" in json.dumps(LAYERED[name]):
        layers = {int(key.split(".")[2]) for key in recorded if ".layers." in key}
        assert changes["num_hidden_layers"] == len(layers)


def test_stacked_layers_make_a_model_that_says_how_many_it_has(run: Run, llamas: Path) -> None:
    (llamas / "merge.yaml").write_text(yaml.safe_dump(LAYERED["passthrough_stack"] | {"dtype": "bfloat16"}))
    result = run("merge", "--from", "merge.yaml", "--out", "merged", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    config = json.loads((llamas / "merged/config.json").read_text())
    assert (config["num_hidden_layers"], config["torch_dtype"]) == (5, "bfloat16")
    assert config["layer_types"] == [*"wxy", *"yz"]
    merged, a, b = (load_file(llamas / name / "model.safetensors") for name in ("merged", "a", "b"))
    expected = {name: tensor for name, tensor in a.items() if "layers.3." not in name} | {
        name.replace(f"layers.{layer}.", f"layers.{layer + 1}."): b[name]
        for layer in (2, 3)
        for name in b
        if f"layers.{layer}." in name
    }
    expected |= {name: b[name] for name in ("lm_head.weight", "model.norm.weight")}
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name].bfloat16()) for name in expected)
    stated = json.loads(result.stdout)["merge"]["slices"]
    assert [part["sources"][0]["layers"] for part in stated] == [[0, 3], [2, 4]]


def test_a_wider_dtype_is_rounded_to_once(llamas: Path) -> None:
    for name in ("a", "b", "base"):
        tensors = load_file(llamas / name / "model.safetensors")
        save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, llamas / name / "model.safetensors")
    merged, changes = assembled(read(llamas, two("task_arithmetic") | {"dtype": "bfloat16", "out_dtype": "float32"}))
    a, b, base = (load_file(llamas / name / "model.safetensors") for name in ("a", "b", "base"))
    for key, tensor in merged.items():
        start = base[key].double()
        expected = start + 0.5 * (a[key].double() - start) + 0.5 * (b[key].double() - start)
        torch.testing.assert_close(tensor.double(), expected, atol=1e-7, rtol=1e-6)
    assert changes == {"torch_dtype": "float32"}


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"slices": [{"sources": [{"model": "a", "layer_range": [0, 5]}]}]}, InputError, "a: has no layer 4"),
        ({"slices": [{"sources": [{"model": "odd", "layer_range": [0, 1]}]}]}, InputError, "odd: slices need a model"),
        (
            {"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]},
                        {"sources": [{"model": "wide", "layer_range": [0, 1]}]}]},
            ModelMismatch, r"lm_head.weight has shape \[9, 4\], not \[8, 4\]",
        ),
    ],
)  # fmt: skip
def test_layers_that_are_not_there(llamas: Path, change: dict[str, Any], error: type[Exception], problem: str) -> None:
    tensors = load_file(llamas / "a" / "model.safetensors")
    for name, other in (("odd", {"w": torch.ones(1)}), ("wide", tensors | {"lm_head.weight": torch.ones(9, 4)})):
        (llamas / name).mkdir()
        save_file(other, llamas / name / "model.safetensors")
    with pytest.raises(error, match=problem):
        Assembly(read(llamas, {"merge_method": "passthrough"} | change))


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
    assert (job.host, job.models) == (Path("base"), [Path("a"), Path("b")])
    assert [source.weight for source in job.slices[0].sources] == [0.5, 0.5]
    params = recipe(job).params
    assert recipe(job).method == method
    assert (params["density"], params["rescale"], params["normalize"]) == (0.5, "l1", normalize)
    assert params.get("election") == election
    assert params.get("epsilon") == (0.15 if "della" in method else None)
    assert recipe(read(tmp_path, two(method, density=0.5, rescale=False))).params["rescale"] == "none"
    assert recipe(read(tmp_path, two(method))).params["density"] == 1


def test_a_models_own_value_goes_first(tmp_path: Path) -> None:
    config = two("ties", density=0.3)
    config["models"][0]["parameters"] = {"weight": 2, "density": 0.7}
    job = read(tmp_path, config)
    trimmed = Recipe.from_steps([("trim", {"density": {"each": [0.7, 0.3]}}), ("elect", {"election": "weighted"})])
    assert recipe(job) == trimmed
    config["models"][1]["parameters"] = {"density": 0.7}
    job = read(tmp_path, config)
    assert [source.weight for source in job.slices[0].sources] == [2.0, 0.5]
    assert recipe(job).params["density"] == 0.7
    config["models"][1]["parameters"] = {"lambda": 0.5}
    with pytest.raises(ConfigError, match="lambda: differs between models"):
        read(tmp_path, config)


@pytest.mark.parametrize("method", [name for name, form in FORMS.items() if form.steps])
def test_with_parameters_of_their_own_models_merge_as_with_shared_ones(llamas: Path, method: str) -> None:
    shared = two(method, density=0.4)
    own = two(method)
    own["models"][0]["parameters"] = {"density": 0.4}
    own["models"][1]["parameters"] = {"density": [0.4, 0.4]}
    whole, _ = assembled(read(llamas, shared))
    (llamas / "assembled").rename(llamas / "shared")
    steps, _ = assembled(read(llamas, own))
    assert len(recipe(read(llamas, own)).steps) == 2
    assert all(torch.equal(whole[name], steps[name]) for name in whole)


def recipe(job: MergeJob) -> Recipe:
    (only,) = job.slices
    return only.recipe


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tokenizer_source": "union"}, "tokenizer_source: only the base's tokenizer is supported"),
        ({"tokenizer": {"source": "union"}}, "tokenizer: only the base's tokenizer is supported"),
        ({"tokenizer": {"tokens": {}}}, "tokenizer.tokens: not supported"),
        ({"chat_template": "auto"}, "chat_template: not supported"),
        ({"merge_metod": "ties"}, "merge_metod: not supported; did you mean 'merge_method'"),
        ({"merge_method": "arcee_fusion"}, "merge_method: 'arcee_fusion' is not supported"),
        ({"merge_method": "dare_tis"}, "did you mean 'dare_ties'"),
        ({"base_model": None}, "base_model: is missing; ties needs it"),
        ({"base_model": 3}, "base_model: expected a directory"),
        ({"models": []}, "models: expected a list"),
        ({"models": [3]}, r"models\[0\]: expected keys with values"),
        ({"models": [{"model": "base"}]}, "there is none beside the base"),
        ({"models": [{"model": "a", "lora": "b"}]}, r"models\[0\].lora: not supported"),
        ({"slices": []}, "models: expected a list of models, or of slices"),
        ({"modules": {"text": {}}}, r"modules.text: not supported"),
        ({"modules": {"default": {}}}, "modules: stands instead of models"),
        ({"parameters": {"weight": [1, "x"]}}, r"parameters.weight\[1\]: expected a number, not 'x'"),
        ({"parameters": {"weight": [{"filter": "mlp", "value": 1}]}}, r"models\[0\].parameters: weight is missing"),
        ({"parameters": {"weight": [{"filter": "mlp", "valu": 1}]}}, r"weight\[0\].valu: not supported; did you mean"),
        ({"parameters": {"weight": [{"filter": 3, "value": 1}]}}, r"weight\[0\].filter: expected a part of"),
        ({"parameters": {"weight": [{"value": [[1]]}]}}, r"weight\[0\].value\[0\]: expected a number"),
        ({"parameters": {"weight": 1, "densty": 1}}, "parameters.densty: ties has no such parameter; did you mean"),
        ({"parameters": {"weight": 1, "normalize": 1}}, "normalize: expected a boolean, not 1"),
        ({"parameters": {"weight": 1, "density": True}}, "density: expected a number, not True"),
        ({"parameters": {"weight": 1, "density": 2}}, "density = 2 should be"),
        ({"parameters": {}}, r"models\[0\].parameters: weight is missing"),
        ({"parameters": {"weight": 10**400}}, "parameters.weight: too large"),
        ({"parameters": {"weight": math.nan}}, "parameters.weight: expected a number"),
        ({"parameters": {"weight": 1, "lambda": 10**400}}, "lambda: too large"),
        ({"parameters": {"weight": 1, "lambda": math.inf}}, "lambda: expected a number, not inf"),
        ({"parameters": {"weight": True}}, "parameters.weight: expected a number"),
        ({"dtype": "int8"}, "dtype: should be one of float32"),
        (
            {"merge_method": "slerp", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"t": 0.5}},
            "slerp merges two",
        ),
        ({"merge_method": "slerp", "models": [{"model": "a"}], "parameters": {}}, "t is missing"),
        ({"merge_method": "passthrough", "parameters": {}}, "passthrough takes one model at a time, not 2"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"merge\.yaml:\d+: .*{problem}"):
        read(tmp_path, two("ties") | change)


SLICED = """\
merge_method: task_arithmetic
base_model: base
parameters: {weight: 1}
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [0, 2]}
  - sources:
      - model: a
        layer_range: [2, 4]
"""


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("", "", "merge.yaml:8: slices[1].sources: base is none of them: the slice needs the layers of the base too"),
        ("[2, 4]", "[4, 2]", "merge.yaml:10: slices[1].sources[0].layer_range: expected [FIRST, END]"),
        ("a, layer_range: [0, 2]", "a, layer_range: [0, 3]", "merge.yaml:5: slices[0].sources: take 2, 3 layers, not"),
        ("layer_range: [2, 4]", "layers: 3", "merge.yaml:10: slices[1].sources[0].layers: not supported"),
        ("weight: 1", "wait: 1", "merge.yaml:3: parameters.wait: task_arithmetic has no such parameter; did you mean"),
    ],
)
def test_mistakes_in_slices_are_named_with_their_lines(tmp_path: Path, old: str, new: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, SLICED.replace(old, new, 1))
    assert caught.value.message.removeprefix(f"{tmp_path}/").startswith(problem)


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


def test_mistakes_on_the_command_line(run: Run, tmp_path: Path) -> None:
    write_models(tmp_path, "inputs_bf16.safetensors")
    config = two("ties") | {"models": [{"model": "ft0"}, {"model": "ft1"}], "dtype": "float12"}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
    refused = run("merge", "--from", "merge.yaml", "--out", "m")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: merge.yaml:2: dtype: should be one of float32, float16")
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
