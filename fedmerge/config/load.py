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

from fedmerge.config.config import Config
from fedmerge.config.locate import KeyPath, key_lines, line_of
from fedmerge.config.section import Section
from fedmerge.errors import ConfigError, did_you_mean
from fedmerge.shares import SLACK

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
# Methods that take no parameters and average, unless the default protection stands in for "auto".
MEANS = ("auto", "fedavg")


class _Problem(NamedTuple):
    path: KeyPath
    text: str


def load_config(
    path: Path, *, environ: Mapping[str, str] | None = None, overrides: Mapping[str, str] | None = None
) -> Config:
    """Read a fedmerge.toml; relative paths in it start from its folder.

    `environ` is searched for overrides and is the process's own environment by default; over both go `overrides`, TOML
    values by SECTION.KEY. Raises `ConfigError` with one line for each problem.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as err:
        raise ConfigError(f"{path}: can't be read ({err.strerror})", hint="write one with: fedmerge init") from err
    except UnicodeDecodeError as err:
        line = path.read_bytes().count(b"\n", 0, err.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text") from err
    environ = os.environ if environ is None else environ
    return parse_config(text, folder=path.parent, where=str(path), environ=environ, overrides=overrides)


def parse_config(
    text: str,
    *,
    folder: Path,
    where: str,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> Config:
    """Parse the text of a fedmerge.toml that stands, or would stand, in `folder`; `where` names it in errors."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as err:  # ValueError: also an integer of thousands of digits
        raise ConfigError(_syntax_error(str(err), text, where)) from err
    variables, problems = _lay_over(data, [*_in_environment(environ or {}), *_in_settings(overrides or {})])
    huge = [_Problem(path, "should be a number of 64 bits at most") for path in _huge_numbers(data)]
    config, found = (None, huge) if huge else _validate(data, folder)
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


def _validate(data: dict[str, Any], folder: Path) -> tuple[Config | None, list[_Problem]]:
    # An absent section is an empty one, so that its defaults are filled in and its required keys are named.
    filled = {name: {} for name in SECTIONS} | data
    config: Config | None = None
    problems: list[_Problem] = []
    try:
        config = Config.model_validate(filled, context={"folder": folder.resolve()})
    except ValidationError as err:
        problems = [_Problem(error["loc"], _explain(error)) for error in err.errors(include_url=False)]
    merge_problems = _merge_problems(filled["merge"])
    problems += merge_problems + _rounds_problems(config) + _delta_problems(config)
    problems += _scaffold_problems(config) + _screen_problems(config) + _robust_problems(config)
    problems += _streaming_problems(config)
    return config, problems if merge_problems else problems + _search_problems(config)


def _rounds_problems(config: Config | None) -> list[_Problem]:
    """Return what in [rounds] does not go together, or with a search."""
    if config is None:
        return []
    rounds, problems = config.rounds, []
    if rounds.async_buffer is not None and rounds.async_buffer < rounds.min_nodes:
        text = f"should be min_nodes, {rounds.min_nodes}, at least"
        problems.append(_Problem(("rounds", "async_buffer"), text))
    if rounds.dynamic_steps < 1:
        steps = config.train.extras.get("steps")
        if rounds.async_buffer is None or isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            text = "needs async_buffer, and steps in [train], of which it asks some nodes for fewer"
            problems.append(_Problem(("rounds", "dynamic_steps"), text))
    if rounds.staleness_limit and config.search.strategy != "none":
        # A search has one factor for each node, and asks each for its scores.
        text = "does not go with late deltas ([rounds] late or async_buffer)"
        problems.append(_Problem(("search", "strategy"), text))
    return problems


def _delta_problems(config: Config | None) -> list[_Problem]:
    """Return what in [delta] does not go with the rest of the configuration."""
    if config is None:
        return []
    delta, outer = config.delta, config.outer.name
    if delta.codec == "auto":
        text = 'is chosen by codec = "auto": leave it out, or leave codec out'
        chosen = {"error_feedback", *delta.codec_settings()} & delta.model_fields_set
        return [_Problem(("delta", key), text) for key in sorted(chosen)]
    # The past would be carried on twice, at the nodes and at the coordinator: the sum was measured to diverge.
    if delta.error_feedback and outer != "sgd":
        text = f'does not go with [outer] name = "{outer}": residuals on top of momentum diverge; '
        return [_Problem(("delta", "error_feedback"), f'{text}take "sgd", or leave it 0')]
    if delta.error_feedback and config.merge.steps:
        from fedmerge.merge.methods import IN_TIME

        for step in config.merge.steps:
            if step.method in IN_TIME:
                text = f"does not go with {step.method} over rounds, which carries the past on as momentum does; "
                return [_Problem(("delta", "error_feedback"), f"{text}leave out that step, or leave it 0")]
    return []


