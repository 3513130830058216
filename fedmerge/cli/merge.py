"""`fedmerge merge`: merge fine-tunes that lie on this machine, without a federation."""

from __future__ import annotations

import hashlib
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from fedmerge.cli.output import JsonFlag, parse_bytes, print_json, print_problem, printable, stderr
from fedmerge.cli.resources import require_device
from fedmerge.config.values import num_cores
from fedmerge.errors import ConfigError, MissingExtra, ResourceError, did_you_mean, reporting_os_errors
from fedmerge.trust.sign import SigningKey

if TYPE_CHECKING:
    from fedmerge.local.assemble import Assembly, MergeJob
    from fedmerge.merge import Recipe
    from fedmerge.merge.layers import Value
    from fedmerge.search import Candidate, SearchSettings
    from fedmerge.search.local import Evaluate
    from fedmerge.tensors import TensorMap

MAX_VALUE_CHARS = 1000  # of a parameter's value
SEE_HELP = "see: fedmerge merge --help"


def merge(
    models: Annotated[
        tuple[Path, ...],
        Parameter(
            name="MODEL", help="Directories of fine-tunes of the base: models or LoRA adapters.", show_default=False
        ),
    ] = (),
    /,
    *,
    out: Annotated[Path, Parameter(help="Where to write the merged model.")],
    base: Annotated[Path | None, Parameter(help="The directory of the model they were tuned from.")] = None,
    from_: Annotated[
        Path | None, Parameter(name="--from", help="Take models, base and method from a mergekit YAML file instead.")
    ] = None,
    method: Annotated[
        str | None, Parameter(help="How to merge: a method, or steps such as dare+elect. [default: task_arithmetic]")
    ] = None,
    weights: Annotated[
        str | None, Parameter(help="One value per model, such as 2,1,1. [default: 1 each]", show_default=False)
    ] = None,
    set: Annotated[  # noqa: A002 - names the option
        tuple[str, ...],
        Parameter(help="A parameter of the method, KEY=VALUE, such as density=0.2 or density=[0.4,0.2]. Repeatable."),
    ] = (),
    scope: Annotated[
        Literal["tensor", "model"] | None,
        Parameter(help="Merge each tensor by itself, or the model as one vector, which takes far more memory."),
    ] = None,
    statistics: Annotated[
        tuple[Path, ...],
        Parameter(
            consume_multiple=True,
            show_default=False,
            help="For fisher and regmean: each model's file from `fedmerge statistics`, in the same order.",
        ),
    ] = (),
    align: Annotated[
        Literal["git_rebasin"] | None,
        Parameter(help="First permute each model's hidden units towards the base's, for models trained apart."),
    ] = None,
    repair: Annotated[
        Path | None,
        Parameter(help="With --align: data on which the merged hidden units shall vary as the models' do (REPAIR)."),
    ] = None,
    trainer: Annotated[str, Parameter(help="For --repair: what the models were tuned with.")] = "text-classification",
    option: Annotated[
        tuple[str, ...], Parameter(help="For --repair: a setting of the trainer, KEY=VALUE. Repeatable.")
    ] = (),
    search: Annotated[
        str | None, Parameter(help="Try many merges and keep the best: greedy_soup or cma_es.", show_default=False)
    ] = None,
    evaluate: Annotated[
        str | None,
        Parameter(help="A command that prints the metrics of the model directory {model} as a JSON object."),
    ] = None,
    search_set: Annotated[
        tuple[str, ...], Parameter(help="A key of \\[search], KEY=VALUE, such as evaluations=100. Repeatable.")
    ] = (),
    seed: Annotated[
        int, Parameter(help="Seed of methods that draw random masks.", validator=Number(gte=0, lt=1 << 63))
    ] = 0,
    key: Annotated[Path | None, Parameter(help="A private key to sign the result with.")] = None,
    max_shard_size: Annotated[
        str | None, Parameter(help="Split weights into files of this size, such as 5GB. [default: as the base]")
    ] = None,
    threads: Annotated[
        int | None,
        Parameter(help="How many tensors to merge at once. [default: one per core]", validator=Number(gte=1)),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        Parameter(help="Merge in this process, or spread over the cores of a Ray cluster that sees the same folders."),
    ] = "local",
    ray_address: Annotated[
        str | None, Parameter(help="With --engine ray: its HOST:PORT, or auto. [default: one started here]")
    ] = None,
    memory: Annotated[str, Parameter(help="About how much memory they may share.")] = "2GB",
    device: Annotated[
        str | None, Parameter(help="Let torch compute there: cuda with a GPU, or cpu. [default: compiled for the CPU]")
    ] = None,
    force: Annotated[bool, Parameter(negative=(), help="Replace the merged model at --out.")] = False,
    json: JsonFlag = False,
) -> None:
    """Merge fine-tunes of one base model into a directory that transformers opens."""
    if out.exists():
        _require_replaceable(out, force=force)
    settings, score = _search(search, search_set, evaluate)
    from fedmerge.cli.progress import counting
    from fedmerge.local.assemble import Assembly
    from fedmerge.local.repaired import merge_repaired
    from fedmerge.merge import Workers, Write
    from fedmerge.publishing.publish import publish_local

    if from_ is None:
        job = _job(models, base, method, weights, set, scope=scope or "tensor", statistics=statistics)
    elif models or base or method or weights or set or scope or statistics:
        raise ConfigError("--from says what to merge and how: give it alone, with --out", hint=SEE_HELP)
    else:
        from fedmerge.interop.mergekit_yaml import read_mergekit

        job = read_mergekit(from_)
    if align is not None and statistics:
        raise ConfigError("--align and --statistics do not go together: those are of models that were not aligned")
    if repair is not None and align is None:
        raise ConfigError("--repair goes with --align: it is for models that were trained apart", hint=SEE_HELP)
    measure, facts = _measuring(repair, trainer, option)
    job = replace(job, align=align, repair=facts)
    merging = _merging(engine, ray_address, is_plain=settings is None and measure is None)
    num_threads = threads or (num_cores() if engine == "local" else 0)
    workers = Workers(num_threads, parse_bytes("--memory", memory), require_device(device))
    max_shard_bytes = None if max_shard_size is None else parse_bytes("--max-shard-size", max_shard_size)
    signing_key = SigningKey.load(key) if key is not None else None
    history: dict[str, str] = {}
    scratch = out.absolute().parent
    if settings is not None or measure is not None:
        with reporting_os_errors(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
    if settings is not None and score is not None:
        from fedmerge.search.local import search_local

        job, history["search.json"] = search_local(
            job, settings, score, seed=seed, workers=workers, scratch=scratch, on_candidate=_show
        )
    assembly = Assembly(job)
    _show_alignments(assembly)

    def fill(write: Write) -> None:
        if measure is not None:
            num_repaired = merge_repaired(assembly, measure, write, seed=seed, workers=workers, scratch=scratch)
            stderr.print(f"repaired {num_repaired} layers")
            return
        counting(merging(assembly, write, seed=seed, workers=workers), len(assembly.schema), "merging")

    digest = publish_local(
        assembly, fill, out, max_shard_bytes=max_shard_bytes, seed=seed, key=signing_key, side_files=history
    )
    if json:
        print_json({"out": str(out), "version": digest, "merge": job.to_dict(), "signed": signing_key is not None})
        return
    stderr.print(f"merged {len(job.models)} models with {'+'.join(job.methods)} into version {digest[:12]}")
    sys.stdout.write(f"{out}\n")


def _merging(engine: str, address: str | None, *, is_plain: bool) -> Callable[..., Iterator[str]]:
    """Return what merges an `Assembly`: its own method, or that on a cluster."""
    if engine == "local":
        if address is not None:
            raise ConfigError("--ray-address goes with --engine ray", hint=SEE_HELP)
        from fedmerge.local.assemble import Assembly

        return Assembly.merge
    if not is_plain:
        raise ConfigError("--engine ray goes with neither --search nor --repair", hint="merge with those here")
    try:
        from fedmerge.local.spread import merge_on_ray
    except ModuleNotFoundError as err:
        raise MissingExtra(f"--engine ray needs {err.name}", hint='pip install "fedmerge[ray]"') from err
    return partial(merge_on_ray, address=address)


def _search(
    strategy: str | None, assignments: tuple[str, ...], evaluate: str | None
) -> tuple[SearchSettings | None, Evaluate | None]:
    """Return how to search and how to score, as a command line asks for it; None twice without a search."""
    if strategy is None:
        if assignments or evaluate:
            raise ConfigError("--evaluate and --search-set go with --search", hint=SEE_HELP)
        return None, None
    if evaluate is None:
        hint = "a command that prints a JSON object of metrics, such as: --evaluate 'python score.py {model}'"
        raise ConfigError("--search needs --evaluate", hint=hint)
    from fedmerge.config import Search
    from fedmerge.search.local import evaluation_command
    from fedmerge.training import validated

    values = _parameters(assignments, option="--search-set") | {"strategy": strategy}
    settings = validated(Search, values, where="--search").settings()
    return settings, None if settings is None else evaluation_command(evaluate, timeout_s=settings.deadline_s)


def _measuring(
    data: Path | None, trainer: str, options: tuple[str, ...]
) -> tuple[Callable[[Path], TensorMap], dict[str, str]] | tuple[None, None]:
    """Return a function from a model directory to the moments of its layers on `data`, and what to say of that."""
    if data is None:
        if options:
            raise ConfigError("--option goes with --repair", hint=SEE_HELP)
        return None, None
    from fedmerge.cli.join import key_values
    from fedmerge.training import load_trainer, require_statistics

    measuring = require_statistics(load_trainer(trainer, {"data": data, **key_values(options)}), "moments", "REPAIR")
    measuring.check()
    with reporting_os_errors(data):
        digest = hashlib.sha256(data.read_bytes()).hexdigest()
    return lambda model: measuring.statistics(model, "moments"), {"data": digest, "trainer": trainer}


def _show_alignments(assembly: Assembly) -> None:
    for path, permutations in assembly.alignments.items():
        num_units = sum(map(len, permutations.values()))
        num_moved = sum(unit != place for units in permutations.values() for place, unit in enumerate(units.tolist()))
        stderr.print(f"{printable(str(path))}: moved {num_moved} of {num_units} units", markup=False)


def _show(candidate: Candidate, score: float) -> None:
    params = "".join(f", {name} = {value:g}" for name, value in candidate.params.items())
    stderr.print(f"{score:.6g} with weights times {candidate.to_dict()['factors']}{params}", markup=False)


def _job(
    models: tuple[Path, ...],
    base: Path | None,
    method: str | None,
    weights: str | None,
    assignments: tuple[str, ...],
    *,
    scope: Literal["tensor", "model"],
    statistics: tuple[Path, ...],
) -> MergeJob:
    """Return the merge that a command line asks for."""
    from fedmerge.local.assemble import MergeJob, Slice, Source

    for name, given in (("MODEL", models), ("--base", base)):
        if not given:
            raise ConfigError(f"{name} is missing", hint=SEE_HELP)
    origin = base or Path()
    recipe = replace(_recipe(method or "task_arithmetic", _parameters(assignments)), scope=scope)
    _require_statistics(recipe, statistics, models)
    if recipe.caution:
        print_problem("warning", recipe.caution, style="yellow")
    files = statistics or [None] * len(models)
    sources = [
        Source(model, weight, statistics=file)
        for model, weight, file in zip(models, _weights(weights, len(models)), files, strict=True)
    ]
    return MergeJob((Slice(recipe, tuple(sources), Source(origin)),), origin)


def _require_statistics(recipe: Recipe, statistics: tuple[Path, ...], models: tuple[Path, ...]) -> None:
    """Raise `ConfigError` unless there are as many statistics as the method needs."""
    if recipe.statistics is None and statistics:
        raise ConfigError(f"--statistics: {recipe.method} takes none", hint=SEE_HELP)
    if recipe.statistics is not None and len(statistics) != len(models):
        raise ConfigError(
            f"{recipe.method} needs --statistics of every model: {len(statistics)} for {len(models)} models",
            hint=f"compute them with: fedmerge statistics MODEL --method {recipe.method} --data FILE --out FILE",
        )


def _recipe(method: str, values: dict[str, Any]) -> Recipe:
    """Return the recipe of a method's name, or of several steps between "+", whose parameters are then STEP.KEY."""
    from fedmerge.merge import Recipe
    from fedmerge.merge.recipe import method_place

    names = [name.strip() for name in method.split("+")]
    if len(names) == 1:
        return Recipe(names[0], values)
    method_place(names)
    steps: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in values.items():
        name, _, parameter = key.partition(".")
        if name not in steps or not parameter:
            raise ConfigError(
                f"--set {key}: names no step{did_you_mean(name, steps)}", hint=f"for example --set {names[0]}.KEY=VALUE"
            )
        steps[name][parameter] = value
    return Recipe.from_steps([(name, steps[name]) for name in names])


def _require_replaceable(out: Path, *, force: bool) -> None:
    """Refuse to overwrite, but an earlier merge when that is wanted: a slip of the keyboard must not cost a folder."""
    if not force:
        raise ResourceError(f"{out}: already exists", hint="choose another --out, or replace it with --force")
    if not (out / "lineage.json").is_file():
        raise ResourceError(
            f"{out}: not a merged model, and --force replaces nothing else", hint="choose another --out"
        )


def _parameters(assignments: tuple[str, ...], *, option: str = "--set") -> dict[str, Any]:
    """Parse KEY=VALUE pairs; a value is written as in TOML, or as a bare word."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not (separator and name and len(text) <= MAX_VALUE_CHARS):
            raise ConfigError(f"{option} {assignment:.60}: expected KEY=VALUE")
        value = _toml(text)
        values[name] = text if value is None else value
    return values


def _weights(text: str | None, num_models: int) -> list[Value]:
    """Parse numbers between commas, or values as they stand in a TOML list."""
    from fedmerge.merge.parameters import Weight, check

    if text is None:
        return [1.0] * num_models
    try:
        weights: list[Value] = [float(part) for part in text.split(",")]
    except ValueError:
        checked = [check(Weight, weight) for weight in _toml(f"[{text}]") or []]
        if not checked or any(problems for _, problems in checked):
            raise ConfigError(
                f"--weights {text:.60}: expected numbers separated by commas",
                hint="or, for weights that vary over layers, lists and tables as in TOML: [0,1],{'*.mlp.*'=0.5}",
            ) from None
        weights = [weight for weight, _ in checked]
    if len(weights) != num_models:
        raise ConfigError(f"--weights has {len(weights)} numbers for {num_models} models")
    return weights


def _toml(text: str) -> Any:
    """Return the TOML value that `text` spells, or None."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return None
    return parsed["value"] if parsed.keys() == {"value"} else None
