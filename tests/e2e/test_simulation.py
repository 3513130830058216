"""Federations in virtual time: what takes how long, who is late, and that engines make no difference."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest
import torch

from fedmerge.config import Config, load_config
from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.coordinator.ownership import open_seat
from fedmerge.errors import ConfigError, InputError, RoundFailed
from fedmerge.events import DeltaAccepted, RoundSealed
from fedmerge.node.events import NodeEvent
from fedmerge.rounds.state import Phase
from fedmerge.sim import ENGINES, FederationResult, Pool, World, local_processes, make_site, open_engine, simulate
from fedmerge.sim.inline import KnownNodes
from fedmerge.sim.sites import LocalLink
from fedmerge.store.database import Database
from fedmerge.store.entries import LedgerEntry
from fedmerge.store.ledger import Ledger
from fedmerge.tensors import Checkpoint
from fedmerge.verify import verify_directory
from tests.conftest import StepTrainer, make_config
from tests.e2e.test_federation import coordinator_key

NODES = {f"node-{number}": StepTrainer(number, num_examples=10) for number in range(6)}


class ThreadedTrainer(StepTrainer):
    """Takes a step as long as it has threads, where others only add in so many parts."""

    def step(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return super().step(name, like) * torch.get_num_threads()


THREADED = {name: ThreadedTrainer(trainer.seed) for name, trainer in NODES.items()}
DAY_S = 86_400.0
# Two that see each other's updates, and have to be the same two, and see the same, wherever and however often.
BAD = "bad_nodes = 2\nattack = 'little'"


def run(
    folder: Path, simulated: str = "", trainers: Mapping[str, StepTrainer] = NODES, train: str = "", **settings: object
):  # type: ignore[no-untyped-def]
    config, _ = make_config(folder, extra=f"{train}\n[simulate]\n{simulated}\n", **settings)  # type: ignore[arg-type]
    return simulate(config, folder / "base", trainers), config


def ledger(config: Config) -> list[LedgerEntry]:
    with closing(Database(config.database_url())) as database:
        return list(Ledger(database).entries)


def kinds(config: Config) -> list[str]:
    return [entry.event.kind for entry in ledger(config)]


def arrivals(config: Config) -> dict[tuple[int, str], float]:
    names = KnownNodes(config.federation.trusted).names()
    return {
        (entry.event.round, names[entry.event.node_id]): entry.at_s
        for entry in ledger(config)
        if isinstance(entry.event, DeltaAccepted)
    }


def test_a_delta_arrives_when_training_and_the_line_let_it(tmp_path: Path) -> None:
    simulated = "train_s = 600.0\nup_mbit_s = 0.5\ndown_mbit_s = 4.0\nlatency_s = 2.0\nspread = 0.7"
    result, config = run(tmp_path, simulated, num_rounds=2, rounds="grace_s = 0.0", min_nodes=6)
    at_s = arrivals(config)
    sizes = {
        (entry.event.round, entry.event.node_id): entry.event.payload_bytes
        for entry in ledger(config)
        if isinstance(entry.event, DeltaAccepted)
    }
    ids = {name: key_id for key_id, name in KnownNodes(config.federation.trusted).names().items()}
    for name in NODES:
        site = make_site(config.simulate, name)
        num_bytes = sizes[1, ids[name]]
        # Round 1 begins with the base model, which is there.
        assert at_s[1, name] == pytest.approx(site.train_s + 2.0 + num_bytes / site.up_bytes_per_s)
        fetched = 2.0 + result.fetched_bytes / 2 / site.down_bytes_per_s
        expected = site.train_s + fetched + 2.0 + sizes[2, ids[name]] / site.up_bytes_per_s
        assert at_s[2, name] - result.rounds[1].opened_s == pytest.approx(expected, rel=0.01)
    assert len({make_site(config.simulate, name).train_s for name in NODES}) == 6
    assert result.rounds[0].published_s == max(value for (number, _), value in at_s.items() if number == 1)


def test_who_comes_after_the_grace_is_not_merged_and_takes_part_again(tmp_path: Path) -> None:
    simulated = "train_s = 1000.0\nstragglers = 0.4\nstraggler_factor = 3.0\nseed = 1"
    result, config = run(tmp_path, simulated, num_rounds=4, min_nodes=2, rounds="grace_s = 500.0")
    slow = {name for name in NODES if make_site(config.simulate, name).train_s == 3000.0}
    assert 1 <= len(slow) <= 4
    at_s = arrivals(config)
    assert {name for number, name in at_s if number == 1} == set(NODES) - slow
    assert [each.published_s for each in result.rounds] == pytest.approx([1500.0, 3000.0, 4500.0, 6000.0])
    # Busy with round 1 until 3000 s, when round 3 opens.
    assert {name for number, name in at_s if number == 3} == set(NODES) - slow
    sealed = [entry.at_s for entry in ledger(config) if isinstance(entry.event, RoundSealed)]
    assert all(value <= sealed[number - 1] for (number, _), value in at_s.items())


def test_months_pass_where_partners_are_seldom_there(tmp_path: Path) -> None:
    rounds = f"grace_s = 0\ndeadline_s = {90 * DAY_S}"
    result, _ = run(tmp_path, "online = 0.1\ntrain_s = 3600.0\nseed = 2", num_rounds=3, min_nodes=6, rounds=rounds)
    assert DAY_S / 2 < result.rounds[-1].published_s < 90 * DAY_S
    assert all(each.num_deltas == 6 for each in result.rounds)


def test_a_file_says_who_is_there(tmp_path: Path) -> None:
    (tmp_path / "there.csv").write_text(
        "to_s,node,from_s\n" + "".join(f"{600 + 100 * number},node-{number},{number * 100}\n" for number in range(5))
    )
    simulated = "availability = 'there.csv'\navailability_period_s = 3600\ntrain_s = 300.0"
    _, config = run(tmp_path, simulated, num_rounds=2, min_nodes=6, rounds="deadline_s = 9000")
    began_s, at_s = ledger(config)[0].at_s, arrivals(config)
    for number in range(5):
        # Trained 300 s from when it came; node-5 has no row, and is always there.
        assert at_s[1, f"node-{number}"] == pytest.approx(began_s + 100 * number + 300.0)
    assert at_s[1, "node-5"] == pytest.approx(began_s + 300.0)
    # The second round opens at 700 s. The first two have left, and train when they come back, an hour after they came;
    # three leave while they train, and deliver then.
    expected = [3600 + 300, 3700 + 300, 3800, 3900, 4000, 1000]
    assert [at_s[2, f"node-{number}"] - began_s for number in range(6)] == pytest.approx(expected)


def test_who_leaves_for_good_is_not_waited_for(tmp_path: Path) -> None:
    """One leaves before the round, one while it trains; the federation goes on to its end without them."""
    (tmp_path / "there.csv").write_text("node,from_s,to_s\nnode-0,0,250\nnode-1,0,300\n")
    simulated = "availability = 'there.csv'\ntrain_s = 100.0"
    result, config = run(tmp_path, simulated, num_rounds=5, rounds="grace_s = 50")
    taken = [sorted(name for other, name in arrivals(config) if other == number) for number in (1, 2, 3, 4, 5)]
    everybody = sorted(NODES)
    assert taken == [everybody, everybody, everybody[2:], everybody[2:], everybody[2:]]
    assert result.rounds[-1].published_s == pytest.approx(200.0 + 3 * 150.0)
    assert [node.name for node in result.nodes if node.merged] == everybody[2:]


def test_a_round_that_failed_is_tried_again_when_it_failed_and_not_before(tmp_path: Path) -> None:
    """The world of the second run begins, as the first one's did, at 0."""
    (tmp_path / "there.csv").write_text("node,from_s,to_s\n" + "".join(f"node-{n},0,250\n" for n in range(4)))
    simulated = "availability = 'there.csv'\ntrain_s = 100.0"
    for min_nodes in (3, 2):
        config, _ = make_config(
            tmp_path, num_rounds=4, min_nodes=min_nodes, rounds="deadline_s = 500", extra=f"[simulate]\n{simulated}\n"
        )
        if min_nodes == 3:
            with pytest.raises(RoundFailed, match="2 of at least 3 nodes"):
                simulate(config, tmp_path / "base", NODES)
    result = simulate(config, tmp_path / "base", NODES)
    times = [entry.at_s for entry in ledger(config)]
    assert times == sorted(times)
    assert [each.num_deltas for each in result.rounds] == [6, 6, 2, 2]
    assert result.rounds[2].opened_s == pytest.approx(200.0 + 500.0)


