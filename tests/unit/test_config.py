from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedmerge.aggregation.outer import OUTER
from fedmerge.aggregation.outer import parameters as outer_parameters
from fedmerge.config import (
    Config,
    OpenSection,
    Section,
    SimulatedNode,
    json_schema,
    load_config,
    parse_address,
    parse_config,
)
from fedmerge.config.load import SECTIONS
from fedmerge.config.locate import key_lines, line_of
from fedmerge.delta.codec import Codec
from fedmerge.errors import ConfigError, InputError
from fedmerge.merge import METHODS, Recipe, parameters
from fedmerge.merge.methods import IN_TIME
from fedmerge.screening.checks import ScreenPolicy
from fedmerge.search import SearchSettings
from fedmerge.tensors import TensorSpec

# Machines that run tests are often busy: how long an example takes says nothing.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

FOLDER = Path("/federation")
ALL_SECTIONS: list[type[Section]] = [*SECTIONS.values(), SimulatedNode]
LARGE = {"w": TensorSpec((10**5, 10**4), "F32")}
MINIMAL = '[federation]\nname = "f"\n[model]\nbase = "base"\n'


def parse(text: str, **environ: str) -> Config:
    return parse_config(text, folder=FOLDER, where="fedmerge.toml", environ=environ)


def problems(text: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, **environ)
    assert caught.value.exit_code == 2
    return caught.value.message.splitlines()


# Any valid configuration, as the dict that tomllib would return.

names = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,20}", fullmatch=True)
words = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
labels = st.lists(words, min_size=2, max_size=4, unique=True) | paths
counts = st.integers(1, 10**6)
positive = st.floats(1e-6, 1e6) | counts
hosts = st.sampled_from(["127.0.0.1", "0.0.0.0", "[::1]", "[fe80::1%eth0]", "coordinator.example.org"])
sizes = counts | st.builds("{}{}".format, st.integers(1, 900), st.sampled_from(["B", "KB", "MB", "GiB", " MiB", "gib"]))
trainer_settings = st.dictionaries(
    st.sampled_from(["epochs", "lr", "batch_size", "text_column", "prompt"]), counts | positive | st.booleans() | words
)
TOPK = ["topk", "layerwise_topk"]
values = st.sampled_from(["fp32", "bf16", "fp16", "int8", "int4", "lloyd3", "lloyd2", "sign"])


