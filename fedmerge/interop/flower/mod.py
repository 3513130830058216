"""A mod for Flower's ClientApp: the reply carries a task vector in fedmerge's codec instead of a whole model."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from fedmerge.delta.frame import DeltaFile, write_delta
from fedmerge.delta.task_vector import subtract
from fedmerge.errors import InvalidDelta
from fedmerge.interop.flower.arrays import Plan, pack_delta, to_record, to_tensors
from fedmerge.node.feedback import carry_over, unsent
from fedmerge.seeds import derive_seed
from fedmerge.tensors import schema_of

RESIDUAL_KEY = "fedmerge-residual"


def fedmerge_delta(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Encode the model in the reply as a task vector against the one in `message`, as a `MergeStrategy` asks.

    Without a plan from a `MergeStrategy(codec=...)` the reply stays as it is, so that an app may always list the mod.
    With error feedback, what the codec leaves out waits in `context.state` for the next round. Raises `InvalidDelta`
    when either message has not exactly one ArrayRecord, and what `subtract` and `write_delta` raise for models that
    have no task vector.
    """
    reply = call_next(message, context)
    plan = Plan.from_config(message.content)
    if plan is None or reply.has_error():
        return reply
    _, sent_model = only_arrays(message.content)
    key, own_model = only_arrays(reply.content)
    base = to_tensors(sent_model)
    schema = schema_of(base)
    to_send = subtract(to_tensors(own_model), base, where="the ClientApp's model")
    seed = derive_seed("flower", plan.seed, message.metadata.dst_node_id)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "delta.safetensors"
        if plan.error_feedback:
            residual = context.state.array_records.get(RESIDUAL_KEY)
            corrected = carry_over(to_send, to_tensors(residual) if residual else None, plan.error_feedback)
            write_delta(path, corrected, schema, plan.codec, seed=seed)
            left = unsent(corrected, DeltaFile(path, schema, plan.codec, seed=seed))
            context.state[RESIDUAL_KEY] = to_record({name: left[name] for name in left})
        else:
            write_delta(path, to_send, schema, plan.codec, seed=seed, base=base)
        reply.content[key] = pack_delta(path)
    return reply


def only_arrays(content: RecordDict) -> tuple[str, ArrayRecord]:
    """Return the one ArrayRecord of a message, with its key; raise `InvalidDelta` unless there is exactly one."""
    records = content.array_records
    if len(records) != 1:
        raise InvalidDelta(f"{len(records)} ArrayRecords in the message, not one", hint="put the model in one record")
    return next(iter(records.items()))
