"""What a node says while it works, to whoever shows or counts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

# The field of a node's log records that holds the event: `fedmerge join` writes it, a simulation in processes reads it.
EVENT_FIELD = "node_event"


@dataclass(frozen=True)
class NodeEvent:
    """Something worth showing: `kind` is fetch, train, encoded, upload, delivered, evaluated, cosigned, excluded (its
    delta was not merged), waiting (not asked in a round), missed or finished."""

    kind: str
    round: int
    values: Mapping[str, Any] = field(default_factory=dict)


class Emit(Protocol):
    """How the parts of a node say something: by the kind and the round of a `NodeEvent`, and its values."""

    def __call__(self, kind: str, round_number: int, **values: Any) -> None:
        """Tell whoever listens."""
        ...
