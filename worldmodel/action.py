"""What a player did (`Action`) and what a world understands (`ActionSpec`). No torch.

An `ActionSpec` is data, not code: it lists buttons (bits) and mouse axes (continuous), so every world can declare its own and
the window, the recorder, the model and a replay read the same declaration.
A vector of length A holds one 0/1 entry per button, then one entry per axis, divided by the axis' scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from worldmodel.errors import ConfigError

MOST_MOTION = 1e9


@dataclass(frozen=True)
class Action:
    """What the player did during one step: held or tapped buttons, and how far the view was moved by mouse.

    mouse: (dx, dy) in the units of the world's axes (degrees for first-person worlds), right and up positive.
    """

    buttons: frozenset[str] = frozenset()
    mouse: tuple[float, float] = (0.0, 0.0)

    def to_json(self) -> dict[str, Any]:
        return {"buttons": sorted(self.buttons), "mouse": [float(m) for m in self.mouse]}

    @staticmethod
    def from_json(data: Any) -> Action:
        """Inverse of `to_json`. Raises ConfigError naming what is wrong."""
        if not isinstance(data, Mapping) or not isinstance(data.get("buttons", []), list):
            raise ConfigError(f'an action is {{"buttons": [...], "mouse": [dx, dy]}}, got {data!r}')
        unknown = sorted(set(data) - {"buttons", "mouse"})
        if unknown:
            raise ConfigError(f"an action has buttons and mouse, not {str(unknown[0])[:40]!r}")
        mouse = data.get("mouse", [0.0, 0.0])
        if not (isinstance(mouse, list) and len(mouse) == 2 and all(type(m) in (int, float) for m in mouse)):
            raise ConfigError(f"an action's mouse is two numbers [dx, dy], got {mouse!r}")
        if not all(abs(m) < MOST_MOTION for m in mouse):  # also false for NaN
            raise ConfigError(f"an action's mouse must be finite and below {MOST_MOTION:g}, got {str(mouse)[:60]}")
        return Action(frozenset(map(str, data.get("buttons", []))), (float(mouse[0]), float(mouse[1])))


NOOP = Action()


@dataclass(frozen=True)
class Button:
    """A thing that is held or not. keys: default physical keys (W3C ``event.code`` names: ``KeyW``, ``Space``, ``MouseLeft``)."""

    name: str
    keys: tuple[str, ...] = ()
    opposite: str = ""
    label: str = ""


@dataclass(frozen=True)
class Axis:
    """A continuous motion per step. source: ``mouse_x`` or ``mouse_y``. limit: largest magnitude per step, in `unit`.

    scale: divisor that brings typical values to about 1 for the network. per_pixel: default units per pixel of mouse motion.
    """

    name: str
    source: str = "mouse_x"
    limit: float = 12.0
    scale: float = 4.0
    per_pixel: float = 0.1
    unit: str = "degrees"


@dataclass(frozen=True)
class ActionSpec:
    """The actions a world understands, in the order of the encoded vector."""

    buttons: tuple[Button, ...] = ()
    axes: tuple[Axis, ...] = ()

    def __post_init__(self) -> None:
        names = [b.name for b in self.buttons] + [a.name for a in self.axes]
        if len(set(names)) != len(names):
            raise ConfigError(f"action names must differ, got {names}")
        for button in self.buttons:
            if button.opposite and button.opposite not in self.names:
                raise ConfigError(f"button {button.name!r} has the unknown opposite {button.opposite!r}")
        for axis in self.axes:
            if axis.source not in ("mouse_x", "mouse_y"):
                raise ConfigError(f"axis {axis.name!r}: source is mouse_x or mouse_y, got {axis.source!r}")
            if not (1e-6 <= axis.limit <= MOST_MOTION and 1e-6 <= axis.scale <= MOST_MOTION):
                raise ConfigError(f"axis {axis.name!r}: limit and scale must be positive, got {axis.limit} and {axis.scale}")
        if len({a.source for a in self.axes}) != len(self.axes):
            raise ConfigError("two axes read the same mouse direction")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the buttons, in order."""
        return tuple(b.name for b in self.buttons)

    @property
    def width(self) -> int:
        """Length A of the encoded vector."""
        return len(self.buttons) + len(self.axes)

    def clean(self, action: Action) -> Action:
        """The action as the world reads it: mouse clipped to the axes' limits, absent axes 0. Unknown: ConfigError."""
        unknown = action.buttons - set(self.names)
        if unknown:
            raise ConfigError(f"unknown action {sorted(unknown)[0]!r}: this world knows {', '.join(self.names) or 'no buttons'}")
        if not all(map(math.isfinite, action.mouse)):
            raise ConfigError(f"mouse motion must be two finite numbers, got {action.mouse}")
        limits = {a.source: a.limit for a in self.axes}
        dx, dy = (
            float(max(-limits.get(s, 0.0), min(v, limits.get(s, 0.0)))) + 0.0  # + 0.0 turns -0.0 into 0.0
            for v, s in zip(action.mouse, ("mouse_x", "mouse_y"), strict=True)
        )
        return Action(frozenset(action.buttons), (dx, dy))

    def encode(self, action: Action) -> np.ndarray:
        """Action -> float32 (A,), buttons as 0/1 and axes clipped to +-limit and divided by scale."""
        action = self.clean(action)
        motion = {"mouse_x": action.mouse[0], "mouse_y": action.mouse[1]}
        bits = [float(name in action.buttons) for name in self.names]
        return np.array(bits + [motion[a.source] / a.scale for a in self.axes], dtype=np.float32)

    def decode(self, vector: Iterable[float]) -> Action:
        """Inverse of `encode`. Raises ConfigError if the length is not A."""
        values = [float(v) for v in vector]
        if len(values) != self.width:
            raise ConfigError(f"an encoded action of this world has {self.width} numbers, got {len(values)}")
        held = frozenset(n for n, v in zip(self.names, values, strict=False) if v > 0.5)
        motion = {a.source: v * a.scale for a, v in zip(self.axes, values[len(self.buttons) :], strict=True)}
        return Action(held, (motion.get("mouse_x", 0.0), motion.get("mouse_y", 0.0)))

    def mirrored(self, action: Action) -> Action:
        """The action with left and right exchanged (mouse dx negated, buttons that have an opposite named left/right swapped)."""
        swap = {"left": "right", "right": "left"}
        return Action(frozenset(swap.get(b, b) for b in action.buttons), (-action.mouse[0], action.mouse[1]))
