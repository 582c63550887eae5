"""Does the view come back? Return tests in the dream and in the real engine, and the engine itself as a yardstick.

Shapes: B rollouts, T frames, H W pixels, A action; pictures are uint8 (..., H, W, 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train import metrics
from train.examine import Bench, thin_out
from train.sizes import Size
from worldmodel.action import Action, ActionSpec
from worldmodel.errors import WorldModelError
from worldmodel.world import World

SETTLE = 8  # idle frames that let momentum die before and after a trip


@dataclass(frozen=True)
class Trip:
    """A script that should lead back to where it began.

    marks: after how many steps a view counts. The first is the start, the last the end; a return has to beat those in between.
    """

    name: str
    actions: tuple[Action, ...]
    marks: tuple[int, ...]


def trips(spec: ActionSpec, size: Size) -> list[Trip]:
    """The return tests that this world's actions allow."""
    idle, found = (Action(),) * SETTLE, []
    n = size.turn_frames
    axis = next((a for a in spec.axes if a.source == "mouse_x" and a.unit == "degrees" and 360 / n <= a.limit), None)
    if axis is not None:
        turn = (Action(mouse=(360 / n, 0.0)),) * n
        found.append(Trip("turn_360", idle + turn, tuple(SETTLE + n * q // 4 for q in range(5))))
    if {"forward", "back"} <= set(spec.names):
        there, back = ((Action(frozenset({name})),) * size.walk_frames + idle for name in ("forward", "back"))
        leg = size.walk_frames + SETTLE
        found.append(Trip("walk_and_back", idle + there + back, (SETTLE, SETTLE + leg, SETTLE + 2 * leg)))
    return found


def return_tests(bench: Bench, real: World | None, why_not: str) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """Does the view come back? In the dream and, where it can be opened, in the real engine. Also the views (B, marks, H, W, 3)."""
    if not bench.size.returns:
        return {"skipped": f"not part of the {bench.size.name} size"}, {}
    plan = trips(bench.spec, bench.size)
    if not plan:
        return {"skipped": "this world has neither a mouse turn in degrees nor forward and back"}, {}
    results, views = {}, {}
    bench.meter.begin("return tests", sum(len(t.actions) for t in plan))
    for trip in plan:
        seen = {"dream": dream_script(bench, trip.actions, trip.marks, bench.size.returns)}
        if real is not None:
            seen["engine"] = engine_script(real, trip.actions, trip.marks, bench.size.returns, bench.seed)
        results[trip.name] = {k: _return_scores(v) for k, v in seen.items()} | ({} if real else {"engine": {"skipped": why_not}})
        views[trip.name] = seen
    return results, views


def _return_scores(views: np.ndarray) -> dict[str, Any]:
    start, others, end = views[:, 0], views[:, 1:-1], views[:, -1]
    back = metrics.psnr(end, start)
    elsewhere = metrics.psnr(others, np.broadcast_to(start[:, None], others.shape)).mean(1)
    return {"return": metrics.summary(back), "other_view": metrics.summary(elsewhere), "margin": metrics.summary(back - elsewhere)}


def dream_script(bench: Bench, script: Sequence[Action], marks: Sequence[int], count: int) -> np.ndarray:
    """The dreamed views after `marks` steps, (B, marks, H, W, 3), of `count` starts: the world's spawns, then held-out clips."""
    n, clips = bench.clips.context, bench.clips
    starts = [(f[-n:], a[-n:]) for f, a in ((s.frames, s.actions) for s in bench.spawns) if len(f) >= n][:count]
    spare = thin_out(clips, max(count - len(starts), 0))
    starts += [(f[:n], a[:n]) for f, a in zip(spare.frames, spare.actions, strict=True)]
    rows = np.stack([bench.spec.encode(a) for a in script])[None].repeat(len(starts), 0)
    seen = []
    frames, actions = (np.stack(x) for x in zip(*starts, strict=True))
    for i, picture in enumerate(bench.dreamer.rollout(frames, actions, rows, bench.seeds(len(starts))), start=1):
        bench.meter.tick()
        if i in marks:
            seen.append(picture)
    return np.stack(seen, axis=1)


def engine_script(real: World, script: Sequence[Action], marks: Sequence[int], count: int, seed: int) -> np.ndarray:
    """The real game's views after `marks` steps, (B, marks, H, W, 3), of its first `count` starts."""
    runs = []
    for i in range(count):
        real.reset(seed=seed * 1000 + i, spawn=i)
        shown = [real.step(action)[-1].rgb for action in script]
        runs.append(np.stack([shown[m - 1] for m in marks]))
    return np.stack(runs)


def engine_play(real: World | None, spec: ActionSpec, script: np.ndarray, seed: int) -> np.ndarray | None:
    """The same random play in the real engine, (B, T, H, W, 3); None where it cannot be opened."""
    if real is None:
        return None
    runs = []
    for i, actions in enumerate(script):
        real.reset(seed=seed * 1000 + i, spawn=i)
        runs.append(np.stack([real.step(spec.decode(row))[-1].rgb for row in actions]))
    return np.stack(runs)


def open_engine(name: str, bench_size: tuple[int, int], spec: ActionSpec) -> tuple[World | None, str]:
    """The real game behind a data set, or the reason why it cannot be had."""
    try:
        from worldmodel.data.real import open_world

        real = open_world(name)
    except (ImportError, WorldModelError) as error:
        return None, str(error)
    if tuple(real.size) != bench_size or real.actions.names != spec.names:
        real.close()
        return None, f"the real {name!r} has other pictures or actions than this world"
    return real, ""
