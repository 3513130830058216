"""fedmerge.toml: what may stand in it, and reading it with errors that say file, line, key and what to do."""

from fedmerge.config.config import Config
from fedmerge.config.load import json_schema, load_config, parse_config
from fedmerge.config.merging import Search
from fedmerge.config.section import OpenSection, Section
from fedmerge.config.simulate import Simulate, SimulatedNode
from fedmerge.config.values import parse_address, parse_size

__all__ = [
    "Config",
    "OpenSection",
    "Search",
    "Section",
    "Simulate",
    "SimulatedNode",
    "json_schema",
    "load_config",
    "parse_address",
    "parse_config",
    "parse_size",
]
