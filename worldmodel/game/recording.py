"""What a run leaves behind besides its replay: a video, and episodes to train on. Both write in a thread of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.action import NOOP, Action, ActionSpec
from worldmodel.data.episode import Episode, save, scan
from worldmodel.data.video import VideoWriter, default_scale
from worldmodel.errors import DataError, WorldModelError
from worldmodel.world import Frame

EPISODE_FRAMES = 400


class Background:
    """Runs jobs one after another in a thread; a full queue makes the caller wait, so nothing is dropped.

    The first error of a job is raised at the next `put` or at `close`; later jobs are skipped.
    """

    def __init__(self, name: str, depth: int = 64) -> None:
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(depth)
        self._error: WorldModelError | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None]) -> None:
        self._raise()
        self._queue.put(job)

    def close(self) -> None:
        """Do what is left and stop. Safe to call twice."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._raise()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._error is None:
                try:
                    job()
                except WorldModelError as error:
                    self._error = error
                except (OSError, RuntimeError, ValueError, MemoryError) as error:
                    reason = f"{type(error).__name__}: {error}"
                    self._error = DataError(f"recording stopped ({reason}): free some space or choose another place")

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error


class VideoRecording:
    """Every generated picture of a run, at the world's own speed."""

    def __init__(self, path: Path, size: tuple[int, int], fps: float, metadata: Mapping[str, str]) -> None:
        self.path = path
        self._writer = VideoWriter(path, size, fps, default_scale(size), metadata=metadata)
        self._background = Background("video")

    def add(self, frame: Frame) -> None:
        rgb = frame.rgb.copy()
        self._background.put(lambda: self._writer.write(rgb))

    def close(self) -> None:
        """Finish the file. Raises DataError if a picture could not be written. Safe to call twice."""
        try:
            self._background.close()
        finally:
            self._writer.close()


@dataclass
class _Take:
    """One episode in the making."""

    seed: int
    spawn: int
    rgb: list[np.ndarray]
    actions: list[np.ndarray]
    poses: list[tuple[float, ...]]


class EpisodeRecording:
    """A person's play as Episodes: a new one at every reset and every 400 frames (which starts with the last picture again)."""

    def __init__(self, folder: Path, world: str, spec: ActionSpec, fps: float, meta: Mapping[str, Any]) -> None:
        self.folder, self._world, self._spec, self._fps, self._meta = folder, world, spec, fps, dict(meta)
        self.saved = 0
        self._take: _Take | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._next = 1 + max((int(n) for p in scan(folder) if (n := p.stem.rpartition("-")[2]).isdecimal()), default=-1)
        except OSError as error:
            raise DataError(f"cannot write episodes to {folder}: {error.strerror or error}; choose another folder") from error
        self._background = Background("episodes", 2)

    def reset(self, seed: int, spawn: int, frame: Frame) -> None:
        self._finish()
        self._begin(seed, spawn, frame)

    def step(self, action: Action, frames: tuple[Frame, ...]) -> None:
        take = self._take
        if take is None:
            return
        for frame in frames:
            take.rgb.append(frame.rgb.copy())
            take.actions.append(self._spec.encode(action))
            take.poses.append(frame.pose)
        if len(take.rgb) >= EPISODE_FRAMES:
            self._finish()
            self._begin(take.seed, take.spawn, frames[-1])

    def close(self) -> None:
        """Save what is open. Safe to call twice."""
        self._finish()
        self._background.close()

    def _begin(self, seed: int, spawn: int, frame: Frame) -> None:
        self._take = _Take(seed, spawn, [frame.rgb.copy()], [self._spec.encode(NOOP)], [frame.pose])

    def _finish(self) -> None:
        take, self._take = self._take, None
        if take is None or len(take.rgb) < 2:
            return
        poses = np.asarray(take.poses, dtype=np.float32).reshape(len(take.rgb), -1)
        meta = {**self._meta, "spawn": take.spawn}
        episode = Episode(np.stack(take.rgb), np.stack(take.actions), poses, self._spec, self._fps, self._world, take.seed, meta)
        path = self.folder / f"episode-{self._next:06d}.npz"
        self._next += 1
        self.saved += 1
        self._background.put(lambda: save(path, episode))
