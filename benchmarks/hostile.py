"""Malformed and forged requests by the million, against a coordinator that runs: nothing is taken, nothing breaks.

    python benchmarks/hostile.py [--quick] [--requests N] [--workers W] [--minutes M] [--seed S] [--plant HOLE]

A coordinator serves over TLS on loopback; two honest nodes complete a round before the attack, one during it and one at
its end. The attackers, in processes of their own, are strangers, an outsider with another federation's keys, a node
that was revoked, an auditor, and a node that takes part and lies. `hostile_requests.py` has what they send. Afterwards
the ledger is read without fedmerge: SQL, JSON, SHA-256 and bare Ed25519.

--plant HOLE serves with one check taken out (`HOLES`): the run must find it, or it proves little. Without --plant, a
short run with each hole follows. The peer is the server itself: an honest round before the attack beside the one
during it, and the server's CPU time for a forged call beside that for an honest one (a nonce).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import multiprocessing
import os
import queue
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from hostile_requests import Attack, Attacker, Known, raw_bytes
from safetensors.torch import save_file
from shared import at_least, at_most, print_table, report

from fedmerge.config import load_config
from fedmerge.node.node import Node
from fedmerge.tensors import Checkpoint
from fedmerge.training import TrainResult, TrainTask
from fedmerge.trust.certificates import TLS_NAME
from fedmerge.trust.keys import TrustStore
from fedmerge.trust.sign import SigningKey
from fedmerge_client.link import GrpcLink

HONEST = ("north", "south")
NUM_ROUNDS = 3
MAX_GROWTH_MB = 24.0
WARM_UP = 0.15  # the share of requests after which memory is first looked at
IN_FLIGHT = 24
# What honest parties put in the ledger here.
EXPECTED = {
    "federation_created", "member_admitted", "member_revoked", "round_opened", "delta_accepted",
    "round_sealed", "deltas_screened", "merge_started", "merge_finished", "round_published",
}  # fmt: skip
CONFIG = """
[federation]
name = "hostile"
[model]
base = "base"
[server]
listen = "127.0.0.1:0"
[rounds]
num_rounds = 3
min_nodes = 2
grace_s = 1
deadline_s = 86400
"""


def _without(module: str, name: str, replacement: Callable[..., Any]) -> Callable[[], None]:
    def take_out() -> None:
        owner: Any = __import__(module.partition(":")[0], fromlist=["_"])
        for part in filter(None, module.partition(":")[2].split(".")):
            owner = getattr(owner, part)
        setattr(owner, name, replacement)

    return take_out


# A check that the server makes, and what stands in its place when it is taken out.
HOLES: dict[str, Callable[[], None]] = {
    "used nonces open sessions": _without("fedmerge_server.sessions:Sessions", "use", lambda self, nonce: None),
    "a statement may be of any round": _without("fedmerge.coordinator.intake", "admit", lambda *args, **kwargs: None),
    "files are found by any path": _without(
        "fedmerge.coordinator.coordinator:Coordinator", "artifact", lambda self, root: self.base.directory / root
    ),
}


class StepTrainer:
    """Adds noise to every tensor."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def check(self) -> None:
        """Accept anything."""

    def train(self, task: TrainTask) -> TrainResult:
        """Write the model plus noise."""
        base, generator = Checkpoint(task.model_dir), torch.Generator().manual_seed(self._seed + task.round)
        tuned = {name: base[name] + 0.01 * torch.randn(base[name].shape, generator=generator) for name in base}
        out = task.workspace / "tuned"
        out.mkdir(exist_ok=True)
        save_file(tuned, out / "model.safetensors")
        return TrainResult(out, 10)

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        """Have nothing to say."""
        return {}


