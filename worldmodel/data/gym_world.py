"""Gymnasium environments behind the `World` face: any id that renders ``rgb_array``, and CarRacing with a player's controls.

gymnasium is imported when a world is opened, not before.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from worldmodel.action import Action, ActionSpec, Axis, Button
from worldmodel.errors import ConfigError, DeviceError
from worldmodel.world import Frame

DEFAULT_LONG_SIDE = 128
ROAD = 9.0  # CarRacing: farther than this from the middle of the road is grass
_KEYS = ("Digit1", "Digit2", "Digit3", "Digit4", "Digit5", "Digit6", "Digit7", "Digit8", "Digit9", "Digit0")
_PAIRS = (("KeyA", "KeyD"), ("KeyS", "KeyW"), ("KeyJ", "KeyL"), ("KeyK", "KeyI"), ("ArrowLeft", "ArrowRight"))


def open_gymnasium(name: str, size: tuple[int, int] | None = None) -> GymnasiumWorld:
    """Open an environment by id. size: (H, W), multiples of 16. Raises DeviceError (not installed) or ConfigError (id or size)."""
    if name == "CarRacing-v3":
        return RacingWorld(size)
    return GymnasiumWorld(name, size)


def _make(name: str, **options: Any) -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise DeviceError(f'the world {name!r} needs Gymnasium: pip install "worldmodel[record]"') from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its advice about versions; what stops us is raised
            return gymnasium.make(name, **options)
    except gymnasium.error.DependencyNotInstalled as error:
        raise DeviceError(f'the world {name!r} lacks a package ({error}): pip install "worldmodel[record]"') from error
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"there is no world {name!r} ({reason}): use rooms, racing or a Gymnasium id") from error


def fit_size(height: int, width: int) -> tuple[int, int]:
    """The default frame size of a picture: longer side at most `DEFAULT_LONG_SIDE`, both sides rounded to multiples of 16."""
    scale = min(1.0, DEFAULT_LONG_SIDE / max(height, width))
    return max(16, round(height * scale / 16) * 16), max(16, round(width * scale / 16) * 16)


def checked_size(size: tuple[int, int]) -> tuple[int, int]:
    """`size` if both numbers are positive multiples of 16 up to 1024, else ConfigError."""
    if min(size) < 16 or max(size) > 1024 or size[0] % 16 or size[1] % 16:
        raise ConfigError(f"frame sizes are multiples of 16 from 16 to 1024, got {size[0]}x{size[1]}")
    return size


class GymnasiumWorld:
    """An environment with Discrete actions (one button each; none held: action 0) or a flat Box of them (two buttons a dimension).

    The default frame size is the rendered picture shrunk to a longer side of 128, rounded to multiples of 16.
    `done` is True once the environment has ended; the next `step` starts it again with the next seed.
    """

    spawns = 1

    def __init__(self, name: str, size: tuple[int, int] | None = None) -> None:
        self._env = self._open(name)
        try:
            self.name = name
            self.actions = self._spec(self._env.action_space)
            self.fps = float(self._env.metadata.get("render_fps") or 30.0)
            self._seed, self._index, self.done = 0, 0, False
            self._env.reset(seed=0)
            self.size = checked_size(size) if size else fit_size(*self._picture().shape[:2])
        except Exception:
            self._env.close()
            raise

    def _open(self, name: str) -> Any:
        env = _make(name, render_mode="rgb_array")
        if env.render_mode != "rgb_array":
            env.close()
            raise ConfigError(f"the world {name!r} cannot render rgb_array: choose another Gymnasium id")
        return env

    def _spec(self, space: Any) -> ActionSpec:
        if type(space).__name__ == "Discrete":
            keys = [(k,) for k in _KEYS] + [()] * max(0, int(space.n) - len(_KEYS))
            return ActionSpec(tuple(Button(f"action{i}", keys[i]) for i in range(int(space.n))))
        if type(space).__name__ == "Box" and len(space.shape) == 1:
            buttons = []
            for i in range(space.shape[0]):
                minus, plus = _PAIRS[i] if i < len(_PAIRS) else ("", "")
                buttons.append(Button(f"minus{i}", (minus,) if minus else (), opposite=f"plus{i}"))
                buttons.append(Button(f"plus{i}", (plus,) if plus else (), opposite=f"minus{i}"))
            return ActionSpec(tuple(buttons))
        raise ConfigError(f"the world needs a Discrete or a one-dimensional Box action space, this one has {space}")

    def _native(self, action: Action) -> Any:
        """Our action -> the environment's."""
        space = self._env.action_space
        if type(space).__name__ == "Discrete":
            held = [i for i, name in enumerate(self.actions.names) if name in action.buttons]
            return int(space.start) + (held[0] if held else 0)
        low = np.where(np.isfinite(space.low), space.low, -1.0)
        high = np.where(np.isfinite(space.high), space.high, 1.0)
        middle = np.clip(0.0, low, high)
        value = middle.copy()
        for i in range(space.shape[0]):
            push = (f"plus{i}" in action.buttons) - (f"minus{i}" in action.buttons)
            value[i] = high[i] if push > 0 else low[i] if push < 0 else middle[i]
        return value.astype(space.dtype)

    def _picture(self) -> np.ndarray:
        picture = self._env.render()
        if not (isinstance(picture, np.ndarray) and picture.ndim == 3 and picture.shape[2] == 3):
            raise ConfigError(f"the world {self.name!r} renders no RGB picture: choose another Gymnasium id")
        return picture

    @property
    def pose(self) -> tuple[float, ...]:
        """Ground truth of where the player is; empty for a world that we know nothing about."""
        return ()

    @property
    def meta(self) -> Mapping[str, Any]:
        import gymnasium

        return {"gymnasium": gymnasium.__version__}

    def _frame(self) -> Frame:
        picture = self._picture()
        if picture.shape[:2] != self.size:
            picture = cv2.resize(picture, self.size[::-1], interpolation=cv2.INTER_AREA)
        return Frame(np.ascontiguousarray(picture, dtype=np.uint8), self._index, pose=self.pose)

    def reset(self, seed: int = 0, spawn: int = 0) -> Frame:
        """Start the environment again under `seed`; it has one spawn."""
        self._seed, self._index, self.done = seed, 0, False
        self._env.action_space.seed(seed)
        self._env.reset(seed=seed)
        return self._frame()

    def step(self, action: Action) -> tuple[Frame, ...]:
        """One step of the environment; if it had ended, it starts again first."""
        action = self.actions.clean(action)
        if self.done:
            index = self._index
            self.reset(self._seed + 1)
            self._index = index
        self._advance(action)
        self._index += 1
        return (self._frame(),)

    def _advance(self, action: Action) -> None:
        _, _, terminated, truncated, _ = self._env.step(self._native(action))
        self.done = bool(terminated or truncated)

    def close(self) -> None:
        """Free the environment. Safe to call twice."""
        self._env.close()


