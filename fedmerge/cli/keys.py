"""`fedmerge keys`: make a signing key, show its public half, replace it by another, and trust somebody else's."""

from __future__ import annotations

import datetime as dt
import sys
import time
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fedmerge.cli.output import JsonFlag, print_json, stderr
from fedmerge.errors import ConfigError, InputError, ResourceError, RevokedKey, reporting_os_errors
from fedmerge.files import replace_file, write_new
from fedmerge.trust.keys import Role, TrustStore
from fedmerge.trust.passphrase import find_passphrase
from fedmerge.trust.sign import ENCRYPTED, NEVER_OVERWRITTEN, Algorithm, PublicKey, SigningKey, read_text


def new(
    path: Annotated[Path, Parameter(help="Where to write the private key; PATH.pub gets the public one.")],
    /,
    *,
    algorithm: Annotated[Algorithm, Parameter(help="What it signs with; p256 is for hardware and rules.")] = "ed25519",
    passphrase: Annotated[bool, Parameter(help="Encrypt it; the passphrase is asked for, twice.")] = False,
    passphrase_file: Annotated[Path | None, Parameter(help="Encrypt it with this file's first line.")] = None,
    json: JsonFlag = False,
) -> None:
    """Make a signing key, readable by its owner alone."""
    public_path = Path(f"{path}.pub")
    key = SigningKey.generate(algorithm)
    is_encrypted = passphrase or passphrase_file is not None
    key.save(path, find_passphrase(path, passphrase_file, is_new=True) if is_encrypted else None)
    try:
        write_new(public_path, key.public.pem().encode(), if_exists=NEVER_OVERWRITTEN)
    except ResourceError:
        path.unlink()
        raise
    if json:
        made = {"key_id": key.public.key_id, "algorithm": algorithm}
        print_json({**made, "private": str(path), "public": str(public_path)})
        return
    sys.stdout.write(f"key id   {key.public.key_id}\nprivate  {path}\npublic   {public_path}\n")
    stderr.print(
        f"keep {path} to yourself; send {public_path} to the coordinator's operator, "
        "and tell them the key id over another channel",
        markup=False,
    )


def show(
    path: Annotated[Path, Parameter(help="A private or public key file.")],
    /,
    *,
    json: JsonFlag = False,
) -> None:
    """Show the public half of a key: its id, and the PEM text that others need to trust it."""
    key = SigningKey.load(path).public if _is_private(path) else PublicKey.load(path)
    if json:
        print_json({"key_id": key.key_id, "algorithm": key.algorithm, "pem": key.pem()})
    else:
        # Text before the block is allowed in a PEM file, so this output can be kept as a key file.
        sys.stdout.write(f"key id {key.key_id} ({key.algorithm})\n{key.pem()}")


def trust(
    public_file: Annotated[Path, Parameter(name="PUBFILE", help="The node's public key file.")],
    /,
    *,
    name: Annotated[str, Parameter(help="What the node is called here.")],
    role: Annotated[Role, Parameter(help="An auditor may fetch all, and submit nothing.")] = "node",
    org: Annotated[
        str | None, Parameter(help="The organisation it belongs to. [default: the name]", show_default=False)
    ] = None,
    config: Annotated[
        Path | None, Parameter(help="The federation's configuration. [default: fedmerge.toml]", show_default=False)
    ] = None,
    into: Annotated[Path | None, Parameter(help="The folder of trusted keys, instead of --config.")] = None,
) -> None:
    """Add a node's public key to a federation. Compare the key id with its owner over another channel first."""
    from fedmerge.config import load_config

    if config is not None and into is not None:
        raise ConfigError("--config and --into exclude each other", hint="give the one that names the folder you mean")
    if _is_private(public_file):
        raise InputError(
            f"{public_file}: is a private key, which nobody but its owner should have",
            hint="ask for the .pub file; if this key was sent over a network, ask for a new one",
        )
    key = PublicKey.load(public_file)
    store = TrustStore(into or load_config(config or Path("fedmerge.toml"), to_merge=False).federation.trusted)
    known_as = store.names().get(key.key_id, name)
    if known_as != name:
        raise InputError(f"{public_file}: this key is already trusted, as {known_as}")
    written = store.add(key, name, org, role)
    sys.stdout.write(f"trusted {name}, key id {key.key_id}, in {written}\n")


