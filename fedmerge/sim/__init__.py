"""Rounds on one machine: the same coordinator and node code as deployed, in one process or in several."""

from fedmerge.sim.engines import ENGINES, Inline, Pool, local_processes, open_engine
from fedmerge.sim.inline import prepare_nodes
from fedmerge.sim.processes import simulate_processes
from fedmerge.sim.results import FederationResult, NodeResult, result_of
from fedmerge.sim.run import load_trainers, simulate
from fedmerge.sim.sites import LocalLink, Site, make_site, node_home
from fedmerge.sim.sweep import SweepResult, outcome_of, sweep
from fedmerge.sim.tracking import to_tensorboard, tracking
from fedmerge.sim.trainers import Engine
from fedmerge.sim.virtual import with_virtual_nodes
from fedmerge.sim.world import World

__all__ = [
    "ENGINES",
    "Engine",
    "FederationResult",
    "Inline",
    "LocalLink",
    "NodeResult",
    "Pool",
    "Site",
    "SweepResult",
    "World",
    "load_trainers",
    "local_processes",
    "make_site",
    "node_home",
    "open_engine",
    "outcome_of",
    "prepare_nodes",
    "result_of",
    "simulate",
    "simulate_processes",
    "sweep",
    "to_tensorboard",
    "tracking",
    "with_virtual_nodes",
]
