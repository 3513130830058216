"""A round's training on disk: written now and then, taken up again when it was cut off, deleted when it is done."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch

from fedmerge.errors import ResourceError
from fedmerge.training import STATE, TrainTask
from fedmerge_client.train.adamw_state import Parameters, Place, load_state, save_state
from fedmerge_client.train.lora import LoraSettings

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

    def begin(
        self, place: Place, optimizer: torch.optim.Optimizer, parameters: Parameters, previous_state: Path | None
    ) -> Place:
        """Read what this round was interrupted at, or else what the last one left, into both; return the place.

        That is `place` where there is neither, and its step where a new round begins.
        """
        if self._path.exists():
            place = load_state(self._path, optimizer, parameters)
            log.info("training goes on after step %d, where it was interrupted", place.step)
        elif previous_state is not None and (previous_state / STATE_FILE).exists():
            place = replace(load_state(previous_state / STATE_FILE, optimizer, parameters), step=place.step)
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


def save_between_rounds(
    task: TrainTask, settings: LoraSettings, place: Place, optimizer: torch.optim.Optimizer, parameters: Parameters
) -> None:
    """Write what the node's next round goes on from: moments and place. An adapter that is new each round has none."""
    kept = {} if settings.lora_rank and not settings.lora_freeze_a else parameters
    save_state(task.workspace / STATE / STATE_FILE, replace(place, step=0), optimizer, kept, with_parameters=False)
