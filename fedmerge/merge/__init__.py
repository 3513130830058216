"""Step 10, merge: methods as pure functions of one parameter's stack, and the engine that streams a model through one.

METHODS[name](deltas, weights, *, base=None, seed=0, **params) -> Tensor
merge_deltas(deltas, weights, Recipe(name, params)) -> (name, Tensor), one parameter at a time
"""

from fedmerge.merge.engine import merge_deltas
from fedmerge.merge.methods import METHODS, MergeMethod
from fedmerge.merge.parameters import Parameter
from fedmerge.merge.recipe import Recipe, parameters

__all__ = ["METHODS", "MergeMethod", "Parameter", "Recipe", "merge_deltas", "parameters"]
