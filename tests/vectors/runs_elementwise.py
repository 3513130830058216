"""How to run the cases of the element-wise methods: DELLA, Breadcrumbs, MagMax, SCE, CABS, PCB, Consensus and EMR."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fedmerge.merge import METHODS
from fedmerge.merge.methods.consensus import Consensus, elect_and_merge
from fedmerge.merge.methods.della import keep_probabilities, sample

# (stack of deltas, weights, stack of recorded masks) -> merged task vector
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def method(name: str, **params: Any) -> Run:
    return lambda deltas, weights, masks: METHODS[name](deltas, weights, **params)


def thinned(deltas: Tensor, masks: Tensor, density: float, epsilon: float) -> Tensor:
    """Return `deltas` (K, *shape) sampled by the recorded masks and rescaled as mergekit does: (K, N)."""
    rows, shape = deltas.flatten(1), deltas.shape[1:]
    probabilities = (keep_probabilities(row, shape, density=density, epsilon=epsilon) for row in rows)
    return sample(rows, zip(masks.flatten(1).bool(), probabilities, strict=True), rescale="l1")


def della(density: float, epsilon: float) -> Run:
    def run(deltas: Tensor, weights: Tensor, masks: Tensor) -> Tensor:
        rows = thinned(deltas, masks, density, epsilon)
        merged = elect_and_merge(
            lambda block: rows[:, block], rows[0], weights.tolist(), Consensus(election="weighted")
        )
        return merged.view(deltas.shape[1:])

    return run


def della_linear(density: float, epsilon: float) -> Run:
    def run(deltas: Tensor, weights: Tensor, masks: Tensor) -> Tensor:
        rows = thinned(deltas, masks, density, epsilon)
        return METHODS["task_arithmetic"](rows, weights).view(deltas.shape[1:])

    return run


def first_two(run: Run) -> Run:
    return lambda deltas, weights, masks: run(deltas[:2], weights[:2], masks)


RUNS_ELEMENTWISE: dict[str, Run] = {
    "mergekit_della_d50_e15": della(0.5, 0.15),
    "mergekit_della_linear_d40_e10": della_linear(0.4, 0.1),
    "mergekit_breadcrumbs_d85_g01": method("breadcrumbs", density=0.85, outliers=0.01),
    "mergekit_breadcrumbs_gamma_clipped": method("breadcrumbs", density=0.95, outliers=0.1),
    "mergekit_breadcrumbs_ties_d85_g05": method(
        "breadcrumbs_ties", density=0.85, outliers=0.05, election="weighted", normalize=False
    ),
    "mergekit_sce_k30": method("sce", selected=0.3, guard="absolute"),
    "magmax_authors": method("magmax", lambda_=1.0),
    "pcb_authors_r10": method("pcb", ratio=0.1),
    "pcb_authors_r20": method("pcb", ratio=0.2),
    "cabs_authors_8_32_two": first_two(method("cabs", num_kept=8, block_length=32, tail="drop")),
    "emr_authors_flat": method("emr"),
    "consensus_authors_l02_k1": method("consensus", threshold=0.2, min_nodes=1),
    "consensus_authors_l04_k1": method("consensus", threshold=0.4, min_nodes=1),
}

# The PCB authors rank over the whole model.
WHOLE_MODEL_ELEMENTWISE = {"pcb_authors_r10", "pcb_authors_r20"}
