"""Policies that play while the recorder watches: a calm, curious player for "rooms", and sticky random keys for any world."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from worldmodel.action import Action, ActionSpec
from worldmodel.world import Frame, World


class Policy(Protocol):
    """Plays one episode."""

    def start(self) -> Frame:
        """Put the world at the episode's beginning; returns its first frame."""
        ...

    def act(self, frame: Frame) -> Action:
        """What to do after having seen `frame`. A policy may have a bool `finished`: True ends the episode early."""
        ...


PolicyFactory = Callable[[World, np.random.Generator], Policy]


class MouseHand:
    """A hand on the mouse for one axis: still, wandering, steady turning, and now and then a quick flick. Units of the axis."""

    def __init__(self, rng: np.random.Generator, limit: float, grain: float = 0.1) -> None:
        self.rng, self.limit, self.grain = rng, limit, grain
        self._mode, self._left, self._value, self._steady = "still", 0, 0.0, 0.0
        self._flick: list[float] = []

    def wander(self) -> float:
        """Next motion of a hand without a goal."""
        rng, limit = self.rng, self.limit
        if self._left <= 0:
            self._left = int(rng.geometric(1 / 18))
            self._mode = str(rng.choice(["still", "wander", "steady"], p=[0.4, 0.35, 0.25]))
            self._steady = float(rng.choice([-1, 1]) * rng.uniform(0.05, 0.4) * limit)
        self._left -= 1
        self._value = 0.85 * self._value + float(rng.normal(0, 0.08 * limit))
        wanted = {"still": 0.0, "wander": self._value, "steady": self._steady}[self._mode]
        return self.settle(wanted)

    def settle(self, wanted: float) -> float:
        """`wanted`, unless a flick is under way; clipped to the limit and rounded to what a mouse can send."""
        if not self._flick and self.rng.random() < 0.006:
            size = float(self.rng.choice([-1, 1]) * self.rng.uniform(0.4, 1.1) * self.limit)
            self._flick = [size * k for k in (0.5, 1.0, 1.0, 0.6)[: int(self.rng.integers(2, 5))]]
        if self._flick:
            wanted = self._flick.pop()
        value = float(np.clip(wanted, -self.limit, self.limit))
        return round(round(value / self.grain) * self.grain, 6) + 0.0


class StickyKeys:
    """Random held buttons: each choice is kept for a geometric time; opposites are seldom held together."""

    def __init__(self, rng: np.random.Generator, spec: ActionSpec, mean: float = 14.0, busy: float = 0.35) -> None:
        self.rng, self.spec, self.mean, self.busy = rng, spec, mean, busy
        self._held: frozenset[str] = frozenset()
        self._left = 0

    def next(self) -> frozenset[str]:
        if self._left <= 0:
            self._left = int(self.rng.geometric(1 / self.mean))
            held = [b for b in self.spec.buttons if self.rng.random() < self.busy]
            opposites = {b.opposite for b in held}
            if self.rng.random() < 0.9:  # a tenth of the time both of a pair may be held, as players do by accident
                held = [b for b in held if b.name not in opposites or self.rng.random() < 0.5]
            self._held = frozenset(b.name for b in held)
        self._left -= 1
        return self._held


class RandomPolicy:
    """Sticky random buttons and a wandering mouse, for any world."""

    def __init__(self, world: World, rng: np.random.Generator) -> None:
        self.world, self.rng = world, rng
        self._keys = StickyKeys(rng, world.actions)
        self._hands = {a.source: MouseHand(rng, a.limit, a.per_pixel) for a in world.actions.axes}

    def start(self) -> Frame:
        seed, spawn = int(self.rng.integers(2**31)), int(self.rng.integers(self.world.spawns))
        return self.world.reset(seed, spawn)

    def act(self, frame: Frame) -> Action:
        motion = {source: hand.wander() for source, hand in self._hands.items()}
        return Action(self._keys.next(), (motion.get("mouse_x", 0.0), motion.get("mouse_y", 0.0)))
