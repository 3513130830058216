"""What lies between a node and its coordinator: the calls of a `Link`, and the state that it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class RoundView:
    """The federation's state as a node sees it; envelopes are not verified yet, and empty when there is nothing."""

    round: int
    phase: str
    spec_envelope: bytes
    record_envelope: bytes
    candidates_envelope: bytes
    num_deltas: int
    finished: bool
    failure: str


class Link(Protocol):
    """What a node asks of a coordinator. Errors are those of `fedmerge.errors`, whatever lies between."""

    def keep_trying(self, patience_s: float) -> None:
        """Be told how long it is worth trying to reach a coordinator that does not answer."""
        ...

    def watch(self) -> Iterator[RoundView]:
        """Yield the state now and after every change, until the last round has ended."""
        ...

    def fetch(self, root: str, target: Path) -> list[bytes]:
        """Fetch a file into `target`, continuing what is there, and hash its leaves. The caller checks the root."""
        ...

    def submit(self, envelope: bytes, payload: Path, leaves: list[bytes], sent: Callable[[int], None]) -> bytes:
        """Upload a payload from wherever it stands and commit it; return the receipt. `sent` is told the progress."""
        ...

    def report_metrics(self, envelope: bytes) -> None:
        """Hand in a signed evaluation."""
        ...
