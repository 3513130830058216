"""What many nodes cost one coordinator: thousands that wait, dozens that upload, and some that fall silent."""

from __future__ import annotations

import hashlib
import queue
import resource
import shutil
import statistics
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeAlias

import psutil
from load_nodes import SPAWN, Coordinator, Crowd, Sender, be_sending, be_stalling, be_waiting, secret_of, serve_bare
from load_site import Payload, Site, cpu_s, payloads, signed, zeros
from processes import status_bytes
from shared import at_least, at_most, print_table

from fedmerge.store.database import Database
from fedmerge.store.ledger import Ledger

# Goals, and figures.
Found: TypeAlias = tuple[list[dict[str, Any]], dict[str, Any]]

MIB = 1 << 20
MAX_IDLE_MIB, MAX_UPLOADS_MIB = 250, 1024
NUM_PROCESSES = 2


def raise_open_files(wanted: int) -> None:
    """Allow this process and its children so many open files; say so and exit where that is not allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        sys.exit(f"{wanted} open files are needed, and this machine allows {hard}: ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def idle(folder: Path, *, quick: bool) -> Found:
    """Have nodes connect, open sessions and watch, and measure what they cost while nothing happens."""
    count, watched_s = (200, 20) if quick else (2000, 120)
    raise_open_files(4 * count)
    names = [f"node-{number:04}" for number in range(count)]
    rows, found = [], {}
    with ExitStack() as stack:
        site = stack.enter_context(Site(folder, names, zeros(MIB)))
        secrets = [secret_of(key) for key in site.keys.values()]
        ready = SPAWN.Queue()
        bare = SPAWN.Process(target=serve_bare, args=(folder / "bare.pem", ready), daemon=True)
        bare.start()
        stack.callback(bare.kill)
        assert bare.pid is not None
        contestants = {
            "bare gRPC": (bare.pid, Coordinator(ready.get(), folder / "bare.pem")),
            "ours": (site.child.pid, Coordinator(site.address, site.bundle)),
        }
        for name, (pid, coordinator) in contestants.items():
            process, before = psutil.Process(pid), status_bytes(pid, "VmRSS")
            began_s, began_cpu_s = time.perf_counter(), cpu_s(process)
            crowd = Crowd(be_waiting, coordinator, secrets, NUM_PROCESSES)
            for _ in range(count):
                crowd.get()
            connecting_s, connecting_cpu_s = time.perf_counter() - began_s, cpu_s(process) - began_cpu_s
            began_s, began_cpu_s = time.perf_counter(), cpu_s(process)
            time.sleep(watched_s)
            idle_cpu_ms = 1000 * (cpu_s(process) - began_cpu_s) / count / ((time.perf_counter() - began_s) / 60)
            rss, anonymous = status_bytes(pid, "VmRSS"), status_bytes(pid, "RssAnon")
            one = {"start_bytes": before, "rss_bytes": rss, "anonymous_bytes": anonymous,
                   "bytes_per_node": (rss - before) / count,
                   "connect_cpu_ms": 1000 * connecting_cpu_s / count, "connect_s": connecting_s,
                   "idle_cpu_ms_per_node_and_minute": idle_cpu_ms}  # fmt: skip
            if name == "ours":
                one["news_cpu_ms"], one["news_s"] = news(site, crowd, process, count)
            crowd.stop()
            found[name] = one
            rows.append([
                name, f"{before / MIB:.0f}", f"{rss / MIB:.0f}", f"{anonymous / MIB:.0f}",
                f"{one['bytes_per_node'] / 1024:.0f}", f"{one['connect_cpu_ms']:.1f}", f"{idle_cpu_ms:.2f}",
            ])  # fmt: skip
    print_table(
        [
            f"{count} nodes",
            "RSS MiB before",
            "with them",
            "anonymous",
            "KiB each",
            "CPU ms to connect one",
            "CPU ms a node and minute",
        ],
        rows,
    )
    ours = found["ours"]
    print(f"news to all of them: {ours['news_cpu_ms']:.0f} CPU ms, {ours['news_s']:.2f} s")
    return [at_most(MAX_IDLE_MIB, f"RSS with {count} idle nodes, MiB", ours["rss_bytes"] / MIB)], found


def news(site: Site, crowd: Crowd, process: psutil.Process, count: int) -> tuple[float, float]:
    """Have the round fail, which all are told; return the CPU milliseconds and the seconds until the last knows."""
    while not crowd.told.empty():
        crowd.told.get()
    began_cpu_s = cpu_s(process)
    site.command("rounds", "extend", "-100000", "--reason", "news")
    told_s = [crowd.get() for _ in range(count)]
    time.sleep(0.5)
    spent_s, ledger = cpu_s(process) - began_cpu_s, Ledger(Database(site.config.database_url()))
    (failed,) = [entry for entry in ledger.entries if entry.event.kind == "round_failed"]
    ledger.close()
    return 1000 * spent_s, max(told_s) - failed.at_s


def root_of(path: Path) -> str:
    """Return the Merkle root (RFC 6962) of a file's MiBs, by its definition."""

    def head(leaves: list[bytes]) -> bytes:
        if len(leaves) == 1:
            return leaves[0]
        split = 1 << (len(leaves) - 1).bit_length() - 1
        return hashlib.sha256(b"\x01" + head(leaves[:split]) + head(leaves[split:])).digest()

    with path.open("rb") as file:
        return head([hashlib.sha256(b"\x00" + data).digest() for data in iter(lambda: file.read(MIB), b"")]).hex()


