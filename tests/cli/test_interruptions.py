"""Commands that are stopped, coordinators that are away, and disks that are full."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import psutil
import pytest

from fedmerge.trust.keys import TrustStore
from fedmerge.trust.sign import SigningKey
from tests.cli.commands import NO_ROOM, Running, fine_tune, make_classifier, write_config, write_data

Run: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]
NODES = '[[nodes]]\nname = "north"\ndata = "north.jsonl"\n[[nodes]]\nname = "south"\ndata = "south.csv"\n'
STOP_S = 5.0  # how long ctrl-C may take

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals, resource limits and mounts")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation's folder: a base model, data, and keys `north.key` and `south.key`, which are trusted."""
    folder = tmp_path_factory.mktemp("federation")
    make_classifier(folder / "base")
    write_data(folder)
    for name in ("north", "south"):
        SigningKey.generate().save(folder / f"{name}.key")
        TrustStore(folder / "trusted").add(SigningKey.load(folder / f"{name}.key").public, name)
    return folder


@pytest.fixture
def folder(federation: Path, tmp_path: Path) -> Path:
    shutil.copytree(federation, tmp_path / "f")
    write_config(tmp_path / "f", num_rounds=1)
    return tmp_path / "f"


Start: TypeAlias = Callable[..., Running]


@pytest.fixture
def start(folder: Path, clean_environment: dict[str, str]) -> Iterator[Start]:
    """`start("serve")` starts a command in `folder`; what still runs at the end is killed."""
    started: list[Running] = []

    def start(*arguments: str | Path) -> Running:
        started.append(Running(folder, clean_environment, *arguments))
        return started[-1]

    yield start
    for command in started:
        command.child.kill()
        command.child.wait()


def serve(start: Start) -> tuple[Running, list[str]]:
    """Start a coordinator; return it, and the arguments with which nodes join it."""
    coordinator = start("serve", "--json")
    coordinator.wait_for("round 1 open")
    ready = json.loads(next(line for line in coordinator.log.splitlines() if line.startswith('{"address"')))
    return coordinator, ["join", "--coordinator", ready["address"], "--trust", ready["bundle"]]


def node(name: str, *, home: str | Path | None = None) -> list[str]:
    data = {"north": "north.jsonl", "south": "south.csv"}[name]
    return ["--key", f"{name}.key", "--data", data, "--home", str(home or name)]


def plain_lines(log: str) -> list[str]:
    """Return the lines that are no log records."""
    return [line for line in log.splitlines() if not line.startswith("{")]


def test_ctrl_c_ends_a_coordinator_and_a_node_that_wait(start: Start) -> None:
    coordinator, join = serve(start)
    north = start(*join, *node("north"))
    north.wait_for("waiting for the others")
    code, seconds = coordinator.stop(signal.SIGINT)
    assert (code, plain_lines(coordinator.log)) == (0, [])
    assert seconds < STOP_S
    # The node goes on trying to reach it; ctrl-C ends that too.
    code, seconds = north.stop(signal.SIGINT)
    assert (code, plain_lines(north.log)) == (130, ["interrupted"])
    assert seconds < STOP_S


def test_a_node_is_stopped_while_it_trains_and_goes_on_later(folder: Path, start: Start) -> None:
    path = folder / "fedmerge.toml"
    path.write_text(path.read_text().replace("steps = 3", "steps = 100000"))
    _, join = serve(start)
    for number, code, last_words in [(signal.SIGINT, 130, ["interrupted"]), (signal.SIGTERM, 143, [])]:
        north = start(*join, *node("north"))
        north.wait_for("training")
        stopped, seconds = north.stop(number)
        assert (stopped, plain_lines(north.log)) == (code, last_words)
        assert seconds < STOP_S
        (outbox,) = (folder / "north" / "rounds").iterdir()
        assert not (outbox / "statement.json").exists()


def test_a_simulation_in_processes_takes_its_children_with_it(folder: Path, start: Start) -> None:
    write_config(folder, extra=NODES)
    shutil.rmtree(folder / "trusted")
    simulation = start("simulate", "--processes")
    children: list[psutil.Process] = []
    while len(children) < 3:  # a coordinator and two nodes
        assert simulation.child.poll() is None, simulation.log
        time.sleep(0.1)
        children = psutil.Process(simulation.child.pid).children(recursive=True)
    code, seconds = simulation.stop(signal.SIGINT)
    assert (code, plain_lines(simulation.log)) == (130, ["interrupted"])
    assert seconds < 2 * STOP_S
    _, alive = psutil.wait_procs(children, timeout=STOP_S)
    assert not alive


