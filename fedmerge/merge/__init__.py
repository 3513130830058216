"""Step 10, merge: methods as pure functions of one parameter's stack, and the engine that streams a model through one.

METHODS[name](deltas, weights, *, base=None, seed=0, **params) -> Tensor
merge_deltas(deltas, weights, Recipe(name, params)) -> (name, Tensor), one parameter at a time
merge_models(deltas, weights, Recipe(name, params), base, write) -> name, one parameter at a time, written
merge_deltas(deltas, weights, Recipe.from_steps([("dare", {...}), ("elect", {...})])): a chain of steps
emr_site(delta, unified).recover(name, unified[name]) -> Tensor, a site's own model out of METHODS["emr"]
"""

from fedmerge.merge.engine import Write, merge_deltas, merge_models
from fedmerge.merge.flight import Workers
from fedmerge.merge.methods import METHODS, MergeMethod
from fedmerge.merge.methods.masks import EmrSite, emr_site, tall_mask
from fedmerge.merge.parameters import Parameter
from fedmerge.merge.recipe import Plan, Recipe, Step, parameters

__all__ = [
    "METHODS",
    "EmrSite",
    "MergeMethod",
    "Parameter",
    "Plan",
    "Recipe",
    "Step",
    "Workers",
    "Write",
    "emr_site",
    "merge_deltas",
    "merge_models",
    "parameters",
    "tall_mask",
]