def senders(site: Site, names: list[str], made: list[Payload]) -> list[Sender]:
    spec, digest = site.spec()
    keys = [site.keys[name] for name in names]
    return [
        Sender(secret_of(key), signed(payload, key, spec, digest).SerializeToString(), payload)
        for key, payload in zip(keys, made, strict=True)
    ]


def uploads(folder: Path, *, quick: bool) -> Found:
    """Have nodes upload all at once, and look at the coordinator's memory the whole time."""
    count, payload_bytes = (9, 32 * MIB) if quick else (33, 256 * MIB)
    needed = (count + 4) * payload_bytes
    if (free := shutil.disk_usage(folder.parent).free) < needed + (1 << 30):
        sys.exit(
            f"{needed / 1e9:.0f} GB of disk and one to spare are needed in {folder.parent}, {free / 1e9:.0f} are free"
        )
    names, peaks = [f"node-{number:02}" for number in range(count)], {"RssAnon": 0, "VmRSS": 0}
    with Site(folder, names, zeros(payload_bytes)) as site:
        made = payloads(site, site.spec()[0], count)
        everybody, start = senders(site, names, made), site.memory()
        alone = Crowd(be_sending, Coordinator(site.address, site.bundle), everybody[:1], 1)
        begun_s, stored_s, _ = alone.get()
        alone_bytes_per_s = made[0].num_bytes / (stored_s - begun_s)
        alone.stop()
        began_cpu_s = cpu_s(site.process)
        crowd, done = (
            Crowd(be_sending, Coordinator(site.address, site.bundle), everybody[1:], NUM_PROCESSES),
            threading.Event(),
        )

        def watch() -> None:
            while not done.wait(0.05):
                for key, peak in peaks.items():
                    peaks[key] = max(peak, site.memory(key))

        watcher = threading.Thread(target=watch)
        watcher.start()
        times = [crowd.get() for _ in everybody[1:]]
        done.set()
        watcher.join()
        crowd.stop()
        server_cpu_s, most = cpu_s(site.process) - began_cpu_s, max(site.memory("VmHWM"), peaks["VmRSS"])
        right = sum(root_of(site.blob(payload.root)) == payload.root for payload in made)
    total_bytes = sum(payload.num_bytes for payload in made[1:])
    streaming_s = max(stored for _, stored, _ in times) - min(begun for begun, _, _ in times)
    whole_s = max(ended for _, _, ended in times) - min(begun for begun, _, _ in times)
    found = {
        "uploads": count, "payload_bytes": made[0].num_bytes, "start_bytes": start, "peak_rss_bytes": most,
        "peak_anonymous_bytes": peaks["RssAnon"], "bytes_per_s": total_bytes / streaming_s,
        "bytes_per_s_with_commits": total_bytes / whole_s, "alone_bytes_per_s": alone_bytes_per_s,
        "server_cpu_s_per_gib": server_cpu_s / total_bytes * (1 << 30), "complete_and_right": right,
    }  # fmt: skip
    in_mib = [f"{num_bytes / MIB:.0f}" for num_bytes in (most, peaks["RssAnon"])]
    rows = [["1", f"{alone_bytes_per_s / 1e6:.0f}", "", ""]]
    rows.append([f"{count - 1} at once", f"{found['bytes_per_s'] / 1e6:.0f}", *in_mib])
    print_table([f"uploads of {made[0].num_bytes / MIB:.0f} MiB", "MB/s in all", "peak RSS MiB", "anonymous"], rows)
    print(f"RSS before: {start / MIB:.0f} MiB; with commits {found['bytes_per_s_with_commits'] / 1e6:.0f} MB/s")
    return [
        at_most(MAX_UPLOADS_MIB, f"most RSS with {count - 1} uploads at once, MiB", most / MIB),
        at_least(count, "uploads complete, and hashed right by other code", right),
    ], found


