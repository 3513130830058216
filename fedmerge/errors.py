"""Every error a user can meet, as one tree.

    FedmergeError                     exit 1   something fedmerge did not expect
    +-- ConfigError                        2   fedmerge.toml or a command line is wrong
    +-- InputError                         2   a model, dataset or key file is not what it should be
    |   +-- ModelMismatch                  2   two checkpoints do not have the same tensors
    |   +-- WrongPassphrase                2   a key file does not open
    +-- VerificationError                  3   a signature, digest or replay does not hold
    |   +-- BadSignature                   3
    |   +-- UntrustedKey                   3
    |   |   +-- RevokedKey, PendingKey     3
    |   +-- UntrustedCertificate           3
    |   |   +-- CertificateExpired, CertificateRequired, CertificateMismatch
    |   +-- Equivocation, ReceiptNotListed, InvalidHandover
    |   +-- DigestMismatch                 3
    +-- Unreachable                        4   no coordinator answers
    +-- RoundFailed                        5   a round ended without a model
    +-- MissingExtra                       6   an optional dependency is not installed
    +-- Refused                            7   the coordinator will not take this submission
    |   +-- UnknownRound, UnknownUpload, UnknownVersion, RoundClosed, NotAsked, WrongPhase, StaleBase,
    |       ConflictingSubmission, BadOffset, QuotaExceeded, Busy, InvalidDelta, NoSession, InvalidToken,
    |       NotAllowed, InvalidProof
    +-- ResourceError                      8   disk full, port in use, file not writable
    |   +-- Deposed                        8   another coordinator has taken over
    +-- NothingDue                         9   `fedmerge join --once` found nothing to do

Each class has a `reason` (UPPER_SNAKE; it travels in google.rpc.ErrorInfo, so that the same class comes
out at the other end of a call), a `hint` (what to do about it) and an `exit_code` for the command line.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar


class FedmergeError(Exception):
    """Base of all errors that are reported to a person as one line, never as a traceback.

    `message` says what is wrong and where; `hint` says what to do.
    """

    reason: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:  # for whoever sees a traceback
            self.add_note(f"hint: {hint}")


class ConfigError(FedmergeError):
    """A configuration file or command line that can't be acted on."""

    reason = "CONFIG_INVALID"
    exit_code = 2


class InputError(FedmergeError):
    """A model, dataset or key file that is not what it should be."""

    reason = "INPUT_INVALID"
    exit_code = 2


class ModelMismatch(InputError):
    """Two sets of tensors that should have the same names, shapes and dtypes do not."""

    reason = "MODEL_MISMATCH"


class WrongPassphrase(InputError):
    """A key file is encrypted, and its passphrase is missing or does not open it."""

    reason = "WRONG_PASSPHRASE"


class VerificationError(FedmergeError):
    """Something signed, hashed or replayed does not hold."""

    reason = "VERIFICATION_FAILED"
    exit_code = 3


class BadSignature(VerificationError):
    """A signature is missing, malformed or does not verify."""

    reason = "BAD_SIGNATURE"


class UntrustedKey(VerificationError):
    """The key is well formed, but nobody here trusts it."""

    reason = "UNTRUSTED_KEY"


class RevokedKey(UntrustedKey):
    """The key was trusted once, and was replaced by its owner or revoked by the operator."""

    reason = "KEY_REVOKED"


class PendingKey(UntrustedKey):
    """The key was enrolled with a join token, and the operator has not approved it yet."""

    reason = "KEY_PENDING"


class UntrustedCertificate(VerificationError):
    """The other side's certificate is not one that is accepted here."""

    reason = "CERTIFICATE_UNTRUSTED"


class CertificateExpired(UntrustedCertificate):
    """A certificate, of this side or the other, was good until a moment that has passed."""

    reason = "CERTIFICATE_EXPIRED"


class CertificateRequired(UntrustedCertificate):
    """The coordinator asks nodes for a certificate of their own."""

    reason = "CERTIFICATE_REQUIRED"


class CertificateMismatch(UntrustedCertificate):
    """A node shows another node's certificate."""

    reason = "CERTIFICATE_MISMATCH"


class Equivocation(VerificationError):
    """A coordinator signed two histories of one federation."""

    reason = "EQUIVOCATION"


class InvalidHandover(VerificationError):
    """A coordinator's key is said to have a successor, and the two have not both signed that."""

    reason = "HANDOVER_INVALID"


