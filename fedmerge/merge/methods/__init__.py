"""The merge methods by name, as plain data: to add one, write a function and list it here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, TypeAlias

from torch import Tensor

from fedmerge.merge.gram import MakeAngles
from fedmerge.merge.methods.average import (
    contributor_mean,
    fedavg,
    fedavg_coefficients,
    task_arithmetic,
    task_arithmetic_coefficients,
)
from fedmerge.merge.methods.breadcrumbs import breadcrumbs, breadcrumbs_ties
from fedmerge.merge.methods.dare import dare_linear, dare_ties
from fedmerge.merge.methods.della import della, della_linear
from fedmerge.merge.methods.factors import by_factors
from fedmerge.merge.methods.fisher import fisher
from fedmerge.merge.methods.geometric import geometric_median, geometric_median_angles, model_stock, model_stock_angles
from fedmerge.merge.methods.knots import knots
from fedmerge.merge.methods.masks import consensus, emr
from fedmerge.merge.methods.pcb import pcb
from fedmerge.merge.methods.regmean import regmean
from fedmerge.merge.methods.robust import mean_around_median, median, trimmed_mean
from fedmerge.merge.methods.selection import cabs, magmax, sce
from fedmerge.merge.methods.spectral import iso_c, iso_cts, subspace_boosting, tsv
from fedmerge.merge.methods.spherical import (
    karcher,
    karcher_angles,
    mean_direction,
    multislerp,
    nuslerp,
    nuslerp_angles,
    rda,
    slerp,
    slerp_angles,
)
from fedmerge.merge.methods.ties import elect, ties
from fedmerge.merge.methods.trajectory import (
    ema,
    ema_coefficients,
    lawa,
    lawa_coefficients,
    swa,
    swa_coefficients,
    wise_ft,
    wise_ft_coefficients,
)

# METHODS[name](deltas, weights, *, base=None, seed=0, **params): a pure function of one parameter's task vectors
# (K, *shape) and their weights (K,) that returns the merged one (*shape,) in fp32, or fp64 if the deltas are fp64.
MergeMethod: TypeAlias = Callable[Concatenate[Tensor, Tensor, ...], Tensor]

METHODS: dict[str, MergeMethod] = {
    "fedavg": fedavg,
    "linear": fedavg,
    "contributor_mean": contributor_mean,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "elect": elect,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "della": della,
    "della_linear": della_linear,
    "breadcrumbs": breadcrumbs,
    "breadcrumbs_ties": breadcrumbs_ties,
    "magmax": magmax,
    "sce": sce,
    "cabs": cabs,
    "pcb": pcb,
    "consensus": consensus,
    "emr": emr,
    "median": median,
    "mean_around_median": mean_around_median,
    "trimmed_mean": trimmed_mean,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "rda": rda,
    "karcher": karcher,
    "model_stock": model_stock,
    "geometric_median": geometric_median,
    "tsv": tsv,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "subspace_boosting": subspace_boosting,
    "ema": ema,
    "lawa": lawa,
    "swa": swa,
    "wise_ft": wise_ft,
    "knots": knots,
    "factor_average": by_factors,
    "fisher": fisher,
    "regmean": regmean,
}

# Methods that look at the base: the engine reads it for these only, since base tensors may have to be computed.
NEEDS_BASE: frozenset[str] = frozenset({"slerp", "nuslerp", "multislerp", "karcher"})

# Methods that weigh by statistics of the nodes' data, with the kind (of `fedmerge.merge.statistics`) that they take as
# a further argument, `statistics`: (K, *shape) for "fisher", (K, in, in) for "gram".
NEEDS_STATISTICS: dict[str, str] = {"fisher": "fisher", "regmean": "gram"}

# Methods that take the factors of LoRA adapters, where every task vector has some, as a further argument `factors`.
NEEDS_FACTORS: frozenset[str] = frozenset({"factor_average"})

# Methods that decompose matrices, or weigh by their Gram matrices, or take factors: a model flattened into one vector
# has none.
BY_SHAPE: frozenset[str] = frozenset(
    {"tsv", "iso_c", "iso_cts", "subspace_boosting", "knots", "regmean", "factor_average"}
)

# Methods that merge two task vectors (or one) and refuse more.
PAIRWISE: frozenset[str] = frozenset({"slerp", "nuslerp"})

# Methods that are sum_i c_i * delta_i, with the function from weights to c_i: the engine folds these delta by delta.
LINEAR: dict[str, Callable[Concatenate[list[float], ...], list[float]]] = {
    "fedavg": fedavg_coefficients,
    "linear": fedavg_coefficients,
    "task_arithmetic": task_arithmetic_coefficients,
    "ema": ema_coefficients,
    "lawa": lawa_coefficients,
    "swa": swa_coefficients,
    "wise_ft": wise_ft_coefficients,
}

# Methods that are such sums with coefficients that follow from inner products, with the function from weights and
# parameters to the rule.
BY_ANGLES: dict[str, MakeAngles] = {
    "slerp": slerp_angles,
    "nuslerp": nuslerp_angles,
    "multislerp": mean_direction,
    "rda": mean_direction,
    "karcher": karcher_angles,
    "model_stock": model_stock_angles,
    "geometric_median": geometric_median_angles,
}

# Methods that take the checkpoints of one run, in order of time, and not the fine-tunes of several nodes.
IN_TIME: frozenset[str] = frozenset({"ema", "lawa", "swa"})
