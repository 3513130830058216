"""`fedmerge serve`: run the coordinator of a federation."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from fedmerge.cli.output import JsonFlag, print_json, stderr
from fedmerge.config import load_config
from fedmerge.config.base import prepare_base

if TYPE_CHECKING:
    from fedmerge_server.run import Listening


def serve(
    config: Annotated[Path, Parameter(help="The federation's configuration.")] = Path("fedmerge.toml"),
    /,
    *,
    json: JsonFlag = False,
) -> None:
    """Run the coordinator until it is interrupted; started again, it goes on where it was."""
    from fedmerge_server.run import serve as serve_until_stopped

    settings = load_config(config)
    base_dir = prepare_base(settings)

    def announce(listening: Listening) -> None:
        if json:
            print_json({"address": listening.address, "bundle": str(listening.bundle)})
            sys.stdout.flush()
            return
        stderr.print(f"coordinator of [bold]{settings.federation.name}[/] on {listening.address}")
        stderr.print(f"give partners {listening.bundle}; they join with:", markup=False)
        stderr.print(
            f"  fedmerge join --coordinator {listening.address} --trust {listening.bundle} --key KEY --data FILE",
            markup=False,
        )

    asyncio.run(serve_until_stopped(settings, base_dir, on_ready=announce))
