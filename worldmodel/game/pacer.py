"""When to read the next action, and when to show the pictures it leads to: just in time, and evenly.

A step begins as late as the even place of its first picture allows, so that its input is as young as it can be. How long it will
take is told by the steps before it: the 99th percentile of the recent ones, and a margin for waking up and for what they have not
shown. No threads and no pygame here, and the clock is given: tests own the time. Times are seconds of that clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RECENT = 128  # steps that the estimate looks back over: a single hiccup is beyond the percentile, two are not
FEWEST = 8  # steps without which there is no estimate
MARGIN = 0.0015  # s, and
MARGIN_SHARE = 0.04  # of the estimate


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

    def restart(self) -> None:
        """After a pause or a reset there is no beat to keep: the next step begins at once and its pictures start a new one."""
        self._beat = None

    def forget(self) -> None:
        """Another engine plays from now on: what steps took so far says nothing."""
        self._recent.clear()

    def wait(self) -> float:
        """Seconds until the next action should be read; at most 0: now."""
        return 0.0 if self._beat is None else self._beat - self.lead() - self._clock()

    def lead(self) -> float:
        """Seconds that a step begins before its first picture is due: what almost every step keeps to, at most the whole slot."""
        return self._slot if len(self._recent) < FEWEST else min(self._slot, self._estimate())

    def _estimate(self) -> float:
        return float(np.percentile(self._recent, 99)) * (1 + MARGIN_SHARE) + MARGIN

    def place(self, began: float, count: int, period: float) -> Places:
        """A step whose action was read at `began` has just made `count` pictures, `period` seconds apart.

        Period 0 is no pace: pictures are shown at once, those of one step spread over the time that it took. A step that is late by
        less than half a period keeps the beat (the next picture makes up for it); beyond that the beat starts anew with it, so that
        a machine too slow for the pace shows every picture when it is ready instead of hurrying after lost time.
        """
        ready = self._clock()
        self._recent.append(ready - began)
        beat, late = self._beat, False
        if beat is None or not period:
            beat = ready
        elif ready > beat:
            late, beat = True, beat if ready - beat < period / 2 else ready
        spacing = period or (ready - began) / count
        self._slot = count * period
        self._beat = beat + self._slot if period else None
        return Places(tuple(max(ready, beat) + i * spacing for i in range(count)), late)

    def first(self, period: float) -> float:
        """The picture of a reset is there, and shown at once: the beat starts with it. Returns when it is due."""
        ready = self._clock()
        self._slot = period
        self._beat = ready + period if period else None
        return ready
