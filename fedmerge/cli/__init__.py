"""The command line: `fedmerge COMMAND`."""

from fedmerge.cli.app import main

__all__ = ["main"]
