"""Searching for a merge of local checkpoints: each candidate is written out and scored by a command."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedmerge.errors import ConfigError, InputError, reporting_os_errors
from fedmerge.local.assemble import Assembly, MergeJob
from fedmerge.merge import Workers
from fedmerge.merge.layers import leaves, varies
from fedmerge.search.board import score_of
from fedmerge.search.strategies import Candidate, Search, SearchSettings
from fedmerge.seeds import derive_seed

PLACEHOLDER = "{model}"
JUDGE = "command"

Evaluate = Callable[[Path], Mapping[str, float]]


def search_local(
    job: MergeJob,
    settings: SearchSettings,
    evaluate: Evaluate,
    *,
    seed: int,
    workers: Workers,
    scratch: Path,
    on_candidate: Callable[[Candidate, float], None] = lambda candidate, score: None,
) -> tuple[MergeJob, str]:
    """Search for the best way to do a merge; return it, and the search's record as JSON text.

    The record says how the search was set, every candidate in order with its metrics and score, and the one chosen.
    `evaluate` gets a model directory, below `scratch`, and returns metrics. Raises `InputError` when they lack the one
    that counts, `ConfigError` for a merge in slices, and what `Search` raises.
    """
    (part, *others) = job.slices
    if others or part.base is None or any(source.layers is not None for source in part.sources):
        raise ConfigError("a search goes with whole models and their base, and not with slices")
    if settings.layers > 1 and any(varies(source.weight) for source in part.sources):
        raise ConfigError("search: layers go with plain weights, and these vary over the model already")
    search = Search(settings, part.recipe, len(part.sources), derive_seed("search", seed))
    history: list[dict[str, Any]] = []
    number = 0
    while search.generation:
        answers = []
        for candidate in search.generation:
            with reporting_os_errors(scratch), TemporaryDirectory(prefix=".fedmerge-search-", dir=scratch) as folder:
                directory = Path(folder) / f"candidate-{len(history):03d}"
                Assembly(as_job(candidate, job)).write(directory, seed=seed, workers=workers)
                metrics = dict(evaluate(directory))
            score = score_of(metrics, settings.metric)
            if score is None:
                raise InputError(
                    f"the evaluation gave {', '.join(metrics) or 'no metrics'}, not {settings.metric}",
                    hint="metric says which one counts: accuracy or loss if it is auto, -NAME where lower is better",
                )
            answers.append({JUDGE: score})
            history.append({"generation": number, **candidate.to_dict(), "metrics": metrics, "score": score})
            on_candidate(candidate, score)
        search.tell(answers)
        number += 1
    record = {
        "format": "fedmerge-search-v1",
        "settings": settings.to_dict(),
        "models": [source.model.name for source in part.sources],
        "seed": seed,
        "candidates": history,
        "chosen": search.best().to_dict(),
    }
    return as_job(search.best(), job), json.dumps(record, indent=2) + "\n"


def as_job(candidate: Candidate, job: MergeJob) -> MergeJob:
    """Return `job`, which has one slice, as the candidate has it.

    Models that it leaves out are none of its sources: some methods look at all models, whatever their weights.
    """
    part = job.slices[0]
    weights = candidate.weights([source.weight for source in part.sources])
    sources = [replace(source, weight=weight) for source, weight in zip(part.sources, weights, strict=True)]
    kept = tuple(source for source in sources if any(leaves(source.weight)))
    return replace(job, slices=(replace(part, recipe=candidate.recipe(part.recipe), sources=kept),))


def evaluation_command(
    command: str,
    *,
    timeout_s: float,
    setting: str = "--evaluate",
    more_time: str = "--search-set deadline_s=SECONDS",
) -> Evaluate:
    """Return a function that runs `command` on a model directory and returns the metrics that it prints.

    `{model}` in it stands for the directory; no shell looks at it. The last line it prints must be a JSON object of
    numbers. Raises `ConfigError` when `{model}` is missing; the function raises `InputError` when the command can't be
    started, fails, takes more than `timeout_s` seconds, or prints something else. Messages name the `setting` that has
    the command, and the one that gives it `more_time`.
    """
    try:
        words = shlex.split(command)
    except ValueError as err:
        raise ConfigError(f"{setting}: {err}") from err
    if not any(PLACEHOLDER in word for word in words):
        raise ConfigError(f"{setting} {command:.80}: has no {PLACEHOLDER}, which stands for the candidate's directory")

    def evaluate(directory: Path) -> Mapping[str, float]:
        arguments = [word.replace(PLACEHOLDER, str(directory)) for word in words]
        try:
            result = subprocess.run(
                arguments, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
            )
        except OSError as err:
            raise InputError(f"the evaluation can't be started: {arguments[0]}: {err.strerror}") from err
        except subprocess.TimeoutExpired as err:
            raise InputError(
                f"the evaluation took more than {timeout_s:g} s", hint=f"give it more with {more_time}"
            ) from err
        if result.returncode != 0:
            said = _last_line(result.stderr) or "it wrote nothing to stderr"
            raise InputError(f"the evaluation failed with exit code {result.returncode}: {said}")
        return _metrics(_last_line(result.stdout))

    return evaluate


def _metrics(line: str) -> dict[str, float]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(type(value) in {int, float} for value in found.values()):
        raise InputError(
            f"the evaluation's last line is {line[:80]!r}",
            hint='it should print a JSON object of numbers, such as {"accuracy": 0.81}',
        )
    return {name: float(value) for name, value in found.items()}


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""
