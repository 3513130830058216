"""What the processes of `fault_federation` are forked from: everything imported, and every compiled loop loaded."""

# ruff: noqa: F401

import tempfile
from pathlib import Path

import fault_disk
import fault_processes
from fault_federation import simulated_version

import fedmerge.cli.join
import fedmerge.cli.serve
import fedmerge_client.link
import fedmerge_server.run

with tempfile.TemporaryDirectory() as scratch:
    simulated_version(Path(scratch))
