"""`fedmerge statistics`: compute what `fedmerge merge` needs beside a model for methods that weigh by its data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fedmerge.cli.join import key_values
from fedmerge.cli.output import JsonFlag, format_bytes, print_json, stderr
from fedmerge.errors import ConfigError


def statistics(
    model: Annotated[Path, Parameter(name="MODEL", help="The directory of a fine-tune.")],
    /,
    *,
    method: Annotated[str, Parameter(help="The merge method that they are for: fisher or regmean.")],
    data: Annotated[Path, Parameter(help="The data that it was tuned on: JSON Lines or CSV.")],
    out: Annotated[Path, Parameter(help="Where to write them, such as model.statistics.safetensors.")],
    trainer: Annotated[str, Parameter(help="What it was tuned with.")] = "text-classification",
    option: Annotated[
        tuple[str, ...],
        Parameter(help="A setting of the trainer, KEY=VALUE, such as statistics_examples=64. Repeatable."),
    ] = (),
    json: JsonFlag = False,
) -> None:
    """Compute statistics of a fine-tune on its data, for methods that merge by them."""
    from fedmerge.merge import Recipe

    kind = Recipe(method).statistics
    if kind is None:
        raise ConfigError(f"--method {method} needs no statistics", hint="see: fedmerge merge --help")
    from safetensors.torch import save

    from fedmerge.files import write_new
    from fedmerge.merge.statistics import packed
    from fedmerge.tensors import Checkpoint
    from fedmerge.training import load_trainer, require_statistics

    measuring = require_statistics(load_trainer(trainer, {"data": data, **key_values(option)}), kind, method)
    measuring.check()
    tensors = packed(measuring.statistics(model, kind), kind, Checkpoint(model).schema)
    contents = save(tensors)
    write_new(out, contents, if_exists="choose another --out")
    if json:
        print_json({"out": str(out), "kind": kind, "num_tensors": len(tensors), "file_bytes": len(contents)})
        return
    stderr.print(f"{kind} statistics of {len(tensors)} tensors, {format_bytes(len(contents))}")
    sys.stdout.write(f"{out}\n")
