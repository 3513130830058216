"""`fedmerge join`: take part in a federation as a node."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fedmerge.cli.output import JsonFlag, print_json, stderr
from fedmerge.cli.progress import node_progress
from fedmerge.errors import ConfigError, UntrustedKey
from fedmerge.node import Node
from fedmerge.sign import SigningKey
from fedmerge.training import load_trainer


def join(
    *,
    coordinator: Annotated[str, Parameter(help="The coordinator's address, HOST:PORT.")],
    trust: Annotated[Path, Parameter(help="The coordinator.pem that the operator gave you.")],
    data: Annotated[Path, Parameter(help="Training data that stays here: JSON Lines or CSV.")],
    test: Annotated[Path | None, Parameter(help="Held-out data; models are scored on it, and the scores sent.")] = None,
    key: Annotated[
        Path | None, Parameter(help="This site's private key. [default: HOME/node.key, made if missing]")
    ] = None,
    home: Annotated[Path, Parameter(help="Folder for models, deltas and what is not sent yet.")] = Path(
        "fedmerge-node"
    ),
    base: Annotated[Path | None, Parameter(help="The base model, if it is here already; fetched otherwise.")] = None,
    name: Annotated[str | None, Parameter(help="What to call this node in its own messages.")] = None,
    trainer: Annotated[str, Parameter(help="How to fine-tune.")] = "text-classification",
    option: Annotated[
        tuple[str, ...], Parameter(help="A setting of the trainer, KEY=VALUE, such as text_column=body. Repeatable.")
    ] = (),
    keep_tuned: Annotated[bool, Parameter(negative=(), help="Keep each round's own fine-tune in HOME/rounds.")] = False,
    json: JsonFlag = False,
) -> None:
    """Train here, send signed deltas, and end with the merged model; started again, it goes on where it was."""
    options: dict[str, object] = {"data": data, **_key_values(option)}
    if test is not None:
        options["test"] = test
    node_trainer = load_trainer(trainer, options)
    node_trainer.check()
    key_path = key or home / "node.key"
    signing_key = SigningKey.load_or_create(key_path) if key is None else SigningKey.load(key_path)
    from fedmerge_client.link import GrpcLink

    link = GrpcLink(coordinator, trust, signing_key)
    shown_as = name or signing_key.public.short
    try:
        with node_progress() as show:
            node = Node(
                link,
                node_trainer,
                signing_key,
                link.coordinator,
                home,
                base=base,
                keep_tuned=keep_tuned,
                on_event=lambda event: show(shown_as, event),
            )
            model_dir = node.run()
    except UntrustedKey as err:
        public_path = key_path.with_name(f"{key_path.name}.pub")
        if not public_path.exists():
            public_path.write_text(signing_key.public.pem())
        raise UntrustedKey(
            f"{coordinator} does not trust this site's key {signing_key.public.short}",
            hint=f"send {public_path} to the operator, who runs: fedmerge keys trust {public_path.name} --name YOU",
        ) from err
    finally:
        link.close()
    if json:
        print_json({"model_dir": str(model_dir), "key_id": signing_key.public.key_id})
    else:
        stderr.print("[bold]the merged model is here[/]")
        sys.stdout.write(f"{model_dir}\n")


def _key_values(options: tuple[str, ...]) -> dict[str, str]:
    values = {}
    for option in options:
        name, separator, value = option.partition("=")
        if not separator:
            raise ConfigError(f"--option {option}: expected KEY=VALUE")
        values[name] = value
    return values
