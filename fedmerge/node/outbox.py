"""What a node keeps from one round for its next: folders beside the statements of the deltas that it signed.

A node has one outbox per round. A folder that is kept in it counts from the moment that the round's statement exists:
one that was left half-written is made again together with the delta.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from fedmerge.errors import VerificationError, reporting_os_errors
from fedmerge.statements import DeltaStatement, RoundSpec
from fedmerge.tensors import TensorMap, write_weights
from fedmerge.trust.sign import PublicKey

STATEMENT = "statement.json"
# What is uploaded.
PAYLOAD = "delta.safetensors"


def forget_deltas(rounds: Path, before: int) -> None:
    """Delete the deltas of all rounds before the round `before`, but not what was signed for them.

    `rounds` is the folder of a node's outboxes, each named by its round first. Raises `ResourceError`.
    """
    with reporting_os_errors(rounds), os.scandir(rounds) as outboxes:
        for outbox in outboxes:
            number = outbox.name.partition("-")[0]
            if number.isdecimal() and int(number) < before:
                Path(outbox.path, PAYLOAD).unlink(missing_ok=True)


def previous_folder(outbox: Path, name: str, spec: RoundSpec, own: Mapping[str, PublicKey]) -> Path | None:
    """Return the folder called `name` of the newest earlier round of the same run, if there is one.

    `outbox` is the folder of the round of `spec` among those of the others, `own` the key that signed their statements.
    All other folders of that name are deleted. That includes one of this same round: it is of an attempt that the
    coordinator gave up, whose delta was never merged. Raises `ResourceError`.
    """
    newest_round, newest = 0, None
    with os.scandir(outbox.parent) as rounds:  # there may be thousands: `Path.glob` takes three times as long
        earlier = [each.path for each in rounds if each.name != outbox.name]
    folders = [Path(path, name) for path in earlier if os.access(f"{path}/{name}", os.F_OK)]
    for folder in folders:
        round_number = round_of(folder.with_name(STATEMENT), spec, own)
        if newest_round < round_number < spec.round:
            newest_round, newest = round_number, folder
    with reporting_os_errors(outbox.parent):
        for folder in folders:
            if folder != newest:
                shutil.rmtree(folder)
    return newest


def round_of(statement_file: Path, spec: RoundSpec, own: Mapping[str, PublicKey]) -> int:
    """Return the round of a signed delta, or 0 when there is none, or it is not this node's, or of another run."""
    try:
        statement, _ = DeltaStatement.open(statement_file.read_bytes(), own, where=str(statement_file))
    except (FileNotFoundError, VerificationError):
        return 0
    return statement.round if (statement.federation, statement.run) == (spec.federation, spec.run) else 0


def write_folder(directory: Path, tensors: TensorMap, shards: Mapping[str, list[str]]) -> None:
    """Write `tensors` to `directory`, split as the model's `shards` are, over what an interrupted attempt left there.

    Its owner alone can read it. Raises `ResourceError` when the disk does not take it.
    """
    names = set(tensors)
    with reporting_os_errors(directory):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(mode=0o700)
    own = {file: [name for name in held if name in names] for file, held in shards.items()}
    write_weights(tensors, directory, {file: held for file, held in own.items() if held})
