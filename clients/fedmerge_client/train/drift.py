"""Holding nodes together while they train: FedProx's pull to the global model, and SCAFFOLD's control variates.

Both change gradients between the backward pass and the optimizer's step.

FedProx (arXiv 1812.06127) adds mu / 2 * |w - global|^2 to the loss. SCAFFOLD (arXiv 1910.06378) adds c - c_i, the mean
of what all nodes' gradients were less what this node's were, so that a step goes where all data want it. A node's c_i
is its own and kept from round to round (option II of the paper): c_i <- c_i - c + (global - tuned) / sum of learning
rates. The mean c of all c_i would have to travel, but is what the global model moved by, over the same sum, when it
moves by the mean of the nodes' steps: so no more is sent than without it. A node that was away for some rounds takes
their mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationInfo, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedmerge.errors import ConfigError, InputError
from fedmerge.tensors import reporting_save_errors

FORMAT = "fedmerge-scaffold-1"
STATE_FILE = "scaffold.safetensors"
OWN, GLOBAL = "control:", "global:"

Parameters = Mapping[str, torch.nn.Parameter]


class DriftSettings(BaseModel):
    """What a plan may ask for under `[train]` against drift.

    `fedprox_mu` is the weight of FedProx's term, 0 for none; `scaffold` corrects the steps of an `optimizer` that is
    plain SGD, without decay, by control variates.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    optimizer: Literal["adamw", "sgd"] = "adamw"
    fedprox_mu: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    scaffold: bool = False

    @field_validator("scaffold")
    @classmethod
    def _is_of_sgd(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("optimizer") != "sgd":
            raise ValueError('goes with optimizer = "sgd" alone: control variates are of plain gradients')
        return value


class Proximal:
    """FedProx's term, made when the parameters are the global model's."""

    def __init__(self, parameters: Parameters, mu: float) -> None:
        self._mu = mu
        self._parameters = parameters
        self._anchors = {name: p.detach().clone() for name, p in parameters.items()} if mu else {}

    def correct(self) -> None:
        """Add the term's gradient to those of the parameters."""
        with torch.no_grad():
            for name, anchor in self._anchors.items():
                parameter = self._parameters[name]
                pull = (parameter - anchor) * self._mu
                parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)


class Scaffold:
    """SCAFFOLD's correction of a round of plain SGD, made when the parameters are the global model's.

    `previous` is the folder that `save` wrote to in this node's last round, None in its first, when all c are zero.
    Raises `InputError` when what is there can't be read.
    """

    def __init__(self, parameters: Parameters, round_number: int, previous: Path | None) -> None:
        self._parameters = parameters
        self._round = round_number
        self._start = {name: p.detach().clone() for name, p in parameters.items()}
        self._own = {name: torch.zeros_like(tensor) for name, tensor in self._start.items()}
        self._all = dict(self._own)
        self._sum_of_lrs = 0.0
        if previous is not None and (previous / STATE_FILE).exists():
            self._read(previous / STATE_FILE)

    def correct(self, lr: float) -> None:
        """Add c - c_i to the gradients of a step that is taken at `lr`."""
        self._sum_of_lrs += lr
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                shift = self._all[name] - self._own[name]
                parameter.grad = shift if parameter.grad is None else parameter.grad.add_(shift)

    def skip(self, lr: float) -> None:
        """Count a step that was taken before the round was interrupted."""
        self._sum_of_lrs += lr

    def save(self, folder: Path) -> None:
        """Write what the next round needs into `folder`: c_i, and the global model it came from."""
        tensors: dict[str, Tensor] = {}
        for name, start in self._start.items():
            moved = (start - self._parameters[name].detach()) / self._sum_of_lrs
            tensors[OWN + name] = (self._own[name] - self._all[name] + moved).cpu().contiguous()
            tensors[GLOBAL + name] = start.cpu().contiguous()
        place = {"round": self._round, "sum_of_lrs": self._sum_of_lrs}
        with reporting_save_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / STATE_FILE, metadata={"format": FORMAT, "place": json.dumps(place)})

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError("not control variates of this version")
                place = json.loads(metadata["place"])
                scale = 1 / (place["sum_of_lrs"] * max(1, self._round - place["round"]))
                for name, start in self._start.items():
                    own, before = (file.get_tensor(kind + name).to(start.device) for kind in (OWN, GLOBAL))
                    self._own[name], self._all[name] = own.view_as(start), (before.view_as(start) - start) * scale
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as err:
            raise InputError(f"{path}: can't be read ({err})", hint="delete it: control variates begin anew") from err


def require_whole_models(lora_rank: int, **settings: object) -> None:
    """Raise `ConfigError` where a correction of whole models is asked for together with adapters."""
    asked = [name for name, value in settings.items() if value]
    if lora_rank and asked:
        raise ConfigError(
            f"[train]: {asked[0]} does not go with lora_rank: adapters begin anew in every round", hint="leave one out"
        )