class RacingWorld(GymnasiumWorld):
    """CarRacing-v3 from above: 96x96 frames, every second step (25 a second), the opening zoom left out; pose (x, y, degrees).

    Keys and mouse move the wheel, at most 0.2 per frame: keys towards +-0.5, mouse by its motion. Another seed, another track.
    """

    SKIP, INTRO, SLEW, TURN = 2, 45, 0.2, 0.5

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        self._steer, self._seen = 0.0, np.zeros((96, 96, 3), np.uint8)
        super().__init__("CarRacing-v3", size)
        self.fps = 50.0 / self.SKIP

    def _open(self, name: str) -> Any:
        return _make(name, render_mode=None)

    def _spec(self, space: Any) -> ActionSpec:
        return ActionSpec(
            buttons=(
                Button("left", ("KeyA", "ArrowLeft"), opposite="right", label="Steer left"),
                Button("right", ("KeyD", "ArrowRight"), opposite="left", label="Steer right"),
                Button("gas", ("KeyW", "ArrowUp"), opposite="brake", label="Gas"),
                Button("brake", ("KeyS", "ArrowDown"), opposite="gas", label="Brake"),
            ),
            axes=(Axis("steer", source="mouse_x", limit=1.0, scale=0.5, per_pixel=0.02, unit="full lock"),),
        )

    def _picture(self) -> np.ndarray:
        return self._seen

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
        """A new track by `seed`, past the opening zoom, standing still."""
        self._seed, self._index, self.done, self._steer = seed, 0, False, 0.0
        self._env.reset(seed=seed)
        for _ in range(self.INTRO):
            self._seen = self._env.step(np.zeros(3, np.float32))[0]
        return self._frame()

    def _advance(self, action: Action) -> None:
        held = action.buttons
        wanted = self.TURN * (("right" in held) - ("left" in held)) + action.mouse[0]
        self._steer = float(np.clip(self._steer + np.clip(wanted - self._steer, -self.SLEW, self.SLEW), -1, 1))
        native = np.array([self._steer, 0.7 * ("gas" in held), 0.6 * ("brake" in held)], np.float32)
        for _ in range(self.SKIP):
            self._seen, _, terminated, truncated, _ = self._env.step(native)
            self.done = self.done or bool(terminated or truncated)


