"""Mutants of delta and step files, by the thousand, as `benchmarks/fuzz.py` makes them; and bugs that they find."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        spec.loader.exec_module(module)
    return module


def test_every_mutant_is_refused_by_name_or_decodes_to_what_the_plan_says(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzz.small_frames(monkeypatch.setattr)
    fuzzer = fuzz.Fuzzer(tmp_path)
    num_mutants = sum(fuzzer.run(seed) for seed in range(1_000_000, 1_000_800))
    assert num_mutants > 4_000
    # Both outcomes of most mutations: they reach past every check, and are stopped by some.
    for mutation in ("replace_bytes", "fill", "scramble", "set_float", "exchange"):
        assert fuzzer.counts[mutation, "refused"] > 20
        assert fuzzer.counts[mutation, "decoded"] > 20
    assert sum(fuzzer.counts[kind, "refused"] for kind, _ in fuzzer.counts if kind.startswith("file")) > 20


@pytest.mark.parametrize("bug", ["indices", "expansion", "steps"])
def test_a_check_that_is_missing_is_found(
    bug: str, fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzz.small_frames(monkeypatch.setattr)
    fuzzer = fuzz.Fuzzer(tmp_path)
    fuzz.PLANTED[bug](monkeypatch.setattr)
    with pytest.raises(fuzz.Failure):
        sum(map(fuzzer.run, range(200)))