class Site:
    """A federation in a folder, and its server as a child process, perhaps with a hole."""

    def __init__(self, folder: Path, hole: str | None = None) -> None:
        self.folder = folder
        (folder / "base").mkdir(parents=True)
        generator = torch.Generator().manual_seed(0)
        save_file({"matrix": torch.randn(512, 1024, generator=generator)}, folder / "base" / "model.safetensors")
        (folder / "base" / "config.json").write_text("{}")
        (folder / "fedmerge.toml").write_text(CONFIG)
        self.config = load_config(folder / "fedmerge.toml")
        self.trust = TrustStore(self.config.federation.trusted)
        self.keys = {name: SigningKey.generate() for name in (*HONEST, "liar", "gone", "auditor")}
        for name, key in self.keys.items():
            self.trust.add(key.public, name, role="auditor" if name == "auditor" else "node")
        serve = ["-m", "fedmerge"] if hole is None else [__file__, "--serve-with", hole]
        self._log = (folder / "serve.log").open("wb")
        self.server = subprocess.Popen(
            [sys.executable, *serve, "serve", str(folder / "fedmerge.toml"), "--json"],
            stdout=subprocess.PIPE, stderr=self._log, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.server.stdout is not None
        ready = json.loads(self.server.stdout.readline())
        self.address, self.bundle = ready["address"], Path(ready["bundle"])
        self.process = psutil.Process(self.server.pid)

    def link(self, name: str) -> GrpcLink:
        return GrpcLink(self.address, self.bundle, self.keys[name], patience_s=120)

    def honest_round(self) -> float:
        """Have both honest nodes take part in the round that is open; return the seconds until its model is out."""
        began_s, threads = time.perf_counter(), []
        for number, name in enumerate(HONEST):
            threads.append(threading.Thread(target=self._take_part, args=(name, number)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - began_s

    def _take_part(self, name: str, number: int) -> None:
        link, home, base = self.link(name), self.folder / name, self.folder / "base"
        node = Node(link, StepTrainer(number), self.keys[name], link.coordinator, home, base=base)
        first = None
        for view in link.watch():
            first = first or view.round
            if view.round > first:
                break
            node.react(view)
            if view.finished:
                break
        link.close()

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def rss_mb(self) -> float:
        if self.server.poll() is not None:
            sys.exit(f"the server died, with exit code {self.server.returncode}")
        return float(self.process.memory_info().rss) / 1e6

    def stop(self) -> bool:
        """Stop the server; return whether it was there, and ended as it should."""
        alive = self.server.poll() is None and self.process.is_running()
        self.server.terminate()
        code = self.server.wait(60)
        self._log.close()
        return alive and code == 0


def known_to_attackers(site: Site, other: Site) -> Known:
    """Return what attackers have in hand: keys, tokens, and what they saw on the wire."""
    links = {name: site.link(name) for name in site.keys}
    specs = {name: each.link(HONEST[0]) for name, each in (("own", site), ("other", other))}
    views = {name: next(view for view in link.watch() if view.spec_envelope) for name, link in specs.items()}
    tokens = {name: dict(link.connection.metadata())["fedmerge-session"] for name, link in links.items()}
    note = specs["other"].growth(0).note
    own_note = specs["own"].growth(0).note
    for link in (*links.values(), *specs.values()):
        link.close()
    site.trust.revoke("gone", "left")
    keys = {name: site.keys[name] for name in ("liar", "gone", "auditor")} | {"foreign": other.keys["liar"]}
    return Known(
        secrets={name: _secret(key) for name, key in keys.items()},
        honest_ids=[site.keys[name].public.key_id for name in HONEST],
        tokens={name: token for name, token in tokens.items() if name in ("liar", "gone", "auditor")},
        coordinator_id=links["liar"].coordinator.key_id,
        spec=views["own"].spec_envelope,
        other_spec=views["other"].spec_envelope,
        note=own_note,
        other_note=note,
        captured=captured_statements(site),
        certificate=site.bundle.read_bytes(),
    )


def _secret(key: SigningKey) -> bytes:
    assert isinstance(key.private, Ed25519PrivateKey)
    return key.private.private_bytes_raw()


def captured_statements(site: Site) -> list[bytes]:
    """Return the statements that honest nodes signed in the round before."""
    return [path.read_bytes() for name in HONEST for path in (site.folder / name).glob("rounds/*/statement.json")]


@dataclass(frozen=True)
class Order:
    """What an attackers' process is to do: so many requests, or as many as it can until `until_s` (Unix time)."""

    address: str
    known: Known
    seed: int
    num_requests: int
    until_s: float


async def attack(order: Order, count: Any) -> dict[str, Any]:
    """Send requests, `IN_FLIGHT` at a time, over several connections; return what came back, and what was taken."""
    address, known, num_requests, until_s = order.address, order.known, order.num_requests, order.until_s
    end = b"-----END CERTIFICATE-----"
    pem = known.certificate
    credentials = grpc.ssl_channel_credentials(pem[: pem.index(end) + len(end)] + b"\n")
    options = [("grpc.ssl_target_name_override", TLS_NAME), ("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.secure_channel(address, credentials, options) for _ in range(4)]
    attacker = Attacker(known, order.seed)
    codes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    taken: list[dict[str, str]] = []
    left = iter(range(num_requests))

    async def work(number: int) -> None:
        for index in left:
            if time.time() > until_s:
                return
            each = attacker.next()
            kinds[each.kind] += 1
            if each.raw is not None:
                codes[await asyncio.to_thread(raw_bytes, address, each.raw, each.in_tls)] += 1
            else:
                code, detail = await _call(channels[(number + index) % len(channels)], each)
                codes[code] += 1
                if code == "OK" and each.must_fail and len(taken) < 20:
                    taken.append({"kind": each.kind, "method": each.method, "answer": detail})
            with count.get_lock():
                count.value += 1

    await asyncio.gather(*(work(number) for number in range(IN_FLIGHT)))
    for channel in channels:
        await channel.close()
    return {"codes": dict(codes), "kinds": dict(kinds), "taken": taken}


async def _call(channel: grpc.aio.Channel, each: Attack) -> tuple[str, str]:
    metadata = (("fedmerge-session", each.token),) if each.token is not None else ()
    try:
        if each.method == "DeltaService/UploadDelta":
            call = channel.stream_unary(f"/fedmerge.v1.{each.method}")
            answer = await call(iter(each.messages), metadata=metadata, timeout=30)
        elif each.method in ("RoundService/WatchRounds", "ModelService/FetchArtifact", "LogService/FetchExport"):
            stream = channel.unary_stream(f"/fedmerge.v1.{each.method}")(
                each.messages[0], metadata=metadata, timeout=30
            )
            answer = await stream.read()
            stream.cancel()
            answer = b"" if answer is grpc.aio.EOF else answer
        else:
            call = channel.unary_unary(f"/fedmerge.v1.{each.method}")
            answer = await call(each.messages[0], metadata=metadata, timeout=30)
    except grpc.aio.AioRpcError as err:
        return err.code().name, ""
    except asyncio.CancelledError:
        return "CANCELLED", ""
    return "OK", answer[:64].hex()


def attack_process(order: Order, count: Any, results: Any) -> None:
    """Be one of the attackers' processes."""
    results.put(asyncio.run(attack(order, count)))


def ledger_facts(folder: Path, honest: dict[str, bytes]) -> dict[str, Any]:
    """Read the ledger without fedmerge's code; return how many events there are by kind, and what is wrong."""
    with sqlite3.connect(f"file:{folder / 'state' / 'ledger.sqlite'}?mode=ro", uri=True) as database:
        rows = database.execute("select number, at_s, body, hash from events order by number").fetchall()
    database.close()
    kinds: Counter[str] = Counter()
    problems, head = [], hashlib.sha256(b"fedmerge.ledger.v1").digest()
    for number, at_s, body, digest in rows:
        head = hashlib.sha256(head + number.to_bytes(8, "big") + at_s.hex().encode() + b"\n" + body).digest()
        if head.hex() != digest:
            problems.append(f"event {number} does not continue the chain")
        event = json.loads(body)
        kinds[event["kind"]] += 1
        if event["kind"] == "delta_accepted":
            envelope = json.loads(event["statement_envelope"])
            payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"]
            (signature,) = envelope["signatures"]
            pae = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
            try:
                key = load_pem_public_key(honest[event["node_id"]])
                assert isinstance(key, Ed25519PublicKey)
                key.verify(base64.b64decode(signature["sig"]), pae)
            except (KeyError, InvalidSignature) as err:
                problems.append(f"event {number}: a delta that no honest node signed ({type(err).__name__})")
    problems += [
        f"{number} events {kind}, which no honest party made" for kind, number in kinds.items() if kind not in EXPECTED
    ]
    return {"kinds": dict(kinds), "problems": problems}


@dataclass(frozen=True)
class Limits:
    """How much to send: so many requests, or as many as can be sent in `max_s`, from so many processes."""

    num_requests: int
    num_workers: int
    max_s: float


@dataclass
class Sent:
    """What came of an attack: each process's answers, the server's memory by requests so far, and what it all took."""

    found: list[dict[str, Any]]
    rss_mb: list[tuple[int, float]]
    took_s: float
    server_cpu_s: float
    honest_round_s: float


def send(site: Site, known: Known, limits: Limits, seed: int) -> Sent:
    """Attack, and have an honest round in the middle of it."""
    context = multiprocessing.get_context("spawn")
    count, results = context.Value("q", 0), context.Queue()
    share, until_s = limits.num_requests // limits.num_workers, time.time() + limits.max_s
    orders = [Order(site.address, known, seed + number, share, until_s) for number in range(limits.num_workers)]
    workers = [context.Process(target=attack_process, args=(order, count, results), daemon=True) for order in orders]
    sent, begun = Sent([], [], 0.0, site.cpu_s(), 0.0), threading.Event()

    def round_during() -> None:
        begun.wait()
        sent.honest_round_s = site.honest_round()

    honest = threading.Thread(target=round_during)
    began_s = last_s = time.perf_counter()
    for each in (*workers, honest):
        each.start()
    while len(sent.found) < len(workers):
        with suppress(queue.Empty):
            sent.found.append(results.get(timeout=0.5))
        sent.rss_mb.append((count.value, site.rss_mb()))
        sent.took_s = time.perf_counter() - began_s
        if max(count.value / limits.num_requests, sent.took_s / limits.max_s) > 1 / 3:
            begun.set()
        if time.perf_counter() > last_s + 60:
            last_s = time.perf_counter()
            print(f"  {count.value} requests, {sent.rss_mb[-1][1]:.0f} MB", file=sys.stderr, flush=True)
    sent.server_cpu_s = site.cpu_s() - sent.server_cpu_s
    begun.set()
    honest.join()
    return sent


def run(limits: Limits, seed: int, hole: str | None = None, keep_log: Path | None = None) -> dict[str, Any]:
    """Attack one server; return what was found."""
    with tempfile.TemporaryDirectory(prefix="fedmerge-hostile-") as scratch:
        site, other = Site(Path(scratch) / "own", hole), Site(Path(scratch) / "other")
        before_s = site.honest_round()
        known = known_to_attackers(site, other)
        other.stop()
        honest_call_s = _honest_calls(site)
        sent = send(site, known, limits, seed)
        after_s = site.honest_round()
        survived = site.stop()
        keys = {site.keys[name].public.key_id: site.keys[name].public.pem().encode() for name in HONEST}
        facts = ledger_facts(site.folder, keys)
        log = (site.folder / "serve.log").read_text(errors="replace")
        if keep_log is not None:
            keep_log.write_text(log)
    codes, kinds = (sum((Counter(each[what]) for each in sent.found), Counter[str]()) for what in ("codes", "kinds"))
    warm = [mb for number, mb in sent.rss_mb if number >= WARM_UP * kinds.total()]
    return {
        "requests": kinds.total(),
        "took_s": sent.took_s,
        "server_cpu_us_per_request": 1e6 * sent.server_cpu_s / kinds.total(),
        "server_cpu_us_per_honest_call": 1e6 * honest_call_s,
        "codes": dict(codes),
        "kinds": dict(kinds),
        "taken": [each for part in sent.found for each in part["taken"]],
        "problems": facts["problems"],
        "events": facts["kinds"],
        "survived": survived,
        "internal_errors": log.count("internal error"),
        "log_mb": len(log) / 1e6,
        "rss_mb": {
            "first": sent.rss_mb[0][1],
            "warm": warm[0],
            "last": warm[-1],
            "peak": max(mb for _, mb in sent.rss_mb),
        },
        "honest_round_s": {"before": before_s, "during": sent.honest_round_s, "after": after_s},
        "rounds_published": facts["kinds"].get("round_published", 0),
    }


def _honest_calls(site: Site, num_calls: int = 300) -> float:
    """Return the server's CPU seconds for an honest call: a nonce."""
    link = site.link(HONEST[0])
    link.connect()
    began_s = site.cpu_s()
    for _ in range(num_calls):
        link.connection.nonce()
    spent_s = site.cpu_s() - began_s
    link.close()
    return spent_s / num_calls


def show(found: dict[str, Any]) -> None:
    print_table(("what was sent", "requests"), [(kind, str(number)) for kind, number in sorted(found["kinds"].items())])
    print()
    print_table(("what came back", "times"), [(code, str(number)) for code, number in sorted(found["codes"].items())])
    rss, rounds = found["rss_mb"], found["honest_round_s"]
    ours_us, honest_us = found["server_cpu_us_per_request"], found["server_cpu_us_per_honest_call"]
    print(f"\n{found['requests']} requests in {found['took_s']:.0f} s, {found['log_mb']:.1f} MB of log")
    print(f"server CPU: {ours_us:.0f} us a request; {honest_us:.0f} us an honest call")
    print("server memory, MB: " + ", ".join(f"{when} {mb:.0f}" for when, mb in rss.items()))
    print("an honest round, s: " + ", ".join(f"{when} {took_s:.1f}" for when, took_s in rounds.items()))
    for each in [*found["taken"][:3], *found["problems"][:3]]:
        print(f"FOUND: {each}")


def main() -> None:
    """Attack, print, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20,000 requests, and 2,000 for each planted hole")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=20, help="stop the attack after so long, and say so")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plant", choices=HOLES)
    parser.add_argument("--log", type=Path, help="where to keep the server's log")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    num_requests = arguments.requests or (20_000 if arguments.quick else 1_000_000)
    limits = Limits(num_requests, arguments.workers, 60 * arguments.minutes)
    found = run(limits, arguments.seed, arguments.plant, arguments.log)
    show(found)
    holes = {}
    if arguments.plant is None:
        for hole in HOLES:
            few = Limits(2_000 if arguments.quick else 10_000, arguments.workers, 120)
            planted = run(few, arguments.seed, hole)
            holes[hole] = len(planted["taken"]) + len(planted["problems"])
            print(f"planted: {hole}: {'found' if holes[hole] else 'NOT FOUND'}")
    growth_mb = found["rss_mb"]["last"] - found["rss_mb"]["warm"]
    targets = [
        at_least(float(num_requests), "requests sent", found["requests"]),
        at_most(0.0, "requests that were taken, by their answers", len(found["taken"])),
        at_most(0.0, "things in the ledger that no honest party made", len(found["problems"])),
        at_least(1.0, "the server is the process that it was, and ends when asked", float(found["survived"])),
        at_most(0.0, "internal errors in the server's log", found["internal_errors"]),
        at_most(MAX_GROWTH_MB, "MB that the server grew by after warming up", growth_mb),
        at_least(float(NUM_ROUNDS), "rounds that honest nodes completed", found["rounds_published"]),
        *(at_least(1.0, f"planted hole is found: {hole}", float(number > 0)) for hole, number in holes.items()),
    ]
    report(targets, {"found": found, "holes": holes}, arguments.json)


if __name__ == "__main__":
    if "--serve-with" in sys.argv:
        place = sys.argv.index("--serve-with")
        HOLES[sys.argv[place + 1]]()
        from fedmerge.cli import main as fedmerge_main

        sys.exit(fedmerge_main(sys.argv[place + 2 :]))
    main()
