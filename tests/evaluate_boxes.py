"""A tiny data set for tests of the evaluation: a box at a place on a striped wall that scrolls with the heading."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.conftest import tiny_spec
from train.dreamer import Dreamer
from train.material import Material, gather
from worldmodel.action import Action
from worldmodel.data.episode import Episode, episode_path, save
from worldmodel.session import WorldSession

HEIGHT, WIDTH, BOX = 32, 48, 8


def draw(x: float, y: float, degrees: float) -> np.ndarray:
    """uint8 (H, W, 3): the box's corner at (x, y), the wall turned by `degrees`."""
    phase = np.arange(WIDTH) + degrees
    wall = np.stack([90 + 60 * np.sin(2 * np.pi * phase / n) for n in (16, 24, 48)], -1)
    picture = np.broadcast_to(wall, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    picture[int(y) : int(y) + BOX, int(x) : int(x) + BOX] = (250, 220, 40)
    return picture


def make_episode(seed: int, length: int) -> Episode:
    spec, rng = tiny_spec(), np.random.default_rng(seed)
    x, y, degrees = rng.uniform(0, WIDTH - BOX), rng.uniform(0, HEIGHT - BOX), 0.0
    frames, actions, poses = [], [], []
    action = Action()
    for t in range(length):
        if t:
            held = frozenset(name for name in ("forward", "back", "left", "right") if rng.random() < 0.3)
            action = Action(held, (float(rng.uniform(-6, 6)), 0.0))
        x = float(np.clip(x + 2 * (("right" in action.buttons) - ("left" in action.buttons)), 0, WIDTH - BOX))
        y = float(np.clip(y + 2 * (("back" in action.buttons) - ("forward" in action.buttons)), 0, HEIGHT - BOX))
        degrees += action.mouse[0]
        frames.append(draw(x, y, degrees))
        actions.append(spec.encode(action))
        poses.append((x, y, degrees))
    arrays = np.stack(frames), np.stack(actions), np.array(poses, np.float32)
    return Episode(*arrays, spec, fps=17.5, world="boxes", seed=seed)


def make_boxes(folder: Path, episodes: int = 4, length: int = 40) -> Path:
    """Record episodes into `folder`; returns it."""
    for i in range(episodes):
        save(episode_path(folder, i), make_episode(i, length))
    return folder


def make_material(folder: Path, episodes: int = 4, length: int = 40) -> Material:
    from tests.conftest import tiny_config

    return gather(make_boxes(folder, episodes, length), tiny_config(), 10_000, lambda _: None)


def tiny_dreamer(session: WorldSession) -> Dreamer:
    return Dreamer(session.config, session.model, session.codec, session.steps)
