"""Does the view stay while nobody acts? A player who rests sees every fault of a world add up on one and the same picture.

Shapes: B rollouts, T frames, H W pixels; pictures are uint8 (..., H, W, 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from train import metrics
from train.examine import Bench, detail
from train.returns import dream_script, engine_script
from worldmodel.action import Action
from worldmodel.world import World

SETTLE = 15  # frames until momentum has died and the view should stay
MARKS = (30, 60, 120, 180)


def standing_still(bench: Bench, real: World | None = None) -> dict[str, Any]:
    """Rest for `size.rest_frames` frames from the world's spawns and held-out clips, and from the real game's where it is open.

    by_frames: at each mark PSNR of the view to the one at frame 15 (100 dB: not a pixel differs) and its detail (std within a
    picture) over that one's. A real game in which nothing moves by itself keeps 100 dB and 1.
    """
    size = bench.size
    bench.meter.begin(f"standing still for {size.rest_frames} frames", size.rest_frames)
    marks = (SETTLE, *(m for m in MARKS if m <= size.rest_frames))
    script = (Action(),) * marks[-1]
    seen = {"dream": dream_script(bench, script, marks, size.random_rollouts)}
    if real is not None:
        seen["engine"] = engine_script(real, script, marks, size.random_rollouts, bench.seed)
    return {"settled": SETTLE, "by_frames": scores(seen, marks)}


def scores(seen: dict[str, np.ndarray], marks: Sequence[int]) -> list[dict[str, Any]]:
    """A row for every mark but the first, of the views of everyone (B, marks, H, W, 3)."""
    rows = []
    for i, mark in enumerate(marks[1:], start=1):
        row: dict[str, Any] = {"frames": mark}
        for who, views in seen.items():
            stays = metrics.summary(metrics.psnr(views[:, i], views[:, 0]))
            row[who] = {"psnr": stays, "detail": detail(views[:, i]) / max(detail(views[:, 0]), 1e-6)}
        rows.append(row)
    return rows