class ReceiptNotListed(VerificationError):
    """A coordinator signed a receipt for a delta, and leaves it out."""

    reason = "RECEIPT_NOT_LISTED"


class DigestMismatch(VerificationError):
    """Bytes do not have the digest that was promised for them."""

    reason = "DIGEST_MISMATCH"


class Unreachable(FedmergeError):
    """No coordinator answers at the address, or it stopped answering."""

    reason = "UNREACHABLE"
    exit_code = 4


class RoundFailed(FedmergeError):
    """A round ended without a published model."""

    reason = "ROUND_FAILED"
    exit_code = 5


class MissingExtra(FedmergeError):
    """An optional dependency is needed and not installed."""

    reason = "MISSING_EXTRA"
    exit_code = 6


class Refused(FedmergeError):
    """The coordinator will not take what was sent."""

    reason = "REFUSED"
    exit_code = 7


class UnknownRound(Refused):
    """There is no such round."""

    reason = "UNKNOWN_ROUND"


class UnknownUpload(Refused):
    """There is no such upload, or it belongs to another node."""

    reason = "UNKNOWN_UPLOAD"


class UnknownVersion(Refused):
    """There is no such model version or artefact."""

    reason = "UNKNOWN_VERSION"


class RoundClosed(Refused):
    """The round no longer takes deltas."""

    reason = "ROUND_CLOSED"


class NotAsked(Refused):
    """The round asks a sample of the nodes, and this one is not among them."""

    reason = "NOT_ASKED"


class WrongPhase(Refused):
    """An operator's command does not fit where the round stands."""

    reason = "WRONG_PHASE"


class StaleBase(Refused):
    """The delta was made against another base model or round spec than this round's."""

    reason = "STALE_BASE"


class ConflictingSubmission(Refused):
    """The node already submitted a different delta for this round."""

    reason = "CONFLICTING_SUBMISSION"


class BadOffset(Refused):
    """A chunk does not continue where the upload stands."""

    reason = "BAD_OFFSET"


class QuotaExceeded(Refused):
    """The payload is over its limit."""

    reason = "QUOTA_EXCEEDED"


class Busy(Refused):
    """The coordinator has its hands full; a node waits `retry_after_s` at least, if it is told, and tries again."""

    reason = "BUSY"

    def __init__(self, message: str, *, hint: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class InvalidDelta(Refused):
    """The delta can't be decoded against the plan: names, shapes, sizes, codes or values are wrong.

    `rejection` is the coordinator's signed word for that (`fedmerge.statements.Rejection`), of a delta that came whole.
    """

    reason = "INVALID_DELTA"

    def __init__(self, message: str, *, hint: str | None = None, rejection: str = "") -> None:
        super().__init__(message, hint=hint)
        self.rejection = rejection


class NoSession(Refused):
    """The call carries no session, or one the coordinator does not know (any more)."""

    reason = "NO_SESSION"


class InvalidToken(Refused):
    """The join token is unknown, used or expired."""

    reason = "TOKEN_INVALID"


class NotAllowed(Refused):
    """The caller's role may not make this call."""

    reason = "NOT_ALLOWED"


class InvalidProof(Refused):
    """The log can't prove what was asked for: it never had that size, or that event."""

    reason = "NO_SUCH_PROOF"


class ResourceError(FedmergeError):
    """The machine can't do what was asked: disk full, port in use, file not writable."""

    reason = "RESOURCE"
    exit_code = 8


class Deposed(ResourceError):
    """Another coordinator leads: this one may not write any more, and stops."""

    reason = "DEPOSED"


class NothingDue(FedmergeError):
    """The round asks nothing of this node at present."""

    reason = "NOTHING_DUE"
    exit_code = 9


def _tree(cls: type[FedmergeError]) -> dict[str, type[FedmergeError]]:
    found = {cls.reason: cls}
    for child in cls.__subclasses__():
        found.update(_tree(child))
    return found


BY_REASON: dict[str, type[FedmergeError]] = _tree(FedmergeError)


@contextmanager
def reporting_os_errors(where: object) -> Iterator[None]:
    """Turn an `OSError` in the block into a `ResourceError` that names `where`."""
    try:
        yield
    except OSError as err:
        full = err.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space and run it again; nothing was half-written" if full else None
        raise ResourceError(f"{where}: {err.strerror or err}", hint=hint) from err


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest of the `known` words, or "" when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
