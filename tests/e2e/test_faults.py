"""Whatever is killed whenever, the published version is the one that an undisturbed run gives."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedmerge.sim.inline import prepare_nodes
from fedmerge.sim.results import result_of
from fedmerge.store.database import Database
from fedmerge.store.ledger import Ledger
from fedmerge.verify import verify_directory
from tests.conftest import ServerProcess, make_base, make_config
from tests.databases import PostgresServer
from tests.e2e.test_federation import TRAINERS, coordinator_key, kinds, run_simulated, running_nodes


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A server that a test may kill."""
    server = PostgresServer()
    yield server
    server.remove()


@pytest.mark.slow
def test_a_database_server_that_is_killed_in_the_middle_of_a_round_costs_only_time(
    tmp_path: Path, own_postgres: PostgresServer
) -> None:
    folder = tmp_path / "deployed"
    make_base(folder / "base")
    extra = f"[store]\ndatabase = '{own_postgres.new_database()}'\n"
    config, path = make_config(folder, num_rounds=2, extra=extra)
    prepare_nodes(config, list(TRAINERS))
    server = ServerProcess(path)
    results: dict[str, Path] = {}
    with running_nodes(folder, server, ("north",), results):
        wait_for(config.database_url(), lambda found: "delta_accepted" in found)
        own_postgres.kill()
        with running_nodes(folder, server, ("south",), results):
            time.sleep(2)  # south's delta waits for the database
            own_postgres.start()
            wait_for(config.database_url(), lambda found: found.count("round_opened") == 2)
            own_postgres.kill()
            own_postgres.start()
    assert server.stop() == 0
    assert sorted(results) == ["north", "south"]
    config, _ = make_config(folder, num_rounds=2, extra=extra)
    result = result_of(config)
    assert result.version == run_simulated(tmp_path / "undisturbed", num_rounds=2).version
    verify_directory(result.model_dir, coordinator_key(folder))
    ledger = Ledger(Database(config.database_url()))
    assert [kinds(ledger).count(kind) for kind in ("delta_accepted", "round_published")] == [4, 2]
    ledger.close()


@pytest.mark.slow
def test_a_coordinator_killed_at_random_moments_publishes_what_it_would_have(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    make_base(folder / "base")
    config, path = make_config(folder)
    prepare_nodes(config, list(TRAINERS))
    server = ServerProcess(path)
    moments = random.Random(7)
    results: dict[str, Path] = {}
    with running_nodes(folder, server, tuple(TRAINERS), results):
        for _ in range(4):
            time.sleep(moments.uniform(0.0, 2.0))
            server.kill()
            server = ServerProcess(path, listen=server.address)
    assert server.stop() == 0
    assert sorted(results) == sorted(TRAINERS)
    result = result_of(config)
    assert result.version == run_simulated(tmp_path / "undisturbed").version
    verify_directory(result.model_dir, coordinator_key(folder))


def wait_for(url: str, condition: Callable[[list[str]], bool]) -> None:
    """Wait for the ledger to hold certain kinds of events."""
    give_up_s = time.monotonic() + 90
    database = Database(url)
    try:
        while not condition(kinds(Ledger(database))):
            assert time.monotonic() < give_up_s
            time.sleep(0.02)
    finally:
        database.close()