def _scaffold_problems(config: Config | None) -> list[_Problem]:
    """Refuse merges from whose step nodes can't tell the mean of their control variates."""
    if config is None or not config.train.extras.get("scaffold"):
        return []
    outer = config.outer
    if config.merge.method in MEANS and (outer.name, outer.lr) == ("sgd", 1.0) and not config.merge.steps:
        return []
    return [_Problem(("train", "scaffold"), 'needs the plain mean: [merge] method = "fedavg", [outer] "sgd" with lr 1')]


def _screen_problems(config: Config | None) -> list[_Problem]:
    """Refuse what in [screen] does not go together, or with the smallest round."""
    if config is None:
        return []
    screen, problems = config.screen, []
    if screen.clip_quantile and screen.clip_norm_ratio is not None:
        problems.append(_Problem(("screen", "clip_quantile"), "is another way to clip than clip_norm_ratio; set one"))
    least = config.rounds.min_nodes
    if screen.max_weight_node * least < 1 - SLACK:
        text = f"can't hold with {least} nodes (`rounds.min_nodes`): it should be {1 / least:.4g} at least"
        problems.append(_Problem(("screen", "max_weight_node"), text))
    if config.search.strategy != "none":
        # A search puts factors on the weights, and what was capped would not be any more.
        caps = [key for key in ("max_weight_node", "max_weight_org") if getattr(screen, key) < 1]
        problems += [_Problem(("screen", key), "does not go with a search, which sets weights itself") for key in caps]
    try:
        config.probe()
    except ConfigError as err:
        problems.append(_Problem(("screen", "probe"), err.message.removeprefix("screen.probe").lstrip(": ")))
    if screen.root and "fltrust" not in screen.robust:
        problems.append(_Problem(("screen", "root"), 'has no effect without the rule "fltrust" in robust'))
    return problems


def _robust_problems(config: Config | None) -> list[_Problem]:
    """Refuse robust rules that could not hold in a round of the least allowed size, and what does not go with them."""
    if config is None or not (rules := config.robust_rules()):
        return []
    from fedmerge.merge.methods import NEEDS_FACTORS, NEEDS_STATISTICS
    from fedmerge.robust import require_rules

    for what, methods in {"statistics": NEEDS_STATISTICS, "factors": NEEDS_FACTORS}.items():
        if config.merge.method in methods:
            text = f'do not go with [merge] method = "{config.merge.method}": combinations of deltas have no {what}'
            return [_Problem(("screen", "robust"), text)]
    try:
        require_rules(rules, config.max_bad(), config.rounds.min_nodes, has_root=config.screen.root != "")
    except ConfigError as err:
        return [_Problem(("screen", "robust"), err.message)]
    return []


def _streaming_problems(config: Config | None) -> list[_Problem]:
    """Refuse what needs all of a model to travel in every round."""
    if config is None:
        return []
    overlap = _overlap_problem(config)
    if config.streaming.fragments == 1 or overlap:
        return [_Problem(("streaming", "overlap_steps"), overlap)] if overlap else []
    from fedmerge.merge.layers import varies
    from fedmerge.merge.methods import NEEDS_STATISTICS

    merge, extras = config.merge, config.train.extras
    adapted = [key for key in ("lora_rank", "fedprox_mu", "scaffold") if extras.get(key)]
    refused = {
        "late deltas ([rounds] late or async_buffer), which are of other parts": config.rounds.staleness_limit > 0,
        f"{' and '.join(adapted)} in [train], which go by whole models": bool(adapted),
        "[search], which scores whole models": config.search.strategy != "none",
        "[screen] probe, which scores whole models": config.screen.probe is not None,
        "[screen] clip_quantile, as parts have lengths of their own": config.screen.clip_quantile > 0,
        "[delta] error_feedback, whose residuals would be of other parts": config.delta.error_feedback > 0,
        '[delta] codec = "auto", which chooses for whole models': config.delta.codec == "auto",
        f'[merge] method = "{merge.method}", which needs statistics': merge.method in NEEDS_STATISTICS,
        "[merge] steps": bool(merge.steps),
        "[merge] values that vary over the model": any(varies(value) for value in merge.extras.values()),
    }
    found = [what for what, is_there in refused.items() if is_there]
    return [_Problem(("streaming", "fragments"), f"above 1 does not go with {what}") for what in found]


