"""Have the partner's own program train: it is started with a few environment variables, and leaves a checkpoint."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from fedmerge.errors import ConfigError, InputError, reporting_os_errors
from fedmerge.training import TrainResult, TrainTask, validated
from fedmerge_client.train.outcome import find_model, read_figures

Value: TypeAlias = bool | int | float | str
FIGURES = "fedmerge.json"
NUM_EXAMPLES = "num_examples"
LOG_TAIL_CHARACTERS = 600


class Settings(BaseModel):
    """What a plan may ask for under `[train]`: whatever the programs agreed on, passed on as it is."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Command(BaseModel):
    """The `command` trainer; its fields are a node's own options.

    `command` is split as a shell would and started without one. It finds in its environment FEDMERGE_MODEL, the
    directory of the model to tune, which it must leave as it is; FEDMERGE_OUTPUT, an empty directory in which it leaves
    the tuned model, a LoRA adapter, or a Trainer's `checkpoint-N`; FEDMERGE_PLAN, a JSON file with `settings` (the
    plan's `[train]`), `round`, `num_rounds` and `seed`. FEDMERGE_OUTPUT/fedmerge.json may hold an object of numbers,
    `num_examples` among them; otherwise the option `num_examples` counts. `evaluate_command`, if given, finds
    FEDMERGE_MODEL and prints an object of numbers as its last line. Either is ended after `timeout_s` seconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: Annotated[str, Field(min_length=1)]
    evaluate_command: str | None = None
    num_examples: Annotated[int, Field(ge=1)] | None = None
    timeout_s: Annotated[FiniteFloat, Field(gt=0)] = 7 * 86400.0
    folder: Path | None = None

    def check(self) -> None:
        """Raise `ConfigError` unless the commands can be split into words and `folder` is there."""
        for command in (self.command, self.evaluate_command):
            if command is not None:
                _words(command)
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(f"trainer command: {self.folder}: no such directory")

    def train(self, task: TrainTask) -> TrainResult:
        """Run `command`, and return what it left.

        Raises `InputError` when it fails, takes too long, or leaves no model or no number of examples.
        """
        task.require_whole("command")
        output, plan, tuned = (task.workspace / name for name in ("output", "plan.json", "tuned"))
        settings = validated(Settings, task.settings, where="[train]").model_dump()
        with reporting_os_errors(task.workspace):
            for left in (output, tuned):
                shutil.rmtree(left, ignore_errors=True)
            output.mkdir()
            plan.write_text(
                json.dumps(
                    {"settings": settings, "round": task.round, "num_rounds": task.num_rounds, "seed": task.seed}
                )
            )
        self._run(
            self.command,
            {"FEDMERGE_MODEL": task.model_dir, "FEDMERGE_OUTPUT": output, "FEDMERGE_PLAN": plan},
            log=task.workspace / "command.log",
        )
        figures_file = output / FIGURES
        figures = read_figures(figures_file.read_text(), where=str(figures_file)) if figures_file.is_file() else {}
        num_examples = figures.pop(NUM_EXAMPLES, self.num_examples)
        if num_examples is None or num_examples < 1:
            raise InputError(
                f"trainer command: nothing says how many examples {self.command!r} trained on",
                hint=f"write {NUM_EXAMPLES} into $FEDMERGE_OUTPUT/{FIGURES}, or give the option {NUM_EXAMPLES}",
            )
        found = find_model(output, where="trainer command")
        with reporting_os_errors(tuned):
            found.rename(tuned)
            shutil.rmtree(output, ignore_errors=True)
        return TrainResult(tuned, int(num_examples), figures)

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        """Return what `evaluate_command` prints as its last line; nothing without one. Raises `InputError`."""
        if self.evaluate_command is None:
            return {}
        printed = self._run(self.evaluate_command, {"FEDMERGE_MODEL": model_dir}).strip()
        return read_figures(printed.rpartition("\n")[2], where=f"the last line of {self.evaluate_command!r}")

    def _run(self, command: str, variables: dict[str, Path], log: Path | None = None) -> str:
        """Run a command to its end and return what it printed; its output is also kept in `log`."""
        environment = {**os.environ, **{name: str(path.resolve()) for name, path in variables.items()}}
        try:
            done = subprocess.run(
                _words(command),
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout_s,
                check=False,
            )
        except OSError as err:
            raise InputError(f"trainer command: {command!r} can't be started ({err.strerror})") from err
        except subprocess.TimeoutExpired as err:
            raise InputError(
                f"trainer command: {command!r} was ended after {self.timeout_s:g} s", hint="raise timeout_s"
            ) from err
        if log is not None:
            log.write_text(done.stdout + done.stderr)
        if done.returncode:
            told = (done.stderr.strip() or done.stdout.strip())[-LOG_TAIL_CHARACTERS:]
            raise InputError(f"trainer command: {command!r} ended with exit code {done.returncode}: {told}")
        return done.stdout


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as err:
        raise ConfigError(f"trainer command: {command!r} can't be split into words ({err})") from err
    if not words:
        raise ConfigError("trainer command: the command is empty")
    return words
