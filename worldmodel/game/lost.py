"""Whether a dream has lost its way: nothing but one colour, as close to a wall that no longer ends."""

from __future__ import annotations

import math

import numpy as np

FLAT = 6.0  # grey levels; pictures of a recorded world have 12 at least (of 16,000, bundled world)
PATIENCE = 3.0  # s
LONGEST = 0.5  # s that one picture counts for: a pause is no play
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


class LostWatch:
    """Looks at the pictures that are shown and says once, each time, that there has been nothing on them for a while."""

    def __init__(self) -> None:
        self._last = math.inf
        self._flat = 0.0  # s of flat pictures, less twice the time of others since
        self._told = False

    def saw(self, rgb: np.ndarray, now: float) -> bool:
        """A picture, uint8 (H,W,3), was shown. True if it is time to say that the way is lost."""
        passed, self._last = min(max(now - self._last, 0.0), LONGEST), now
        self._flat = min(max(self._flat + (passed if is_flat(rgb) else -2 * passed), 0.0), PATIENCE)
        if self._flat == 0.0:
            self._told = False
        if self._flat < PATIENCE or self._told:
            return False
        self._told = True
        return True


def is_flat(rgb: np.ndarray) -> bool:
    """Whether rows are of one grey almost, whatever they are from top to bottom: a wall's shading says nothing."""
    grey = rgb[::4, ::4].astype(np.float32) @ _LUMA
    return float(grey.std(axis=1).mean()) < FLAT
