"""`fedmerge keys`: make a signing key, show its public half, and trust somebody else's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fedmerge.cli.output import JsonFlag, print_json, stderr
from fedmerge.errors import ConfigError, InputError, ResourceError
from fedmerge.files import write_new
from fedmerge.sign import NEVER_OVERWRITTEN, PublicKey, SigningKey, TrustStore, read_text


def new(
    path: Annotated[Path, Parameter(help="Where to write the private key; PATH.pub gets the public one.")],
    /,
    *,
    json: JsonFlag = False,
) -> None:
    """Make a signing key (Ed25519), readable by its owner alone."""
    public_path = Path(f"{path}.pub")
    key = SigningKey.generate()
    key.save(path)
    try:
        write_new(public_path, key.public.pem().encode(), if_exists=NEVER_OVERWRITTEN)
    except ResourceError:
        path.unlink()
        raise
    if json:
        print_json({"key_id": key.public.key_id, "private": str(path), "public": str(public_path)})
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
        print_json({"key_id": key.key_id, "pem": key.pem()})
    else:
        # Text before the block is allowed in a PEM file, so this output can be kept as a key file.
        sys.stdout.write(f"key id {key.key_id}\n{key.pem()}")


def trust(
    public_file: Annotated[Path, Parameter(name="PUBFILE", help="The node's public key file.")],
    /,
    *,
    name: Annotated[str, Parameter(help="What the node is called here.")],
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
    store = TrustStore(into or load_config(config or Path("fedmerge.toml")).federation.trusted)
    known_as = store.names().get(key.key_id, name)
    if known_as != name:
        raise InputError(f"{public_file}: this key is already trusted, as {known_as}")
    written = store.add(key, name)
    sys.stdout.write(f"trusted {name}, key id {key.key_id}, in {written}\n")


def _is_private(path: Path) -> bool:
    return "PRIVATE KEY-----" in read_text(path)