def test_a_simulation_goes_on_when_it_was_stopped_whatever_the_time_is(tmp_path: Path) -> None:
    """Killed in round 2, and started again a year later, or on a clock that is a year behind: nobody is missed."""
    settings = "train_s = 50.0\nspread = 1.0\nonline = 0.5"
    for folder in ("plain", "later", "earlier"):
        extra = f"[simulate]\n{settings}\n"
        make_config(tmp_path / folder, num_rounds=2, min_nodes=6, rounds="deadline_s = 90000", extra=extra)
    versions = set()
    for folder, end_s in (("plain", 0.0), ("later", 8e7), ("earlier", 3e7)):
        config = load_config(tmp_path / folder / "fedmerge.toml")

        def stop(name: str, event: NodeEvent) -> None:
            if (event.kind, event.round) == ("upload", 2):
                raise KeyboardInterrupt

        start, base = (World(5e7) for _ in range(2)), tmp_path / folder / "base"
        if end_s:
            with pytest.raises(KeyboardInterrupt):
                simulate(config, base, NODES, world=next(start), on_event=stop)
        result = simulate(config, base, NODES, world=World(end_s) if end_s else next(start))
        assert [each.num_deltas for each in result.rounds] == [6, 6]
        assert result.rounds[-1].published_s < 30 * DAY_S
        versions.add(result.version)
    assert len(versions) == 1


