"""`fedmerge verify`: check a published model, or an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.markup import escape

from fedmerge.cli.output import JsonFlag, print_json, printable, stdout
from fedmerge.config import Config, load_config
from fedmerge.errors import ConfigError, InputError, VerificationError
from fedmerge.trust.keys import TrustStore
from fedmerge.trust.sign import PublicKey

if TYPE_CHECKING:
    from fedmerge.store.blobs import BlobStore
    from fedmerge.verify import Checklist, History


def verify(
    directory: Annotated[Path, Parameter(help="The published model's directory, or an export.")],
    /,
    *,
    key: Annotated[
        Path | None, Parameter(help="The coordinator's public key, or its coordinator.pem, got over a safe channel.")
    ] = None,
    trusted: Annotated[Path | None, Parameter(help="A folder of public keys to trust, instead of --key.")] = None,
    replay: Annotated[
        Path | None,
        Parameter(help="The coordinator's state folder or fedmerge.toml: merge its stored deltas again and compare."),
    ] = None,
    base: Annotated[
        Path | None,
        Parameter(
            help="The base model, for --replay or an export's deltas. [default: the coordinator's]", show_default=False
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Check a published model: signatures, digests, history; with --replay, the merge itself, bit for bit.

    All is checked, whatever fails: each line says ok, !! with the reason, or -- and why it was not checked.
    """
    if (key is None) == (trusted is None):
        raise ConfigError(
            "whose signature should it have? Give --key or --trusted",
            hint="the coordinator.pem that the federation's operator gave you will do",
        )
    is_archive = (directory / "export.json").is_file() or directory.suffix == ".tar"
    if base is not None and replay is None and not is_archive:
        raise ConfigError("--base goes with --replay", hint="give --replay STATE, the coordinator's state folder")
    if trusted is not None and not trusted.is_dir():
        raise InputError(f"{trusted}: no such folder of public keys")
    config = load_config(replay) if replay is not None and replay.suffix == ".toml" else None
    if replay is not None:
        if config is None and not (replay / "blobs").is_dir():
            hint = "it has a folder blobs with the deltas; where they lie elsewhere, give fedmerge.toml"
            raise InputError(f"{replay}: not a coordinator's state folder", hint=hint)
        base = base or _coordinators_base(replay if config is None else config.federation.state, config)
    if trusted is not None:
        keys = TrustStore(trusted).keys()
    else:
        assert key is not None
        public = PublicKey.load(key)
        keys = {public.key_id: public}
    from fedmerge.verify import Checklist, examine_directory, examine_local, is_local

    checks, version = Checklist(), None
    if is_archive:
        version = _verify_export(directory, keys, checks, base=base, state=replay, config=config)
    elif is_local(directory):
        local = examine_local(directory, keys, checks)
        version = local.model_digest if local else None
    else:
        found = examine_directory(directory, keys, checks)
        version = found[0].model.digest if found else None
        if replay is None or base is None:
            checks.skip("replay", "not asked for; --replay STATE merges the stored deltas again")
        elif found is not None:
            hint = "is it the state folder of the coordinator that published this model?"
            _replay(found[1], base, _blobs_of(replay, config), checks, place=replay, hint=hint)
    _report(version, checks, json=json)


def _verify_export(
    path: Path,
    keys: Mapping[str, PublicKey],
    checks: Checklist,
    *,
    base: Path | None,
    state: Path | None,
    config: Config | None,
) -> str | None:
    """Check an export, and replay its rounds where there is a base; return the version that they lead to."""
    from fedmerge.archive import opened
    from fedmerge.publishing.export import BLOBS
    from fedmerge.store.blobs import BlobStore
    from fedmerge.store.shelves import FolderShelf
    from fedmerge.verify import examine_export

    with opened(path) as folder, TemporaryDirectory(prefix="fedmerge-parts-") as scratch:
        found = examine_export(folder, keys, checks)
        if found is None:
            return None
        blobs = BlobStore(Path(scratch), FolderShelf(folder / BLOBS)) if state is None else _blobs_of(state, config)
        if state is None and not (folder / BLOBS).is_dir():
            checks.skip("replay", "there are no deltas in it; fedmerge export --with-deltas puts them in")
        elif base is None:
            checks.skip("replay", "the base model is needed to merge the deltas again; give --base")
        else:
            hint = "an export has the deltas of the rounds that were asked for"
            _replay(found[1], base, blobs, checks, place=path, hint=hint)
        return found[1].records[-1].model.digest if found[1].records else None


def _replay(history: History, base: Path, blobs: BlobStore, checks: Checklist, *, place: Path, hint: str) -> None:
    from fedmerge.tensors import Checkpoint
    from fedmerge.verify import replay_rounds

    if not replay_rounds(history, Checkpoint(base), blobs, checks) and not checks.failures:
        raise InputError(f"{place}: {checks.errors[0].message}", hint=hint)


def _blobs_of(state: Path, config: Config | None) -> BlobStore:
    from fedmerge.store.blobs import BlobStore

    return BlobStore(state / "blobs") if config is None else config.open_blobs()


def _coordinators_base(state_dir: Path, config: Config | None) -> Path:
    """Return the base with a head that the coordinator made, or else the one that its configuration names."""
    made = state_dir / "base"
    base = made if config is None or made.is_dir() else config.model.base
    if not base.is_dir():
        raise ConfigError(f"{base}: no such directory", hint="say where the base model is, with --base")
    return base


def _report(version: str | None, checks: Checklist, *, json: bool) -> None:
    """Print what was checked; raise the first failure, as an error that counts them."""
    failures = checks.failures
    if json:
        listed = [check.to_dict() for check in checks.checks]
        print_json({"version": version, "verified": not failures, "checks": listed})
    else:
        for check in checks.checks:
            mark = {"ok": "[green]ok[/]", "failed": "[bold red]!![/]", "not checked": "[yellow]--[/]"}[check.outcome]
            suffix = {"ok": "", "failed": f" ({check.reason})", "not checked": " (not checked)"}[check.outcome]
            stdout.print(f"{mark}  {check.name:<10} {escape(printable(check.detail))}{suffix}")
    if failures:
        first = next(err for err in checks.errors if isinstance(err, VerificationError))
        more = f" (the first of {len(failures)} failures)" if len(failures) > 1 else ""
        raise type(first)(f"{first.message}{more}", hint=first.hint)
    if not json:
        stdout.print(f"[bold green]verified[/]: version {version}")
