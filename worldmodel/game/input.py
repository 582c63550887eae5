"""The input contract: what one step of the world gets to know of what the player did since the step before.

held keys, united with keys tapped since the last snapshot (no tap is lost), summed mouse motion; of two opposites the newest
wins; everything is let go when the window loses its focus. Every event carries its time, so that the delay from the event to the
first picture it changed can be measured. Thread-safe: the window feeds it, the generator takes snapshots. No pygame here.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from worldmodel.action import NOOP, Action, ActionSpec
from worldmodel.game.keymap import KEY_RATE, Keymap, axis_of


@dataclass(frozen=True)
class Snapshot:
    """One step's input. taken: when it was read; event: time of the oldest event that shows first in it (seconds)."""

    action: Action = NOOP
    taken: float = 0.0
    event: float | None = None


class InputState:
    """Collects events between two snapshots. Times are `time.perf_counter` seconds; motion is in pixels, x right and y down.

    frames: pictures that one action is held for; the motion between two snapshots is spread over them.
    """

    def __init__(self, spec: ActionSpec, keymap: Keymap, frames: int = 1) -> None:
        self._spec, self._keymap, self._frames = spec, keymap, frames
        self._opposites = _symmetric(spec)
        self._lock = threading.Lock()
        self._held: dict[str, int] = {}  # code -> order of its press
        self._taps: dict[str, int] = {}  # code -> order of a press since the last snapshot
        self._motion = [0.0, 0.0]
        self._stick = (0.0, 0.0)
        self._oldest: float | None = None
        self._order = 0

    def press(self, code: str, now: float) -> bool:
        """A key went down. Returns whether it means anything to this world; a repeat of a held key changes nothing."""
        with self._lock:
            if code not in self._keymap.bindings:
                return False
            if code not in self._held:
                self._order += 1
                self._held[code] = self._taps[code] = self._order
                self._mark(now)
            return True

    def release(self, code: str, now: float) -> None:
        """A key went up. A tap that no step has seen yet stays."""
        with self._lock:
            if self._held.pop(code, None) is not None:
                self._mark(now)

    def motion(self, dx: float, dy: float, now: float) -> None:
        """The captured mouse moved by (dx, dy) pixels."""
        with self._lock:
            if self._spec.axes and (dx or dy):
                self._motion[0] += dx
                self._motion[1] += dy
                self._mark(now)

    def stick(self, x: float, y: float, now: float) -> None:
        """The gamepad's right stick stands at (x, y) in [-1, 1], y down."""
        with self._lock:
            if (x, y) != self._stick:
                self._stick = (x, y)
                self._mark(now)

    def release_all(self, now: float) -> None:
        """Focus was lost or the game is paused: let go of everything, taps and motion included."""
        with self._lock:
            if self._acts():
                self._mark(now)
            self._held.clear()
            self._taps.clear()
            self._motion = [0.0, 0.0]
            self._stick = (0.0, 0.0)

    def busy(self) -> bool:
        """Whether anything is held, or was tapped or moved since the last snapshot."""
        with self._lock:
            return self._acts()

    def _acts(self) -> bool:
        return bool(self._held or self._taps or any(self._motion) or any(self._stick))

    def held(self) -> frozenset[str]:
        """Targets (button names, ``axis+``) that are held now, for display."""
        with self._lock:
            return frozenset(self._keymap.bindings[c] for c in self._held)

    def snapshot(self, now: float) -> Snapshot:
        """The action of the next step; clears taps, motion and the event mark."""
        with self._lock:
            pressed = {**self._taps, **self._held}
            newest: dict[str, int] = {}
            for code, order in pressed.items():
                target = self._keymap.bindings[code]
                newest[target] = max(order, newest.get(target, 0))
            buttons = {t for t in newest if t in self._spec.names and newest[t] > newest.get(self._opposites.get(t, ""), 0)}
            action = self._spec.clean(Action(frozenset(buttons), self._look(newest)))
            taken = Snapshot(action, now, self._oldest)
            self._taps.clear()
            self._motion = [0.0, 0.0]
            self._oldest = None
            return taken

    def _look(self, pressed: dict[str, int]) -> tuple[float, float]:
        """Mouse, stick and keys together, in the axes' units; right and up positive."""
        sign_y = 1.0 if self._keymap.invert_y else -1.0
        look = {"mouse_x": 0.0, "mouse_y": 0.0}
        inputs = {"mouse_x": (self._motion[0], self._stick[0]), "mouse_y": (sign_y * self._motion[1], sign_y * self._stick[1])}
        for axis in self._spec.axes:
            pixels, stick = inputs[axis.source]
            moved = pixels * axis.per_pixel * self._keymap.sensitivity / self._frames
            look[axis.source] = moved + stick * axis.limit * KEY_RATE
        for target in pressed:
            found = axis_of(self._spec, target)
            if found:
                axis, direction = found
                look[axis.source] += direction * axis.limit * KEY_RATE
        return look["mouse_x"], look["mouse_y"]

    def _mark(self, now: float) -> None:
        self._oldest = now if self._oldest is None else min(self._oldest, now)


def _symmetric(spec: ActionSpec) -> dict[str, str]:
    """Opposite pairs both ways, also where a world declares only one side."""
    pairs = {b.name: b.opposite for b in spec.buttons if b.opposite}
    return {**{v: k for k, v in pairs.items()}, **pairs}
