"""Rounds on one machine: the same coordinator and node code as deployed, in one process or in several."""

from fedmerge.sim.inline import node_home, prepare_nodes, simulate
from fedmerge.sim.processes import simulate_processes
from fedmerge.sim.results import FederationResult, NodeResult, result_of

__all__ = [
    "FederationResult",
    "NodeResult",
    "node_home",
    "prepare_nodes",
    "result_of",
    "simulate",
    "simulate_processes",
]
