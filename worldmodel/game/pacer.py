"""When to read the next action, and when to show the pictures it leads to: just in time, and evenly.

A step begins as late as the even place of its first picture allows, so that its input is as young as it can be. How long it will
take is told by the steps before it: slowness comes in spells, so the slowest of the last few counts as well as what almost all of
the recent ones kept to; a margin is for waking up and for what they have not shown. No threads and no pygame here, and the clock is
given: tests own the time. Times are seconds of that clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# chosen on three recorded runs of 2,000 steps (docs/speed.md)
RECENT, MOST, MORE = 128, 98, 1.04  # steps, the percentile that counts, times which
LAST, SPREAD, MOST_SPREAD = 8, 2.0, 0.15  # the slowest of so many steps counts and as much more as twice the recent spread
MARGIN = 0.0015  # s


@dataclass(frozen=True)
class Places:
    """When each picture of a step is to be shown. late: the first was ready only after its even place."""

    due: tuple[float, ...]
    late: bool = False


class Pacer:
    """Keeps the beat of one run. Not thread-safe: its owner locks."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._beat: float | None = None  # the even place of the next step's first picture
        self._slot = 0.0  # how long the pictures of a step are shown
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._behind: deque[float] = deque(maxlen=LAST)  # what is done behind a step before the next can begin
        self._placed: float | None = None

    def restart(self) -> None:
        """After a pause or a reset there is no beat to keep: the next step begins at once and its pictures start a new one."""
        self._beat = self._placed = None

    def forget(self) -> None:
        """Another engine plays from now on: what steps took so far says nothing."""
        self._recent.clear()
        self._behind.clear()

    def wait(self) -> float:
        """Seconds until the next action should be read; at most 0: now. First asked when the next step could begin."""
        if self._placed is not None:
            self._behind.append(self._clock() - self._placed)
            self._placed = None
        return 0.0 if self._beat is None else self._beat - self.lead() - self._clock()

    def lead(self) -> float:
        """Seconds that a step begins before its first picture is due: what almost every step keeps to, at most the whole slot."""
        return self._slot if len(self._recent) < LAST else min(self._slot, self._estimate())

    def _estimate(self) -> float:
        steps = np.array(self._recent)
        most, many, middle = np.percentile(steps, (MOST, 95, 50))
        spread = min(SPREAD * (many / middle - 1), MOST_SPREAD) if middle else 0.0
        return float(max(most * MORE, steps[-LAST:].max() * (1 + spread))) + MARGIN

    def place(self, began: float, count: int, period: float) -> Places:
        """A step whose action was read at `began` has just made `count` pictures, `period` seconds apart.

        Period 0 is no pace: pictures are shown at once, those of one step spread over the time that it took. After a late step the
        beat is moved, but for what the next step can make up without being late itself, at most half a period; so a machine too
        slow for the pace shows every picture when it is ready instead of hurrying after lost time.
        """
        ready = self._clock()
        self._recent.append(ready - began)
        beat, late = self._beat, False
        if beat is None or not period:
            beat = ready
        elif ready > beat:
            spare = count * period - self.lead() - max(self._behind, default=0.0)
            late, beat = True, max(beat, ready - min(max(spare, 0.0), period / 2))
        spacing = period or (ready - began) / count
        self._slot, self._placed = count * period, ready
        self._beat = beat + self._slot if period else None
        return Places(tuple(max(ready, beat) + i * spacing for i in range(count)), late)

    def first(self, period: float) -> float:
        """The picture of a reset is there, and shown at once: the beat starts with it. Returns when it is due."""
        ready = self._clock()
        self._slot = period
        self._beat = ready + period if period else None
        return ready
