"""Merge configurations in the YAML form that mergekit publishes, read as a merge job with mergekit's meaning.

What the methods are to us is in `fedmerge.interop.mergekit_forms`. A parameter is looked for in a slice's source (or in
`models`), then in the slice, in the module and at the top; a list runs over the depth of its slice, and a list of
`filter` and `value` goes by parts of tensor names, as `fedmerge.merge.layers` has both.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedmerge.errors import ConfigError, did_you_mean
from fedmerge.interop.mergekit_forms import FORMS, Values
from fedmerge.interop.yaml_file import YamlFile
from fedmerge.local.assemble import MergeJob, Slice, Source
from fedmerge.merge import Recipe, Step
from fedmerge.merge.layers import DEFAULT, EACH, Value
from fedmerge.merge.methods import PAIRWISE

KEYS = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "name",
)  # fmt: skip
IGNORED_PARAMETERS = frozenset({"int8_mask"})  # how mergekit stores its masks

# What mergekit calls a dtype, by the name that safetensors has for it.
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}

Place: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True)
class _Level:
    """A table of parameters and where it stands."""

    place: Place
    values: Values


@dataclass(frozen=True)
class _Entry:
    """A model of a slice, where it stands, and its own parameters."""

    source: Source
    place: Place
    level: _Level


def read_mergekit(path: Path) -> MergeJob:
    """Read the YAML file `path`; models are local directories, relative to the working directory.

    Raises `ConfigError`, naming line and key, when the file can't be read, or asks for what fedmerge does not do: other
    tokenizers than the base's, say, or modules. Raises `MissingExtra` without PyYAML.
    """
    return _Reader(YamlFile(path)).job()


class _Reader:
    def __init__(self, file: YamlFile) -> None:
        self.file = file
        self.config = self._mapping(file.data, (), KEYS)
        name = self.config.get("merge_method")
        if not isinstance(name, str) or name not in FORMS:
            # Only a word is shown: a structure of aliases may be tiny in the file and endless in print.
            given = (
                f"{name!r:.60} is not supported{did_you_mean(name, FORMS)}" if isinstance(name, str) else "is missing"
            )
            raise self._error(("merge_method",), given, hint=f"supported are {', '.join(FORMS)}")
        self.name, self.form = name, FORMS[name]
        self.base = self._path(self.config["base_model"], ("base_model",)) if self.config.get("base_model") else None
        if self.base is None and self.config.get("base_model") is not None:
            raise self._error(("base_model",), "expected a directory")
        if self.base is None and self.form.base in {"origin", "node"}:
            raise self._error(("base_model",), f"is missing; {name} needs it")

    def job(self) -> MergeJob:
        for key in ("tokenizer_source", "tokenizer"):
            self._require_own_tokenizer(key)
        top = self._level(self.config, ())
        body, levels = self.config, [top]
        place: Place = ()
        if "modules" in body:
            module = self._mapping(self._mapping(body["modules"], ("modules",), ("default",)).get("default"),
                                   ("modules", "default"), ("slices", "models", "parameters"))  # fmt: skip
            if "models" in body or "slices" in body:
                raise self._error(("modules",), "stands instead of models and slices")
            body, place = module, ("modules", "default")
            levels = [self._level(module, place), top]
        if ("slices" in body) == ("models" in body):
            raise self._error((*place, "models"), "expected a list of models, or of slices")
        if "models" in body:
            slices = [self._slice(self._entries(body["models"], (*place, "models")), (*place, "models"), levels)]
        else:
            slices = [
                self._sliced(one, (*place, "slices", index), levels)
                for index, one in enumerate(self._list(body["slices"], (*place, "slices")))
            ]
        host = self.base or slices[0].sources[0].model
        dtype = self._dtype("out_dtype") or self._dtype("dtype")
        return MergeJob(tuple(slices), host, dtype)

    # The parts of a configuration

    def _sliced(self, data: object, place: Place, levels: list[_Level]) -> Slice:
        keys = self._mapping(data, place, ("sources", "parameters"))
        entries = self._entries(keys.get("sources"), (*place, "sources"), sliced=True)
        lengths = [stop - start for start, stop in (entry.source.layers or (0, 0) for entry in entries)]
        if len(set(lengths)) > 1:
            raise self._error((*place, "sources"), f"take {', '.join(map(str, lengths))} layers, not the same number")
        return self._slice(entries, (*place, "sources"), [self._level(keys, place), *levels])

    def _slice(self, entries: list[_Entry], place: Place, levels: list[_Level]) -> Slice:
        """Return what is merged how, once the base has its place."""
        form = self.form
        base, tuned = None, entries
        if self.base is not None and form.base != "none":
            base = next((one.source for one in entries if one.source.model == self.base), None)
            tuned = [one for one in entries if one.source.model != self.base]
            if base is None and entries[0].source.layers is not None:
                raise self._error(place, f"{self.base} is none of them: the slice needs the layers of the base too")
            base = Source(self.base, layers=base.layers if base else None)
        if not tuned:
            raise self._error(place, "there is none beside the base")
        values, weights = self._values(tuned, levels)
        sources = [
            Source(one.source.model, weight, one.source.layers) for one, weight in zip(tuned, weights, strict=True)
        ]
        if form.base == "node" and base is not None:
            sources = [base, *sources]
        if form.method in PAIRWISE and len(sources) != 2:
            raise self._error(place, f"{self.name} merges two models, not {len(sources)}")
        if self.name == "passthrough":
            if len(sources) != 1:
                raise self._error(place, f"passthrough takes one model at a time, not {len(sources)}")
            only = Source(sources[0].model, values["scale"], sources[0].layers)
            return Slice(Recipe("task_arithmetic"), (only,), None)
        if self.name == "linear" and not values["normalize"]:
            return Slice(Recipe("task_arithmetic"), tuple(sources), None)
        if values.get("normalize_weights") is False and not _is_one(weights):
            raise self._error(place, "normalize_weights: false is supported only where the weights sum to 1")
        recipe = self._recipe(values, has_base=self.base is not None, place=place)
        return Slice(recipe, tuple(sources), base or sources[0])

    def _recipe(self, values: Values, *, has_base: bool, place: Place) -> Recipe:
        form = self.form
        # Without a base these two merge models as they are.
        space = {"space": "weights"} if form.base == "optional" and not has_base else {}
        try:
            if form.steps is None or not any(isinstance(value, dict) and EACH in value for value in values.values()):
                return Recipe(form.method, {**form.translate(values), **form.more, **space})
            before = {key: value for key, value in values.items() if key in form.own or key == "rescale"}
            rest = {key: value for key, value in values.items() if key not in before}
            transform, method = form.steps
            steps = (Step(transform, form.translate(before)),)
            return Recipe(method, {**form.translate(rest), **form.more}, before=steps)
        except ConfigError as err:
            raise self._error(place, err.message, hint=err.hint) from err

    def _entries(self, data: object, place: Place, *, sliced: bool = False) -> list[_Entry]:
        entries: list[_Entry] = []
        for index, item in enumerate(self._list(data, place)):
            where = (*place, index)
            keys = self._mapping(item, where, ("model", "parameters", *(["layer_range"] if sliced else [])))
            layers = self._layers(keys.get("layer_range"), (*where, "layer_range")) if sliced else None
            source = Source(self._path(keys.get("model"), (*where, "model")), layers=layers)
            entries.append(_Entry(source, where, self._level(keys, where)))
        return entries

    def _layers(self, value: object, place: Place) -> tuple[int, int]:
        numbers = value if isinstance(value, list) else []
        whole = [number for number in numbers if isinstance(number, int) and not isinstance(number, bool)]
        if len(numbers) != 2 or len(whole) != 2 or not 0 <= whole[0] < whole[1] < 1 << 31:
            raise self._error(place, "expected [FIRST, END], the first layer and the one after the last")
        return whole[0], whole[1]

    # Parameters

    def _values(self, tuned: list[_Entry], levels: list[_Level]) -> tuple[dict[str, Any], list[Value]]:
        """Return the method's parameters, and the models' weights; a model's own value goes before all others."""
        form, name = self.form, self.name
        known = {*form.parameters, *(["weight"] if form.weighted else [])}
        for level in [*(one.level for one in tuned), *levels]:
            for key in level.values.keys() - known - IGNORED_PARAMETERS:
                problem = f"{name} has no such parameter{did_you_mean(key, known)}"
                raise self._error((*level.place, key), problem, hint=f"it takes {', '.join(sorted(known))}")
        values: dict[str, Any] = {}
        for key, default in form.parameters.items():
            found = [self._value(key, default, [one.level, *levels]) for one in tuned]
            if all(value == found[0] for value in found):
                values[key] = found[0]
            elif key in form.own:
                values[key] = {EACH: found}
            else:
                raise self._error(
                    (*tuned[0].place, "parameters", key), "differs between models, which is not supported"
                )
        if not form.weighted:
            return values, [1.0] * len(tuned)
        return values, [self._value("weight", None, [one.level, *levels]) for one in tuned]

    def _value(self, key: str, default: Any, levels: Sequence[_Level]) -> Value:
        """Return the value of a parameter: the first level that has one for a tensor decides."""
        table: dict[str, Any] = {}
        for level in levels:
            if key in level.values:
                found = self._read(level.values[key], (*level.place, key), boolean=isinstance(default, bool))
                for pattern, item in found.items():
                    table.setdefault(pattern, item)
                if DEFAULT in table:
                    break
        else:
            if default is None:
                raise self._error(levels[0].place, f"{key} is missing; {self.name} needs it")
            table[DEFAULT] = default
        return table[DEFAULT] if table.keys() == {DEFAULT} else table

    def _read(self, value: object, place: Place, *, boolean: bool) -> dict[str, Any]:
        """Return a value as a table by patterns of names."""
        if boolean:
            if not isinstance(value, bool):
                raise self._error(
                    place, f"expected a boolean, not {value!r:.60}" if _is_short(value) else "expected a boolean"
                )
            return {DEFAULT: value}
        if not isinstance(value, list) or not any(isinstance(item, dict) for item in value):
            return {DEFAULT: self._numbers(value, place)}
        table: dict[str, Any] = {}
        for index, item in enumerate(value):
            where = (*place, index)
            keys = self._mapping(item, where, ("filter", "value"))
            part = keys.get("filter", "*")
            if not isinstance(part, str) or not part:
                raise self._error((*where, "filter"), "expected a part of tensor names")
            found = self._numbers(keys.get("value"), (*where, "value"))
            table.setdefault(DEFAULT if part == "*" else f"*{glob.escape(part)}*", found)
            if part == "*":
                break  # nothing behind it is ever reached
        return table

    def _numbers(self, value: object, place: Place) -> Value:
        if isinstance(value, list) and value:
            return [self._number(item, (*place, index)) for index, item in enumerate(value)]
        return self._number(value, place)

    def _number(self, value: object, place: Place) -> float | int:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            shown = f", not {value!r:.60}" if _is_short(value) else ""
            raise self._error(place, f"expected a number{shown}")
        if isinstance(value, int) and value.bit_length() > 64:
            raise self._error(place, "too large")
        if not math.isfinite(value):
            raise self._error(place, f"expected a number, not {value}")
        return value

    # Small things

    def _level(self, keys: Values, place: Place) -> _Level:
        where = (*place, "parameters")
        return _Level(where, self._mapping(keys.get("parameters") or {}, where))

    def _mapping(self, value: object, place: Place, known: Iterable[str] = ()) -> Values:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise self._error(place, "expected keys with values")
        for key in value.keys() - {*known} if known else ():
            near = did_you_mean(key, known)
            raise self._error((*place, key), f"not supported{near}", hint=f"supported are {', '.join(known)}")
        return value

    def _list(self, value: object, place: Place) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self._error(place, "expected a list of models" if place[-1:] != ("slices",) else "expected slices")
        return value

    def _path(self, value: object, place: Place) -> Path:
        if not isinstance(value, str) or not value or "\0" in value:
            raise self._error(place, "expected a directory", hint="models are local directories; none is downloaded")
        return Path(value)

    def _dtype(self, key: str) -> str | None:
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or value not in DTYPES:
            raise self._error((key,), f"should be one of {', '.join(DTYPES)}")
        return DTYPES[value]

    def _require_own_tokenizer(self, key: str) -> None:
        value = self.config.get(key)
        if key == "tokenizer" and isinstance(value, dict):
            value = self._mapping(value, (key,), ("source",)).get("source", "base")
        if value not in (None, "base"):
            raise self._error(
                (key,),
                "only the base's tokenizer is supported: vocabularies are not merged",
                hint='leave it out, or say "base"; models with other vocabularies can\'t be merged',
            )

    def _error(self, place: Place, problem: str, *, hint: str | None = None) -> ConfigError:
        return self.file.error(place, problem, hint=hint)


def _is_one(weights: list[Value]) -> bool:
    return all(isinstance(weight, (int, float)) for weight in weights) and math.isclose(sum(weights), 1, abs_tol=1e-6)


def _is_short(value: object) -> bool:
    """Whether a value may be shown: a structure of aliases may be tiny in the file and endless in print."""
    return value is None or isinstance(value, (bool, int, float, str))
