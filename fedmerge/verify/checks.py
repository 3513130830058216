"""A verification's findings: it goes on after what does not hold, and says of each thing whether it was looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from fedmerge.errors import FedmergeError, InputError, InvalidDelta, UnknownVersion, VerificationError

Outcome: TypeAlias = Literal["ok", "failed", "not checked"]
# Failures of one kind that are listed one by one; a file from outside can hold any number.
MAX_LISTED = 50


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `detail` says what held, what did not and where, or why it was not checked.

    `reason` is the UPPER_SNAKE name of the error (`fedmerge.errors`) where it failed.
    """

    name: str
    outcome: Outcome
    detail: str
    reason: str = ""
    hint: str | None = None

    @property
    def passed(self) -> bool | None:
        """True, False, or None when it could not be checked."""
        return {"ok": True, "failed": False, "not checked": None}[self.outcome]

    def to_dict(self) -> dict[str, Any]:
        """Return the check as JSON types."""
        found = {"name": self.name, "outcome": self.outcome, "detail": self.detail}
        return found | ({"reason": self.reason} if self.reason else {}) | ({"hint": self.hint} if self.hint else {})


@dataclass
class Checklist:
    """What was checked so far, in order; `errors` are those behind what failed or could not be checked."""

    checks: list[Check] = field(default_factory=list)
    errors: list[FedmergeError] = field(default_factory=list)

    @property
    def failures(self) -> list[Check]:
        """What does not hold."""
        return [check for check in self.checks if check.outcome == "failed"]

    def ok(self, name: str, detail: str) -> None:
        """Note that something holds."""
        self.checks.append(Check(name, "ok", detail))

    def skip(self, name: str, why: str, err: FedmergeError | None = None) -> None:
        """Note that something could not be checked."""
        self.checks.append(Check(name, "not checked", why, hint=err.hint if err else None))
        self.errors += [err] if err else []

    def fail(self, name: str, err: VerificationError) -> None:
        """Note that something does not hold."""
        num_failed = sum(check.name == name for check in self.failures)
        if num_failed < MAX_LISTED:
            self.checks.append(Check(name, "failed", err.message, err.reason, err.hint))
        elif num_failed == MAX_LISTED:
            self.checks.append(Check(name, "failed", f"more than {MAX_LISTED} failures; the others are not listed"))
        self.errors.append(err)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Note under `name` what the block raises because something does not hold, and go on after it."""
        try:
            yield
        except VerificationError as err:
            self.fail(name, err)
        except (InputError, InvalidDelta, UnknownVersion) as err:  # what a damaged file is to those who read it
            self.fail(name, VerificationError(err.message, hint=err.hint))

    def holds(self, name: str) -> bool:
        """Whether nothing called `name` has failed."""
        return all(check.name != name for check in self.failures)

    def require(self) -> None:
        """Raise the first error, if there is one."""
        if self.errors:
            raise self.errors[0]


def shortened(names: Sequence[str], most: int = 12) -> str:
    """Return names in a row, and of many only the first and how many more there are."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])
