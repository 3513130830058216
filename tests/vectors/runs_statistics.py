"""How to run the recorded cases of the methods that take statistics."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedmerge.merge import METHODS

# (stacks of four deltas by name, what the file holds) -> merged task vectors by name
RunOnStatistics = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]


def of_the_nodes(kind: str, name: str, recorded: Mapping[str, Tensor]) -> Tensor | None:
    keys = [f"{kind}.{name}.ft{node}" for node in range(4)]
    return torch.stack([recorded[key] for key in keys]) if keys[0] in recorded else None


def regmean(off_diagonal: float) -> RunOnStatistics:
    def run(deltas: Mapping[str, Tensor], recorded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: METHODS["regmean"](
                stack, torch.ones(4), statistics=of_the_nodes("gram", name, recorded), off_diagonal=off_diagonal
            )
            for name, stack in deltas.items()
        }

    return run


def fisher_of_the_whole_model(**params: Any) -> RunOnStatistics:
    """Merge all tensors as one, since the norms are those of the whole model."""

    def run(deltas: Mapping[str, Tensor], recorded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {name: of_the_nodes("fisher", name, recorded) for name in deltas}
        flat = torch.cat([stack.flatten(1) for stack in deltas.values()], dim=1)
        statistics = torch.cat([stack.flatten(1) for stack in found.values() if stack is not None], dim=1)
        merged = METHODS["fisher"](flat, torch.ones(4), statistics=statistics, **params)
        parts = merged.split([stack[0].numel() for stack in deltas.values()])
        return {name: part.view(deltas[name].shape[1:]) for name, part in zip(deltas, parts, strict=True)}

    return run


RUNS_STATISTICS: dict[str, RunOnStatistics] = {
    "fisher_fusionbench_norm": fisher_of_the_whole_model(normalize=True, floor="absolute", epsilon=1e-6),
    "regmean_fusionbench_a100_fp32": regmean(1.0),
    "regmean_fusionbench_a010_fp32": regmean(0.1),
    "regmean_fusionbench_a090_fp64": regmean(0.9),
}