def _overlap_problem(config: Config) -> str:
    """Say why rounds can't overlap as the file says, where they can't."""
    from fedmerge.training import COUNTING

    num_steps, overlap = config.train.extras.get("steps"), config.streaming.overlap_steps
    if not overlap:
        return ""
    if config.streaming.fragments == 1:
        return "goes with fragments above 1"
    if config.train.trainer not in COUNTING:
        return f'goes with the trainers {" and ".join(COUNTING)}, and not with "{config.train.trainer}"'
    if not isinstance(num_steps, int) or overlap >= num_steps:
        return "has to be less than [train] steps, which are to be given with it"
    return ""


def _search_problems(config: Config | None) -> list[_Problem]:
    """Check a search against the merge that it varies, which must be right itself."""
    if config is None or config.search.strategy == "none":
        return []
    if config.robust_rules():
        # They mix deltas so that no single node matters much; a factor for each node is the opposite.
        return [_Problem(("search", "strategy"), "does not go with [screen] robust; set one of them")]
    try:
        config.search_settings()
    except ConfigError as err:
        return [_Problem(("search",), err.message.removeprefix("search: "))]
    return []


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


def _merge_problems(section: Any) -> list[_Problem]:
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
        return [_Problem(("merge", "method"), f"should be how each candidate is merged; set {method!r} under [search]")]
    if method not in METHODS:
        return [_Problem(("merge", "method"), _one_of(method, [default, *METHODS]))]
    if method in IN_TIME:
        text = f"averages over time, and nodes have no order: as [[merge.steps]], put {method} behind a method"
        return [_Problem(("merge", "method"), text)]
    given = {key: value for key, value in section.items() if key not in SECTIONS["merge"].model_fields}
    return _parameter_problems(("merge",), method, parameters(method), given)


def _step_problems(section: dict[str, Any]) -> list[_Problem]:
    default = SECTIONS["merge"].model_fields["method"].default
    stray = [key for key in section if key not in {"steps"} | MERGE_KEYS and (key, section[key]) != ("method", default)]
    problems = [_Problem(("merge", key), "belongs in one of merge.steps, which stand instead") for key in stray]
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
        return [*problems, _Problem(("merge", "steps"), f"{err.message}; {err.hint}")]
    for index, (step, parameters) in enumerate(zip(steps, known, strict=True)):
        given = {key: value for key, value in step.items() if key != "method"}
        problems += _parameter_problems(("merge", "steps", index), names[index], parameters, given)
    return problems


def _parameter_problems(
    path: KeyPath, method: str, parameters: Mapping[str, Parameter], given: Mapping[str, Any]
) -> list[_Problem]:
    from fedmerge.merge.parameters import check, config_key

    known = {config_key(name): parameter for name, parameter in parameters.items()}
    problems: list[_Problem] = []
    for key, value in given.items():
        if key in known:
            problems += [
                _Problem((*path, key, *inner), _explain(error)) for inner, error in check(known[key], value)[1]
            ]
        else:
            suggestion = did_you_mean(key, known) or f"; {method} takes {', '.join(known) or 'no parameters'}"
            problems.append(_Problem((*path, key), f"unknown key{suggestion}"))
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


def _lay_over(data: dict[str, Any], overrides: Iterable[_Override]) -> tuple[dict[KeyPath, str], list[_Problem]]:
    """Lay the overrides over `data`; return what each is shown as, by key path, and what is wrong with their names."""
    shown: dict[KeyPath, str] = {}
    problems: list[_Problem] = []
    for override in overrides:
        if override.section not in SECTIONS:
            problem = f"unknown section {override.section!r}{_suggestion(override.section, SECTIONS)}"
            if override.section == "nodes":
                problem = "[[nodes]] can only be set in the file"
            problems.append(_Problem((), f"{override.shown_as}: {problem}"))
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
    place = f"{where}:{line or text.count(chr(10)) + 1}"
    return f"{place}: not valid TOML: {problem}{f' (column {column})' if column else ''}"
