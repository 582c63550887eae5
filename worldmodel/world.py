"""The face that the dream, the real game and a replay all show. No torch.

Shapes: H, W picture height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from worldmodel.action import Action, ActionSpec


@dataclass(frozen=True)
class Frame:
    """One picture of a world.

    rgb: uint8 (H, W, 3). index: 0 for the picture shown by `World.reset`, then 1, 2, ...
    timing_ms: milliseconds spent per part, for example ``{"denoise": 21.0, "commit": 5.1, "decode": 3.0}``; what is unknown is
        left out. The commit is that of the step before.
    pose: ground truth (x, y, degrees) where the world knows it, else empty.
    """

    rgb: np.ndarray
    index: int
    timing_ms: Mapping[str, float] = field(default_factory=dict)
    pose: tuple[float, ...] = ()


@runtime_checkable
class World(Protocol):
    """Something that turns actions into pictures, one step at a time.

    name: short name. size: (H, W) of every frame. fps: natural frames per second.
    actions: what the world understands. spawns: how many starting places it offers (at least 1).
    """

    name: str
    size: tuple[int, int]
    fps: float
    actions: ActionSpec
    spawns: int

    def reset(self, seed: int = 0, spawn: int = 0) -> Frame:
        """Start again at a spawn (taken modulo `spawns`); same seed and spawn, same world. Returns the first picture."""
        ...

    def step(self, action: Action) -> tuple[Frame, ...]:
        """Do one action; return its frames, oldest first (1 in most worlds, more where frames are dreamed in chunks)."""
        ...

    def close(self) -> None:
        """Free what the world holds. Safe to call twice."""
        ...