class RacingPolicy:
    """Drives CarRacing: follows the road by keys with a drifting lateral offset (70 %), or plays with random keys (30 %).

    `finished` turns True some time after the road was lost: the recorder then ends the episode.
    """

    def __init__(self, world: RacingWorld, rng: np.random.Generator) -> None:
        from worldmodel.data.policies import MouseHand, StickyKeys

        self.world, self.rng = world, rng
        self._keys = StickyKeys(rng, world.actions, mean=8.0)
        self._hand = MouseHand(rng, 0.3, 0.02)
        self._random, self._left, self._offset, self._cruise = False, 0, 0.0, 40.0
        self._track, self._lost, self.finished = np.zeros((1, 2)), 0, False

    def start(self) -> Frame:
        frame = self.world.reset(int(self.rng.integers(2**31)))
        self._track, self._lost, self.finished = self.world.track, 0, False
        return frame

    def act(self, frame: Frame) -> Action:
        if self._left <= 0:
            self._random = bool(self.rng.random() < 0.4)  # for shorter times: 30 % of the frames
            self._left = int(self.rng.geometric(1 / (25 if self._random else 40)))
            self._offset, self._cruise = float(self.rng.uniform(-4, 4)), float(self.rng.uniform(14, 38))
        self._left -= 1
        x, y, degrees = frame.pose
        distances = ((self._track - (x, y)) ** 2).sum(1)
        near = int(distances.argmin())
        self._lost = self._lost + 1 if distances[near] > ROAD**2 else 0
        self.finished = self._lost > 40  # nothing but grass from here
        if self._random:
            return Action(self._keys.next(), (self._hand.wander(), 0.0))
        ahead, beyond = (self._track[(near + k) % len(self._track)] for k in (4, 5))
        along = (beyond - ahead) / max(1e-6, float(np.hypot(*(beyond - ahead))))
        goal = ahead + self._offset * np.array([along[1], -along[0]])
        error = (float(np.degrees(np.arctan2(goal[1] - y, goal[0] - x))) - degrees + 180.0) % 360.0 - 180.0
        held = {"left"} if error > 6 else {"right"} if error < -6 else set()
        if self.world.speed < self._cruise * (0.6 if abs(error) > 25 else 1.0):
            held.add("gas")
        elif self.world.speed > self._cruise * 1.2:
            held.add("brake")
        return Action(frozenset(held), (0.0, 0.0))
