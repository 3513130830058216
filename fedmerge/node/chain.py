"""A node's copies of what is published: the base model, and each version by the route that takes the fewest bytes.

Whatever the route, a version counts only when what was written has the digest that the coordinator signed.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from fedmerge.delta.task_vector import delta_schema
from fedmerge.errors import DigestMismatch, InputError, InvalidDelta, reporting_os_errors
from fedmerge.files import sync_file, sync_tree
from fedmerge.models.sums import RunningSum
from fedmerge.models.versions import cheapest_route, follow, open_model, require_digest, write_model
from fedmerge.statements import ModelRef, RoundSpec, StepRef, UpdateRef
from fedmerge.tensors import Checkpoint, TensorMap, model_digest, schema_digest
from fedmerge.transparency.merkle import merkle_root

log = logging.getLogger(__name__)

Fetch: TypeAlias = Callable[[str, Path], list[bytes]]
Announce: TypeAlias = Callable[[int, str, int], None]
ChainMaker: TypeAlias = Callable[[Path, Fetch, Announce, Path | None], "ModelChain"]


class ModelChain:
    """The models in a node's folder `home`.

    `fetch(root, target)` gets a file of the coordinator's by its Merkle root, goes on where it was, and returns the
    hashes of the leaves that came;
    `announce(round, what, num_bytes)` is told before. `base` is a directory with the base model, fetched when None.
    What is kept is `durable` unless it is only simulated.
    """

    def __init__(
        self,
        home: Path,
        fetch: Fetch,
        announce: Announce,
        base: Path | None = None,
        *,
        durable: bool = True,
    ) -> None:
        self.home = home
        self._link_fetch = fetch
        self._announce = announce
        self._base_dir = base
        self._base: Checkpoint | None = None
        self._durable = durable
        self._sum = RunningSum(home / "sum")

    def materialise(self, ref: ModelRef, spec: RoundSpec, parent: Path | None = None) -> Path:
        """Return a directory with the model version `ref`, checked against its digest, the only one in `parent`.

        That is `home / "models"` where it is not given. Raises `DigestMismatch` when what was published does not lead
        to the digest, and as `require_base` does.
        """
        base = self.require_base(spec)
        if not ref.updates:
            return base.directory
        target = (parent or self.home / "models") / ref.digest
        if target.exists():
            return target
        held = {folder.name: folder for folder in (self.home / "models").glob("*") if not folder.suffix}
        num_summed, _ = self._sum.open(ref.updates)
        here = {file.name for file in (self.home / "updates").glob("*")} | {u.root for u in ref.updates[:num_summed]}
        steps = cheapest_route(ref, held, here)
        if steps:
            try:
                start = Checkpoint(held[steps[0].before]) if steps[0].before in held else base
                self._install(follow(steps, start, self._published_file), ref, base, target)
                return target
            except (DigestMismatch, InvalidDelta, InputError) as err:
                # The updates are what defines a version, and start from the base, whose digest was checked.
                log.warning("round %d: %s; taking the updates instead", spec.round, err.message)
        try:
            self._add_up(ref, base, target)
        except (DigestMismatch, InputError) as err:
            if not num_summed:
                raise
            # No file was synced: a power cut may have taken a part of the sum.
            log.warning("round %d: %s; adding up all updates again", spec.round, err.message)
            self._sum.clear()
            self._add_up(ref, base, target)
        return target

    def _add_up(self, ref: ModelRef, base: Checkpoint, target: Path) -> None:
        """Install `ref` from its updates, which no newer version needs once their sum is there."""
        model = open_model(ref, base, self._published_file, self._sum)
        if target.parent != self.home / "models":
            self._install(model, ref, base, target)
            return
        with self._sum.keeping(ref.updates, model) as model:
            self._install(model, ref, base, target)
        for update in ref.updates:
            self.drop_update(update)

    def _install(self, model: TensorMap, ref: ModelRef, base: Checkpoint, target: Path) -> None:
        """Write `model` to `target`, in place of all older versions, if it is what `ref` says."""
        partial = target.with_suffix(".partial")
        with reporting_os_errors(target):
            shutil.rmtree(partial, ignore_errors=True)
            write_model(model, base, partial)
            require_digest(Checkpoint(partial), ref.digest, where=f"{self.home}")
            for old in target.parent.iterdir():
                if old != partial:
                    shutil.rmtree(old)
            if self._durable:
                sync_tree(partial)
            partial.rename(target)
            for step in ref.steps:  # of no use any more
                self._place(step).unlink(missing_ok=True)

    def _published_file(self, ref: UpdateRef | StepRef) -> Path:
        target = self._place(ref)
        if not target.exists():
            what = "update" if isinstance(ref, UpdateRef) else "step"
            self._announce(ref.round, what, ref.num_bytes)
            self._fetch(ref.root, target)
        return target

    def _place(self, ref: UpdateRef | StepRef) -> Path:
        return self.home / "updates" / ref.root

    def drop_update(self, ref: UpdateRef) -> None:
        """Delete a fetched update that is not needed again."""
        self._place(ref).unlink(missing_ok=True)

    def require_base(self, spec: RoundSpec) -> Checkpoint:
        """Return the federation's base model; raise `InputError` when the one that is here is another."""
        if self._base is not None:
            return self._base
        directory = self._base_dir or self._fetch_base(spec)
        base = Checkpoint(directory)
        found = model_digest(base)
        if found != spec.model.base_digest or schema_digest(delta_schema(base.schema)) != spec.schema_digest:
            raise InputError(
                f"{directory}: is not the base model of federation {spec.federation!r} "
                f"(version {found[:12]}, expected {spec.model.base_digest[:12]})",
                hint="leave out --base to fetch the right one from the coordinator"
                if self._base_dir
                else "a node's folder serves one federation: give another --home",
            )
        self._base = base
        return base

    def _fetch_base(self, spec: RoundSpec) -> Path:
        directory = self.home / "base"
        for ref in spec.base_files:
            target = directory / ref.name
            if not target.exists():
                self._announce(spec.round, ref.name, ref.num_bytes)
                self._fetch(ref.root, target)
        return directory

    def _fetch(self, root: str, target: Path) -> None:
        partial = target.with_name(f"{target.name}.partial")
        with reporting_os_errors(target):
            partial.parent.mkdir(parents=True, exist_ok=True)
            if merkle_root(self._link_fetch(root, partial)).hex() != root:
                partial.unlink()
                raise DigestMismatch(f"{target.name}: the coordinator sent other bytes than it promised")
            if self._durable:
                sync_file(partial)
            partial.rename(target)
