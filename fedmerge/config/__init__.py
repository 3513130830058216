"""fedmerge.toml: what may stand in it, and reading it with errors that say file, line, key and what to do."""

from fedmerge.config.load import json_schema, load_config, parse_config
from fedmerge.config.sections import Config, OpenSection, Search, Section, SimulatedNode
from fedmerge.config.values import parse_address, parse_size

__all__ = [
    "Config",
    "OpenSection",
    "Search",
    "Section",
    "SimulatedNode",
    "json_schema",
    "load_config",
    "parse_address",
    "parse_config",
    "parse_size",
]
