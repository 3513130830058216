"""Rounds on one machine: the same coordinator and node code as deployed, in one process or in several."""

from fedmerge.sim.inline import SimulationResult, node_home, prepare_nodes, simulate

__all__ = ["SimulationResult", "node_home", "prepare_nodes", "simulate"]
