"""Virtual time: tasks that take turns, each until it waits, in the order in which their waits end.

One runs at a time and none is interrupted, so what happens depends on the tasks alone: the same world plays out the
same way each time, and a month of waiting takes no time. Any code may wait, however deep in calls, because tasks are
greenlets.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable

from greenlet import GreenletExit, getcurrent, greenlet


class World:
    """A clock, `now_s` in seconds, and the tasks that live by it."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s
        self._order = itertools.count()
        # (when due, in which order among those due then, task, which of its waits this ends)
        self._due: list[tuple[float, int, greenlet, int]] = []
        self._waits: dict[greenlet, int] = {}
        self._listening: list[greenlet] = []
        self._hub: greenlet | None = None

    @property
    def now_s(self) -> float:
        """The time."""
        return self._now_s

    def clock(self) -> float:
        """Return the time, as a function."""
        return self.now_s

    def begin_at(self, at_s: float) -> None:
        """Set the clock, before there are tasks."""
        assert not self._waits
        self._now_s = at_s

    def spawn(self, run: Callable[[], None], *, after_s: float = 0.0) -> None:
        """Begin a task once `after_s` have passed."""
        # The hub is its parent, whoever spawns it: that is where control goes when it ends, and its error.
        task = greenlet(run, parent=self._hub or getcurrent())
        self._waits[task] = 0
        self._wake(task, self.now_s + after_s)

    def begin(self, work: Callable[[], None]) -> Callable[[], None]:
        """Begin some work as a task of its own; return a function that waits for it and raises what it raised."""
        ended: list[Exception | None] = []

        def run() -> None:
            try:
                work()
                ended.append(None)
            except Exception as err:
                ended.append(err)
            self.notify()

        def wait() -> None:
            while not ended:
                self.wait()
            if ended[0] is not None:
                raise ended[0]

        self.spawn(run)
        return wait

    def sleep(self, duration_s: float) -> None:
        """Let `duration_s` pass for the task that calls; outside a world's tasks nothing happens.

        A task that sleeps for ever, infinitely long, ends.
        """
        task = getcurrent()
        if task in self._waits:
            if math.isinf(duration_s):
                raise GreenletExit
            self._wake(task, self.now_s + duration_s)
            self._leave()

    def wait(self, until_s: float | None = None) -> None:
        """Let time pass for the task that calls, until somebody notifies, or `until_s`."""
        task = getcurrent()
        if until_s is not None:
            self._wake(task, max(until_s, self.now_s))
        self._listening.append(task)
        self._leave()
        if task in self._listening:  # nobody did: what is told from now on is not for this wait
            self._listening.remove(task)

    def notify(self) -> None:
        """Wake the tasks that wait for news."""
        listening, self._listening = self._listening, []
        for task in listening:
            self._wake(task, self.now_s)

    def run(self) -> None:
        """Play until no task has anything to wait for; an error in a task ends the others, and is raised."""
        self._hub = getcurrent()
        try:
            while self._due:
                due_s, _, task, wait = heapq.heappop(self._due)
                if task.dead or self._waits[task] != wait:
                    continue  # something else woke it before
                self._now_s = max(self._now_s, due_s)
                self._waits[task] += 1
                task.switch()
                if task.dead:
                    del self._waits[task]
        finally:
            for task in list(self._waits):
                if not task.dead and task:
                    task.throw(GreenletExit)
            self._waits.clear()
            self._due.clear()
            self._listening.clear()

    def _wake(self, task: greenlet, at_s: float) -> None:
        heapq.heappush(self._due, (at_s, next(self._order), task, self._waits[task]))

    def _leave(self) -> None:
        assert self._hub is not None
        self._hub.switch()