def table(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(required, optional=optional)


Table: TypeAlias = st.SearchStrategy[dict[str, Any]]
tls: Table = st.builds(dict) | st.fixed_dictionaries({"tls_cert": paths, "tls_key": paths})
sparsifier: Table = (
    st.builds(dict)
    | st.fixed_dictionaries({"sparsify": st.sampled_from(["seeded", *TOPK]), "density": st.floats(1e-6, 1)})
    | st.fixed_dictionaries({"sparsify": st.sampled_from(TOPK), "error_feedback": st.floats(0, 1)})
    | st.fixed_dictionaries({"sparsify": st.just("lowrank"), "rank": st.integers(1, 4096)})
)
merges: Table = st.builds(dict) | st.fixed_dictionaries(
    {"method": st.just("ties")},
    optional={"density": st.floats(0.01, 1), "lambda": st.floats(-2, 2), "normalize": st.booleans()},
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    def both(*strategies: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
        return {key: value for strategy in strategies for key, value in draw(strategy).items()}

    data: dict[str, Any] = {
        "federation": draw(table({"name": names}, {"state": paths, "key": paths, "trusted": paths})),
        "model": draw(table({"base": paths}, {"labels": labels})),
        "server": both(
            tls,
            table(
                {},
                {
                    "listen": st.builds("{}:{}".format, hosts, st.integers(0, 65535)),
                    "max_payload_bytes": sizes,
                    "max_uploads": counts,
                    "max_bytes_per_s": sizes,
                    "idle_s": positive,
                    "lease_s": st.floats(1, 1e6),
                },
            ),
        ),
        "store": draw(
            table(
                {},
                {
                    "database": st.sampled_from(["sqlite:////srv/l.sqlite", "postgresql+psycopg://me@host/ledger"]),
                    "blobs": st.sampled_from(["/srv/blobs", "s3://bucket", "s3://bucket/a/b"]),
                },
            )
        ),
        "rounds": draw(
            table(
                {},
                {
                    "num_rounds": counts,
                    "min_nodes": counts,
                    "fraction": st.floats(0, 1),
                    "deadline_s": positive,
                    "grace_s": positive | st.just("auto"),
                    "sample": counts | st.floats(0, 1, exclude_min=True, exclude_max=True),
                },
            )
        ),
        "train": both(trainer_settings, table({}, {"trainer": names})),
        "delta": both(
            sparsifier,
            table({}, {"values": values, "block_size": st.integers(8, 2**20), "zstd_level": st.integers(1, 19)}),
            table(
                {},
                {
                    "small_elements": st.integers(0, 2**31),
                    "small_values": st.sampled_from(["same", "auto", "fp32", "int8"]),
                    "downlink": values | st.sampled_from(["auto", "steps"]),
                    "snapshot_every": counts,
                },
            ),
            table({}, {"max_noise_ratio": st.floats(0, 1e6), "fallback": values | st.just("none")}),
            table({}, {"factors": values | st.just("exact")}),
        )
        if draw(st.booleans())
        else draw(table({"codec": st.just("auto")}, {"downlink": values})),
        "merge": both(merges, table({}, {"seed": st.integers(0, 2**63 - 1)})),
        "screen": draw(
            table(
                {},
                {
                    "max_norm_ratio": st.floats(1, 100),
                    "clip_norm_ratio": positive,
                    "weighting": st.sampled_from(["examples", "equal"]),
                    "max_weight_ratio": st.floats(1, 100),
                },
            )
        ),
        "outer": draw(
            table(
                {},
                {"name": st.sampled_from(["sgd", "nesterov"]), "lr": positive, "momentum": st.floats(0, 0.99)},
            )
        ),
    }
    if data["delta"].get("error_feedback"):
        data["outer"].pop("name", None)  # not together with nesterov
    data = {name: section for name, section in data.items() if section or draw(st.booleans())}
    nodes = st.builds(lambda a, b: a | b, trainer_settings, table({"name": names, "data": paths}, {"test": paths}))
    data["nodes"] = draw(st.lists(nodes, max_size=3, unique_by=lambda node: node["name"]))
    return data


def toml(value: Any) -> str:
    """TOML's notation for a scalar or a list of them: JSON's, for what is generated here."""
    return json.dumps(value, ensure_ascii=False)


NOISE = ["", "# a comment", "   # [rounds]", "# min_nodes = 9"]


@st.composite
def written(draw: st.DrawFn, data: dict[str, Any]) -> tuple[str, dict[tuple[str, ...], int]]:
    """Write `data` in one of the many ways TOML has; return the text and the line of each `(section, key)`."""
    lines: list[str] = []
    where: dict[tuple[str, ...], int] = {}

    def put(text: str, *path: str) -> None:
        lines.extend(draw(st.lists(st.sampled_from(NOISE), max_size=1)))
        where[path] = len(lines) + 1
        lines.extend(text.split("\n"))

    def key(name: str) -> str:
        return draw(st.sampled_from([name, f'"{name}"', f"'{name}'"]))

    def value(value: Any) -> str:
        if isinstance(value, list) and draw(st.booleans()):
            return "[ # [rounds]\n" + "".join(f"  {toml(item)}, # ]\n" for item in value) + "]"
        if isinstance(value, str) and draw(st.booleans()):
            return f'"""\\\n  {json.dumps(value, ensure_ascii=False)[1:-1]}"""'
        return toml(value) + draw(st.sampled_from(["", " # = [x]"]))

    sections = {name: section for name, section in data.items() if name != "nodes"}
    styles = {name: draw(st.sampled_from(["table", "table", "dotted", "inline"])) for name in sections}
    for name, section in sections.items():
        if styles[name] == "dotted":
            for k, v in section.items():
                put(f"{key(name)} . {key(k)} = {value(v)}", name, k)
        elif styles[name] == "inline":
            put(f"{key(name)} = {{ {', '.join(f'{key(k)} = {toml(v)}' for k, v in section.items())} }}", name)
            where |= {(name, k): where[name,] for k in section}
    for name, section in sections.items():
        if styles[name] == "table":
            put(f"[ {key(name)} ]", name)
            for k, v in section.items():
                put(f"  {key(k)} = {value(v)}", name, k)
    for i, node in enumerate(data.get("nodes", [])):
        put("[[nodes]]", f"nodes[{i}]")
        for k, v in node.items():
            put(f"{key(k)} = {value(v)}", f"nodes[{i}]", k)
    return draw(st.sampled_from(["\n", "\r\n"])).join(lines), where


def in_folder(path: str) -> Path:
    return (FOLDER / path).resolve()


@unhurried
@given(st.data())
def test_a_valid_configuration_comes_back_as_it_was_written(data: st.DataObject) -> None:
    wanted = data.draw(configs())
    text, _ = data.draw(written(wanted))
    config = parse(text)
    for name, section in wanted.items():
        for i, table in enumerate(section if name == "nodes" else [section]):
            got = (config.nodes[i] if name == "nodes" else getattr(config, name)).model_dump()
            for key, value in table.items():
                if isinstance(got[key], Path):
                    assert got[key] == in_folder(value)
                elif key in {"max_payload_bytes", "max_bytes_per_s"}:
                    assert got[key] == value or isinstance(value, str)
                else:
                    assert got[key] == (tuple(value) if isinstance(value, list) else value)
    assert len(config.nodes) == len(wanted["nodes"])
    if config.delta.codec == "custom":
        settings = config.delta.model_dump() | ({} if config.delta.small_values != "auto" else {"small_values": "fp32"})
        assert config.uplink(LARGE).codec.to_dict().items() <= settings.items()
    downlink = {"auto": "int8", "steps": "fp32"}.get(config.delta.downlink, config.delta.downlink)
    assert config.downlink_codec({}).to_dict().items() >= {"sparsify": "none", "values": downlink}.items()
    unsaid = "trimmed_mean" if config.robust_rules() == ("spectral",) else "fedavg"
    assert config.recipe().method == wanted.get("merge", {}).get("method", unsaid)


def test_steps_make_a_recipe() -> None:
    text = "[[merge.steps]]\nmethod = 'dare'\ndensity = [0.2, 0.4]\n[[merge.steps]]\nmethod = 'elect'\n"
    expected = Recipe.from_steps([("dare", {"density": [0.2, 0.4]}), ("elect", {})])
    assert parse(MINIMAL + text).recipe() == expected


def test_the_codec_is_chosen_for_what_the_steps_do() -> None:
    def reason(*names: str, num_rounds: int = 1) -> str:
        steps = "".join(f"[[merge.steps]]\nmethod = '{name}'\n" for name in names)
        text = f"[server]\nlisten = '0.0.0.0:1'\n[rounds]\nnum_rounds = {num_rounds}\n[delta]\ncodec = 'auto'\n"
        return parse(MINIMAL + text + steps).uplink(LARGE).reason

    assert "keeps the mean of random masks" in reason("fedavg", "scale", num_rounds=1)
    assert "trim+fedavg or a robust rule looks at every entry" in reason("trim", "fedavg")
    assert "with outer momentum" in reason("fedavg", "ema", num_rounds=30)
    assert "without outer momentum" in reason("fedavg", num_rounds=30)


@unhurried
@given(st.data())
def test_a_misspelt_key_is_reported_with_its_line(data: st.DataObject) -> None:
    config = data.draw(configs())
    closed = [name for name in config if name in SECTIONS and not issubclass(SECTIONS[name], OpenSection)]
    name, key = data.draw(st.sampled_from([(name, key) for name in closed for key in config[name]]))
    at = data.draw(st.integers(0, len(key) - 1))
    misspelt = [key[:at] + key[at] + key[at:], key[:at] + key[at + 1 :], key[:at] + "_" + key[at:]]
    wrong = data.draw(st.sampled_from(misspelt).filter(lambda word: word and word not in SECTIONS[name].model_fields))
    config[name] = {wrong if k == key else k: v for k, v in config[name].items()}
    text, where = data.draw(written(config))
    place = f"fedmerge.toml:{where[name, wrong]}: {name}.{wrong}: unknown key; did you mean "
    assert [problem.startswith(place) for problem in problems(text)].count(True) == 1


BAD: list[tuple[str, list[str]]] = [
    ("", ["1: federation.name: required key is missing", "1: model.base: required key is missing"]),
    (
        '# who\n[federation]\nstate = "s"\n\n[model]\n',
        ["2: federation.name: required key is missing", "5: model.base: required key is missing"],
    ),
    (MINIMAL + "[merge]\nmethod = 'ties'\ndensty = 0.2\n", ["7: merge.densty: unknown key; did you mean 'density'?"]),
    (MINIMAL + "[merge]\nmethod = 'ties'\ndensity = 2\n", ["7: merge.density: should be at most 1, not 2"]),
    (MINIMAL + "[merge]\nmethod = 'ties'\ndensity = [1, 2]\n", ["7: merge.density[1]: should be at most 1, not 2"]),
    (
        MINIMAL + "[merge]\nmethod = 'ties'\n[merge.density]\ndefault = 0.5\n'*.mlp.*' = 'x'\n",
        ["9: merge.density.\"*.mlp.*\": should be a number, not 'x'"],
    ),
    (
        MINIMAL + "[merge]\nmethod = 'ties'\nnormalize = 'no'\n",
        ["7: merge.normalize: should be true or false, not 'no'"],
    ),
    (MINIMAL + "[merge]\nmethod = 'ties'\nlambda_ = 1\n", ["7: merge.lambda_: unknown key; did you mean 'lambda'?"]),
    (MINIMAL + "[merge]\ndensity = 0.2\n", ["6: merge.density: unknown key; fedavg takes no parameters"]),
    (
        MINIMAL + "[merge]\nmethod = 'tie'\n",
        [f"6: merge.method: should be one of 'auto', {', '.join(map(repr, METHODS))}, not 'tie'; did you mean 'ties'?"],
    ),
    (
        MINIMAL + "[merge]\nmethod = 'ema'\n",
        ["6: merge.method: averages over time, and nodes have no order: as [[merge.steps]], put ema behind a method"],
    ),
    (
        MINIMAL + "[[merge.steps]]\nmethod = 'dare'\ndensty = 0.2\n[[merge.steps]]\nmethod = 'elect'\nlambda = 'x'\n",
        [
            "7: merge.steps[0].densty: unknown key; did you mean 'density'?",
            "10: merge.steps[1].lambda: should be a number, not 'x'",
        ],
    ),
    (
        MINIMAL + "[[merge.steps]]\nmethod = 'dare'\n",
        [
            "5: merge.steps: no step merges: dare; "
            "put a method behind the transforms, such as elect, task_arithmetic or fedavg"
        ],
    ),
    (
        MINIMAL + "[merge]\nmethod = 'ties'\ndensity = 0.5\n[[merge.steps]]\nmethod = 'ties'\n",
        [
            "6: merge.method: belongs in one of merge.steps, which stand instead",
            "7: merge.density: belongs in one of merge.steps, which stand instead",
        ],
    ),
    (MINIMAL + "[[merge.steps]]\ndensity = 0.5\n", ["5: merge.steps[0].method: required key is missing"]),
    (MINIMAL + "[merge]\nsteps = 3\n", ["6: merge.steps: should be a list, not 3"]),
    (MINIMAL + "[merge]\nmethod = 3\n", ["6: merge.method: should be a string, not 3"]),
    (MINIMAL + "[rouns]\nmin_nodes = 2\n", ["5: rouns: unknown section; did you mean 'rounds'?"]),
    ("min_nodes = 2\n" + MINIMAL, ["1: min_nodes: unknown key; it belongs in [rounds]"]),
    (MINIMAL + "listen = '[::]:1'\n", ["5: model.listen: unknown key; it belongs in [server]"]),
    (MINIMAL + "qqq = 1\n", ["5: model.qqq: unknown key; known are base, name, labels"]),
    (MINIMAL + "rounds = 3\n", ["5: model.rounds: unknown key; known are base, name, labels"]),
    ("rounds = 3\n" + MINIMAL, ["1: rounds: should be a table, not 3"]),
    (MINIMAL + "[rounds]\nmin_nodes = 0\n", ["6: rounds.min_nodes: should be at least 1, not 0"]),
    (MINIMAL + "[rounds]\nmin_nodes = 2.0\n", ["6: rounds.min_nodes: should be a whole number, not 2.0"]),
    (MINIMAL + "[rounds]\nmin_nodes = true\n", ["6: rounds.min_nodes: should be a whole number, not true"]),
    (
        MINIMAL + "[rounds]\ngrace_s = 'automatic'\nsample = 1.5\n",
        [
            '6: rounds.grace_s: should be a number of seconds from 0 up, or "auto"',
            "7: rounds.sample: should be a number of nodes from 1 up, or a share of them between 0 and 1",
        ],
    ),
    (
        MINIMAL + "[rounds]\nasync_buffer = 1\n[search]\nstrategy = 'greedy_soup'\n",
        [
            "6: rounds.async_buffer: should be min_nodes, 2, at least",
            "8: search.strategy: does not go with late deltas ([rounds] late or async_buffer)",
        ],
    ),
    (
        MINIMAL + "[rounds]\nasync_buffer = 2\ndynamic_steps = 0.5\n",
        ["7: rounds.dynamic_steps: needs async_buffer, and steps in [train], of which it asks some nodes for fewer"],
    ),
    (MINIMAL + "[rounds]\ndeadline_s = 0\n", ["6: rounds.deadline_s: should be above 0, not 0"]),
    (MINIMAL + "[rounds]\ndeadline_s = inf\n", ["6: rounds.deadline_s: should be a number, not inf"]),
    (MINIMAL + "[rounds]\n'deadline.s' = 1\n", ["6: rounds.\"deadline.s\": unknown key; did you mean 'deadline_s'?"]),
    (MINIMAL + "[outer]\nmomentum = 1.0\n", ["6: outer.momentum: should be below 1, not 1.0"]),
    (
        MINIMAL + "[delta]\nvalues = 'int9'\n",
        [
            "6: delta.values: should be one of 'fp32', 'bf16', 'fp16', 'int8', 'int4', 'lloyd3', 'lloyd2', 'sign', "
            "not 'int9'; did you mean 'int8'?"
        ],
    ),
    (
        MINIMAL + "[delta]\ndensity = 0.5\n",
        ['6: delta.density: has no effect without sparsify = "seeded", "topk" or "layerwise_topk"'],
    ),
    (
        MINIMAL + "[delta]\ncodec = 'auto'\nvalues = 'int8'\ndownlink = 'bf16'\nerror_feedback = 0.0\n",
        [
            '7: delta.values: is chosen by codec = "auto": leave it out, or leave codec out',
            '9: delta.error_feedback: is chosen by codec = "auto": leave it out, or leave codec out',
        ],
    ),
    (
        MINIMAL + "[delta]\nrank = 4\n",
        ['6: delta.rank: sparsify = "lowrank" takes a rank of at least 1, and the others take none'],
    ),
    (
        MINIMAL + "[delta]\nsparsify = 'lowrank'\n",
        ['5: delta.rank: sparsify = "lowrank" takes a rank of at least 1, and the others take none'],
    ),
    (
        MINIMAL + "[delta]\nerror_feedback = 0.95\n",
        [
            '6: delta.error_feedback: goes with "topk" and "layerwise_topk" alone: '
            "the others leave nothing out to be sent later"
        ],
    ),
    (
        MINIMAL + "[delta]\nerror_feedback = 0.95\nsparsify = 'seeded'\ndensity = 0.5\n",
        [
            '6: delta.error_feedback: goes with "topk" and "layerwise_topk" alone: '
            "the others leave nothing out to be sent later"
        ],
    ),
    (
        MINIMAL + "[delta]\nsparsify = 'topk'\ndensity = 0.1\nerror_feedback = 0.95\n"
        "[[merge.steps]]\nmethod = 'fedavg'\n[[merge.steps]]\nmethod = 'ema'\n",
        [
            "8: delta.error_feedback: does not go with ema over rounds, which carries the past on as momentum does; "
            "leave out that step, or leave it 0"
        ],
    ),
    (
        MINIMAL + "[merge]\nthreads = -1\nmemory_budget = 'much'\n",
        [
            "6: merge.threads: should be at least 0, not -1",
            '7: merge.memory_budget: should be a number of bytes, or a text like "500MB" or "2GiB"',
        ],
    ),
    (
        MINIMAL + "[delta]\nsparsify = 'topk'\nerror_feedback = 1.5\n",
        ["7: delta.error_feedback: should be at most 1, not 1.5"],
    ),
    (
        MINIMAL + "[outer]\nname = 'nesterov'\n[delta]\nsparsify = 'topk'\ndensity = 0.1\nerror_feedback = 0.95\n",
        [
            '10: delta.error_feedback: does not go with [outer] name = "nesterov": '
            'residuals on top of momentum diverge; take "sgd", or leave it 0'
        ],
    ),
    (
        MINIMAL + "[server]\nlisten = '::1:8700'\n",
        ['6: server.listen: should be "host:port", with IPv6 in brackets: "[::1]:8700"'],
    ),
    (
        MINIMAL + "[server]\nmax_payload_bytes = '2 apples'\n",
        ['6: server.max_payload_bytes: should be a number of bytes, or a text like "500MB" or "2GiB"'],
    ),
    (
        MINIMAL + "[store]\ndatabase = 'mysql://host/ledger'\n",
        ['6: store.database: should be "sqlite:///FILE" or "postgresql+psycopg://USER@HOST/DATABASE"'],
    ),
    (
        MINIMAL + "[store]\nblobs = 'gs://bucket'\n",
        ['6: store.blobs: should be a folder, or "s3://BUCKET/PREFIX"'],
    ),
    (
        MINIMAL + "[server]\ntls_cert = 'c'\n",
        ["5: server.tls_key: tls_cert and tls_key go together: give both or neither"],
    ),
    (MINIMAL + "[federation.x]\n", ["5: federation.x: unknown key; known are name, state, key, trusted"]),
    (
        MINIMAL.replace('"f"', '"a/b"'),
        ["2: federation.name: should be letters, digits, '-', '_' and '.', at most 100, not beginning with '.'"],
    ),
    (MINIMAL + "labels = ['a', 'a']\n", ["5: model.labels: names a label twice"]),
    (
        MINIMAL + "labels = ['a']\n",
        ["5: model.labels: should be a list of two or more label names, or the path of a text file with one per line"],
    ),
    (
        MINIMAL + "[[nodes]]\nname = 'a'\n[[nodes]]\ndata = 3\n",
        [
            "7: nodes[1].name: required key is missing",
            "8: nodes[1].data: should be a path",
        ],
    ),
    (
        MINIMAL + "[[nodes]]\nname='a'\ndata='d'\n[[nodes]]\nname='a'\ndata='e'\n",
        ["5: nodes: two nodes are called 'a'"],
    ),
    (
        MINIMAL + "[merge]\nmethod = 'greedy_soup'\n",
        ["6: merge.method: should be how each candidate is merged; set 'greedy_soup' under [search]"],
    ),
    (
        MINIMAL + "[search]\nstrategy = 'greedy_soup'\nlayers = 2\n",
        ["5: search: greedy_soup has one factor for each model"],
    ),
    (
        MINIMAL + "[merge]\nmethod = 'ties'\n[search]\nstrategy = 'cma_es'\nvary = { density = [0.5, 0.9] }\n",
        ["7: search: vary.density should be a range around its start, 0.2"],
    ),
    (
        MINIMAL + "[search]\nstrategy = 'cma_es'\nvary = { density = [0.5] }\n",
        ["7: search.vary.density[1]: required key is missing"],
    ),
    (
        MINIMAL + "[screen]\nrobust = ['krum']\n[rounds]\nmin_nodes = 5\n[search]\nstrategy = 'cma_es'\n",
        ["10: search.strategy: does not go with [screen] robust; set one of them"],
    ),
    *(
        (
            MINIMAL + f"[screen]\nrobust = ['krum']\n[rounds]\nmin_nodes = 5\n[merge]\nmethod = '{method}'\n",
            [f'6: screen.robust: do not go with [merge] method = "{method}": combinations of deltas have no {what}'],
        )
        for method, what in {"fisher": "statistics", "factor_average": "factors"}.items()
    ),
    (
        MINIMAL + "[[merge.steps]]\nmethod = 'dare'\n[[merge.steps]]\nmethod = 'factor_average'\n",
        [
            "5: merge.steps: factor_average takes adapters' factors, and dare acts on their products; "
            "leave out what comes before factor_average"
        ],
    ),
    (MINIMAL + "[nodes]\nname='a'\n", ["5: nodes: should be a list, not a table"]),
    ("[federation\n", ["1: not valid TOML: Expected ']' at the end of a table declaration (column 12)"]),
    (MINIMAL + "base = 'b'\n", ["5: not valid TOML: Cannot overwrite a value (column 11)"]),
    (MINIMAL + "[train]\n[train]\n", ["6: not valid TOML: Cannot declare train twice (column 7)"]),
    (MINIMAL + "x = [\n", ["6: not valid TOML: Invalid value"]),
    # Everything at once, in the order of the file.
    (
        "[rounds]\nmin_nodes = 0\nnum_roundz = 1\n[outer]\nlr = 'x'\n",
        [
            "1: federation.name: required key is missing",
            "1: model.base: required key is missing",
            "2: rounds.min_nodes: should be at least 1, not 0",
            "3: rounds.num_roundz: unknown key; did you mean 'num_rounds'?",
            "5: outer.lr: should be a number, not 'x'",
        ],
    ),
]


@pytest.mark.parametrize(("text", "expected"), BAD)
def test_what_is_wrong_is_said_with_file_line_and_key(text: str, expected: list[str]) -> None:
    assert problems(text) == [f"fedmerge.toml:{line}" for line in expected]


def test_a_byte_order_mark_is_none_of_the_texts(tmp_path: Path) -> None:
    (tmp_path / "fedmerge.toml").write_bytes(MINIMAL.encode("utf-8-sig"))
    assert load_config(tmp_path / "fedmerge.toml") == parse_config(MINIMAL, folder=tmp_path, where="")


def test_the_environment_overrides_the_file_and_is_named_in_errors() -> None:
    text = MINIMAL + "[rounds]\nmin_nodes = 5\n"
    config = parse(
        text,
        FEDMERGE_ROUNDS__MIN_NODES="3",
        FEDMERGE_ROUNDS__GRACE_S="1.5",
        FEDMERGE_FEDERATION__NAME="2024",
        FEDMERGE_SERVER__LISTEN="[::1]:0",
        FEDMERGE_MODEL__LABELS='["x", "y"]',
        FEDMERGE_MERGE__METHOD="ties",
        FEDMERGE_MERGE__LAMBDA="0.5",
        FEDMERGE_TRAIN__EPOCHS="2",
        FEDMERGE_LOG_LEVEL="DEBUG",
        OTHER__THING="1",
    )
    assert (config.rounds.min_nodes, config.rounds.grace_s, config.federation.name) == (3, 1.5, "2024")
    assert (config.server.address, config.model.labels) == (("::1", 0), ("x", "y"))
    assert config.recipe() == Recipe("ties", {"lambda": 0.5})
    assert config.train_settings() == {"trainer": "text-classification", "epochs": 2}
    assert problems(
        text,
        FEDMERGE_ROUNDS__MIN_NODES="many",
        FEDMERGE_ROUNDS__MIN_NODS="3",
        FEDMERGE_ROUND__MIN_NODES="3",
        FEDMERGE_NODES__NAME="a",
    ) == [
        "FEDMERGE_NODES__NAME: [[nodes]] can only be set in the file",
        "FEDMERGE_ROUND__MIN_NODES: unknown section 'round'; did you mean 'rounds'?",
        "FEDMERGE_ROUNDS__MIN_NODES: rounds.min_nodes: should be a whole number, not 'many'",
        "FEDMERGE_ROUNDS__MIN_NODS: rounds.min_nods: unknown key; did you mean 'min_nodes'?",
    ]


def test_load_config_resolves_paths_from_the_folder_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("sub/fedmerge.toml")
    path.parent.mkdir()
    path.write_text(MINIMAL + "labels = 'labels.txt'\n[server]\ntls_cert = '/etc/c.pem'\ntls_key = '../k.pem'\n")
    config = load_config(path, environ={})
    assert config.model.base == tmp_path / "sub/base"
    assert config.federation.state == tmp_path / "sub/state"
    assert config.server.tls_cert == Path("/etc/c.pem")
    assert config.server.tls_key == tmp_path / "k.pem"
    with pytest.raises(InputError, match=r"labels\.txt: can't be read"):
        config.model.label_names()
    (tmp_path / "sub/labels.txt").write_text("negative\n\n positive \n", encoding="utf-8")
    assert config.model.label_names() == ("negative", "positive")
    (tmp_path / "sub/labels.txt").write_text("one\n")
    with pytest.raises(InputError, match="two or more different label names"):
        config.model.label_names()


@pytest.mark.parametrize(
    "content", [None, b'[federation]\nname = "\xff"\n', b"x = " + b"9" * 5000, b"x = " + b"[" * 9999]
)
def test_a_file_that_is_no_toml_is_a_config_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "fedmerge.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"fedmerge\.toml"):
        load_config(path, environ={})


@pytest.mark.parametrize(
    ("downlink", "half", "single", "steps", "values"),
    [
        ("auto", 11, 10, True, "fp32"),
        ("auto", 10, 11, False, "int8"),
        ("steps", 0, 10, True, "fp32"),
        ("bf16", 10, 0, False, "bf16"),
    ],
)
def test_what_nodes_fetch_depends_on_the_base_model(
    downlink: str, half: int, single: int, steps: bool, values: str
) -> None:
    config = parse(f"{MINIMAL}\n[delta]\ndownlink = '{downlink}'\nblock_size = 64")
    schema = {
        "a": TensorSpec((half,), "BF16"),
        "b": TensorSpec((1, single), "F32"),
        "c": TensorSpec((99,), "I64"),
    }
    assert config.takes_steps(schema) == steps
    assert config.downlink_codec(schema) == Codec(values=values, block_size=64)


def test_defaults_are_those_of_the_parts_they_configure() -> None:
    config = parse(MINIMAL)
    assert config.uplink(LARGE)[:2] == (Codec(small_values="fp32"), 0.0)
    assert config.downlink_codec(LARGE) == Codec(values="int8", small_values="fp32")
    assert config.recipe() == Recipe("fedavg")
    assert config.screen_policy() == ScreenPolicy()
    assert config.outer_settings() == {"name": "sgd", "lr": 1.0}
    assert config.search_settings() is None
    searching = parse(MINIMAL + "[search]\nstrategy = 'cma_es'\n").search_settings()
    assert searching == SearchSettings("cma_es")


@pytest.mark.parametrize("key", ["density", "block_size", "small_elements", "zstd_level", "max_noise_ratio"])
def test_ranges_of_the_codec_are_the_codecs_own(key: str) -> None:
    schema = json_schema()["$defs"]["Delta"]["properties"][key]
    seeded = {"sparsify": "seeded"}
    for bound, beyond in ((schema["minimum"], -1), (schema["maximum"], 1)):
        Codec.from_dict(seeded | {key: bound})
        with pytest.raises(ConfigError):
            Codec.from_dict(seeded | {key: bound + beyond})


@pytest.mark.parametrize("key", ["max_norm_ratio", "max_weight_ratio"])
def test_ranges_of_the_screen_are_the_screens_own(key: str) -> None:
    bound = json_schema()["$defs"]["Screen"]["properties"][key]["minimum"]
    ScreenPolicy.from_dict({key: bound})
    with pytest.raises(ConfigError):
        ScreenPolicy.from_dict({key: bound - 0.1})


@pytest.mark.parametrize("name", OUTER)
def test_outer_settings_are_what_the_optimizer_takes(name: str) -> None:
    settings = parse(MINIMAL + f"[outer]\nname = {toml(name)}\n").outer_settings()
    assert settings.pop("name") == name
    assert settings.keys() == outer_parameters(name).keys()


@pytest.mark.parametrize("method", [name for name in METHODS if name not in IN_TIME])
def test_every_parameter_of_every_method_can_be_written_in_the_file(method: str) -> None:
    defaults = {name.removesuffix("_"): parameter.default for name, parameter in parameters(method).items()}
    text = MINIMAL + f"[merge]\nmethod = {toml(method)}\n" + "".join(f"{k} = {toml(v)}\n" for k, v in defaults.items())
    assert parse(text).recipe() == Recipe(method)


def test_json_schema_describes_every_key_and_agrees_with_the_loader() -> None:
    schema = json_schema()
    assert schema["required"] == ["federation", "model"]
    for section in ALL_SECTIONS:
        described = schema["$defs"][section.__name__]
        assert described["description"]
        assert all(described["properties"][key].get("description") for key in section.model_fields)
        assert bool(described["additionalProperties"]) is issubclass(section, OpenSection)
    assert tomllib.loads(MINIMAL).keys() == set(schema["required"])


def test_sections_are_frozen() -> None:
    config = parse(MINIMAL)
    with pytest.raises(ValidationError):
        config.rounds.min_nodes = 1


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1B", 1), ("1kB", 1000), ("1KiB", 1024), ("1.5 MB", 1_500_000), ("2GiB", 2 << 30), ("1TiB", 1 << 40), (7, 7)],
)
def test_sizes(text: str | int, num_bytes: int) -> None:
    assert parse(MINIMAL + f"[server]\nmax_payload_bytes = {toml(text)}\n").server.max_payload_bytes == num_bytes


@pytest.mark.parametrize(
    "size", ["", "0B", "-1", "1", "1e3MB", "2 G B", "1PiB", "9" * 400 + "TB", 0, -1, True, 1.5, 2**60]
)
def test_sizes_that_are_none(size: object) -> None:
    (problem,) = problems(MINIMAL + f"[server]\nmax_payload_bytes = {toml(size)}\n")
    assert problem.startswith("fedmerge.toml:6: server.max_payload_bytes: should be a number of bytes")


@pytest.mark.parametrize("address", ["", ":1", "a:", "a", "a:b", "::1:1", "[::1]", "a:65536", "a b:1", "a:1 ", "[a:1"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        parse_address(address)


def all_keys(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(inner, (dict, list)) and inner:
            yield from all_keys(inner, (*path, key))


def test_locator_on_the_odd_corners_of_toml() -> None:
    text = '''\
a = 1 # b = 2
"b.c" = """
d = 3
[e]
"""""
f.g . "h i" = [ [1, 2], # ]
  "]", \'\'\'
[j]\'\'\' ]
[k]
[k.l . m]
n = { o = 1, p = [ 2 ] }
[[q]]
[[q.r]]
s = 2026-01-01T00:00:00Z
[[q.r]]
s = "\\"[t]\\\\"
[[q]]
[q.u]
v = 'w = \\'
'''
    expected = {
        ("a",): 1, ("b.c",): 2, ("f",): 6, ("f", "g"): 6, ("f", "g", "h i"): 6, ("k",): 9, ("k", "l"): 10,
        ("k", "l", "m"): 10, ("k", "l", "m", "n"): 11, ("q",): 12, ("q", 0): 12, ("q", 0, "r"): 13,
        ("q", 0, "r", 0): 13, ("q", 0, "r", 0, "s"): 14, ("q", 0, "r", 1): 15, ("q", 0, "r", 1, "s"): 16,
        ("q", 1): 17, ("q", 1, "u"): 18,
        ("q", 1, "u", "v"): 19,
    }  # fmt: skip
    lines = key_lines(text)
    assert lines == expected
    # What the locator does not list is found at the key around it.
    unlisted = set(all_keys(tomllib.loads(text))) - expected.keys()
    assert {line_of(path, lines) for path in unlisted} == {6, 11}
    assert line_of(("x", "y"), lines) == 1


def test_section_classes_have_documentation_for_people() -> None:
    for section in ALL_SECTIONS:
        assert issubclass(section, Section)
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            assert field.description.rstrip(")").endswith("."), f"{section.__name__}.{name}"
