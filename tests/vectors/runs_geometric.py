"""How to run the recorded cases of the geometric and spectral methods."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedmerge.merge import METHODS

# (stack of deltas, weights, base) -> merged task vector
RunOnBase = Callable[[Tensor, Tensor, Tensor], Tensor]


def method(name: str, **params: Any) -> RunOnBase:
    return lambda deltas, weights, base: METHODS[name](deltas, weights, base=base, **params)


def of_two(name: str, **params: Any) -> RunOnBase:
    """Merge the first two fine-tunes."""
    return lambda deltas, weights, base: METHODS[name](deltas[:2], weights, base=base, **params)


def from_the_base(name: str, **params: Any) -> RunOnBase:
    """Merge the base, as a node that changed nothing, with the first fine-tune."""

    def run(deltas: Tensor, weights: Tensor, base: Tensor) -> Tensor:
        pair = torch.stack([torch.zeros_like(base), deltas[0]])
        return METHODS[name](pair, torch.ones(2), base=base, **params)

    return run


RUNS_GEOMETRIC: dict[str, RunOnBase] = {
    "mergekit_slerp_t30": from_the_base("slerp", t=0.3, space="weights"),
    "mergekit_nuslerp": of_two("nuslerp", space="weights"),
    "mergekit_nuslerp_rowwise": of_two("nuslerp", axis="column"),
    "mergekit_multislerp_base": method("multislerp"),
    "mergekit_karcher_4": method("karcher", space="weights"),
    "mergekit_karcher_on_deltas": method("karcher"),
    "mergekit_model_stock_4": method("model_stock", clamp=False),
    "mergekit_model_stock_filterwise": method("model_stock", clamp=False, filter_wise=True),
    "tsvm_authors": method("tsv"),
    "tsvm_authors_fp64": method("tsv"),
    "iso_c_authors": method("iso_c"),
    "iso_cts_authors_f80": method("iso_cts", common_space_fraction=0.8),
    "iso_cts_authors_f80_fp64": method("iso_cts", common_space_fraction=0.8),
    "subspace_boosting_ta_b00": method("subspace_boosting", beta=0.0),
    "subspace_boosting_ta_b50": method("subspace_boosting", beta=0.5),
    "subspace_boosting_ta_b01_fp64": method("subspace_boosting", beta=0.01),
}
