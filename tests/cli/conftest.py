"""Running the command line as a person does: as a process, in a folder, with no FEDMERGE_ variable set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests import warm


@pytest.fixture
def clean_environment() -> dict[str, str]:
    # Importing flwr, as other tests do, sets one of gRPC's: its C++ part then logs what the command line says itself.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FEDMERGE_", "GRPC_"))}
    return kept | {"COLUMNS": "80", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


@pytest.fixture
def run(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run("keys", "show", path)` runs `fedmerge keys show PATH` in `tmp_path`; `python=` runs a program instead."""

    def run(
        *arguments: str | Path, env: Mapping[str, str] | None = None, python: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        environ, timeout_s = clean_environment | dict(env or {}), 300
        if python is None:
            folder = tmp_path_factory.mktemp("printed")
            printed = folder / "stdout", folder / "stderr"
            process = warm.fedmerge(*arguments, folder=tmp_path, environ=environ, stdout=printed[0], stderr=printed[1])
            try:
                code = process.wait(timeout_s)
            finally:
                process.kill()
            return subprocess.CompletedProcess(arguments, code, *(path.read_text() for path in printed))
        return subprocess.run(
            [sys.executable, "-c", python, *map(str, arguments)],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run
