"""Error feedback: what a lossy delta leaves unsent stays with its node, and is added to the next round's task vector.

SparseLoCo, arXiv 2508.15706, for top-k: a node sends `decay * residual + task vector`, and what of that the receiver
does not decode is its next residual. So an element that is never among the largest still arrives, some rounds later.
Residuals are debited when a delta is signed and never restored, whatever becomes of it: mass that is sent again when it
is stale does more harm than mass that is lost.

A residual is a folder of safetensors beside the statement of the delta that left it, and counts from the moment that
this statement exists. It is as confidential as the delta, and never leaves the node.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedmerge.node.outbox import previous_folder, write_folder
from fedmerge.statements import RoundSpec
from fedmerge.tensors import Checkpoint, Computed, TensorMap
from fedmerge.trust.sign import PublicKey

RESIDUAL = "residual"


def carry_over(task_vector: TensorMap, residual: TensorMap | None, decay: float) -> TensorMap:
    """Return what is to be sent, `decay * residual + task_vector`: fp32, each tensor computed when it is asked for.

    Without a residual that is the task vector.
    """

    def compute(name: str) -> Tensor:
        change = task_vector[name].to(torch.float32)
        return change if residual is None else residual[name] * decay + change

    return Computed(task_vector, compute)


def unsent(to_send: TensorMap, sent: TensorMap) -> TensorMap:
    """Return the residual `to_send - sent`: fp32, each tensor computed when it is asked for.

    `sent` is what the receiver decodes, of the names and shapes of `to_send`.
    """
    return Computed(to_send, lambda name: to_send[name].to(torch.float32) - sent[name])


def write_residual(outbox: Path, residual: TensorMap, shards: Mapping[str, list[str]]) -> None:
    """Write a residual into `outbox`, as `write_folder` does."""
    write_folder(outbox / RESIDUAL, residual, shards)


def previous_residual(outbox: Path, spec: RoundSpec, own: Mapping[str, PublicKey]) -> Checkpoint | None:
    """Return the residual that the round of `spec` continues, if any, and delete all others; see `previous_folder`.

    Raises `InputError` when the residual can't be read, and `ResourceError`.
    """
    folder = previous_folder(outbox, RESIDUAL, spec, own)
    return None if folder is None else Checkpoint(folder)
