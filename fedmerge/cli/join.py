"""`fedmerge join`: take part in a federation as a node."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from fedmerge.cli.output import JsonFlag, print_json, stderr
from fedmerge.cli.progress import node_progress
from fedmerge.config import parse_address
from fedmerge.errors import ConfigError, PendingKey, RevokedKey, UntrustedKey, reporting_os_errors
from fedmerge.lock import FolderLock
from fedmerge.node.node import Node
from fedmerge.node.witness import Witness
from fedmerge.training import load_trainer
from fedmerge.trust.passphrase import find_passphrase
from fedmerge.trust.sign import PublicKey, SigningKey

if TYPE_CHECKING:
    from fedmerge_client.link import GrpcLink


log = logging.getLogger(__name__)

APPROVAL_POLL_S = 2.0


def join(
    *,
    coordinator: Annotated[
        str, Parameter(help="The coordinator's address, HOST:PORT, or several, HOST:PORT,HOST:PORT, to try in turn.")
    ],
    trust: Annotated[Path, Parameter(help="The coordinator.pem that the operator gave you.")],
    token: Annotated[str | None, Parameter(help="The join token that the operator gave you, the first time.")] = None,
    data: Annotated[
        Path | None, Parameter(help="Training data, which stays here: JSON Lines, CSV, Parquet, text.")
    ] = None,
    test: Annotated[Path | None, Parameter(help="Held-out data; models are scored on it, and the scores sent.")] = None,
    key: Annotated[
        Path | None, Parameter(help="This site's private key. [default: HOME/node.key, made if missing]")
    ] = None,
    passphrase_file: Annotated[Path | None, Parameter(help="File with the key's passphrase, if it has one.")] = None,
    certificate: Annotated[
        Path | None, Parameter(help="A client certificate (PEM) of your own, if the coordinator asks for one.")
    ] = None,
    certificate_key: Annotated[Path | None, Parameter(help="Its private key (PEM).")] = None,
    home: Annotated[Path, Parameter(help="Folder for models, deltas and what is not sent yet.")] = Path(
        "fedmerge-node"
    ),
    base: Annotated[Path | None, Parameter(help="The base model, if it is here already; fetched otherwise.")] = None,
    name: Annotated[str | None, Parameter(help="What to call this node in its own messages.")] = None,
    trainer: Annotated[str, Parameter(help="How to fine-tune.")] = "text-classification",
    option: Annotated[
        tuple[str, ...],
        Parameter(help="A setting of the trainer, KEY=VALUE or TABLE.KEY=VALUE, such as text_column=body. Repeatable."),
    ] = (),
    keep_tuned: Annotated[bool, Parameter(negative=(), help="Keep each round's own fine-tune in HOME/rounds.")] = False,
    keep_rounds: Annotated[
        int,
        Parameter(
            validator=Number(gte=0),
            help="Keep the deltas of so many rounds in HOME/rounds, the last ones; 0 keeps all.",
        ),
    ] = 0,
    once: Annotated[
        bool, Parameter(negative=(), help="Do what is due now and end, for batch schedulers; 9 if nothing was due.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Train here, send signed deltas, and end with the merged model; started again, it goes on where it was."""
    try:
        for address in coordinator.split(","):
            parse_address(address)
    except ValueError as err:
        raise ConfigError(f"--coordinator {coordinator}: {err}") from err
    if (certificate is None) != (certificate_key is None):
        raise ConfigError("--certificate and --certificate-key go together: give both or neither")
    options: dict[str, object] = {"data": data, "test": test, **key_values(option)}
    options = {key: value for key, value in options.items() if value is not None}
    node_trainer = load_trainer(trainer, options)
    node_trainer.check()
    PublicKey.load(trust)  # a mistake here should not leave a new key behind
    key_path = key or home / "node.key"
    if key is None and not key_path.exists():
        SigningKey.generate().save(key_path)
    signing_key = SigningKey.load(key_path, partial(find_passphrase, file=passphrase_file))
    from fedmerge_client.link import GrpcLink

    own = (certificate_key, certificate) if certificate_key and certificate else None
    link = GrpcLink(coordinator, trust, signing_key, home=home, own_certificate=own)
    shown_as = name or signing_key.public.short
    with closing(link):
        if token is not None:
            link.enrol(token)
        _connect(link, coordinator, signing_key.public, key_path)
        # A trainer's own processes may outlive a node that was killed by some seconds.
        lock = FolderLock(home, who="node", hint="stop it first, or choose another --home", patience_s=10.0)
        with closing(lock), node_progress() as show:
            node = Node(
                link,
                node_trainer,
                signing_key,
                link.pin,
                home,
                base=base,
                keep_tuned=keep_tuned,
                keep_rounds=keep_rounds,
                witness=Witness(home, link, signing_key, link.pin, time.time),
                on_event=lambda event: show(shown_as, event),
            )
            model_dir = node.run_once() if once else node.run()
    if json:
        print_json({"model_dir": str(model_dir) if model_dir else None, "key_id": signing_key.public.key_id})
    elif model_dir is None:
        stderr.print("done for now; run it again for the next round")
    else:
        stderr.print("[bold]the merged model is here[/]")
        sys.stdout.write(f"{model_dir}\n")


def _connect(link: GrpcLink, coordinator: str, public_key: PublicKey, key_path: Path) -> None:
    """Open a session, once the operator has approved the key; or say how this site comes to be trusted."""
    is_waiting = False
    try:
        while True:
            try:
                link.connect()
                return
            except PendingKey as err:
                if not is_waiting:
                    log.warning("%s; the operator runs: fedmerge nodes approve NAME", err.message)
                is_waiting = True
                time.sleep(APPROVAL_POLL_S)
    except RevokedKey:
        raise
    except UntrustedKey as err:
        public_path = Path(f"{key_path}.pub")
        with reporting_os_errors(public_path):
            public_path.write_text(public_key.pem())
        raise UntrustedKey(
            f"{coordinator} does not trust this site's key {public_key.short}",
            hint=f"send {public_path} to the operator, who runs: fedmerge keys trust {public_path.name} --name YOU",
        ) from err


def key_values(options: tuple[str, ...]) -> dict[str, object]:
    """Parse the KEY=VALUE pairs of --option; raise `ConfigError` for one that is none."""
    values: dict[str, object] = {}
    for option in options:
        name, separator, value = option.partition("=")
        if not (separator and name):
            raise ConfigError(f"--option {option}: expected KEY=VALUE")
        table, dot, key = name.partition(".")
        if not dot:
            values[name] = value
            continue
        inner = values.setdefault(table, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--option {option}: {table} was given a value of its own before")
        inner[key] = value
    return values
