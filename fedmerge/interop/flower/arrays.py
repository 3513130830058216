"""Models and delta files as Flower's records, and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedmerge.delta.codec import Codec
from fedmerge.errors import ConfigError, InputError, InvalidDelta

DELTA_KEY: Final = "fedmerge.delta"
DELTA_STYPE: Final = "fedmerge.delta.v1"
PLAN_KEY: Final = "fedmerge-plan"


@dataclass(frozen=True)
class Plan:
    """What a strategy asks of `fedmerge_delta`: a codec, the decay of error feedback (0 for none), the round's seed."""

    codec: Codec
    error_feedback: float
    seed: int

    def to_json(self) -> str:
        """Return the plan as it travels in a message's ConfigRecord."""
        return json.dumps(
            {"codec": self.codec.to_dict(), "error_feedback": self.error_feedback, "seed": str(self.seed)}
        )

    @classmethod
    def from_config(cls, records: RecordDict) -> Plan | None:
        """Return the plan in one of a message's ConfigRecords, if there is one; raise `ConfigError` for a bad one."""
        for record in records.config_records.values():
            if PLAN_KEY in record:
                return cls._parse(record)
        return None

    @classmethod
    def _parse(cls, record: ConfigRecord) -> Plan:
        try:
            plan = json.loads(str(record[PLAN_KEY]))
            return cls(Codec.from_dict(plan["codec"]), float(plan["error_feedback"]), int(plan["seed"]))
        except (ValueError, KeyError, TypeError) as err:
            raise ConfigError(
                f"{PLAN_KEY}: not a plan of this version of fedmerge ({err})",
                hint="install the same version of fedmerge for the ServerApp and the ClientApps",
            ) from err


def to_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Return the arrays of `record` as tensors, by name.

    Raises `InvalidDelta` for one that is no numpy array or of a type that torch does not have.
    """
    tensors = {}
    for name, array in record.items():
        try:
            tensors[name] = torch.from_numpy(array.numpy())
        except (TypeError, ValueError) as err:
            raise InvalidDelta(f"{name}: not an array that torch can hold ({err})") from err
    return tensors


def to_record(tensors: dict[str, Tensor]) -> ArrayRecord:
    """Return `tensors` as Flower's arrays; raise `InputError` for bf16 and other types that numpy does not have."""
    try:
        return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in tensors.items()})
    except TypeError as err:
        raise InputError(f"Flower carries numpy arrays only ({err})", hint="convert the model to float32") from err


def pack_delta(path: Path) -> ArrayRecord:
    """Return the delta file at `path` as one opaque array."""
    data = path.read_bytes()
    return ArrayRecord({DELTA_KEY: Array(dtype="uint8", shape=(len(data),), stype=DELTA_STYPE, data=data)})


def is_delta(record: ArrayRecord) -> bool:
    """Return whether `record` is what `pack_delta` makes."""
    return list(record) == [DELTA_KEY] and record[DELTA_KEY].stype == DELTA_STYPE


def num_bytes(record: ArrayRecord) -> int:
    """Return the bytes of all arrays of `record` as they travel."""
    return sum(len(array.data) for array in record.values())
