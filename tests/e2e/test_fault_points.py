"""The few faults, of the thousands in `benchmarks/faults.py`, that once broke a federation of real processes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="it counts system calls there")
def test_what_once_broke_a_federation_does_not(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--part", "found", "--json", found],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(found.read_text())
    assert (figures["found"]["trials"], figures["found"]["broken"]) == (2, [])
    assert all(target["holds"] for target in figures["targets"])