def test_a_sample_is_asked_and_nobody_else_trains(tmp_path: Path) -> None:
    result, config = run(tmp_path, "train_s = 5.0", num_rounds=4, rounds="sample = 2")
    asked = [{name for other, name in arrivals(config) if other == number} for number in (1, 2, 3, 4)]
    assert [len(names) for names in asked] == [2, 2, 2, 2]
    assert len(set.union(*asked)) > 2
    assert {node.name for node in result.nodes} == set.union(*asked)
    assert all(node.merged for node in result.nodes)
    assert result.rounds[-1].published_s == pytest.approx(20.0)


def test_drop_outs_leave_the_round_to_its_deadline(tmp_path: Path) -> None:
    result, config = run(tmp_path, "dropout = 0.4\nseed = 5", num_rounds=3, min_nodes=1, rounds="grace_s = 50.0")
    taken = {number: {name for other, name in arrivals(config) if other == number} for number in (1, 2, 3)}
    for number, names in taken.items():
        assert names == {name for name in NODES if not make_site(config.simulate, name).drops_out(number)}
    assert len({frozenset(names) for names in taken.values()}) > 1
    assert result.rounds[-1].published_s == pytest.approx(50.0 * sum(len(names) < 6 for names in taken.values()))


def test_a_simulation_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    plain, _ = run(tmp_path / "plain", BAD, num_rounds=2)
    make_config(tmp_path / "killed", num_rounds=2, extra=f"[simulate]\n{BAD}\n")
    command = [sys.executable, "-m", "tests.e2e.test_simulation", str(tmp_path / "killed"), "to be killed"]
    assert subprocess.run(command, check=False).returncode == 9
    config = load_config(tmp_path / "killed" / "fedmerge.toml")
    assert kinds(config).count("round_published") == 1
    assert simulate(config, tmp_path / "killed" / "base", NODES).version == plain.version
    assert kinds(config).count("round_opened") == 2


def test_only_a_simulation_waits_for_no_disk(tmp_path: Path) -> None:
    config, _ = make_config(tmp_path)
    asked = "PRAGMA synchronous"
    for settings, expected in (({}, 2), ({"durable": False}, 0)):
        with closing(open_seat(config, time.monotonic, **settings)) as seat:
            assert seat.database.run(lambda connection: connection.exec_driver_sql(asked).scalar()) == expected


def test_a_node_that_was_asked_before_the_round_was_opened_again_misses_it(tmp_path: Path) -> None:
    config, _ = make_config(
        tmp_path,
        rounds="sample = 1\ndeadline_s = 100.0",
        min_nodes=1,
        extra="[simulate]\ntrain_s = 150.0\nspread = 0.0\n",
    )
    world, asked, events = World(), list[str](), list[tuple[str, str]]()

    def connect(coordinator: Coordinator, node_id: str) -> LocalLink:
        def try_again() -> None:
            state = coordinator.journal.state
            if state.phase == Phase.FAILED and not state.is_retried and state.attempt < 4:
                coordinator.operator.retry("again")
            if state.opened is not None and state.phase == Phase.OPEN:
                asked[state.attempt - 1 :] = state.opened.sample

        if not asked:
            coordinator.journal.on_change.append(try_again)
            try_again()
        return LocalLink(coordinator, node_id)

    with pytest.raises(RoundFailed):
        simulate(
            config,
            tmp_path / "base",
            NODES,
            world=world,
            connect=connect,
            on_event=lambda name, event: events.append((name, event.kind)),
        )
    assert len(set(asked)) > 1
    assert sum(kind == "missed" for _, kind in events) == 4


