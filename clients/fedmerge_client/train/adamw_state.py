"""AdamW's state between rounds and across interruptions: a safetensors file, and the place in the data with it.

DiLoCo (arXiv 2311.08105) keeps the inner optimizer's state at each node: moments are neither averaged nor reset.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedmerge.errors import InputError
from fedmerge.tensors import reporting_save_errors

FORMAT = "fedmerge-adamw-1"
KEYS = ("step", "exp_avg", "exp_avg_sq")
PARAMETER = "parameter"
SEPARATOR = ":"

Parameters = Mapping[str, torch.nn.Parameter]


@dataclass(frozen=True)
class Place:
    """Where training stands: `step` in the round, `num_taken` windows since the run began, and the seed of their order.

    `step` is 0 between rounds.
    """

    step: int
    num_taken: int
    order_seed: int


def save_state(
    path: Path, place: Place, optimizer: torch.optim.Optimizer, parameters: Parameters, *, with_parameters: bool
) -> None:
    """Write the optimizer's state by parameter name to `path`, with the parameters themselves if asked, at once.

    Whatever was at `path` is replaced when all is written. Raises `ResourceError`.
    """
    tensors = {
        f"{key}{SEPARATOR}{name}": optimizer.state[parameter][key]
        for name, parameter in parameters.items()
        if parameter in optimizer.state
        for key in KEYS
    }
    if with_parameters:
        tensors |= {f"{PARAMETER}{SEPARATOR}{name}": parameter.detach() for name, parameter in parameters.items()}
    partial = path.with_suffix(".partial")
    with reporting_save_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            partial,
            metadata={"format": FORMAT, "place": json.dumps(asdict(place))},
        )
        partial.replace(path)


def load_state(path: Path, optimizer: torch.optim.Optimizer, parameters: Parameters) -> Place:
    """Read `save_state`'s file into the optimizer, and into the parameters if they are in it; return the place.

    A parameter of which the file has nothing of the right shape begins anew. Raises `InputError` when the file can't be
    read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError("not an AdamW state of this version")
            place = Place(**json.loads(metadata["place"]))
            names = set(file.keys())
            for name, parameter in parameters.items():
                found: dict[str, Tensor] = {
                    key: file.get_tensor(f"{key}{SEPARATOR}{name}")
                    for key in KEYS
                    if f"{key}{SEPARATOR}{name}" in names
                }
                if len(found) == len(KEYS) and all(found[key].shape == parameter.shape for key in KEYS[1:]):
                    optimizer.state[parameter] = _on_device(found, parameter)
                if f"{PARAMETER}{SEPARATOR}{name}" in names:
                    with torch.no_grad():
                        parameter.copy_(file.get_tensor(f"{PARAMETER}{SEPARATOR}{name}"))
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as err:
        raise InputError(
            f"{path}: can't be read ({err})", hint="delete it: the optimizer's state and the data's order begin anew"
        ) from err
    return place


def _on_device(state: dict[str, Tensor], parameter: torch.nn.Parameter) -> dict[str, Any]:
    # torch keeps the step count where it is, and the moments with their parameter.
    return {key: tensor if key == "step" else tensor.to(parameter.device) for key, tensor in state.items()}
