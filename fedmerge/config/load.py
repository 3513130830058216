"""Reading fedmerge.toml: every problem at once, each as `fedmerge.toml:9: merge.densty: unknown key; did you mean ...`.

Values come from the file and, over it, from environment variables `FEDMERGE_<SECTION>__<KEY>`.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fedmerge.config.across import MEANS, Problem, across_sections, search_problems
from fedmerge.config.config import Config
from fedmerge.config.locate import KeyPath, key_lines, line_of
from fedmerge.config.section import Section
from fedmerge.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from fedmerge.merge import Parameter

ENV_PREFIX = "FEDMERGE_"
SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}

# What [merge] holds beside a method or steps, and parameters.
MERGE_KEYS = SECTIONS["merge"].model_fields.keys() - {"method", "steps"}


def load_config(
    path: Path,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, str] | None = None,
    to_merge: bool = True,
) -> Config:
    """Read a fedmerge.toml; relative paths in it start from its folder.

    `environ` is searched for overrides and is the process's own environment by default; over both go `overrides`, TOML
    values by SECTION.KEY. Whoever is not going `to_merge` is spared the check of how, which loads torch. Raises
    `ConfigError` with one line for each problem.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")  # as some editors write it
    except OSError as err:
        raise ConfigError(f"{path}: can't be read ({err.strerror})", hint="write one with: fedmerge init") from err
    except UnicodeDecodeError as err:
        line = path.read_bytes().count(b"\n", 0, err.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text") from err
    environ = os.environ if environ is None else environ
    return parse_config(
        text, folder=path.parent, where=str(path), environ=environ, overrides=overrides, to_merge=to_merge
    )


def parse_config(
    text: str,
    *,
    folder: Path,
    where: str,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, str] | None = None,
    to_merge: bool = True,
) -> Config:
    """Parse the text of a fedmerge.toml that stands, or would stand, in `folder`; `where` names it in errors.

    The rest, and what is raised, is as for `load_config`.
    """
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as err:  # ValueError: also an integer of thousands of digits
        raise ConfigError(_syntax_error(str(err), text, where)) from err
    variables, problems = _lay_over(data, [*_in_environment(environ or {}), *_in_settings(overrides or {})])
    huge = [Problem(path, "should be a number of 64 bits at most") for path in _huge_numbers(data)]
    config, found = (None, huge) if huge else _validate(data, folder, to_merge=to_merge)
    problems += found
    if config is not None and not problems:
        return config
    lines = key_lines(text)
    report: list[tuple[int, str]] = []
    for path, text_ in problems:
        variable = variables.get(path[:2])
        line = 0 if variable or not path else line_of(path, lines)
        place = f"{variable}: " if variable else f"{where}:{line}: " if path else ""
        report.append((line, f"{place}{_dotted(path)}{text_}"))
    # Problems of the file in the file's order, then those of the environment.
    raise ConfigError("\n".join(line for _, line in sorted(report, key=lambda item: item[0] or 1 << 30)))


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of fedmerge.toml, for editors."""
    schema = Config.model_json_schema()
    # Every section may be left out; the ones with required keys are then reported key by key.
    schema["required"] = [
        name for name in SECTIONS if any(f.is_required() for f in SECTIONS[name].model_fields.values())
    ]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema | {"title": "fedmerge.toml"}


def _validate(data: dict[str, Any], folder: Path, *, to_merge: bool) -> tuple[Config | None, list[Problem]]:
    # An absent section is an empty one, so that its defaults are filled in and its required keys are named.
    filled = {name: {} for name in SECTIONS} | data
    config: Config | None = None
    problems: list[Problem] = []
    try:
        config = Config.model_validate(filled, context={"folder": folder.resolve()})
    except ValidationError as err:
        problems = [Problem(error["loc"], _explain(error)) for error in err.errors(include_url=False)]
    merge_problems = _merge_problems(filled["merge"]) if to_merge else []
    problems += merge_problems + (across_sections(config) if config is not None else [])
    # A search varies the merge, which must be right itself.
    if to_merge and config is not None and not merge_problems:
        problems += search_problems(config)
    return config, problems


def _huge_numbers(value: object, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield where an integer is beyond TOML's range; Python refuses to print some of them."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _huge_numbers(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _huge_numbers(item, (*path, index))
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        yield path


def _merge_problems(section: Any) -> list[Problem]:
    """Check the merge method, or the steps, and their parameters against their signatures."""
    default = SECTIONS["merge"].model_fields["method"].default
    if not isinstance(section, dict) or section.keys() <= MERGE_KEYS:
        return []  # nothing to look up, which would load torch
    if section.get("steps"):
        return _step_problems(section)
    method = section.get("method", default)
    if not isinstance(method, str) or not method or (method in MEANS and section.keys() <= {"method"} | MERGE_KEYS):
        return []
    method = "fedavg" if method == default else method
    from fedmerge.merge import METHODS, parameters
    from fedmerge.merge.methods import IN_TIME

    if method in get_args(SECTIONS["search"].model_fields["strategy"].annotation):
        return [Problem(("merge", "method"), f"should be how each candidate is merged; set {method!r} under [search]")]
    if method not in METHODS:
        return [Problem(("merge", "method"), _one_of(method, [default, *METHODS]))]
    if method in IN_TIME:
        text = f"averages over time, and nodes have no order: as [[merge.steps]], put {method} behind a method"
        return [Problem(("merge", "method"), text)]
    given = {key: value for key, value in section.items() if key not in SECTIONS["merge"].model_fields}
    return _parameter_problems(("merge",), method, parameters(method), given)


def _step_problems(section: dict[str, Any]) -> list[Problem]:
    default = SECTIONS["merge"].model_fields["method"].default
    stray = [key for key in section if key not in {"steps"} | MERGE_KEYS and (key, section[key]) != ("method", default)]
    problems = [Problem(("merge", key), "belongs in one of merge.steps, which stand instead") for key in stray]
    steps = section["steps"]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return problems
    names = [step.get("method") for step in steps]
    if not all(isinstance(name, str) and name for name in names):
        return problems
    from fedmerge.merge.recipe import chain_parameters

    try:
        known = chain_parameters(names)
    except ConfigError as err:
        return [*problems, Problem(("merge", "steps"), f"{err.message}; {err.hint}")]
    for index, (step, parameters) in enumerate(zip(steps, known, strict=True)):
        given = {key: value for key, value in step.items() if key != "method"}
        problems += _parameter_problems(("merge", "steps", index), names[index], parameters, given)
    return problems


def _parameter_problems(
    path: KeyPath, method: str, parameters: Mapping[str, Parameter], given: Mapping[str, Any]
) -> list[Problem]:
    from fedmerge.merge.parameters import check, config_key

    known = {config_key(name): parameter for name, parameter in parameters.items()}
    problems: list[Problem] = []
    for key, value in given.items():
        if key in known:
            problems += [Problem((*path, key, *inner), _explain(error)) for inner, error in check(known[key], value)[1]]
        else:
            suggestion = did_you_mean(key, known) or f"; {method} takes {', '.join(known) or 'no parameters'}"
            problems.append(Problem((*path, key), f"unknown key{suggestion}"))
    return problems


class _Override(NamedTuple):
    shown_as: str
    section: str
    key: str
    text: str


def _in_environment(environ: Mapping[str, str]) -> Iterator[_Override]:
    for variable in sorted(environ):
        section, separator, key = variable.removeprefix(ENV_PREFIX).lower().partition("__")
        if variable.startswith(ENV_PREFIX) and separator:
            yield _Override(variable, section, key, environ[variable])


def _in_settings(settings: Mapping[str, str]) -> Iterator[_Override]:
    for name, text in settings.items():
        section, _, key = name.partition(".")
        yield _Override(f"{name}={text}", section, key, text)


def _lay_over(data: dict[str, Any], overrides: Iterable[_Override]) -> tuple[dict[KeyPath, str], list[Problem]]:
    """Lay the overrides over `data`; return what each is shown as, by key path, and what is wrong with their names."""
    shown: dict[KeyPath, str] = {}
    problems: list[Problem] = []
    for override in overrides:
        if override.section not in SECTIONS:
            problem = f"unknown section {override.section!r}{_suggestion(override.section, SECTIONS)}"
            if override.section == "nodes":
                problem = "[[nodes]] can only be set in the file"
            problems.append(Problem((), f"{override.shown_as}: {problem}"))
            continue
        table = data.setdefault(override.section, {})
        if isinstance(table, dict):
            table[override.key] = _value(override.text, SECTIONS[override.section], override.key)
            shown[override.section, override.key] = override.shown_as
    return shown, problems


def _value(text: str, section: type[Section], key: str) -> Any:
    """Return `text` as the TOML value it spells, or as itself where a string is wanted or it spells none."""
    field = section.model_fields.get(key)
    if field is not None and field.annotation in (str, Path):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(error: ErrorDetails) -> str:
    """Say what is wrong with a value in one clause of plain words."""
    given, context = _shown(error["input"]), error.get("ctx", {})
    match error["type"]:
        case "missing":
            return "required key is missing"
        case "extra_forbidden":
            return _unknown_key(error["loc"], error["input"])
        case "value_error":
            return f"{context['error']}"
        case "literal_error":
            return _one_of(error["input"], re.findall(r"'([^']*)'", context["expected"]))
        case "model_type" | "dict_type":
            return f"should be a table, not {given}"
        case "tuple_type" | "list_type":
            return f"should be a list, not {given}"
        case "int_type" | "int_from_float":
            return f"should be a whole number, not {given}"
        case "float_type" | "finite_number":
            return f"should be a number, not {given}"
        case "string_type":
            return f"should be a string, not {given}"
        case "bool_type":
            return f"should be true or false, not {given}"
        case "string_too_short":
            return "should not be empty"
        case "greater_than":
            return f"should be above {context['gt']:g}, not {given}"
        case "greater_than_equal":
            return f"should be at least {context['ge']:g}, not {given}"
        case "less_than":
            return f"should be below {context['lt']:g}, not {given}"
        case "less_than_equal":
            return f"should be at most {context['le']:g}, not {given}"
    message = error["msg"].removeprefix("Input ")
    return f"{message[:1].lower()}{message[1:]}, not {given}"


def _unknown_key(path: KeyPath, value: object) -> str:
    key = str(path[-1])
    if len(path) == 1 and isinstance(value, dict):
        return f"unknown section{_suggestion(key, Config.model_fields)}"
    own = SECTIONS[str(path[0])].model_fields if path[0] in SECTIONS and len(path) > 1 else SECTIONS
    home = next((name for name, section in SECTIONS.items() if key in section.model_fields), None)
    if home is not None and not did_you_mean(key, own):
        return f"unknown key; it belongs in [{home}]"
    return f"unknown key{_suggestion(key, own)}"


def _one_of(value: object, choices: Iterable[str]) -> str:
    allowed = ", ".join(repr(choice) for choice in choices)
    return f"should be one of {allowed}, not {_shown(value)}{did_you_mean(str(value), choices)}"


def _suggestion(word: str, known: Iterable[str]) -> str:
    return did_you_mean(word, known) or f"; known are {', '.join(known)}"


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, bool):
        return str(value).lower()
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _dotted(path: KeyPath) -> str:
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part if re.fullmatch('[A-Za-z0-9_-]+', part) else json.dumps(part)}"
    return f"{text[1:]}: " if text else ""


def _syntax_error(message: str, text: str, where: str) -> str:
    """Move the position that tomllib puts at the end of its message to the front."""
    match = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", message, re.DOTALL)
    problem, line, column = match.groups() if match else (message, None, None)
    # tomllib shows a key as the tuple of its parts.
    problem = re.sub(r"\(('[^()]*',?)\)", lambda key: ".".join(re.findall(r"'([^']*)'", key[1])), problem)
    place = f"{where}:{line or text.count(chr(10)) + 1}"
    return f"{place}: not valid TOML: {problem}{f' (column {column})' if column else ''}"
