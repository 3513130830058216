"""Streaming DiLoCo at a node (arXiv 2501.18512): where a round's training begins, and what the next one goes on from.

Nodes train all parameters all the time, and from round to round each goes on from its own: of the parameters that
travel in a round, a *fragment* (`fedmerge.aggregation.fragments`), it sends the difference to the published ones, and
once those moved takes `mixing * own + (1 - mixing) * published` for them. The other fragments stay as they are until it
is their turn.

With `overlap_steps` (tau) a node trains on while its fragment is under way: the first so many steps of its next round
start from its own model as it was when the fragment was sent, and what was published is mixed in after them. So sites
compute while the slowest of them sends, and a coordinator merges.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from fedmerge.aggregation.fragments import Fragments
from fedmerge.delta.task_vector import UpdatedModel, delta_schema, working_dtype
from fedmerge.errors import InputError, reporting_os_errors
from fedmerge.files import sync_directory, sync_tree
from fedmerge.models.versions import write_model
from fedmerge.node.outbox import STATEMENT, previous_folder, round_of, write_folder
from fedmerge.statements import RoundSpec
from fedmerge.tensors import Checkpoint, Computed, TensorMap
from fedmerge.training import STATE
from fedmerge.trust.sign import PublicKey

LOCAL: Final = "local"
START: Final = "start"
AHEAD: Final = "ahead"


@dataclass(frozen=True)
class Start:
    """Where a node's round begins: a model directory, the trainer's state, and the steps of it that are to be taken."""

    model_dir: Path
    state: Path | None
    part: range | None = None


def own_start(
    spec: RoundSpec,
    published: Checkpoint,
    base: Checkpoint,
    outbox: Path,
    own: PublicKey,
    *,
    train_on: Callable[[Path, int], Path],
) -> Start:
    """Return what a node goes on from: the `published` model, or `outbox / "start"`, and what its trainer kept.

    That is the node's own model of its last round, with what was published since mixed in. `outbox` is the folder of
    the round of `spec` among those of the others, `own` the key that signed what they hold. A node begins with the
    published model in its first round, and after a rollback of what it was in. Where rounds overlap, `train_on` is
    given the folder of the last round, and its number, and returns that with the steps since. Raises as
    `previous_folder` does.
    """
    signers = {own.key_id: own}
    state = previous_folder(outbox, STATE, spec, signers)
    fragments = Fragments.of(spec)
    local_dir = None if fragments is None else previous_folder(outbox, LOCAL, spec, signers)
    if fragments is None or local_dir is None:
        return Start(published.directory, state)
    last_round = round_of(local_dir.with_name(STATEMENT), spec, signers)
    since = range(last_round, spec.round)
    if not {update.round for update in spec.model.updates}.issuperset(since):
        return Start(published.directory, state)
    part = None
    if fragments.overlap_steps:
        previous_folder(outbox, AHEAD, spec, signers)
        ahead = train_on(local_dir.parent, last_round)
        local_dir, state = ahead / LOCAL, ahead / STATE if (ahead / STATE).exists() else None
        part = range(fragments.overlap_steps, spec.num_steps(own.key_id) or 0)
    names = fragments.names(published.schema)
    moved = {name for number in since for name in names[(number - 1) % fragments.num]}
    local = Checkpoint(local_dir)

    def compute(name: str) -> Tensor:
        theirs = published[name]
        if name not in local:
            return theirs
        mine = local[name]
        dtype = working_dtype(mine, theirs)
        share = fragments.mixing if name in moved else 1.0
        return (mine.to(dtype) * share + theirs.to(dtype) * (1 - share)).to(theirs.dtype)

    return Start(_write_start(Computed(published, compute), base, outbox), state, part)


def ahead_of(
    spec: RoundSpec,
    base: Checkpoint,
    outbox: Path,
    train: Callable[[Start, Path], Path],
    *,
    durable: bool,
) -> Path:
    """Return the folder `outbox / "ahead"`, with a node's model and trainer's state after the steps of overlap.

    They start from what `outbox` keeps of the round that was sent last. `train` is given the start and a folder to work
    in, and returns the tuned model's directory. What was made once is made no more; what was interrupted goes on.
    """
    made, working = outbox / AHEAD, outbox / f"{AHEAD}.part"
    if made.exists():
        return made
    fragments, local, state = Fragments.of(spec), Checkpoint(outbox / LOCAL), outbox / STATE
    if fragments is None:
        raise ValueError("the round sends no fragments")
    with reporting_os_errors(working):
        working.mkdir(mode=0o700, exist_ok=True)
    own = Computed(base, lambda name: (local[name] if name in local else base[name]).to(base[name].dtype))
    start = _write_start(own, base, working)
    tuned = train(Start(start, state if state.exists() else None, range(fragments.overlap_steps)), working)
    keep_own(spec, Checkpoint(tuned), base, working)
    with reporting_os_errors(working):
        shutil.rmtree(tuned)
        shutil.rmtree(start)
        if durable:
            sync_tree(working)
        working.rename(made)
        if durable:
            sync_directory(outbox)
    return made


def _write_start(tensors: TensorMap, base: Checkpoint, folder: Path) -> Path:
    start = folder / START
    with reporting_os_errors(start):
        shutil.rmtree(start, ignore_errors=True)
    write_model(tensors, base, start)
    return start


def keep_own(spec: RoundSpec, tuned: TensorMap, base: Checkpoint, outbox: Path) -> None:
    """Keep a node's `tuned` model in `outbox` for its next round, where the plan sends fragments.

    Raises `InputError` for an adapter, which can't be sent in parts, and `ResourceError`.
    """
    if not spec.streaming:
        return
    if isinstance(tuned, UpdatedModel):
        raise InputError("an adapter can't be sent in fragments", hint="train whole models, or change the plan")
    write_folder(outbox / LOCAL, Computed(delta_schema(base.schema), tuned.__getitem__), base.shards())
