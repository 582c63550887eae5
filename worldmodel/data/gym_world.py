"""Gymnasium environments behind the `World` face: any id that renders ``rgb_array``. CarRacing has its own room, `racing`.

gymnasium is imported when a world is opened, not before.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from worldmodel.action import Action, ActionSpec, Button
from worldmodel.errors import ConfigError, DeviceError
from worldmodel.world import Frame

DEFAULT_LONG_SIDE = 128
_KEYS = ("Digit1", "Digit2", "Digit3", "Digit4", "Digit5", "Digit6", "Digit7", "Digit8", "Digit9", "Digit0")
_PAIRS = (("KeyA", "KeyD"), ("KeyS", "KeyW"), ("KeyJ", "KeyL"), ("KeyK", "KeyI"), ("ArrowLeft", "ArrowRight"))


def open_gymnasium(name: str, size: tuple[int, int] | None = None) -> GymnasiumWorld:
    """Open an environment by id. size: (H, W), multiples of 16. Raises DeviceError (not installed) or ConfigError (id or size)."""
    if name == "CarRacing-v3":
        from worldmodel.data.racing import RacingWorld

        return RacingWorld(size)
    return GymnasiumWorld(name, size)


def make(name: str, **options: Any) -> Any:
    """`gymnasium.make` with our errors: DeviceError (a package is missing) or ConfigError (no such id)."""
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
        env = make(name, render_mode="rgb_array")
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
