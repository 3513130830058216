"""Contribute a fine-tune that exists already: nothing is trained, the round gets what a directory holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fedmerge.errors import InputError
from fedmerge.training import TrainResult, TrainTask
from fedmerge_client.train.outcome import link_directory, require_model


class Settings(BaseModel):
    """What a plan may ask for under `[train]`: nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ExistingCheckpoint(BaseModel):
    """The `checkpoint` trainer; its fields are a node's own options.

    `model` is a fine-tune of the federation's base model, or a LoRA adapter of it, and `num_examples` what it was tuned
    on. It takes part in the first round alone: what was subtracted once would be added again in the next.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    num_examples: Annotated[int, Field(ge=1)]

    def check(self) -> None:
        """Raise `InputError` unless `model` is a directory with weights."""
        require_model(self.model, where="trainer checkpoint")

    def train(self, task: TrainTask) -> TrainResult:
        """Return `model`, linked into the workspace. Raises `InputError` in any round but the first."""
        task.require_whole("checkpoint")
        if task.round != 1:
            raise InputError(
                f"trainer checkpoint: {self.model} took part in round 1, and this is round {task.round}",
                hint="a finished fine-tune is merged once: set rounds.num_rounds = 1, or train in every round",
            )
        return TrainResult(link_directory(self.model, task.workspace / "tuned"), self.num_examples)

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        """Return nothing: there is no data to score a model on."""
        return {}
