"""A round's training on disk: written now and then, taken up again when it was cut off, deleted when it is done."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

import torch

from fedmerge.errors import ResourceError
from fedmerge_client.train.adamw_state import Parameters, Place, load_state, save_state

log = logging.getLogger(__name__)

FOLDER = "checkpoint"
STATE_FILE = "adamw.safetensors"
# A process that is killed loses this much at most; to write costs seconds, for models of billions of parameters.
INTERVAL_S = 300.0


class Checkpoints:
    """The checkpoints of one round in its `workspace`: every `every_steps`, or every five minutes when that is 0.

    They hold the parameters that are trained, AdamW's moments and the place, so that going on from one leads to the
    bits that an undisturbed round would have ended with, whenever it was written.
    """

    def __init__(self, workspace: Path, every_steps: int) -> None:
        self._path = workspace / FOLDER / STATE_FILE
        self._every_steps = every_steps
        self._written_s = time.monotonic()

    def resume(self, optimizer: torch.optim.Optimizer, parameters: Parameters) -> Place | None:
        """Read the checkpoint of a round that was interrupted into both, and return its place; None without one."""
        if not self._path.exists():
            return None
        place = load_state(self._path, optimizer, parameters)
        log.info("training goes on after step %d, where it was interrupted", place.step)
        return place

    def keep(self, place: Place, optimizer: torch.optim.Optimizer, parameters: Parameters) -> None:
        """Write a checkpoint in place of the one before, if one is due. Training goes on where that fails."""
        now_s = time.monotonic()
        due = place.step % self._every_steps == 0 if self._every_steps else now_s >= self._written_s + INTERVAL_S
        if not due:
            return
        try:
            save_state(self._path, place, optimizer, parameters, with_parameters=True)
        except ResourceError as err:
            log.warning("no checkpoint after step %d: %s", place.step, err.message)
        self._written_s = time.monotonic()

    def drop(self) -> None:
        """Delete the checkpoint: what was trained is on disk."""
        shutil.rmtree(self._path.parent, ignore_errors=True)
