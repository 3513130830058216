"""The keys that a coordinator had, by the hand-overs in what is verified, before anything else in it is believed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from fedmerge.errors import InputError, InvalidHandover, VerificationError
from fedmerge.statements.handover import follow_line
from fedmerge.trust.sign import PublicKey
from fedmerge.verify.checks import Checklist


@dataclass(frozen=True)
class KeyLine:
    """A coordinator's keys, oldest first, each handed over to the next; none where there was no hand-over.

    `problem` is what keeps a hand-over from being believed.
    """

    keys: tuple[PublicKey, ...]
    problem: VerificationError | None = None

    @classmethod
    def read(cls, lines: Iterable[tuple[str, str]], key: str, kind: str, text: str) -> KeyLine:
        """Read the hand-overs among places and lines of JSON: those whose `key` is `kind` have one as `text`."""
        try:
            return cls(follow_line(None, _found(lines, key, kind, text)))
        except InvalidHandover as err:
            return cls((), err)

    def trusted(self, known: Mapping[str, PublicKey]) -> Mapping[str, PublicKey]:
        """Return the keys to trust: those that are `known`, and where one is of this line, all of the line."""
        own = {key.key_id: key for key in self.keys}
        return {**known, **own} if own.keys() & known.keys() else known

    def up_to(self, signer: PublicKey, checks: Checklist) -> tuple[PublicKey, ...]:
        """Return the keys from the first to `signer`, which should be the last one; what is wrong is noted."""
        self.note(checks)
        if self.keys and self.keys[-1] != signer:
            found = f"signed by key {signer.short}, and the hand-overs lead to {self.keys[-1].short}"
            checks.fail("keys", InvalidHandover(found))
        return self.keys or (signer,)

    def note(self, checks: Checklist) -> None:
        """Note that a hand-over does not hold, if one does not."""
        if self.problem is not None:
            checks.fail("keys", self.problem)


def _found(lines: Iterable[tuple[str, str]], key: str, kind: str, text: str) -> Iterator[tuple[str, str]]:
    """Yield places and hand-overs; lines that are anything else, or can't be read, are for others to look at."""
    with suppress(VerificationError, InputError):
        for place, line in lines:
            if kind not in line:
                continue
            try:
                fields = json.loads(line)
                fields = json.loads(fields["event"]) if "event" in fields else fields
                if fields[key] == kind:
                    yield place, str(fields[text])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
