"""Waiting between tries: exponentially longer, with full jitter, and for so long in all."""

from __future__ import annotations

import random
import time

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 10.0


class Backoff:
    """The waits of one call that is tried until it succeeds, or `patience_s` have passed.

    Full jitter, a wait drawn evenly from none to the longest, spreads nodes best that were all cut off at once
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
    """

    def __init__(self, patience_s: float) -> None:
        self._give_up_s = time.monotonic() + patience_s
        self._delay_s = FIRST_DELAY_S

    def wait(self, *, at_least_s: float = 0.0) -> bool:
        """Sleep before another try, and return True; or return False at once when there is no patience left.

        `at_least_s` is what the other end asked for. The last wait ends with the patience, for one more try then.
        """
        left_s = self._give_up_s - time.monotonic()
        if left_s <= 0:
            return False
        time.sleep(min(left_s, at_least_s + random.uniform(0, self._delay_s)))
        self._delay_s = min(2 * self._delay_s, LONGEST_DELAY_S)
        return True
