"""What happens inside one recording process: open a world, play the episodes it is told to, write them, say how they look."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.action import NOOP
from worldmodel.data import episode as episodes
from worldmodel.data.policies import PolicyFactory
from worldmodel.errors import DataError, WorldModelError
from worldmodel.world import World

PSNR_CAP = 50.0  # equal pictures count as this many dB
FLAT_STD = 20.0


@dataclass(frozen=True)
class Job:
    """What all episodes of a data set have in common; sent once to every worker."""

    open_world: Callable[[], World]
    policy: PolicyFactory
    out: Path
    seed: int
    episode_frames: int


def world_meta(world: World) -> dict[str, Any]:
    """JSON-able facts of a world that a recording depends on, such as the map's version."""
    return dict(getattr(world, "meta", {}))


def measure(frames: np.ndarray) -> dict[str, float | int]:
    """How learnable frames (T, H, W, 3) look: mean PSNR of repeating the last frame (dB, capped), and flat frames (std < 20)."""
    psnr, flat = 0.0, 0
    for now, before in zip(frames[1:], frames[:-1], strict=True):
        step = np.subtract(now, before, dtype=np.int16).reshape(-1)
        error = float(np.einsum("i,i->", step, step, dtype=np.int64)) / step.size
        psnr += min(PSNR_CAP, 10 * float(np.log10(255.0**2 / error))) if error > 0 else PSNR_CAP
    for frame in frames[::8]:
        flat += float(np.sqrt(frame.reshape(-1, 3).var(axis=0).mean())) < FLAT_STD
    count = len(frames)
    return {"frames": count, "psnr": round(psnr / max(1, count - 1), 4), "flat": round(flat / len(frames[::8]), 4)}


def play(world: World, job: Job, index: int) -> episodes.Episode:
    """Play episode `index`: a function of (job.seed, index) and the world alone."""
    rng = np.random.default_rng([job.seed, index])
    policy = job.policy(world, rng)
    frame, action = policy.start(), NOOP
    height, width = world.size
    frames = np.empty((job.episode_frames, height, width, 3), np.uint8)
    actions = np.zeros((job.episode_frames, world.actions.width), np.float32)
    poses = np.zeros((job.episode_frames, len(frame.pose)), np.float32)
    filled = 0
    while True:
        frames[filled], poses[filled] = frame.rgb, frame.pose
        if filled:
            actions[filled] = world.actions.encode(action)
        filled += 1
        if filled == job.episode_frames or getattr(world, "done", False) or getattr(policy, "finished", False):
            break
        action = policy.act(frame)
        frame = world.step(action)[-1]
    frames, actions, poses = frames[:filled], actions[:filled], poses[:filled]
    meta = {"index": index, "world": world_meta(world), "stats": measure(frames)}
    return episodes.Episode(frames, actions, poses, world.actions, world.fps, world.name, job.seed, meta)


def ensure(world: World, job: Job, index: int) -> dict[str, Any]:
    """Keep episode `index` if its file is whole, else record it. Returns its statistics."""
    path = episodes.episode_path(job.out, index)
    kept = False
    if path.exists():
        with contextlib.suppress(DataError):
            episode = episodes.load(path)
            kept = (episode.world, episode.seed, episode.meta.get("index")) == (world.name, job.seed, index)
    if not kept:
        episode = play(world, job, index)
        episodes.save(path, episode)
    visited = {f"{int(x) // 64},{int(y) // 64}" for x, y in episode.poses[:, :2]} if episode.poses.shape[1] >= 2 else set()
    return {**episode.meta.get("stats", measure(episode.frames)), "kept": kept, "visited": sorted(visited)}


def facts(world: World) -> dict[str, Any]:
    """What the data set's manifest says about the world."""
    return {
        "world": world.name,
        "size": list(world.size),
        "fps": world.fps,
        "spec": asdict(world.actions),
        "meta": world_meta(world),
    }


def work(pipe: Connection, job: Job) -> None:
    """Process entry: serve episode numbers until the pipe closes (also when the parent was killed)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):  # a Ctrl-C in the terminal must reach the parent only, not the engines
        with contextlib.suppress(OSError):
            os.setsid()
    with contextlib.suppress(ImportError):
        importlib.import_module("cv2").setNumThreads(1)  # one process per core is the plan
    world: World | None = None
    try:
        world = job.open_world()
        pipe.send(("ready", facts(world)))
        while True:
            index = pipe.recv()
            pipe.send(("done", ensure(world, job, index)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except WorldModelError as error:
        _report(pipe, str(error))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _report(pipe, f"no space left for {job.out}: free some and run the same command again")
        else:
            _report(pipe, f"cannot write {job.out}: {error.strerror or error}")
    finally:
        if world is not None:
            world.close()


def _report(pipe: Connection, message: str) -> None:
    with contextlib.suppress(OSError):
        pipe.send(("failed", message))
