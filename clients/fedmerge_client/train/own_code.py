"""A partner's own Python: imported by the name that the node's own options give, and run with seeded generators.

Names come from the node's command line or file, never from a plan: what a coordinator sends must not choose what runs.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmerge.errors import ConfigError


def import_attribute(name: str, folder: Path | None, *, where: str) -> Any:
    """Return what "package.module:attribute" names; `folder` is where its package lies when it is not installed.

    `where` says in errors what it is for. Raises `ConfigError` when it can't be imported.
    """
    module, _, attribute = name.partition(":")
    if folder is not None and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as err:
        raise ConfigError(
            f"{where} {name!r} can't be imported ({err})",
            hint='write "package.module:attribute", and name the folder of its package as `folder`',
        ) from err


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch meanwhile: own code, PEFT and dropout take no other."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed % 2**63)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
