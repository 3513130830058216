"""Merge configurations in the YAML form that mergekit publishes, read as a fedmerge recipe with mergekit's meaning.

What a key means there stands beside each method below as switches of ours: signs are elected by weighted sums, DARE and
DELLA restore the sum of magnitudes instead of dividing by the density, and so on. Random masks come from fedmerge's own
generator, so that methods which draw them agree in distribution, not in bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fedmerge.errors import ConfigError, MissingExtra, did_you_mean
from fedmerge.merge import Recipe
from fedmerge.merge.layers import Value
from fedmerge.merge.methods import PAIRWISE

MAX_FILE_BYTES = 1 << 20

KEYS = ("merge_method", "models", "base_model", "parameters", "dtype")
IGNORED_KEYS = frozenset({"name"})
IGNORED_PARAMETERS = frozenset({"int8_mask"})  # how mergekit stores its masks

# What mergekit calls a dtype, by the name that safetensors has for it.
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}

Values: TypeAlias = Mapping[str, Any]
# What the base model is to a method: what task vectors start from, a node of its own, either, or absent.
Base: TypeAlias = Literal["origin", "node", "optional", "none"]


@dataclass(frozen=True)
class MergeJob:
    """A merge as a configuration asks for it: fine-tunes with their weights, the base, the recipe and a dtype.

    `base` is one of `models` where the method has no other use for it. `dtype` is as safetensors names it.
    """

    recipe: Recipe
    base: Path
    models: tuple[Path, ...]
    weights: tuple[Value, ...]
    dtype: str | None


@dataclass(frozen=True)
class _Form:
    """One method: ours, its parameters there with their defaults (None: required), and how they become ours."""

    method: str
    parameters: Values
    translate: Callable[[Values], dict[str, Any]]
    base: Base = "origin"
    weighted: bool = True
    more: Values = field(default_factory=dict)
    mean: str | None = None  # the parameter that must be true, since we only have the mean


def _same(values: Values) -> dict[str, Any]:
    return dict(values)


def _rescaled(values: Values) -> dict[str, Any]:
    return {**values, "rescale": "l1" if values["rescale"] else "none"}


def _breadcrumbs(values: Values) -> dict[str, Any]:
    return {("outliers" if name == "gamma" else name): value for name, value in values.items()}


def _nuslerp(values: Values) -> dict[str, Any]:
    if values["nuslerp_flatten"]:
        return {"axis": "tensor"}
    return {"axis": "column" if values["nuslerp_row_wise"] else "row"}


def _nothing(values: Values) -> dict[str, Any]:
    return {}


_SUM = {"lambda": 1.0, "normalize": False}
_THIN = {**_SUM, "density": 1.0}
_ELECT = {"election": "weighted"}

FORMS: dict[str, _Form] = {
    "linear": _Form("fedavg", {"normalize": True}, _nothing, base="none", mean="normalize"),
    "slerp": _Form("slerp", {"t": None}, _same, base="node", weighted=False, more={"space": "weights"}),
    "nuslerp": _Form("nuslerp", {"nuslerp_flatten": True, "nuslerp_row_wise": False}, _nuslerp, base="optional"),
    "multislerp": _Form("multislerp", {"normalize_weights": True}, _nothing, base="optional", mean="normalize_weights"),
    "karcher": _Form(
        "karcher", {"max_iter": 10, "tol": 1e-5}, _same, base="none", weighted=False, more={"space": "weights"}
    ),
    "task_arithmetic": _Form("task_arithmetic", _SUM, _same),
    "ties": _Form("ties", {**_THIN, "normalize": True}, _same, more=_ELECT),
    "dare_linear": _Form("dare_linear", {**_THIN, "rescale": True}, _rescaled),
    "dare_ties": _Form("dare_ties", {**_THIN, "rescale": True}, _rescaled, more=_ELECT),
    "della": _Form("della", {**_THIN, "normalize": True, "epsilon": 0.15, "rescale": True}, _rescaled, more=_ELECT),
    "della_linear": _Form("della_linear", {**_THIN, "epsilon": 0.15, "rescale": True}, _rescaled),
    "breadcrumbs": _Form("breadcrumbs", {**_THIN, "gamma": 0.01}, _breadcrumbs),
    "breadcrumbs_ties": _Form("breadcrumbs_ties", {**_THIN, "gamma": 0.01}, _breadcrumbs, more=_ELECT),
    "model_stock": _Form("model_stock", {"filter_wise": False}, _same, weighted=False, more={"clamp": False}),
    "sce": _Form(
        "sce",
        {"select_topk": 1.0},
        lambda values: {"selected": values["select_topk"]},
        weighted=False,
        more={"guard": "absolute"},
    ),
}


def read_mergekit(path: Path) -> MergeJob:
    """Read the YAML file `path`; models are local directories, relative to the working directory.

    Raises `ConfigError`, naming the key, when the file can't be read, or asks for what fedmerge does not do: slices,
    gradients over layers, other tokenizers, or a parameter that differs between models. Raises `MissingExtra` without
    PyYAML.
    """
    config = _mapping(_parse(path), str(path))
    for key in config.keys() - {*KEYS} - IGNORED_KEYS:
        raise ConfigError(
            f"{path}: {key}: not supported{did_you_mean(str(key), KEYS)}", hint=f"supported are {', '.join(KEYS)}"
        )
    name = config.get("merge_method")
    if not isinstance(name, str) or name not in FORMS:
        # Only a word is shown: a structure of aliases may be tiny in the file and endless in print.
        given = f"{name!r:.60} is not supported{did_you_mean(name, FORMS)}" if isinstance(name, str) else "is missing"
        raise ConfigError(f"{path}: merge_method: {given}", hint=f"supported are {', '.join(FORMS)}")
    form = FORMS[name]
    entries = _entries(config, str(path))
    base = _path(config["base_model"], f"{path}: base_model") if config.get("base_model") is not None else None
    origin, entries = _placed(form, name, base, entries, str(path))
    shared = _mapping(config.get("parameters") or {}, f"{path}: parameters")
    values, weights = _values(form, name, shared, entries, str(path))
    # Without a base these two merge models as they are.
    space = {"space": "weights"} if form.base == "optional" and base is None else {}
    return MergeJob(
        recipe=Recipe(form.method, {**form.translate(values), **form.more, **space}),
        base=origin,
        models=tuple(model for model, _ in entries),
        weights=weights,
        dtype=_dtype(config.get("dtype"), str(path)),
    )


_Entries: TypeAlias = list[tuple[Path, Values]]


def _parse(path: Path) -> object:
    try:
        import yaml  # type: ignore[import-untyped]
    except ModuleNotFoundError as err:
        raise MissingExtra("the package yaml is not installed", hint="pip install pyyaml") from err
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as err:
        raise ConfigError(f"{path}: can't be read ({err.strerror})") from err
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: too large to be a merge configuration")
    try:
        return yaml.safe_load(data)
    except yaml.MarkedYAMLError as err:
        line = f":{err.problem_mark.line + 1}" if err.problem_mark else ""
        raise ConfigError(f"{path}{line}: not YAML ({err.problem})") from err
    except (yaml.YAMLError, ValueError, RecursionError) as err:
        raise ConfigError(f"{path}: not YAML ({type(err).__name__})") from err


def _mapping(value: object, where: str) -> Values:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{where}: expected keys with values")
    return value


def _path(value: object, where: str) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"{where}: expected a directory", hint="models are local directories; none is downloaded")
    return Path(value)


def _entries(config: Values, where: str) -> _Entries:
    models = config.get("models")
    if not isinstance(models, list) or not models:
        raise ConfigError(f"{where}: models: expected a list of models")
    entries: _Entries = []
    for index, entry in enumerate(models):
        place = f"{where}: models[{index}]"
        keys = _mapping(entry, place)
        for key in keys.keys() - {"model", "parameters"}:
            raise ConfigError(f"{place}.{key}: not supported")
        model = _path(keys.get("model"), f"{place}.model")
        entries.append((model, _mapping(keys.get("parameters") or {}, f"{place}.parameters")))
    return entries


def _placed(form: _Form, name: str, base: Path | None, entries: _Entries, where: str) -> tuple[Path, _Entries]:
    """Return what task vectors start from, and the models that take part."""
    if base is None and form.base in {"origin", "node"}:
        raise ConfigError(f"{where}: base_model: is missing; {name} needs it")
    if base is not None and form.base != "none":
        entries = [(model, values) for model, values in entries if model != base]
        if form.base == "node":
            entries = [(base, {}), *entries]
    if form.method in PAIRWISE and len(entries) != 2:
        raise ConfigError(f"{where}: models: {name} merges two models, not {len(entries)}")
    if not entries:
        raise ConfigError(f"{where}: models: there is none beside the base")
    return base or entries[0][0], entries


def _values(
    form: _Form, name: str, shared: Values, entries: _Entries, where: str
) -> tuple[dict[str, Any], tuple[float, ...]]:
    """Return the method's parameters, and the models' weights. A model's own value goes before the shared one."""
    known = {*form.parameters, *(["weight"] if form.weighted else [])}
    places = [("parameters", shared), *((f"{model}: parameters", own) for model, own in entries)]
    for place, given in places:
        for key, value in given.items():
            if key not in known and key not in IGNORED_PARAMETERS:
                raise ConfigError(f"{where}: {place}.{key}: {name} has no such parameter{did_you_mean(key, known)}")
            if not isinstance(value, (bool, int, float)):
                raise ConfigError(
                    f"{where}: {place}.{key}: expected a number or a boolean",
                    hint="gradients over layers, and values that depend on tensor names, are not supported",
                )
            if isinstance(value, int) and value.bit_length() > 64:
                raise ConfigError(f"{where}: {place}.{key}: too large")
    values: dict[str, Any] = {}
    for key, default in form.parameters.items():
        found = {own.get(key, shared.get(key, default)) for _, own in _heard(form, entries)}
        if len(found) > 1:
            raise ConfigError(f"{where}: {key}: differs between models, which is not supported")
        (values[key],) = found
        if values[key] is None:
            raise ConfigError(f"{where}: parameters.{key}: is missing; {name} needs it")
        if isinstance(default, bool) != isinstance(values[key], bool):
            expected = "a boolean" if isinstance(default, bool) else "a number"
            raise ConfigError(f"{where}: {key}: expected {expected}, not {values[key]!r}")
    if not form.weighted:
        return values, (1.0,) * len(entries)
    weights = tuple(_weight(own.get("weight", shared.get("weight")), model, where) for model, own in entries)
    if form.mean and not values[form.mean] and not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise ConfigError(f"{where}: {form.mean}: false is supported only where the weights sum to 1")
    return values, weights


def _heard(form: _Form, entries: _Entries) -> _Entries:
    """Return the models whose own parameters count: all, but the base where it is a node."""
    return entries[1:] if form.base == "node" else entries


def _weight(value: object, model: Path, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        problem = "is missing" if value is None else "expected a number"
        raise ConfigError(f"{where}: {model}: parameters.weight: {problem}")
    return float(value)


def _dtype(value: object, where: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or value not in DTYPES:
        raise ConfigError(f"{where}: dtype: should be one of {', '.join(DTYPES)}")
    return DTYPES[value]
