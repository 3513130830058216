"""What one node may take of the coordinator: one stream at a time, a share of the places, so many bytes a second.

Nothing is queued here. A stream that has no place is told when to come back; one that is too fast is not read from, so
that HTTP/2's flow control stops its sender.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fedmerge.errors import Busy, Unreachable

# What a sender waits that finds no place: about what a place is held for 100 MB on a link of 50 MB/s.
RETRY_AFTER_S = 2.0


class Streams:
    """The streams of one `kind` ("uploads") that are under way, `most` at a time, and what each node moved of late."""

    def __init__(self, kind: str, most: int, max_bytes_per_s: int | None) -> None:
        self._kind, self._most = kind, most
        self._max_bytes_per_s = max_bytes_per_s
        self._tasks: dict[str, asyncio.Task[object]] = {}
        self._next_s: dict[str, float] = {}

    @contextmanager
    def place(self, node_id: str) -> Iterator[None]:
        """Hold a place while the block runs. Raises `Busy` when there is none.

        A node has one: its earlier stream ends with `Unreachable`, as it may be of a connection that only the node
        knows to be broken.
        """
        earlier = self._tasks.pop(node_id, None)
        if earlier is not None:
            earlier.cancel()
        if len(self._tasks) >= self._most:
            raise Busy(
                f"{self._most} {self._kind} are under way, as many as this coordinator takes at once",
                hint="it goes on by itself",
                retry_after_s=RETRY_AFTER_S,
            )
        task = asyncio.current_task()
        assert task is not None
        self._tasks[node_id] = task
        try:
            yield
        except asyncio.CancelledError:
            if self._tasks.get(node_id) is task:
                raise
            task.uncancel()
            raise Unreachable("a newer stream of this node took the place of this one") from None
        finally:
            if self._tasks.get(node_id) is task:
                del self._tasks[node_id]

    async def pace(self, node_id: str, num_bytes: int) -> None:
        """Wait until a node that has just moved `num_bytes` may move more."""
        if self._max_bytes_per_s is None:
            return
        now_s = time.monotonic()
        next_s = max(now_s, self._next_s.get(node_id, now_s)) + num_bytes / self._max_bytes_per_s
        self._next_s[node_id] = next_s
        await asyncio.sleep(next_s - now_s)
