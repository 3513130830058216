"""`fedmerge audit`: compare what members were shown, to catch a coordinator that tells two histories."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fedmerge.cli.output import JsonFlag, print_json, stdout
from fedmerge.errors import ConfigError
from fedmerge.statements.handover import Pin, handovers_in
from fedmerge.transparency.audit import read_checkpoints, require_continued, require_one_history
from fedmerge.trust.passphrase import find_passphrase
from fedmerge.trust.sign import PublicKey, SigningKey, read_text


def audit(
    paths: Annotated[
        list[Path],
        Parameter(name="NOTES", help="Checkpoints of several members: files, or folders with LOG.note files in them."),
    ],
    /,
    *,
    trust: Annotated[Path, Parameter(help="The coordinator.pem that the operator gave you.")],
    coordinator: Annotated[
        str | None, Parameter(help="The coordinator's address, to have it prove that its log continues all of them.")
    ] = None,
    key: Annotated[Path | None, Parameter(help="A member's private key, for --coordinator.")] = None,
    passphrase_file: Annotated[Path | None, Parameter(help="File with the key's passphrase, if it has one.")] = None,
    json: JsonFlag = False,
) -> None:
    """Compare the log checkpoints that members kept; exits with 3 when the coordinator told two histories."""
    if (coordinator is None) != (key is None):
        raise ConfigError("--coordinator and --key go together: give both or neither")
    pin = Pin(PublicKey.load(trust))
    pin.follow(read_text(path) for path in handovers_in([path for path in paths if path.is_dir()]))
    shown = read_checkpoints(paths, pin.ever.values())
    num_sizes = require_one_history(shown)
    now_size = None
    if coordinator is not None and key is not None:
        from fedmerge_client.link import GrpcLink

        signing_key = SigningKey.load(key, partial(find_passphrase, file=passphrase_file))
        with closing(GrpcLink(coordinator, trust, signing_key)) as link:
            link.connect()
            now_size = require_continued(shown, link.pin.ever.values(), link.growth).size
    if json:
        report = {"origin": shown[0].checkpoint.origin, "checkpoints": len(shown), "sizes": num_sizes}
        print_json({**report, "consistent": True, "continued_to": now_size})
        return
    stdout.print(f"[green]ok[/]  all {len(shown)} checkpoints are signed, and no two of one size differ")
    if now_size is not None:
        stdout.print(f"[green]ok[/]  the coordinator's log of {now_size} events continues each of them")
    elif num_sizes > 1:
        detail = f"they have {num_sizes} sizes; --coordinator has it prove that they are one history"
        stdout.print(f"[yellow]--[/]  {detail} (not checked)")
