"""Pictures on their way from the generator to the screen: each gets its place in time and waits for it in a bounded mailbox.

Any thread may call. Times are `time.perf_counter` seconds.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from worldmodel.game.input import Snapshot
from worldmodel.game.pacer import Pacer
from worldmodel.game.stats import Stats
from worldmodel.world import Frame


@dataclass(frozen=True)
class Shown:
    """A picture on its way to the screen. index: pictures of this run so far. due: when to show it. event: oldest input it answers.

    span: whatever was done between these two times shows first in this picture; None: in no particular one. first: the picture of a
    reset, which no step made.
    """

    rgb: np.ndarray
    index: int
    due: float
    event: float | None
    span: tuple[float, float] | None = None
    first: bool = False


class Delivery:
    """The generator puts pictures in (`first`, `step`) and asks when to make the next ones (`wait`); the screen takes them out."""

    def __init__(self, stats: Stats) -> None:
        self._stats, self._pacer, self._lock = stats, Pacer(), threading.Lock()
        self._read: float | None = None  # when the action before was read, while play flows
        self._box: deque[Shown] = deque()

    def take(self, now: float) -> Shown | None:
        """The newest picture that is due, or None. An older one that was never shown leaves its event to the next."""
        with self._lock:
            found: Shown | None = None
            while self._box and self._box[0].due <= now:
                found = _inherit(self._box.popleft(), found)
            return found

    def next_due(self) -> float | None:
        """When the next picture is to be shown; None: there is none."""
        with self._lock:
            return self._box[0].due if self._box else None

    def wait(self) -> float:
        """Seconds until the next action should be read; at most 0: now."""
        with self._lock:
            return self._pacer.wait()

    def forget(self) -> None:
        """What steps took so far says nothing about those to come."""
        with self._lock:
            self._pacer.forget()

    def interrupt(self) -> None:
        """The flow of pictures ends here on purpose; what comes next starts a new one."""
        with self._lock:
            self._interrupt()

    def clear(self) -> None:
        """Before a reset: pictures of the old place must not follow the new one."""
        with self._lock:
            self._box.clear()
            self._interrupt()

    def first(self, frame: Frame, index: int, period: float) -> None:
        """The picture of a reset. period: seconds between pictures; 0: as fast as it goes."""
        with self._lock:
            self._put([Shown(np.array(frame.rgb), index, self._pacer.first(period), None, first=True)])

    def step(self, frames: tuple[Frame, ...], snapshot: Snapshot, index: int, period: float, flows: bool) -> None:
        """The pictures of a step. index: of the last one. flows: the next step follows by itself (not while paused)."""
        with self._lock:
            places = self._pacer.place(snapshot.taken, len(frames), period)
            if places.late:
                self._stats.late()
            span = (self._read, snapshot.taken) if self._read is not None else None
            self._read = snapshot.taken if flows else None
            if not flows:
                self._pacer.restart()
            start = index - len(frames) + 1
            made = [Shown(np.array(f.rgb), start + i, due, None) for i, (f, due) in enumerate(zip(frames, places.due, strict=True))]
            self._put([replace(made[0], event=snapshot.event, span=span), *made[1:]])

    def _interrupt(self) -> None:
        self._pacer.restart()
        self._read = None
        self._stats.pause()

    def _put(self, pictures: Sequence[Shown]) -> None:
        """The mailbox holds the new pictures and those of the step before that may not be due yet; a full one loses its oldest."""
        for shown in pictures:
            self._box.append(shown)
            if len(self._box) > 2 * len(pictures) - 1:
                old = self._box.popleft()
                self._box[0] = _inherit(self._box[0], old)


def _inherit(newer: Shown, older: Shown | None) -> Shown:
    """A picture that replaces one never shown answers its events too."""
    if older is None:
        return newer
    events = [e for e in (older.event, newer.event) if e is not None]
    spans = [s for s in (older.span, newer.span) if s is not None]
    return replace(newer, event=min(events, default=None), span=(spans[0][0], spans[-1][1]) if spans else None)
