"""Power cuts: an ext4 file system in a file in memory, copied while it is written to, and the copy mounted."""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import fault_bugs
from fault_disk import call, mounting_why_not
from fault_federation import Before, Part, Run, Template, Trial

# Nothing reaches the disk but what is synced: no rename makes ext4 write early.
OPTIONS = "loop,noauto_da_alloc,commit=300"
IMAGE_MIB = 128
MEMORY = Path("/dev/shm")


def power_cut(after_s: float) -> Trial:
    """Cut the power of the machine that everything runs on, and start it all again."""

    def trial(run: Run) -> bool:
        scratch = Path(run.cleanup.enter_context(tempfile.TemporaryDirectory(dir=MEMORY, prefix="fedmerge-power-")))
        image, copy = scratch / "image", scratch / "copy"
        kept = run.folder.rename(run.folder.with_name(f"{run.folder.name}-kept"))
        run.folder.mkdir()
        with image.open("wb") as file:
            file.truncate(IMAGE_MIB << 20)
        call("mkfs.ext4", "-q", "-F", image)
        call("mount", "-o", OPTIONS, image, run.folder)
        run.cleanup.callback(call, "umount", run.folder)
        shutil.copytree(kept, run.folder, dirs_exist_ok=True)
        shutil.rmtree(kept)
        call("sync", "-f", run.folder)
        run.start_all()
        time.sleep(after_s)
        for name in run.processes:
            if run.code(name) is None:
                run.signal(name, signal.SIGSTOP)
        receipts = run.receipts()
        shutil.copyfile(image, copy)
        run.end()
        call("umount", run.folder)
        call("mount", "-o", OPTIONS, copy, run.folder)
        run.check_acknowledged(receipts)
        run.start_all()
        run.finish()
        return True

    return trial


def power_cuts(template: Template, draw: random.Random, quick: bool) -> Sequence[Trial]:
    """Cut the power at random moments."""
    return [power_cut(draw.uniform(0, 1)) for _ in range(5 if quick else 100)]


POWER = Part(
    "a power cut of the machine that coordinator and nodes run on",
    power_cuts,
    lambda template, draw: [power_cut(draw.uniform(0, 1)) for _ in range(20)],
    Before(fault_bugs.nothing_is_synced),
    mounting_why_not,
)
