"""Compare the checkpoints that members were shown: did a coordinator tell all of them the same history?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from fedmerge.errors import DigestMismatch, Equivocation, InputError, InvalidProof, reporting_os_errors
from fedmerge.transparency.log import MAX_NOTE_BYTES, Growth, LogCheckpoint, open_by_any, verify_consistency
from fedmerge.trust.sign import PublicKey

BOTH_SIGNED = "both are signed by the coordinator, and together prove it"


@dataclass(frozen=True)
class Shown:
    """A checkpoint that a member was shown, and the file that it kept it in."""

    path: Path
    checkpoint: LogCheckpoint


def read_checkpoints(paths: list[Path], coordinator: Collection[PublicKey]) -> list[Shown]:
    """Read notes from files, and from all `*.note` files below folders, and verify the coordinator's signature on each.

    `coordinator` are its keys, which it had one after the other.

    Raises `InputError` when there are none or they are of several logs, `BadSignature` or `UntrustedKey`.
    """
    shown = [
        Shown(path, open_by_any(_read(path), coordinator, where=str(path)))
        for path in sorted({file for path in paths for file in _files(path)})
    ]
    if not shown:
        raise InputError("no checkpoints there", hint="a node keeps them in its folder, in log/*.note")
    origins = sorted({each.checkpoint.origin for each in shown})
    if len(origins) > 1:
        raise InputError(f"these are of several logs: {', '.join(origins)}", hint="audit each federation by itself")
    return shown


def require_one_history(shown: list[Shown]) -> int:
    """Return how many sizes there are; raise `Equivocation` when two checkpoints of one size differ."""
    for one, other in combinations(shown, 2):
        if one.checkpoint.size == other.checkpoint.size and one.checkpoint.root != other.checkpoint.root:
            raise Equivocation(
                f"{one.path} and {other.path}: two histories of {one.checkpoint.size} events", hint=BOTH_SIGNED
            )
    return len({each.checkpoint.size for each in shown})


def require_continued(
    shown: list[Shown], coordinator: Collection[PublicKey], grow: Callable[[int], Growth]
) -> LogCheckpoint:
    """Have the coordinator prove that its log now continues each checkpoint; return that of the log now.

    `grow` asks it. Raises `Equivocation` when it can't.
    """
    latest: Shown | None = None
    for each in sorted(shown, key=lambda each: each.checkpoint.size):
        for before in [each, latest] if latest else [each]:
            latest = _continued(before, coordinator, grow)
    assert latest is not None
    return latest.checkpoint


def _continued(before: Shown, coordinator: Collection[PublicKey], grow: Callable[[int], Growth]) -> Shown:
    old = before.checkpoint
    try:
        growth = grow(old.size)
        new = open_by_any(growth.note, coordinator, where="the coordinator's checkpoint")
        if new.origin != old.origin:
            raise InputError(f"{before.path}: of another log than this coordinator's, {new.origin}")
        verify_consistency(old.size, old.root, new.size, new.root, growth.proof)
    except (DigestMismatch, InvalidProof) as err:
        raise Equivocation(
            f"{before.path}: the coordinator signed it, and can't prove that its log continues it ({err.message})",
            hint="it shows others another history, or has lost events",
        ) from err
    return Shown(Path("the coordinator's last answer"), new)


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from path.rglob("*.note")
    else:
        yield path


def _read(path: Path) -> bytes:
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint")
    with reporting_os_errors(path), path.open("rb") as file:
        return file.read(MAX_NOTE_BYTES + 1)
