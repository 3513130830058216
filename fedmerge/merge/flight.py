"""Several parameters in work at once, within a budget of memory, and their results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Workers:
    """Where a merge runs: on how many threads, in about how much memory, and on which torch device.

    The memory, of results that wait and of stacks, is what parameters share that are in work together; one parameter is
    always in work, whatever it takes. With more than one thread, the maps that are merged have to be safe to read from
    several. With a `device` torch computes there, `cpu` included; without one, compiled methods do where there are any.
    """

    num_threads: int = 1
    memory_budget_bytes: int = 2 << 30
    device: str | None = None


def in_order(
    names: Sequence[str], work: Callable[[str], Result], cost_bytes: Callable[[str], int], workers: Workers
) -> Iterator[tuple[str, Result]]:
    """Yield `(name, work(name))` for `names` in their order; nothing is worked on before the first is asked for."""
    if workers.num_threads == 1:
        for name in names:
            yield name, work(name)
        return
    waiting, running, used_bytes = deque(names), deque[tuple[str, Future[Result]]](), 0
    with ThreadPoolExecutor(workers.num_threads, thread_name_prefix="merge") as pool:
        try:
            while waiting or running:
                while waiting and len(running) <= workers.num_threads:
                    if running and used_bytes + cost_bytes(waiting[0]) > workers.memory_budget_bytes:
                        break
                    name = waiting.popleft()
                    used_bytes += cost_bytes(name)
                    running.append((name, pool.submit(work, name)))
                name, future = running.popleft()
                yield name, future.result()
                used_bytes -= cost_bytes(name)
        finally:
            for _, future in running:
                future.cancel()