@pytest.mark.slow
def test_a_node_that_fails_ends_a_simulation_in_processes_at_once(folder: Path, start: Start) -> None:
    path = folder / "fedmerge.toml"
    (folder / "south.csv").write_text("text,label\nx,things.tol\n")  # shows only once the model is there
    path.write_text(path.read_text().replace("[train]", "deadline_s = 9999\n[train]") + NODES)
    shutil.rmtree(folder / "trusted")
    simulation = start("simulate", "--processes")
    assert simulation.wait() == 5
    (line,) = plain_lines(simulation.log)
    assert line.startswith("error: south failed with exit code 2: error: ")
    assert "south.csv:2: the model has no label 'things.tol'; did you mean 'things.tool'?" in line


def test_a_merge_that_does_not_fit_leaves_nothing(folder: Path, run: Run) -> None:
    for name in ("a", "b"):
        fine_tune(folder / "base", folder.parent / name, ord(name))
    program = f"{NO_ROOM.format(50_000)}\nimport sys\nfrom fedmerge.cli import main\nsys.exit(main())"
    result = run("merge", "a", "b", "--base", folder / "base", "--out", "m", python=program)
    assert (result.returncode, result.stdout) == (8, "")
    assert result.stderr.startswith("error: ")
    assert "model: could not write" not in result.stderr
    assert result.stderr.splitlines()[1:] == ["hint: is the disk full?"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["a", "b", "f"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(kib)` mounts a disk of so many KiB at a folder and returns it."""
    place = tmp_path / "disk"

    def mount(kib: int) -> Path:
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("this user can't mount a small disk")
        return place

    yield mount
    # Lazily, since what the test started may still have files open there.
    subprocess.run(["umount", "--lazy", str(place)], capture_output=True, check=False)


def test_a_coordinator_does_not_start_on_a_full_disk(
    folder: Path, small_disk: Callable[[int], Path], start: Start
) -> None:
    disk = small_disk(16)
    path = folder / "fedmerge.toml"
    path.write_text(path.read_text().replace('"tiny"', f'"tiny"\nstate = "{disk}/state"'))
    coordinator = start("serve")
    assert coordinator.wait() == 8
    error, *hint = plain_lines(coordinator.log)
    assert error.startswith(f"error: {disk}/state")
    assert hint == ["hint: is the disk full, or the file in use?"]


@pytest.mark.slow
def test_a_node_whose_disk_is_full_says_so_and_goes_on_when_there_is_room(
    folder: Path, small_disk: Callable[[int], Path], start: Start
) -> None:
    """The disk fills while the base is fetched; with more room, while the fine-tune is written; or the delta."""
    disk = small_disk(60)
    _, join = serve(start)
    for kib, place in [(60, "base/"), (130, "rounds/"), (190, "rounds/")]:
        subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)
        full = start(*join, *node("north", home=disk / "north"))
        assert full.wait() == 8
        error, hint = plain_lines(full.log)
        assert error.startswith(f"error: {disk}/north/{place}")
        assert hint.startswith("hint: ")
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    start(*join, *node("north", home=disk / "north")).wait_for("waiting for the others")


def fill(path: Path) -> None:
    """Write a file as large as the disk takes."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@pytest.mark.slow
def test_a_coordinator_whose_disk_fills_up_goes_on_when_there_is_room(
    folder: Path, small_disk: Callable[[int], Path], start: Start
) -> None:
    disk = small_disk(2048)
    path = folder / "fedmerge.toml"
    path.write_text(path.read_text().replace('"tiny"', f'"tiny"\nstate = "{disk}/state"'))
    coordinator, join = serve(start)
    filler = disk / "filler"
    fill(filler)
    nodes = [start(*join, *node(name)) for name in ("north", "south")]
    coordinator.wait_for("is full")
    filler.unlink()
    assert [command.wait() for command in nodes] == [0, 0], nodes[0].log
    versions = {plain_lines(command.log)[-1].rsplit("/", 1)[-1] for command in nodes}
    assert len(versions) == 1
    assert (disk / "state" / "models" / "round-0001" / "lineage.sig.json").exists()
    assert coordinator.stop(signal.SIGTERM)[0] == 0