def stalled(folder: Path, *, quick: bool) -> Found:
    """Have an honest node upload with and without nodes that hold places and send nothing, coming back when cut."""
    trials, payload_bytes, places, idle_s = (3, 32 * MIB, 8, 12) if quick else (5, 64 * MIB, 32, 60)
    counts = {"none": 0, "all places but one": places - 1, "all places": places, "twice the places": 2 * places}
    honest = [f"honest-{number}" for number in range(trials * len(counts))]
    silent = [f"silent-{number:02}" for number in range(max(counts.values()))]
    took_s: dict[str, list[float]] = {name: [] for name in counts}
    cuts: list[float] = []
    limits = {"max_uploads": places, "idle_s": idle_s}
    with Site(folder, [*honest, *silent], zeros(payload_bytes), {"server": limits}) as site:
        spec, digest = site.spec()
        *made, never = payloads(site, spec, len(honest) + 1)
        stallers, coordinator = senders(site, silent, [never] * len(silent)), Coordinator(site.address, site.bundle)
        start, left = site.memory(), iter(zip(honest, made, strict=True))
        for _ in range(trials):
            for name, count in counts.items():
                crowd = Crowd(be_stalling, coordinator, stallers[:count], 1) if count else None
                for _ in range(min(count, places)):
                    while crowd and crowd.get() != "sent":
                        pass
                who, payload = next(left)
                path, link = payload.write(folder / "honest-payload"), site.link(who)
                begin = signed(payload, site.keys[who], spec, digest)
                link.connect()
                began_s = time.perf_counter()
                link.submit(begin.envelope, path, payload.leaves, lambda sent: None)
                took_s[name].append(time.perf_counter() - began_s)
                link.close()
                if crowd and name == "all places but one" and not cuts:  # nobody needs their places: they are cut later
                    cuts += ended(crowd, 1.5 * idle_s)
                if crowd:
                    crowd.stop()
        peak = site.memory("VmHWM")
    medians = {name: statistics.median(several) for name, several in took_s.items()}
    print_table(
        [f"silent uploads ({places} places)", "seconds for an honest one", "most", "ratio"],
        [
            [name, f"{median:.2f}", f"{max(took_s[name]):.2f}", f"{median / medians['none']:.2f}"]
            for name, median in medians.items()
        ],
    )
    print(f"silent ones were cut after {min(cuts):.1f} to {max(cuts):.1f} s (idle_s is {idle_s})")
    print(f"RSS from {start / MIB:.0f} to {peak / MIB:.0f} MiB")
    figures = {"took_s": took_s, "cut_after_s": cuts, "places": places, "idle_s": idle_s, "peak_rss_bytes": peak}
    return [
        at_most(
            1.25,
            "time of an honest upload beside silent ones in all places but one, to that alone",
            medians["all places but one"] / medians["none"],
        ),
        at_most(
            idle_s / 6 + 6, "seconds for an honest upload where silent ones have all places", medians["all places"]
        ),
        at_most(idle_s + 2, "seconds after which a silent upload is cut", max(cuts)),
    ], figures


def ended(crowd: Crowd, within_s: float) -> list[float]:
    """Return after how many seconds of silence uploads were ended because nothing came."""
    found, until_s = [], time.monotonic() + within_s
    while time.monotonic() < until_s:
        with suppress(queue.Empty):
            told = crowd.told.get(timeout=1)
            if told != "sent" and "no chunk came" in told[1]:
                found.append(told[0])
    return found
