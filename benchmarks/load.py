"""What a coordinator takes: nodes that wait, uploads at once, silent ones, the speed of a stream, and of a round.

    python benchmarks/load.py [--quick] [--part NAME]... [--json FILE]

`idle`: nodes that have a session and watch, beside a gRPC server with nothing behind it. `uploads`: uploads at once,
beside one; the coordinator's memory the whole time, and what is stored hashed by other code. `stalled`: an honest
upload beside silent ones that come back when they are cut, and without them. `stream`: an upload and a download beside
bare gRPC, a TLS socket and a plain one, and what hashing, the disk and decoding take alone. `rounds`: what a round
takes beside training, and what Flower's deployed processes take; who leaves the machine no memory is stopped.

Both ends are on this machine and share its cores; what is compared is interleaved. `uploads` takes 9 GB of disk.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from load_many import idle, stalled, uploads
from load_rounds import rounds
from load_streams import stream
from shared import report

PARTS = {"stream": stream, "stalled": stalled, "uploads": uploads, "idle": idle, "rounds": rounds}


def main() -> None:
    """Do the parts, print tables, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", action="append", choices=list(PARTS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what was started is ended
    targets, figures = [], {}
    for name in arguments.part or PARTS:
        with tempfile.TemporaryDirectory(prefix="fedmerge-load-") as scratch:
            print(f"\n{name}", flush=True)
            goals, figures[name] = PARTS[name](Path(scratch) / "federation", quick=arguments.quick)
            targets += goals
    report(targets, figures, arguments.json)


if __name__ == "__main__":
    main()
