"""A coordinator's keys, one after the other: each hands the federation over to the next, and both sign that.

A partner pins the key that it was given. It takes another one for the coordinator's only by such a statement, and
remembers it: what the old key signs from then on is not the coordinator's any more.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmerge.errors import Equivocation, InputError, InvalidHandover, VerificationError
from fedmerge.files import replace_file
from fedmerge.statements import Handover
from fedmerge.trust.sign import PublicKey, SigningKey, parse_json_object, read_text

log = logging.getLogger(__name__)

OUT_OF_BAND = "ask the operator over another channel which key is the coordinator's, and get its coordinator.pem"


@dataclass(frozen=True)
class Step:
    """A hand-over that both keys have signed; `text` is how it travels."""

    text: str
    statement: Handover
    old: PublicKey
    new: PublicKey


def sign_handover(federation: str, run: str, old: SigningKey, new: SigningKey) -> str:
    """Return a hand-over as it travels: JSON with both public keys, and the statement under either's signature."""
    statement = Handover(federation=federation, run=run, old_key=old.public.key_id, new_key=new.public.key_id)
    parts = {
        "old_key": old.public.pem(),
        "new_key": new.public.pem(),
        "envelope": statement.sign(old).decode(),
        "proof": statement.sign(new).decode(),
    }
    return json.dumps(parts)


def read_handover(text: str, *, where: str) -> Step:
    """Verify a hand-over under the two keys that it names; raise `InvalidHandover` unless both have signed it."""
    try:
        parts = {name: str(value) for name, value in parse_json_object(text.encode(), where=where).items()}
        old, new = (PublicKey.from_pem(parts[name], where=where) for name in ("old_key", "new_key"))
        statement, _ = Handover.open(parts["envelope"].encode(), {old.key_id: old}, where=where)
        proven, _ = Handover.open(parts["proof"].encode(), {new.key_id: new}, where=where)
    except (VerificationError, InputError, KeyError) as err:
        raise InvalidHandover(f"{where}: is not signed by both keys", hint=OUT_OF_BAND) from err
    if proven != statement or (statement.old_key, statement.new_key) != (old.key_id, new.key_id) or old == new:
        raise InvalidHandover(f"{where}: is not of the keys that have signed it", hint=OUT_OF_BAND)
    return Step(text, statement, old, new)


def follow_line(first: PublicKey | None, texts: Iterable[tuple[str, str]]) -> tuple[PublicKey, ...]:
    """Return a coordinator's keys, oldest first, from pairs of a place and the hand-over that was found there.

    They must go on from each other, and from `first`, if it is given. Raises `InvalidHandover`.
    """
    line = [first] if first is not None else []
    for where, text in texts:
        step = read_handover(text, where=where)
        if line and step.old != line[-1]:
            raise InvalidHandover(
                f"{where}: hands over key {step.old.short}, and {line[-1].short} was the coordinator's"
            )
        if step.new in line:
            raise InvalidHandover(f"{where}: hands over to key {step.new.short}, which was given up before")
        line += [step.new] if line else [step.old, step.new]
    return tuple(line)


class Pin:
    """The key by which a site knows its coordinator: the one that it was given, and those that took over from it.

    Hand-overs are kept in `folder`, if there is one, beside the checkpoints that the keys have signed.
    """

    def __init__(self, key: PublicKey, folder: Path | None = None) -> None:
        self._given = key
        self._folder = folder
        self._steps: list[Step] = []
        if folder is not None:
            self._steps = [read_handover(read_text(path), where=str(path)) for path in handovers_in([folder])]

    @property
    def line(self) -> list[PublicKey]:
        """The coordinator's keys as far as this site knows, oldest first."""
        before = {step.new: step.old for step in self._steps}
        after = {step.old: step.new for step in self._steps}
        line = [self._given]
        while (old := before.get(line[0])) is not None and old not in line:
            line.insert(0, old)
        while (new := after.get(line[-1])) is not None and new not in line:
            line.append(new)
        return line

    @property
    def current(self) -> PublicKey:
        """The coordinator's key now."""
        return self.line[-1]

    @property
    def now(self) -> dict[str, PublicKey]:
        """Whose word is the coordinator's now, by key id."""
        return {self.current.key_id: self.current}

    @property
    def ever(self) -> dict[str, PublicKey]:
        """Whose word was the coordinator's at some time, for what this site has kept."""
        return {key.key_id: key for key in self.line}

    def follow(self, texts: Iterable[str]) -> None:
        """Take up what a coordinator says about its keys.

        Raises `InvalidHandover`, and `Equivocation` where a key hands over to another one than this site was told
        before; then both are kept.
        """
        before, told = self.current, list[Step]()
        for text in texts:
            step = read_handover(text, where="the coordinator's hand-over")
            known = next((each for each in self._steps if each.old == step.old), None)
            if known is not None and known.new != step.new:
                self._keep(step, "fork")
                raise Equivocation(
                    f"key {step.old.short} handed over to {known.new.short} before, and to {step.new.short} now",
                    hint=OUT_OF_BAND,
                )
            if known is None:
                self._steps.append(step)
                told.append(step)
        line = self.line
        for step in told:
            if step.new in line:
                self._keep(step, "handover")
        if self.current != before:
            log.warning("the coordinator's key %s handed over to %s", before.short, self.current.short)

    def _keep(self, step: Step, kind: str) -> None:
        if self._folder is not None:
            replace_file(self._folder / f"{kind}-{step.old.short}-{step.new.short}.json", step.text.encode())


def pinned(known: PublicKey | Pin) -> Pin:
    """Return how to know a coordinator by a key that it has for good, or one that may be handed over."""
    return known if isinstance(known, Pin) else Pin(known)


def handovers_in(folders: Sequence[Path]) -> list[Path]:
    """Return the files in which sites have kept hand-overs."""
    return sorted(path for folder in folders for path in folder.rglob("handover-*.json"))