def merged(result: FederationResult) -> tuple[str, torch.Tensor]:
    return result.version, Checkpoint(result.model_dir)["matrix"]


@pytest.mark.slow
def test_every_engine_and_every_timing_gives_the_same_model(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    plain, _ = run(tmp_path / "plain", f"threads = 3\n{BAD}", THREADED, num_rounds=2, min_nodes=6)
    timing = "train_s = 50.0\nspread = 1.0\nup_mbit_s = 1.0"
    timed, _ = run(tmp_path / "timed", f"threads = 3\n{timing}\n{BAD}", THREADED, num_rounds=2, min_nodes=6)
    assert torch.get_num_threads() == before
    assert merged(timed)[0] == plain.version
    assert torch.equal(merged(plain)[1], merged(timed)[1])
    for name in ENGINES:
        assert run_in_a_process(tmp_path / name, name) == plain.version


def run_in_a_process(folder: Path, engine: str) -> str:
    """Simulate with an engine in a process of its own, as engines start threads and more, and return the version."""
    extra = f"[simulate]\nengine = '{engine}'\nthreads = 3\n{BAD}\n"
    make_config(folder, num_rounds=2, min_nodes=6, extra=extra)
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.test_simulation", str(folder)], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.split()[-1]


def main(folder: Path, *to_be_killed: str) -> None:
    """Simulate; or end at once when the first node of round 2 has sent its first bytes."""

    def end(name: str, event: NodeEvent) -> None:
        if to_be_killed and (event.kind, event.round) == ("upload", 2):
            os._exit(9)

    config = load_config(folder / "fedmerge.toml")
    with closing(open_engine(config.simulate)) as engine:
        trainers = NODES if to_be_killed else THREADED
        result = simulate(config, folder / "base", trainers, engine=engine, on_event=end)
    sys.stdout.write(f"{result.version}\n")


def test_nodes_share_the_threads_there_are(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        shared, _ = run(tmp_path / "shared", "workers = 2", THREADED)
        assert torch.get_num_threads() == 4
        said, _ = run(tmp_path / "said", "threads = 2", THREADED)
        pooled, _ = run(tmp_path / "pooled", "engine = 'pool'", THREADED)
        alone, _ = run(tmp_path / "alone", "workers = 1", THREADED)
    finally:
        torch.set_num_threads(before)
    assert shared.version == said.version == pooled.version != alone.version


def test_a_simulation_goes_on_with_the_threads_it_was_begun_with(tmp_path: Path) -> None:
    """On a machine with other cores, and with other workers, which threads otherwise follow from."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        whole, _ = run(tmp_path / "whole", "workers = 2", THREADED, num_rounds=2)
        run(tmp_path / "resumed", "workers = 2", THREADED, num_rounds=1)
        torch.set_num_threads(3)
        resumed, _ = run(tmp_path / "resumed", "workers = 1", THREADED, num_rounds=2)
        with pytest.raises(ConfigError, match=r"simulate\.threads was 2 and is 1"):
            run(tmp_path / "resumed", "threads = 1", THREADED, num_rounds=2)
    finally:
        torch.set_num_threads(before)
    assert resumed.version == whole.version


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "said"), [("ray", "no machine on Ray has 10000 cores"), ("flower", "num_cpus")])
def test_engines_are_not_waited_for_when_they_have_too_little(tmp_path: Path, engine: str, said: str) -> None:
    make_config(tmp_path, extra=f"[simulate]\nengine = '{engine}'\nray_cpus = 10000\n")
    command = [sys.executable, "-m", "tests.e2e.test_simulation", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *_, last = (line for line in done.stderr.splitlines() if "ResourceError: " in line)
    assert said in last


@pytest.mark.parametrize("text", ["{", "[]", "\\udc80"])
def test_settings_that_somebody_wrote_over_are_no_traceback(tmp_path: Path, text: str) -> None:
    _, config = run(tmp_path)
    (config.federation.state / "simulated.json").write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match=r"simulated\.json: not what a simulation wrote"):
        run(tmp_path)


def test_a_simulation_does_not_go_on_with_other_settings_unnoticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, config = run(tmp_path, "seed = 1", num_rounds=1)
    events = len(ledger(config))
    with pytest.raises(
        ConfigError, match=r"merge.method was \"auto\" and is \"ties\", simulate.seed was 1 and is 2"
    ) as caught:
        run(tmp_path, "seed = 2\n[merge]\nmethod = 'ties'", num_rounds=1)
    assert f"delete {config.federation.state} and {tmp_path / 'nodes'}" in (caught.value.hint or "")
    assert len(ledger(config)) == events
    assert run(tmp_path, "seed = 1\nengine = 'pool'", num_rounds=1)[0].version == first.version
    further, _ = run(tmp_path, "seed = 1", num_rounds=2)
    anew, _ = run(tmp_path / "anew", "seed = 1", num_rounds=2)
    assert (further.version, further.num_rounds) == (anew.version, 2)
    caplog.clear()
    run(tmp_path, "seed = 1\n[merge]\nmethod = 'ties'", num_rounds=3)
    assert 'goes on with other settings than before: merge.method was "auto" and is "ties"' in caplog.text
    with pytest.raises(ConfigError, match="begun with other settings"):
        run(tmp_path, "seed = 1", num_rounds=3)
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    result, _ = run(moved, "seed = 1\n[merge]\nmethod = 'ties'", num_rounds=3)
    assert result.num_rounds == 3


def test_a_trainer_that_had_nothing_to_train_on_is_named(tmp_path: Path) -> None:
    trainers = NODES | {"node-1": StepTrainer(1, num_examples=0)}
    with pytest.raises(InputError, match="the trainer says that it trained on 0 examples"):
        run(tmp_path, trainers=trainers)


def test_a_round_too_short_to_train_in_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(RoundFailed, match="before the deadline") as caught:
        run(tmp_path, "train_s = 100.0", rounds="deadline_s = 90.0")
    assert (
        caught.value.hint == "a round lasts rounds.deadline_s = 90, and to train takes simulate.train_s = 100 seconds"
    )


def test_an_error_in_a_worker_comes_out_as_it_is(tmp_path: Path) -> None:
    with closing(Pool(local_processes(1))) as pool:
        waiting = pool.submit(StepTrainer(1), "evaluate", tmp_path / "nowhere")
        with pytest.raises(Exception, match="nowhere"):
            waiting()


def test_slow_nodes_take_fewer_steps_and_deliver_as_often(tmp_path: Path) -> None:
    """DyLU, arXiv 2401.09135: H_w = floor(H * v_w / v_max), once a node's speed is known."""
    trainers = dict(list(NODES.items())[:3])
    simulated = "train_s = 1000.0\nstragglers = 0.4\nstraggler_factor = 4.0\nseed = 1"
    rounds = "async_buffer = 1\nmax_staleness = 9\ndynamic_steps = 0.2"
    result, config = run(tmp_path, simulated, trainers, train="steps = 40", num_rounds=15, min_nodes=1, rounds=rounds)
    ids = {name: key_id for key_id, name in KnownNodes(config.federation.trusted).names().items()}
    slow = {name for name in trainers if make_site(config.simulate, name).train_s == 4000.0}
    assert 1 <= len(slow) < 3
    _, history, _ = verify_directory(result.model_dir, coordinator_key(tmp_path))
    asked = [spec.steps for spec in sorted(history.specs.values(), key=lambda spec: spec.round)]
    assert asked[0] == {}
    assert asked[-1] == {ids[name]: 10 for name in slow}
    for name in trainers:
        times = [at_s for (_, node), at_s in arrivals(config).items() if node == name]
        assert times[0] == (4000.0 if name in slow else 1000.0)
        assert times[2] - times[1] == 1000.0


def test_old_models_go_when_nobody_reads_them(tmp_path: Path) -> None:
    """Twenty nodes, which share the published models; some are so slow that rounds pass while they train.

    Bad ones read the model again when they have trained.
    """
    trainers = {f"node-{number:02}": StepTrainer(number) for number in range(20)}
    simulated = "train_s = 100.0\nstragglers = 0.2\nstraggler_factor = 9.5\nseed = 3\nbad_nodes = 10"
    rounds = "async_buffer = 10\nmax_staleness = 12"
    results = {}
    for name, keep in (("some", "[publish]\nkeep_rounds = 1\n"), ("all", "")):
        results[name], _ = run(
            tmp_path / name,
            simulated,
            trainers,
            train="steps = 4",
            num_rounds=20,
            min_nodes=1,
            rounds=f"{rounds}\n{keep}",
        )
    assert results["some"].version == results["all"].version
    models = results["some"].model_dir.parent
    held = [path.parent.name for path in sorted(models.glob("*/model.safetensors"))]
    assert held[-1] == "round-0020"
    assert len(held) < 12
    assert len(list(models.iterdir())) == 20


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
