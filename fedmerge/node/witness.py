"""A member as a witness: it checks that the coordinator's log only grows, and has its receipts, and cosigns it.

Every checkpoint that was checked is kept in `log/` in the node's folder, signed by the coordinator. Members who compare
theirs (`fedmerge audit`) find out whether they were told the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from fedmerge.errors import DigestMismatch, Equivocation, InvalidProof, ReceiptNotListed, VerificationError
from fedmerge.files import replace_file
from fedmerge.statements import MergeRecord, Receipt
from fedmerge.statements.handover import Pin, pinned
from fedmerge.transparency.log import (
    Growth,
    LogCheckpoint,
    cosign,
    log_leaf,
    log_origin,
    open_by_any,
    open_checkpoint,
    verify_consistency,
    verify_inclusion,
)
from fedmerge.trust.sign import PublicKey, SigningKey

log = logging.getLogger(__name__)

KEEP = "keep this folder: it holds what the coordinator signed; compare with other members, by fedmerge audit"


class LogLink(Protocol):
    """What a witness asks of a coordinator."""

    def growth(self, old_size: int) -> Growth:
        """Return a checkpoint now, and the proof that it continues that of `old_size` events."""
        ...

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """Return the proof that event `index` is among the first `size`."""
        ...

    def cosign(self, note: bytes, cosignature: bytes) -> None:
        """Hand in a cosignature."""
        ...


class Witness:
    """A node's memory of a coordinator's log, in its folder `home`. `clock` is Unix time, for cosignatures.

    What it keeps is `durable` unless it is only simulated.
    """

    def __init__(
        self,
        home: Path,
        link: LogLink,
        key: SigningKey,
        coordinator: PublicKey | Pin,
        clock: Callable[[], float],
        *,
        durable: bool = True,
    ) -> None:
        self.folder = home / "log"
        self._receipts = home / "rounds"
        self._link = link
        self._key = key
        self._pin = pinned(coordinator)
        self._clock = clock
        self._durable = durable
        # What it has read already, and verified; nobody else writes there.
        self._known: dict[str, LogCheckpoint] = {}
        self._opened: dict[Path, Receipt] | None = None
        self._listed: set[Path] = set()

    def keep(self, path: Path, receipt: Receipt) -> None:
        """Be told of a receipt that this node has verified and put at `path`, in a round's folder.

        Those of earlier rounds that the log was seen to have are done with: a log that grows from there has them still.
        """
        receipts = self._all_receipts()
        for done in [each for each in self._listed if receipts[each].round < receipt.round]:
            self._listed.remove(done)
            del receipts[done]
        receipts[path] = receipt

    def observe(self, federation: str, run: str) -> LogCheckpoint:
        """Check the log as it is now against all that this node knows, keep its checkpoint, and cosign it.

        Raises `Equivocation` when it does not continue what this node was shown before, and `ReceiptNotListed` when it
        lacks a delta for which this node has a receipt.
        """
        origin = log_origin(federation, run)
        known = self._newest(origin)
        try:
            growth = self._link.growth(known.size if known else 0)
        except InvalidProof as err:
            raise Equivocation(
                f"the log is shorter than the coordinator signed before: {err.message}", hint=KEEP
            ) from err
        checkpoint = open_checkpoint(growth.note, self._pin.current, where="checkpoint")
        if checkpoint.origin != origin:
            raise VerificationError(f"the checkpoint is of another log, {checkpoint.origin}")
        if known is not None:
            try:
                verify_consistency(known.size, known.root, checkpoint.size, checkpoint.root, growth.proof)
            except DigestMismatch as err:
                self._keep(checkpoint, growth.note, "fork")
                raise Equivocation(
                    f"the coordinator signed two histories: {err.message}; both are in {self.folder}", hint=KEEP
                ) from err
        self._require_receipts(checkpoint, federation, run)
        self._keep(checkpoint, growth.note, "log")
        self._known[origin] = checkpoint
        self._link.cosign(growth.note, cosign(growth.note, self._key, int(self._clock())))
        return checkpoint

    def require_listed(self, record: MergeRecord) -> None:
        """Raise `ReceiptNotListed` when `record` leaves out a delta for which this node has a receipt."""
        listed = {contribution.statement_digest for contribution in record.contributions}
        for path, receipt in self._own_receipts(record.federation, record.run):
            spec_digest = path.parent.name.rpartition("-")[2]
            if (
                receipt.round == record.round
                and record.spec_digest.startswith(spec_digest)
                and receipt.statement_digest not in listed
            ):
                raise ReceiptNotListed(
                    f"round {record.round}: the coordinator signed {path}, and its merge record leaves the delta out",
                    hint="unless this node was revoked meanwhile, the two together are proof",
                )

    def _require_receipts(self, checkpoint: LogCheckpoint, federation: str, run: str) -> None:
        for path, receipt in self._own_receipts(federation, run):
            if path in self._listed:
                continue
            where = f"{path}: the coordinator signed this receipt, and its log"
            try:
                proof = self._link.inclusion(receipt.event, checkpoint.size)
                leaf = log_leaf(receipt.event_hash)
                verify_inclusion(leaf, receipt.event, checkpoint.size, proof, checkpoint.root)
            except (DigestMismatch, InvalidProof) as err:
                raise ReceiptNotListed(f"{where} does not have it", hint=KEEP) from err
            self._listed.add(path)

    def _own_receipts(self, federation: str, run: str) -> list[tuple[Path, Receipt]]:
        return [
            (path, receipt)
            for path, receipt in self._all_receipts().items()
            if (receipt.federation, receipt.run) == (federation, run)
        ]

    def _all_receipts(self) -> dict[Path, Receipt]:
        if self._opened is None:
            self._opened = {
                path: Receipt.open(path.read_bytes(), self._pin.ever, where=str(path))[0]
                for path in sorted(self._receipts.glob("*/receipt.json"))
            }
        return self._opened

    def _newest(self, origin: str) -> LogCheckpoint | None:
        if origin in self._known:
            return self._known[origin]
        kept = [
            open_by_any(path.read_bytes(), self._pin.ever.values(), where=str(path))
            for path in sorted(self.folder.glob("log-*.note"))
        ]
        return max((each for each in kept if each.origin == origin), key=lambda each: each.size, default=None)

    def _keep(self, checkpoint: LogCheckpoint, note: bytes, kind: str) -> None:
        run = checkpoint.origin.rpartition("/")[2]
        replace_file(self.folder / f"{kind}-{run[:12]}-{checkpoint.size:08d}.note", note, durable=self._durable)
