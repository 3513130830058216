"""Virtual time: tasks take turns in the order in which their waits end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.sim import World


def test_a_year_of_waiting_takes_no_time_and_is_in_order() -> None:
    world, seen = World(start_s=100.0), []

    def task(name: str, *naps_s: float) -> None:
        for nap_s in naps_s:
            world.sleep(nap_s)
            seen.append((world.now_s, name))

    world.spawn(lambda: task("slow", 3.2e7))
    world.spawn(lambda: task("quick", 1.0, 1.5))
    world.spawn(lambda: task("late", 0.5), after_s=1.0)
    world.run()
    assert seen == [(101.0, "quick"), (101.5, "late"), (102.5, "quick"), (100.0 + 3.2e7, "slow")]


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0]), max_size=6), max_size=6))
def test_time_never_runs_backwards_and_tasks_that_are_due_together_keep_their_order(naps_s: list[list[float]]) -> None:
    world, seen = World(), []

    def task(number: int) -> None:
        for step, nap_s in enumerate(naps_s[number]):
            world.sleep(nap_s)
            seen.append((world.now_s, number, step))

    for number in range(len(naps_s)):
        world.spawn(lambda number=number: task(number))  # type: ignore[misc]
    world.run()
    assert [at_s for at_s, _, _ in seen] == sorted(at_s for at_s, _, _ in seen)
    for number, naps in enumerate(naps_s):
        own = [at_s for at_s, other, _ in seen if other == number]
        assert own == [sum(naps[: step + 1]) for step in range(len(naps))]


def test_news_that_come_after_a_wait_is_over_wake_nobody() -> None:
    world, seen = World(), []

    def sleeper() -> None:
        world.wait(1.0)
        world.sleep(10.0)
        seen.append(world.now_s)

    def ends_after_waiting() -> None:
        world.wait(2.0)

    def teller() -> None:
        world.sleep(5.0)
        world.notify()

    world.spawn(sleeper)
    world.spawn(ends_after_waiting)
    world.spawn(teller)
    world.run()
    assert seen == [11.0]


def test_news_ends_a_wait_before_its_time_and_only_once() -> None:
    world, seen = World(), []

    def listener() -> None:
        for until_s in (10.0, None, 30.0):
            world.wait(until_s)
            seen.append(world.now_s)

    def teller() -> None:
        world.sleep(4.0)
        world.notify()
        world.sleep(16.0)
        world.notify()

    world.spawn(listener)
    world.spawn(teller)
    world.run()
    assert seen == [4.0, 20.0, 30.0]


def test_a_task_may_spawn_others_and_outlive_them() -> None:
    world, seen = World(), []

    def parent() -> None:
        for number in range(3):
            world.spawn(lambda number=number: seen.append((world.now_s, number)), after_s=number)  # type: ignore[misc]
        world.sleep(1.5)
        seen.append((world.now_s, -1))

    world.spawn(parent)
    world.run()
    assert seen == [(0.0, 0), (1.0, 1), (1.5, -1), (2.0, 2)]


def test_an_error_ends_the_world_and_runs_what_the_others_left_to_do() -> None:
    world, seen = World(), []

    def waiter() -> None:
        try:
            world.sleep(100.0)
        finally:
            seen.append("cleaned up")

    def failing() -> None:
        world.sleep(1.0)
        raise ValueError("in the middle")

    world.spawn(waiter)
    world.spawn(failing)
    with pytest.raises(ValueError, match="in the middle"):
        world.run()
    assert seen == ["cleaned up"]


def test_outside_a_task_sleeping_does_nothing() -> None:
    world = World(start_s=5.0)
    world.sleep(10.0)
    assert world.now_s == 5.0