def rotate(
    path: Annotated[Path, Parameter(help="The private key file to replace; the old key stays in PATH.KEYID.")],
    /,
    *,
    coordinator: Annotated[str, Parameter(help="The coordinator's address, HOST:PORT.")],
    trust: Annotated[Path, Parameter(help="The coordinator.pem that the operator gave you.")],
    algorithm: Annotated[Algorithm, Parameter(help="What the new key signs with.")] = "ed25519",
    passphrase_file: Annotated[
        Path | None, Parameter(help="File with the key's passphrase; the new one's, too.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Replace this site's key by a new one, which the old one signs for; the coordinator then takes only the new one.

    Stop the node first. Interrupted anywhere, the same command finishes it.
    """
    from fedmerge_client.link import GrpcLink

    old, new = _successor(path, algorithm, passphrase_file)
    with closing(GrpcLink(coordinator, trust, old)) as link:
        try:
            link.rotate_key(new)
        except RevokedKey:
            with closing(GrpcLink(coordinator, trust, new)) as again:
                again.connect()  # accepted before an interruption, or this raises as well
    kept = _put_in_place(path, old, new)
    if json:
        print_json({"key_id": new.public.key_id, "replaced": old.public.key_id, "private": str(path)})
    else:
        sys.stdout.write(f"key id   {new.public.key_id}\nreplaced {old.public.key_id}, kept in {kept}\n")


def handover(
    config: Annotated[Path, Parameter(help="The federation's configuration, at the coordinator.")] = Path(
        "fedmerge.toml"
    ),
    /,
    *,
    algorithm: Annotated[Algorithm, Parameter(help="What the new key signs with.")] = "ed25519",
    passphrase_file: Annotated[
        Path | None, Parameter(help="File with the key's passphrase; the new one's, too.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Replace the coordinator's key by a new one, which the old one signs for; nodes follow by themselves.

    Stop the coordinator first, and those that stand by for it. Interrupted anywhere, the same command finishes it.
    """
    from fedmerge.config import load_config
    from fedmerge.coordinator.ownership import open_seat
    from fedmerge.events import HandedOver
    from fedmerge.rounds.journal import Journal
    from fedmerge.statements.handover import sign_handover

    settings = load_config(config, to_merge=False)
    if settings.store.database is None and not (settings.federation.state / "ledger.sqlite").exists():
        raise InputError(f"{settings.federation.state}: holds no federation yet", hint="start it: fedmerge serve")
    path = settings.federation.key
    old, new = _successor(path, algorithm, passphrase_file)
    with closing(open_seat(settings, time.monotonic)) as seat:
        seat.take()
        journal = Journal(seat.open_ledger(), old, time.time)
        *given_up, current = journal.own_keys.values()
        if current == old.public:
            created = journal.created
            journal.append(HandedOver(handover=sign_handover(created.federation, created.run, old, new)))
        elif current != new.public or old.public not in given_up:
            raise InputError(f"{path}: is not the key of this federation, {current.short}")
    kept = _put_in_place(path, old, new)
    if json:
        print_json({"key_id": new.public.key_id, "replaced": old.public.key_id, "private": str(path)})
        return
    sys.stdout.write(f"key id   {new.public.key_id}\nreplaced {old.public.key_id}, kept in {kept}\n")
    stderr.print("start the coordinator again: nodes follow; newcomers need the coordinator.pem that it writes then")


def ca(
    folder: Annotated[Path, Parameter(name="DIR", help="The new folder, for server.ca in fedmerge.toml.")],
    /,
    *,
    days: Annotated[int, Parameter(help="How long the authority lasts.")] = 3650,
    passphrase: Annotated[bool, Parameter(help="Encrypt its key; the passphrase is asked for, twice.")] = False,
    passphrase_file: Annotated[Path | None, Parameter(help="Encrypt its key with this file's first line.")] = None,
) -> None:
    """Make a federation's own certificate authority, for the coordinator's certificate and those of nodes."""
    from fedmerge.trust.certificates import CA_KEY, Authority

    if not 1 <= days <= 36500:
        raise ConfigError(f"--days {days}: should be from 1 to 36500")
    password = None
    if passphrase or passphrase_file is not None:
        password = find_passphrase(folder / CA_KEY, passphrase_file, is_new=True)
    Authority.create(folder, dt.datetime.now(dt.UTC), dt.timedelta(days=days), password)
    sys.stdout.write(f"certificate authority in {folder}\n")
    stderr.print(f'keep {folder / CA_KEY} to yourself, and set under [server]: ca = "{folder}"', markup=False)


def _successor(path: Path, algorithm: Algorithm, passphrase_file: Path | None) -> tuple[SigningKey, SigningKey]:
    """Return a key and the one to follow it, which is made in PATH.next, encrypted if the first is, or found there."""
    passphrase = cache(lambda key_path: find_passphrase(path, passphrase_file))
    old, next_path = SigningKey.load(path, passphrase), Path(f"{path}.next")
    if not next_path.exists():
        password = passphrase(path) if ENCRYPTED in read_text(path) else None
        SigningKey.generate(algorithm).save(next_path, password)
    return old, SigningKey.load(next_path, passphrase)


def _put_in_place(path: Path, old: SigningKey, new: SigningKey) -> Path:
    """Put the new key at PATH, and return where the old one is kept."""
    kept = Path(f"{path}.{old.public.short}")
    replace_file(Path(f"{path}.pub"), new.public.pem().encode())
    with reporting_os_errors(path):
        kept.unlink(missing_ok=True)
        kept.hardlink_to(path)
        Path(f"{path}.next").replace(path)
    return kept


def _is_private(path: Path) -> bool:
    return "PRIVATE KEY-----" in read_text(path)
