"""The world "racing": Gymnasium's CarRacing-v3 with a player's controls and a picture of its own, and a driver that records it."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from worldmodel.action import Action, ActionSpec, Axis, Button
from worldmodel.data.gym_world import GymnasiumWorld, make
from worldmodel.data.policies import MouseHand, StickyKeys
from worldmodel.world import Frame

ROAD = 9.0  # farther than this from the middle of the road is grass


class RacingWorld(GymnasiumWorld):
    """CarRacing-v3 from above, driven by Box2D and painted by us: 80x112 frames, every third step (16.7 a second), no score,
    no dashboard, no opening zoom, a dashed middle line that shows the speed. Another seed, another track; it never ends.

    Keys turn the wheel to +-`TURN`, the mouse by its motion; 0.4 is full lock. Gas works up to `TOP` units a second, so that a
    held key does not leave what recordings show; without gas the car slows down by itself. Pose: (x, y, degrees).
    """

    SIZE, SKIP, TOP = (80, 112), 3, 42.0
    TURN, SLEW, GAS, BRAKE, DRAG = 0.3, 0.08, 0.4, 0.2, 0.02  # SLEW: of the wheel, per physics step of 1/50 s
    VIEW, CAR_AT, FINE = 52.0, 0.84, 4  # units across the picture; the car's height in it, from the top; supersampling
    EARTH, GRASS, TARMAC, PAINT = (102, 204, 102), (102, 230, 102), (105, 105, 105), (235, 235, 235)
    PITCH = 100 / 3  # of the squares of lighter grass, which are half as wide

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        self._steer = 0.0
        self._corners = np.zeros((0, 4, 2))
        self._colors: list[tuple[int, ...]] = []
        self._shown = size or self.SIZE
        super().__init__("CarRacing-v3", size or self.SIZE)
        self.fps = 50.0 / self.SKIP

    def _open(self, name: str) -> Any:
        env = make(name, render_mode=None, disable_env_checker=True, max_episode_steps=-1)
        env.unwrapped._render = lambda mode: None  # it would paint every step; see `_picture`
        return env

    def _spec(self, space: Any) -> ActionSpec:
        return ActionSpec(
            buttons=(
                Button("left", ("KeyA", "ArrowLeft"), opposite="right", label="Steer left"),
                Button("right", ("KeyD", "ArrowRight"), opposite="left", label="Steer right"),
                Button("gas", ("KeyW", "ArrowUp"), opposite="brake", label="Gas"),
                Button("brake", ("KeyS", "ArrowDown"), opposite="gas", label="Brake"),
            ),
            axes=(Axis("steer", source="mouse_x", limit=0.4, scale=0.2, per_pixel=0.01, unit="radians"),),
        )

    def _survey(self) -> None:
        """What is painted of this track: tarmac, then kerbs, then the middle line."""
        quads = np.array([quad for quad, _ in self._env.unwrapped.road_poly], float)
        colors = [tuple(int(c) for c in color) for _, color in self._env.unwrapped.road_poly]
        kerb = np.array([color[0] >= 200 for color in colors])
        a, b, c, d = np.moveaxis(quads[~kerb][::3], 1, 0)  # left, right, right, left
        line = np.stack([a + (b - a) * 0.47, a + (b - a) * 0.53, d + (c - d) * 0.53, d + (c - d) * 0.47], axis=1)
        self._corners = np.concatenate([quads[~kerb], quads[kerb], line])
        kerbs = [color for color in colors if color[0] >= 200]
        self._colors = [self.TARMAC] * int((~kerb).sum()) + kerbs + [self.PAINT] * len(line)

    def _picture(self) -> np.ndarray:
        height, width = (side * self.FINE for side in self._shown)
        car, zoom = self._env.unwrapped.car, width / self.VIEW
        cos, sin = np.cos(car.hull.angle), np.sin(car.hull.angle)
        here, turn = np.array(car.hull.position), np.array([[cos, sin], [-sin, cos]])
        canvas = np.full((height, width, 3), self.EARTH, np.uint8)

        def paint(points: np.ndarray, color: tuple[int, ...]) -> None:
            cv2.fillPoly(canvas, [np.rint(points * 16).astype(np.int32)], color, shift=4)

        def seen(points: np.ndarray) -> np.ndarray:
            x, y = np.moveaxis((points - here) @ turn.T * zoom, -1, 0)
            return np.stack([width / 2 + x, height * self.CAR_AT - y], axis=-1) - 0.5

        square = np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) * self.PITCH / 2
        west, south = np.floor(here / self.PITCH) - 2
        for i, j in np.ndindex(5, 5):
            paint(seen(np.array([west + i, south + j]) * self.PITCH + square), self.GRASS)
        corners = seen(self._corners)
        inside = ((corners.max(1) > 0) & (corners.min(1) < (width, height))).all(1)
        for k in np.flatnonzero(inside):
            paint(corners[k], self._colors[k])
        for body in car.drawlist:
            for fixture in body.fixtures:
                paint(seen(np.array([body.transform * v for v in fixture.shape.vertices])), tuple(int(255 * c) for c in body.color))
        return cv2.resize(canvas, self._shown[::-1], interpolation=cv2.INTER_AREA)

    @property
    def pose(self) -> tuple[float, ...]:
        car = self._env.unwrapped.car
        return float(car.hull.position[0]), float(car.hull.position[1]), float(np.degrees(car.hull.angle)) + 90.0

    @property
    def speed(self) -> float:
        """Units per second."""
        return float(np.hypot(*self._env.unwrapped.car.hull.linearVelocity))

    @property
    def track(self) -> np.ndarray:
        """float (N, 2): the middle of the road, in driving order."""
        return np.array([tile[2:4] for tile in self._env.unwrapped.track])

    def reset(self, seed: int = 0, spawn: int = 0) -> Frame:
        """A new track by `seed`, standing still."""
        self._seed, self._index, self.done, self._steer = seed, 0, False, 0.0
        self._env.reset(seed=seed)
        self._survey()
        return self._frame()

    def _advance(self, action: Action) -> None:
        held = action.buttons
        wanted = self.TURN * (("right" in held) - ("left" in held)) + action.mouse[0]
        for _ in range(self.SKIP):
            self._steer = float(np.clip(self._steer + np.clip(wanted - self._steer, -self.SLEW, self.SLEW), -1, 1))
            gas = self.GAS * ("gas" in held and self.speed < self.TOP)
            brake = self.BRAKE if "brake" in held else 0.0 if "gas" in held else self.DRAG
            self._env.step(np.array([self._steer, gas, brake], np.float32))


class RacingPolicy:
    """Drives CarRacing in stretches of some seconds, each in one of the `MANNERS`. Now and then the other way round the track.

    keys, hand: follows the road with a drifting lateral offset, steering by keys or by mouse; random: any keys and mouse;
    wild: gas and one way held, which spins; coast, stop: no key, or the brake, until long after the car stands.
    `finished` turns True some time after the road was lost: the recorder then ends the episode.
    """

    MANNERS = ("keys", "hand", "random", "wild", "coast", "stop")
    SHARES, LENGTHS = (0.36, 0.22, 0.27, 0.05, 0.05, 0.05), (55, 40, 32, 14, 20, 24)  # of the time; mean frames of a stretch
    LOST = 60  # frames

    def __init__(self, world: RacingWorld, rng: np.random.Generator) -> None:
        self.world, self.rng = world, rng
        self._keys = StickyKeys(rng, world.actions, mean=6.0)
        self._hand = MouseHand(rng, 0.3, 0.01)
        self._manner, self._left, self._offset, self._cruise = "keys", 0, 0.0, 30.0
        self._way, self._pedal, self._wheel = 1, False, "left"
        self._track, self._lost, self.finished = np.zeros((1, 2)), 0, False

    def start(self) -> Frame:
        frame = self.world.reset(int(self.rng.integers(2**31)))
        self._track, self._lost, self.finished = self.world.track, 0, False
        self._way = 1 if self.rng.random() < 0.5 else -1  # tracks run counter-clockwise: more left turns than right ones
        return frame

    def act(self, frame: Frame) -> Action:
        rng = self.rng
        if self._left <= 0 or self._lost == 20:
            weights = np.array(self.SHARES) / self.LENGTHS
            weights[2:] *= self._lost < 5  # a player who left the road wants to go back
            manner = int(rng.choice(len(self.MANNERS), p=weights / weights.sum()))
            self._manner, self._left = self.MANNERS[manner], int(rng.geometric(1 / self.LENGTHS[manner]))
            self._offset, self._cruise = float(rng.uniform(-5, 5)), float(rng.uniform(12, 46))
            self._wheel = str(rng.choice(["left", "right"]))
        self._left -= 1
        x, y, degrees = frame.pose
        distances = ((self._track - (x, y)) ** 2).sum(1)
        near = int(distances.argmin())
        self._lost = self._lost + 1 if distances[near] > ROAD**2 else 0
        self.finished = self._lost > self.LOST  # nothing but grass from here
        if self._manner == "random":
            return Action(self._keys.next(), (self._hand.wander(), 0.0))
        if self._manner == "wild":
            return Action(frozenset({"gas", self._wheel}), (0.0, 0.0))
        if self._manner in ("coast", "stop"):
            return Action(frozenset({"brake"} if self._manner == "stop" else ()), (0.0, 0.0))
        return self._follow(near, x, y, degrees)

    def _follow(self, near: int, x: float, y: float, degrees: float) -> Action:
        reach = 3 + round(self.world.speed / 14)
        ahead, beyond = (self._track[(near + self._way * k) % len(self._track)] for k in (reach, reach + 1))
        along = (beyond - ahead) / max(1e-6, float(np.hypot(*(beyond - ahead))))
        goal = ahead + self._offset * np.array([along[1], -along[0]])
        error = (float(np.degrees(np.arctan2(goal[1] - y, goal[0] - x))) - degrees + 180.0) % 360.0 - 180.0
        pace = self._cruise * (0.5 if abs(error) > 25 else 1.0)
        self._pedal = self.world.speed < (pace if self._pedal else 0.85 * pace)
        held = {"gas"} if self._pedal else {"brake"} if self.world.speed > 1.25 * pace else set()
        if self._manner == "hand":
            return Action(frozenset(held), (round(float(np.clip(-error / 80 + self.rng.normal(0, 0.02), -0.4, 0.4)), 2), 0.0))
        return Action(frozenset(held | ({"left"} if error > 6 else {"right"} if error < -6 else set())), (0.0, 0.0))
