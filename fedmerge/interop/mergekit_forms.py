"""What the methods of mergekit's configurations are to us: the method and its parameters, as switches of ours.

Signs are elected by weighted sums there, DARE and DELLA restore the sum of magnitudes instead of dividing by the
density, and so on. Random masks come from fedmerge's own generator, so that methods which draw them agree in
distribution, not in bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Values: TypeAlias = Mapping[str, Any]
# What the base model is to a method: what task vectors start from, a node of its own, either, or absent.
Base: TypeAlias = Literal["origin", "node", "optional", "none"]


@dataclass(frozen=True)
class Form:
    """One method: ours, its parameters there with their defaults (None: required), and how they become ours.

    `steps` are a transform and a method that are the same together; `own` names the parameters that the transform takes
    and that models may have of their own.
    """

    method: str
    parameters: Values
    translate: Callable[[Values], dict[str, Any]]
    base: Base = "origin"
    weighted: bool = True
    more: Values = field(default_factory=dict)
    steps: tuple[str, str] | None = None
    own: frozenset[str] = frozenset()


def _same(values: Values) -> dict[str, Any]:
    return dict(values)


def _rescaled(values: Values) -> dict[str, Any]:
    if "rescale" not in values:
        return dict(values)
    return {**values, "rescale": "l1" if values["rescale"] else "none"}


def _breadcrumbs(values: Values) -> dict[str, Any]:
    return {("outliers" if name == "gamma" else name): value for name, value in values.items()}


def _nuslerp(values: Values) -> dict[str, Any]:
    if values["nuslerp_flatten"]:
        return {"axis": "tensor"}
    return {"axis": "column" if values["nuslerp_row_wise"] else "row"}


def _nothing(values: Values) -> dict[str, Any]:
    return {}


_SUM = {"lambda": 1.0, "normalize": False}
_THIN = {**_SUM, "density": 1.0}
_ELECT = {"election": "weighted"}
_DENSITY = frozenset({"density"})

FORMS: dict[str, Form] = {
    "linear": Form("fedavg", {"normalize": True}, _nothing, base="none"),
    "passthrough": Form("task_arithmetic", {"scale": 1.0}, _nothing, base="none", weighted=False),
    "slerp": Form("slerp", {"t": None}, _same, base="node", weighted=False, more={"space": "weights"}),
    "nuslerp": Form("nuslerp", {"nuslerp_flatten": True, "nuslerp_row_wise": False}, _nuslerp, base="optional"),
    "multislerp": Form("multislerp", {"normalize_weights": True}, _nothing, base="optional"),
    "karcher": Form(
        "karcher", {"max_iter": 10, "tol": 1e-5}, _same, base="none", weighted=False, more={"space": "weights"}
    ),
    "task_arithmetic": Form("task_arithmetic", _SUM, _same),
    "ties": Form("ties", {**_THIN, "normalize": True}, _same, more=_ELECT, steps=("trim", "elect"), own=_DENSITY),
    "dare_linear": Form(
        "dare_linear", {**_THIN, "rescale": True}, _rescaled, steps=("dare", "task_arithmetic"), own=_DENSITY
    ),
    "dare_ties": Form(
        "dare_ties", {**_THIN, "rescale": True}, _rescaled, more=_ELECT, steps=("dare", "elect"), own=_DENSITY
    ),
    "della": Form(
        "della",
        {**_THIN, "normalize": True, "epsilon": 0.15, "rescale": True},
        _rescaled,
        more=_ELECT,
        steps=("magprune", "elect"),
        own=_DENSITY | {"epsilon"},
    ),
    "della_linear": Form(
        "della_linear",
        {**_THIN, "epsilon": 0.15, "rescale": True},
        _rescaled,
        steps=("magprune", "task_arithmetic"),
        own=_DENSITY | {"epsilon"},
    ),
    "breadcrumbs": Form(
        "breadcrumbs",
        {**_THIN, "gamma": 0.01},
        _breadcrumbs,
        steps=("breadcrumbs_mask", "task_arithmetic"),
        own=_DENSITY | {"gamma"},
    ),
    "breadcrumbs_ties": Form(
        "breadcrumbs_ties",
        {**_THIN, "gamma": 0.01},
        _breadcrumbs,
        more=_ELECT,
        steps=("breadcrumbs_mask", "elect"),
        own=_DENSITY | {"gamma"},
    ),
    "model_stock": Form("model_stock", {"filter_wise": False}, _same, weighted=False, more={"clamp": False}),
    "sce": Form(
        "sce",
        {"select_topk": 1.0},
        lambda values: {"selected": values["select_topk"]},
        weighted=False,
        more={"guard": "absolute"},
    ),
}
