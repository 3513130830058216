"""Faults of the network between a node and its coordinator, and a node that sends what it should not."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import fault_bugs
import grpc
from fault_disk import call
from fault_federation import NODES, Before, Failed, Part, Run, Template, Trial, free_port
from fault_proxy import Line, forward

from fedmerge.v1 import delta_pb2
from fedmerge.wire import CHUNK_BYTES
from fedmerge_client.link import GrpcLink

CLONE_NEWNET = 0x40000000
SENT_BYTES = 3_700_000  # about what a node sends in all
WRONG_STREAMS = 100
KEEPALIVE_S = 80  # after so long a connection that fell silent is given up


def broken_line(line: Line) -> Trial:
    """Give one node a line that fails."""

    def trial(run: Run) -> bool:
        address = f"127.0.0.1:{free_port()}"
        run.help(forward, address, run.address, line).recv()
        run.node_addresses["north"] = address
        run.patience_s += KEEPALIVE_S if line.fault in ("silent", "trickle") else 0
        run.start_all()
        if line.fault == "trickle":
            for _ in run.patiently("the other node's delta"):
                delivered = {path.parts[-4] for path in run.receipts()}
                if "north" in delivered:
                    raise Failed("the slow node was first")
                if delivered:
                    break
        run.finish()
        return True

    return trial


def wrong_chunks(seed: int) -> Trial:
    """Have a node, in a session of its own, send streams of wrong chunks before the right ones."""

    def trial(run: Run) -> bool:
        run.before["north"] = [*run.before.get("north", []), Before(send_wrong_chunks, (seed,))]
        run.start_all()
        run.finish()
        return True

    return trial


def send_wrong_chunks(seed: int) -> None:
    """In a node: before each delta, send `WRONG_STREAMS` that are corrupt, truncated, too long, elsewhere or twice."""
    submit, draw = GrpcLink.submit, random.Random(seed)

    def hostile(
        self: GrpcLink, envelope: bytes, payload: Path, leaves: list[bytes], sent: Callable[[int], None]
    ) -> bytes:
        begin = delta_pb2.BeginUploadRequest(envelope=envelope, leaf_hashes=b"".join(leaves))
        upload_id = self.connection.call(lambda stubs: stubs.deltas.BeginUpload, begin).upload_id
        data = payload.read_bytes()
        chunks = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
        stored = 0
        for number in range(WRONG_STREAMS):
            at = stored // CHUNK_BYTES
            if number * len(chunks) >= (at + 1) * WRONG_STREAMS:  # now the right one, and once more
                stream = [(stored, chunks[at])] * 2
            else:
                stream = _wrong(chunks, at, draw)
            requests = [delta_pb2.UploadDeltaRequest(upload_id=upload_id, offset=o, data=d) for o, d in stream]
            try:
                self.connection.stubs.deltas.UploadDelta(
                    iter(requests), metadata=self.connection.metadata(), timeout=30
                )
            except grpc.RpcError:
                pass
            else:
                sys.exit("internal error: wrong chunks were taken")
            asked = delta_pb2.GetUploadRequest(upload_id=upload_id)
            now = self.connection.call(lambda stubs: stubs.deltas.GetUpload, asked).committed_bytes
            if now != stored + (len(chunks[at]) if stream[-1] == stream[0] and len(stream) == 2 else 0):
                sys.exit(f"internal error: {now} bytes are stored")
            stored = now
        return submit(self, envelope, payload, leaves, sent)

    GrpcLink.submit = hostile  # type: ignore[method-assign]


def _wrong(chunks: list[bytes], at: int, draw: random.Random) -> list[tuple[int, bytes]]:
    """Return offsets and chunks, of which the first is not what chunk `at` should be."""
    start, chunk = at * CHUNK_BYTES, chunks[at]
    flipped = bytearray(chunk)
    flipped[draw.randrange(len(chunk))] ^= 1 << draw.randrange(8)
    other = draw.choice([number for number in range(len(chunks)) if number != at])
    match draw.choice(["flip", "cut", "longer", "other", "elsewhere", "empty"]):
        case "flip":
            return [(start, bytes(flipped))]
        case "cut":
            return [(start, chunk[: draw.randrange(1, len(chunk))])]
        case "longer":
            return [(start, chunk + b"\0")]
        case "other":
            return [(start, chunks[other])]
        case "elsewhere":
            return [(other * CHUNK_BYTES, chunks[other]), (start, chunk)]
        case _:
            return [(start, b"")]


def bad_network(*, loss: int = 0, away_s: float = 0.0) -> Trial:
    """Have the nodes reach the coordinator over a link that loses packets, or is down for a while."""

    def trial(run: Run) -> bool:
        mark = run.address.rpartition(":")[2]
        here, there = f"fm{mark}a", f"fm{mark}b"
        for name in (here, there):
            call("ip", "netns", "add", name)
            run.cleanup.callback(call, "ip", "netns", "del", name)
        call("ip", "link", "add", here, "netns", here, "type", "veth", "peer", "name", there, "netns", there)
        for number, name in enumerate((here, there), 1):
            call("ip", "-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", name)
            for device in ("lo", name):
                call("ip", "-n", name, "link", "set", device, "up")
            if loss:
                rules = "add table inet f; add chain inet f i { type filter hook input priority 0; }; "
                rules += f"add rule inet f i numgen random mod 100 < {loss} drop"
                call("ip", "netns", "exec", name, "nft", rules)
        run.address = "10.77.0.1:8700"
        run.node_addresses = dict.fromkeys(NODES, run.address)
        for name in ("coordinator", *NODES):
            where = here if name == "coordinator" else there
            run.before[name] = [*run.before.get(name, []), Before(enter, (where,))]
        run.patience_s *= 3 if loss else 1
        run.start_all()
        if away_s:
            time.sleep(random.Random(mark).uniform(0, 0.8))
            call("ip", "-n", there, "link", "set", there, "down")
            time.sleep(away_s)
            call("ip", "-n", there, "link", "set", there, "up")
        run.finish()
        return True

    return trial


def enter(namespace: str) -> None:
    """Take this process's network to be a namespace's."""
    with Path(f"/run/netns/{namespace}").open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def namespaces_why_not() -> str:
    """Say why there can be no networks here; empty where there can."""
    if shutil.which("nft") is None or shutil.which("ip") is None:
        return "nft or ip is not installed (Debian: apt-get install nftables iproute2)"
    done = subprocess.run(["ip", "netns", "add", "fmprobe"], capture_output=True, text=True, check=False)
    if not done.returncode:
        call("ip", "netns", "del", "fmprobe")
    return done.stderr.strip()


def lines(template: Template, draw: random.Random, quick: bool) -> Sequence[Trial]:
    """Cut, falsify, end and delay connections at random bytes, from the handshake on."""

    def at() -> int:
        return draw.randrange(8_000) if draw.random() < 0.3 else draw.randrange(SENT_BYTES)

    faults = [("cut", 3, 100), ("corrupt", 2, 50), ("truncate", 1, 20), ("silent", 0, 8), ("trickle", 0, 4)]
    found = [
        Line(fault, at(), draw.randint(1, 4)) for fault, few, many in faults for _ in range(few if quick else many)
    ]
    found = [Line(line.fault, line.after_bytes, 1) if line.fault in ("silent", "trickle") else line for line in found]
    found += [Line(delay_s=0.05)] * (1 if quick else 5)
    return [broken_line(line) for line in found]


LINES = Part(
    "a line that is cut, corrupt, half-closed, silent, late, or has one byte a second",
    lines,
)
CHUNKS = Part(
    f"{WRONG_STREAMS} streams of wrong chunks by an honest node's session, before each delta",
    lambda template, draw, quick: [wrong_chunks(draw.getrandbits(32)) for _ in range(1 if quick else 10)],
    lambda template, draw: [wrong_chunks(draw.getrandbits(32)) for _ in range(2)],
    Before(fault_bugs.chunks_are_not_checked),
)
NETWORK = Part(
    "a network that loses a fifth of all packets, or is down for a while",
    lambda template, draw, quick: (
        [bad_network(loss=20) for _ in range(1 if quick else 20)]
        + [bad_network(away_s=draw.uniform(1, 5)) for _ in range(1 if quick else 20)]
    ),
    why_not=namespaces_why_not,
)
