"""`fedmerge export`: write what an outsider needs to check a federation's rounds without asking anybody."""

from __future__ import annotations

import re
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fedmerge.cli.output import JsonFlag, format_bytes, print_json, stdout
from fedmerge.config import load_config
from fedmerge.errors import ConfigError, InputError, ResourceError
from fedmerge.trust.passphrase import find_passphrase
from fedmerge.trust.sign import SigningKey


def export(
    config: Annotated[Path, Parameter(help="The federation's configuration, at the coordinator.")] = Path(
        "fedmerge.toml"
    ),
    /,
    *,
    out: Annotated[Path, Parameter(help="The new folder, or file where it is called NAME.tar.")],
    rounds: Annotated[
        str | None, Parameter(help="Of which rounds receipts, publications and deltas: 2, 1,3 or 2-4. [default: all]")
    ] = None,
    with_deltas: Annotated[
        bool, Parameter(negative=(), help="Put the deltas in, too, so that the merges can be done again.")
    ] = False,
    coordinator: Annotated[
        str | None,
        Parameter(help="An auditor's way: the coordinator's address, HOST:PORT, instead of a configuration."),
    ] = None,
    trust: Annotated[Path | None, Parameter(help="The coordinator.pem that the operator gave you.")] = None,
    key: Annotated[Path | None, Parameter(help="The auditor's private key.")] = None,
    passphrase_file: Annotated[Path | None, Parameter(help="File with the key's passphrase, if it has one.")] = None,
    json: JsonFlag = False,
) -> None:
    """Write all that it takes to check rounds offline: `fedmerge verify OUT --key coordinator.pem` does."""
    chosen = None if rounds is None else parse_rounds(rounds)
    if out.exists():
        raise ResourceError(f"{out}: already exists", hint="choose another --out; exports are never overwritten")
    if coordinator is None:
        _write(config, out, chosen, with_deltas, passphrase_file)
    else:
        if trust is None or key is None:
            raise ConfigError("--coordinator needs --trust and --key", hint="the coordinator.pem, and an auditor's key")
        if out.suffix != ".tar":
            raise ConfigError(f"--out {out}: a coordinator sends a file: call it NAME.tar")
        from fedmerge_client.link import GrpcLink

        signing_key = SigningKey.load(key, partial(find_passphrase, file=passphrase_file))
        with closing(GrpcLink(coordinator, trust, signing_key)) as link:
            link.fetch_export(out, chosen, with_deltas=with_deltas)
    files = [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else [out]
    num_bytes = sum(path.stat().st_size for path in files)
    if json:
        print_json({"path": str(out), "bytes": num_bytes})
    else:
        stdout.print(f"exported to {out}: {format_bytes(num_bytes)}", markup=False)


def _write(config_path: Path, out: Path, rounds: list[int] | None, with_deltas: bool, passphrase: Path | None) -> None:
    config = load_config(config_path)
    state = config.federation.state
    if not state.is_dir():
        raise InputError(f"{state}: no federation's state", hint="start one with: fedmerge serve")
    from fedmerge.publishing.export import export as write_export
    from fedmerge.store.database import Database
    from fedmerge.store.ledger import Ledger

    key = SigningKey.load(config.federation.key, partial(find_passphrase, file=passphrase))
    with closing(Ledger(Database(config.database_url()))) as ledger:
        write_export(ledger, config.open_blobs(), state / "models", key, out, rounds=rounds, with_deltas=with_deltas)


def parse_rounds(text: str) -> list[int]:
    """Return the rounds that `2`, `1,3` or `2-4` stand for; raise `ConfigError` for anything else."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part.strip())
        if match is None:
            raise ConfigError(f"--rounds {text:.60}: expected numbers such as 2, 1,3 or 2-4")
        first = int(match[1])
        found |= set(range(first, int(match[2] or first) + 1))
    return sorted(found)
