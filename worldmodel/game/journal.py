"""Everything that listens to a run: the replay file, the video, the episodes. Called by the generator's thread only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worldmodel.action import Action
from worldmodel.game.recording import EpisodeRecording, VideoRecording
from worldmodel.game.replay import ReplayWriter
from worldmodel.world import Frame


class Journal:
    """header: the replay's header, also written into videos. size: (H, W). Parts that are None are left out."""

    def __init__(
        self,
        header: Mapping[str, Any],
        size: tuple[int, int],
        fps: float,
        replay: ReplayWriter | None = None,
        episodes: EpisodeRecording | None = None,
    ) -> None:
        self._header, self._size, self._fps = dict(header), size, fps
        self.replay, self.episodes = replay, episodes
        self.video: VideoRecording | None = None
        self.videos: list[Path] = []

    def start_video(self, path: Path) -> None:
        """Record from now on; does nothing while a video is being recorded."""
        if self.video is None:
            tags = {"title": str(self._header.get("world", "")), "comment": json.dumps(self._header)}
            self.video = VideoRecording(path, self._size, self._fps, tags)

    def toggle_video(self, path: Path) -> str:
        """Begin a video in `path`, or end the one that is being recorded; says which."""
        if self.video is None:
            self.start_video(path)
            return f"recording {path}"
        path = self.video.path
        self.stop_video()
        return f"saved {path}"

    def stop_video(self) -> None:
        if self.video is not None:
            video, self.video = self.video, None
            try:
                video.close()
            finally:
                if video.path.is_file():
                    self.videos.append(video.path)

    def reset(self, frame: int, seed: int, spawn: int, picture: Frame) -> None:
        if self.replay:
            self.replay.reset(frame, seed, spawn, picture.rgb)
        if self.video:
            self.video.add(picture)
        if self.episodes:
            self.episodes.reset(seed, spawn, picture)

    def step(self, frame: int, action: Action, pictures: tuple[Frame, ...]) -> None:
        if self.replay:
            self.replay.step(frame, action, [p.rgb for p in pictures])
        if self.video:
            for picture in pictures:
                self.video.add(picture)
        if self.episodes:
            self.episodes.step(action, pictures)

    def event(self, name: str, frame: int, **values: Any) -> None:
        if self.replay:
            self.replay.event(name, frame, **values)

    def close(self) -> None:
        """Flush and close all parts, even if one of them fails; then raise the first failure."""
        failures = []
        for close in (self.replay.close if self.replay else None, self.stop_video, self.episodes.close if self.episodes else None):
            try:
                if close:
                    close()
            except Exception as error:  # raised below
                failures.append(error)
        if failures:
            raise failures[0]
