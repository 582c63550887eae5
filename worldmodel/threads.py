"""When the number of CPU threads should be measured again: another program may have taken a core, or given it back.

With a core taken, several threads are far slower than one: each product waits for a thread that does not run. Times are seconds of
the clock that is given; tests own it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np

FIRST = 32  # steps after a measurement that say how long steps take when all is well
SPAN, MOST = 2.0, 95  # s of steps that are watched, and the percentile of their times that counts
WORSE, WELL = 1.5, 1.2  # times as long as at first: slow from the one on, well again only below the other
LASTING = 5.0  # s that steps must be slow
REST, LONGEST_REST = 10.0, 640.0  # s between measurements; doubled whenever one changed nothing


class ThreadWatch:
    """Told how long every step took, says when to measure. Measuring costs a tenth of a second or so, hence the patience."""

    def __init__(self, count: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """count: the threads in use, just measured."""
        self._clock, self._most, self._rest = clock, count, REST
        self._recent: deque[tuple[float, float]] = deque()
        self._begin(count)

    def _begin(self, count: int) -> None:
        self._count, self._measured = count, self._clock()
        self._first, self._usual = list[float](), 0.0
        self._slow_since: float | None = None
        self._recent.clear()

    def settled(self, count: int) -> None:
        """A measurement has chosen `count` threads."""
        self._rest = min(2 * self._rest, LONGEST_REST) if count == self._count else REST
        self._most = max(self._most, count)
        self._begin(count)

    def took(self, seconds: float) -> bool:
        """A step took so long; True: measure now, and tell by `settled`."""
        now = self._clock()
        if len(self._first) < FIRST:
            self._first.append(seconds)
            self._usual = float(np.percentile(self._first, MOST))
            return False
        self._recent.append((now, seconds))
        while self._recent[0][0] < now - SPAN:
            self._recent.popleft()
        share = np.percentile([s for _, s in self._recent], MOST) / self._usual
        if share < WELL:
            self._slow_since = None
        elif share > WORSE and self._slow_since is None:
            self._slow_since = now
        slow = self._slow_since is not None and now - self._slow_since >= LASTING
        return (slow or self._count < self._most) and now - self._measured >= self._rest
