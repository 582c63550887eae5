"""A tiny world for training tests: a bright box on a shaded ground, moved by two buttons and an axis."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from train.__main__ import run
from train.config import RunConfig, register
from train.settings import CONF
from train.state import TrainState, load_latest
from worldmodel.action import ActionSpec, Axis, Button
from worldmodel.data.episode import Episode, episode_path, save

SPEC = ActionSpec(
    (Button("left", ("KeyA",), opposite="right"), Button("right", ("KeyD",))), (Axis("lift", "mouse_y", limit=4, scale=4),)
)
HEIGHT, WIDTH, BOX = 32, 48, 12
TINY = (
    "train.threads=1",
    "device=cpu",
    "train.precision=fp32",
    "train.sample_minutes=0",
    "train.checkpoint_minutes=0",
    "stage.warmup=5",
)


def draw(x: float, y: float) -> np.ndarray:
    """uint8 (H,W,3) with the box's corner at (x, y)."""
    ground = np.linspace(40, 120, WIDTH)[None, :, None] + np.linspace(0, 40, HEIGHT)[:, None, None] * np.array([1.0, 0.4, 0.0])
    picture = np.broadcast_to(ground, (HEIGHT, WIDTH, 3)).astype(np.uint8).copy()
    picture[int(y) : int(y) + BOX, int(x) : int(x) + BOX] = (240, 200, 60)
    return picture


def make_episode(seed: int, length: int) -> Episode:
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(0, WIDTH - BOX), rng.uniform(0, HEIGHT - BOX)
    frames, actions = [draw(x, y)], [np.zeros(SPEC.width, np.float32)]
    for _ in range(length - 1):
        left, right, lift = float(rng.random() < 0.4), float(rng.random() < 0.4), float(rng.uniform(-1, 1))
        x = float(np.clip(x + 4 * (right - left), 0, WIDTH - BOX))
        y = float(np.clip(y - 4 * lift, 0, HEIGHT - BOX))
        frames.append(draw(x, y))
        actions.append(np.array([left, right, lift], np.float32))
    poses = np.zeros((length, 0), np.float32)
    return Episode(np.stack(frames), np.stack(actions), poses, SPEC, fps=10.0, world="boxes", seed=seed)


def make_boxes(folder: Path, episodes: int = 6, length: int = 24) -> Path:
    """Record `episodes` episodes of `length` frames into `folder`; returns it."""
    for i in range(episodes):
        save(episode_path(folder, i), make_episode(i, length))
    return folder


def composed(*overrides: str) -> RunConfig:
    """Typed settings, as the command line would compose them."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_object(compose("train", overrides=list(overrides)))
    assert isinstance(config, RunConfig)
    return config


def settings(*overrides: str) -> RunConfig:
    """Of a tiny run."""
    return composed("model=tiny", "data=tiny", *TINY, *overrides)


def latest(folder: Path) -> TrainState:
    """The last checkpoint of a run."""
    state = load_latest(folder / "state", print)
    assert state is not None
    return state


def train(folder: Path, *overrides: str) -> TrainState:
    """Run a stage in this process, in ``folder``; returns its last checkpoint."""
    run(settings(*overrides), folder)
    return latest(folder)


def command(*overrides: str, launcher: tuple[str, ...] = ("-m", "train")) -> list[str]:
    """The same run as a command line."""
    return [sys.executable, *launcher, "model=tiny", "data=tiny", *TINY, *overrides]


def environment() -> dict[str, str]:
    """For child processes: this checkout on the path, one thread."""
    return {**os.environ, "PYTHONPATH": str(CONF.parent), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
