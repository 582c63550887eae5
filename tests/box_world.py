"""A second, tiny implementation of the World protocol, for tests of the window: a square that moves over a chequered floor."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from worldmodel.action import Action, ActionSpec, Axis, Button
from worldmodel.errors import ConfigError
from worldmodel.game.app import play
from worldmodel.game.settings import Preview, Settings
from worldmodel.world import Frame, World

SPEC = ActionSpec(
    buttons=(
        Button("forward", ("KeyW",), opposite="back", label="Walk forward"),
        Button("back", ("KeyS",), label="Walk back"),
        Button("left", ("KeyA",), opposite="right", label="Step left"),
        Button("right", ("KeyD",), label="Step right"),
        Button("use", ("KeyE",), label="Open doors"),
    ),
    axes=(Axis("turn", "mouse_x", limit=12.0, scale=4.0, per_pixel=0.1),),
)
PREVIEW = Preview("box", "box", "Box world", spec=SPEC)


class BoxWorld:
    """Deterministic: the picture is a function of seed, spawn and all actions since the reset.

    step_seconds, load_seconds: how long a step and the loading take.
    """

    name, size, fps, actions, spawns = "box", (80, 128), 17.5, SPEC, 3
    device, dtype, steps, threads, weights_hash = "cpu", "float32", 2, 1, "0123456789abcdef"

    def __init__(self, step_seconds: float = 0.0, load_seconds: float = 0.0, fps: float = 17.5) -> None:
        time.sleep(load_seconds)
        self.fps, self._seconds, self.engine, self.closed = fps, step_seconds, "eager", False
        self.commits = 0

    def reset(self, seed: int = 0, spawn: int = 0) -> Frame:
        self._xy = np.array([64.0 + 7 * spawn, 40.0])
        self._angle, self._seed, self._index, self._used = float(seed % 360), seed, 0, False
        return self._frame()

    def step(self, action: Action) -> tuple[Frame, ...]:
        assert not self.closed
        time.sleep(self._seconds)
        b = action.buttons
        self._xy += 2.0 * np.array([("right" in b) - ("left" in b), ("back" in b) - ("forward" in b)])
        self._angle += action.mouse[0]
        self._used = "use" in b
        self._index += 1
        return (self._frame(),)

    def finish(self) -> None:
        self.commits += 1

    def close(self) -> None:
        self.closed = True

    def _frame(self) -> Frame:
        y, x = np.mgrid[:80, :128]
        sky = np.stack([110 + y, 150 + y, 225 + 0 * y], -1) * (y < 30)[..., None]
        depth = np.maximum(y - 28, 1)
        floor = ((np.floor((x - self._xy[0]) * 12 / depth) + np.floor(300 / depth + self._xy[1] / 6)) % 2)[..., None]
        ground = (np.array([96, 140, 70]) * floor + np.array([190, 170, 110]) * (1 - floor)) * (y >= 30)[..., None]
        rgb = (sky + ground).clip(0, 255).astype(np.uint8)
        left, top = int(20 + self._angle * 2) % 118, int(self._xy[1]) % 70
        rgb[top : top + 14, left : left + 10] = (250, 220, 80) if self._used else (200, 60, 50)
        rgb[0, 0] = (self._seed % 256, self.engine == "compiled", 0)
        return Frame(
            rgb, self._index, {"denoise": 3.0, "decode": 1.0, "commit": 2.0}, (float(self._xy[0]), float(self._xy[1]), self._angle)
        )


class PromptBoxWorld(BoxWorld):
    """Its prompt is a number: how red the sky is. Encoding takes `encode_seconds`; what is no number cannot be encoded."""

    takes_prompts = True

    def __init__(self, encode_seconds: float = 0.0) -> None:
        super().__init__()
        self._encode, self._places = encode_seconds, [0, 0, 0]

    def find_prompt(self, text: str) -> int:
        time.sleep(self._encode)
        if not text.isdecimal():
            raise ConfigError(f"no embedding of {text!r} is here: give a number")
        return int(text)

    def add_prompt(self, found: int) -> int:
        self._places.append(found)
        self.spawns, self._red = len(self._places), found
        return self.spawns - 1

    def reset(self, seed: int = 0, spawn: int = 0) -> Frame:
        self._red = self._places[spawn]
        return super().reset(seed, spawn)

    def _frame(self) -> Frame:
        frame = super()._frame()
        frame.rgb[0, 1] = (self._red, 0, 0)
        return frame


class CompilingBoxWorld(BoxWorld):
    """Offers a second engine, whose pictures differ in one pixel; it takes `build_seconds` to build, or fails."""

    def __init__(self, build_seconds: float = 0.0, failure: str = "", begun: bool = False, step_seconds: float = 0.0) -> None:
        super().__init__(step_seconds)
        self._build, self._failure, self._began = build_seconds, failure, None
        if begun:
            self.start_compile()

    @property
    def compile_state(self) -> str:
        if self._began is None:
            return "off"
        if time.perf_counter() - self._began < self._build:
            return "building"
        return f"failed: {self._failure}" if self._failure else "ready"

    def start_compile(self) -> None:
        self._began = time.perf_counter()

    def adopt_compiled(self, always: bool = False) -> bool:
        if self.compile_state != "ready":
            return False
        self.engine = "compiled"
        return True


class CoresBoxWorld(BoxWorld):
    """Its pictures hang on the number of threads, as rounding does; when it is asked for the `change`th time, it takes one."""

    def __init__(self, change: int = 0) -> None:
        super().__init__()
        self.threads, self._change, self._asked = 2, change, 0

    def review_threads(self, seconds: float) -> int | None:
        self._asked += 1
        if self._asked != self._change:
            return None
        self.set_threads(1)
        return 1

    def set_threads(self, count: int) -> None:
        self.threads = count

    def _frame(self) -> Frame:
        frame = super()._frame()
        frame.rgb[0, 2] = (self.threads, 0, 0)
        return frame


class ChunkBoxWorld(BoxWorld):
    """Every action is held for three pictures, which come together."""

    frames_per_action = 3

    def step(self, action: Action) -> tuple[Frame, ...]:
        time.sleep(self._seconds)
        seconds, self._seconds = self._seconds, 0.0
        frames = tuple(BoxWorld.step(self, action)[0] for _ in range(3))
        self._seconds = seconds
        return frames


def run(factory: Callable[[], World] = BoxWorld, **settings: object) -> int:
    """Play without a window; returns the exit code."""
    return play(lambda report: factory(), PREVIEW, Settings(headless=True, **settings))  # type: ignore[arg-type]
