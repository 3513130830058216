"""Align models that were trained apart: permute one's hidden units to be the other's, which changes no output.

groups_of(schema, config) -> [Group(name, num_units, axes)], what of an architecture may be permuted together
weight_matching(target, model, groups) -> {group: permutation}
permuted(model, groups, permutations) -> TensorMap
repair(model, goals, stages, measure) -> {name: tensor}, what has the hidden units of a merged model vary again
"""

from fedmerge.rebasin.groups import Axis, Group, groups_of, mlp_groups, read_config
from fedmerge.rebasin.match import permuted, weight_matching
from fedmerge.rebasin.repair import Moments, goal_moments, repair, repaired_layers

__all__ = [
    "Axis",
    "Group",
    "Moments",
    "goal_moments",
    "groups_of",
    "mlp_groups",
    "permuted",
    "read_config",
    "repair",
    "repaired_layers",
    "weight_matching",
]
