"""`fedmerge merge`: merge fine-tunes that lie on this machine, without a federation."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fedmerge.cli.output import JsonFlag, print_json, stderr
from fedmerge.errors import ConfigError, ResourceError
from fedmerge.sign import SigningKey


def merge(
    models: Annotated[tuple[Path, ...], Parameter(name="MODEL", help="Directories of fine-tunes of the base.")],
    /,
    *,
    base: Annotated[Path, Parameter(help="The directory of the model they were tuned from.")],
    out: Annotated[Path, Parameter(help="Where to write the merged model.")],
    method: Annotated[str, Parameter(help="How to merge.")] = "task_arithmetic",
    weights: Annotated[
        str | None, Parameter(help="One number per model, such as 2,1,1. [default: 1 each]", show_default=False)
    ] = None,
    set: Annotated[  # noqa: A002 - names the option
        tuple[str, ...], Parameter(help="A parameter of the method, KEY=VALUE, such as density=0.2. Repeatable.")
    ] = (),
    seed: Annotated[int, Parameter(help="Seed of methods that draw random masks.")] = 0,
    key: Annotated[Path | None, Parameter(help="A private key to sign the result with.")] = None,
    force: Annotated[bool, Parameter(negative=(), help="Replace what is at --out.")] = False,
    json: JsonFlag = False,
) -> None:
    """Merge fine-tunes of one base model into a directory that transformers opens."""
    if out.exists() and not force:
        raise ResourceError(f"{out}: already exists", hint="choose another --out, or replace it with --force")
    from fedmerge.delta import UpdatedModel, subtract
    from fedmerge.merge import Recipe, merge_deltas
    from fedmerge.publish import publish_local
    from fedmerge.statements import LocalInput
    from fedmerge.tensors import Checkpoint, model_digest

    recipe = Recipe(method, _parameters(set))
    factors = _weights(weights, len(models))
    signing_key = SigningKey.load(key) if key is not None else None
    origin = Checkpoint(base)
    tuned = [Checkpoint(path) for path in models]
    vectors = [subtract(model, origin, where=str(path)) for model, path in zip(tuned, models, strict=True)]
    inputs = [
        LocalInput(name=path.name, digest=model_digest(model), weight=weight)
        for path, model, weight in zip(models, tuned, factors, strict=True)
    ]
    merged = dict(merge_deltas(vectors, factors, recipe, base=origin, seed=seed))
    digest = publish_local(
        UpdatedModel(origin, [merged]),
        origin,
        out,
        inputs=inputs,
        recipe=recipe.to_dict(),
        seed=seed,
        key=signing_key,
    )
    if json:
        print_json({"out": str(out), "version": digest, "merge": recipe.to_dict(), "signed": signing_key is not None})
        return
    stderr.print(f"merged {len(models)} models with {method} into version {digest[:12]}")
    sys.stdout.write(f"{out}\n")


def _parameters(assignments: tuple[str, ...]) -> dict[str, Any]:
    """Parse KEY=VALUE pairs; a value is written as in TOML, or as a bare word."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"--set {assignment}: expected KEY=VALUE")
        try:
            values[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[name] = text
    return values


def _weights(text: str | None, num_models: int) -> list[float]:
    if text is None:
        return [1.0] * num_models
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError as err:
        raise ConfigError(f"--weights {text}: expected numbers separated by commas") from err
    if len(weights) != num_models:
        raise ConfigError(f"--weights has {len(weights)} numbers for {num_models} models")
    return weights
