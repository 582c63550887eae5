"""Videos in a folder -> clips of equal size, rate and length with their prompt and camera.

``clips.jsonl`` in the folder names the videos, one JSON object a line: file, and if there is one prompt, and for models with a
camera one of
  trajectory   a string of minWM's grammar, one motion a latent: "w*10,d*10"
  poses        a .npy of world-to-camera poses, (P,4,4), or (P,7) with translation and quaternion (x,y,z,w), a row for every picture
               of the video, or for every pose_every-th
  actions      a .jsonl of actions, one a picture, in the names of the client: {"buttons": ["forward"], "mouse": [1.5, 0]}
and perhaps intrinsics [fx, fy], divided by the picture's width and height. Without that file every video counts, and NAME.txt
beside it is its prompt. Shapes: F pictures of a clip, L = 1 + (F - 1) / 4 latents, P rows of a file, H W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from worldmodel.action import Action
from worldmodel.errors import ConfigError, DataError

MANIFEST = "clips.jsonl"
VIDEOS = {".mp4", ".mkv", ".webm", ".mov", ".avi"}
PER_LATENT = 4
_KEYS = {"file", "prompt", "trajectory", "poses", "pose_every", "actions", "intrinsics"}
_CAMERAS = ("trajectory", "poses", "actions")


@dataclass(frozen=True)
class Video:
    """A video and what goes with it. told: its line of the manifest."""

    folder: Path
    told: dict[str, Any]

    @property
    def path(self) -> Path:
        return self.folder / self.told["file"]

    @property
    def prompt(self) -> str:
        return str(self.told.get("prompt", ""))

    @property
    def has_camera(self) -> bool:
        return any(name in self.told for name in _CAMERAS)


@dataclass(frozen=True)
class Clip:
    """pictures: uint8 (F,H,W,3). number: which of its video. views (L,4,4), intrinsics (L,3,3): float32, where a camera moves."""

    video: Video
    number: int
    pictures: np.ndarray
    views: np.ndarray | None
    intrinsics: np.ndarray | None


def find_videos(folder: Path) -> list[Video]:
    """The videos of a folder, in the manifest's or the names' order. Raises DataError for a wrong line or an empty folder."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: give one with videos")
    manifest = folder / MANIFEST
    if manifest.is_file():
        lines = [line for line in manifest.read_text(encoding="utf-8").splitlines() if line.strip()]
        videos = [_video(folder, line, number) for number, line in enumerate(lines, 1)]
    else:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEOS)
        captions = [path.with_suffix(".txt") for path in paths]
        prompts = [caption.read_text(encoding="utf-8").strip() if caption.is_file() else "" for caption in captions]
        videos = [Video(folder, {"file": path.name, "prompt": prompt}) for path, prompt in zip(paths, prompts, strict=True)]
    if not videos:
        raise DataError(f"{folder} holds no videos ({', '.join(sorted(VIDEOS))}) and no {MANIFEST}: give another folder")
    if len({video.has_camera for video in videos}) > 1:
        lacking = next(video for video in videos if not video.has_camera)
        raise DataError(f"{manifest} gives some videos a camera and {lacking.told['file']} none: give all of them one, or none")
    return videos


def _video(folder: Path, line: str, number: int) -> Video:
    where = f"{folder / MANIFEST} line {number}"
    try:
        told = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}): write one object a line") from error
    if not isinstance(told, dict) or not isinstance(told.get("file"), str) or set(told) - _KEYS:
        raise DataError(f"{where}: a line is an object with file and, if wanted, {', '.join(sorted(_KEYS - {'file'}))}")
    if sum(name in told for name in _CAMERAS) > 1:
        raise DataError(f"{where}: give one of {', '.join(_CAMERAS)}")
    if not (folder / told["file"]).is_file():
        raise DataError(f"{where}: there is no {folder / told['file']}")
    focal = told.get("intrinsics", [1, 1])
    if not (isinstance(focal, list | tuple) and len(focal) == 2 and all(type(f) in (int, float) and f > 0 for f in focal)):
        raise DataError(f"{where}: intrinsics are two positive numbers [fx, fy], got {focal}")
    if not (type(every := told.get("pose_every", 1)) is int and every >= 1):
        raise DataError(f"{where}: pose_every is a whole number from 1, got {every}")
    return Video(folder, told)


def cut(video: Video, size: tuple[int, int], fps: float, frames: int) -> Iterator[Clip]:
    """Clips of `frames` pictures, one behind the other, `fps` pictures a second, cut and scaled to `size` (H, W).

    What is left at the end of a video is dropped. Raises DataError for a video that cannot be read, or a camera that does not fit.
    """
    pictures: list[np.ndarray] = []
    sources: list[int] = []
    number, camera = 0, None
    for source, rgb, rate in _pictures(video.path, size, fps):
        if camera is None and video.has_camera:
            camera = _camera(video, rate, fps)
        pictures.append(rgb)
        sources.append(source)
        if len(pictures) == frames:
            views = None if camera is None else camera(number, sources[::PER_LATENT])
            yield Clip(video, number, np.stack(pictures), views, None if views is None else _intrinsics(video, len(views)))
            pictures, sources, number = [], [], number + 1


def _pictures(path: Path, size: tuple[int, int], fps: float) -> Iterator[tuple[int, np.ndarray, float]]:
    """(number in the video, uint8 (H,W,3), the video's own rate) nearest to the times 0, 1/fps, 2/fps ..."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate, due, begin = float(stream.average_rate or fps), 0, None
            for source, frame in enumerate(container.decode(stream)):
                time = frame.time if frame.time is not None else source / rate
                begin = time if begin is None else begin
                fitted = None
                while time - begin + 0.5 / rate > due / fps:
                    if fitted is None:
                        image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                        fitted = np.asarray(ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS))
                    yield source, fitted, rate
                    due += 1
    except (OSError, ValueError, IndexError) as error:  # PyAV's errors are OSErrors and ValueErrors
        raise DataError(f"{path} cannot be read as a video ({error}): mend or remove it") from error


def _intrinsics(video: Video, latents: int) -> np.ndarray:
    from worldmodel.models.camera import INTRINSICS

    fx, fy = video.told.get("intrinsics", INTRINSICS[:2])
    return np.tile(np.array([[fx, 0, 0.5], [0, fy, 0.5], [0, 0, 1]], np.float32), (latents, 1, 1))


def _camera(video: Video, rate: float, fps: float) -> Callable[[int, list[int]], np.ndarray]:
    """(clip number, its latents' pictures) -> view matrices (L,4,4) relative to the clip's first. Raises DataError."""
    from worldmodel.models.camera import trajectory_views

    told, where = video.told, f"the camera of {video.path}"
    try:
        if "trajectory" in told:
            rows = trajectory_views(str(told["trajectory"])).numpy()
            return lambda number, at: _picked(rows, [number * len(at) + i for i in range(len(at))], where)
        if "poses" in told:
            rows, every = _read_poses(video.folder / str(told["poses"])), told.get("pose_every", 1)
        else:
            rows, every = _walked(video.folder / str(told["actions"]), fps / PER_LATENT / rate), 1
    except (OSError, ValueError, ConfigError) as error:
        raise DataError(f"{where} cannot be read: {error}") from error
    return lambda number, at: _picked(rows, [source // every for source in at], where)


def _picked(rows: np.ndarray, at: list[int], where: str) -> np.ndarray:
    if at[-1] >= len(rows):
        raise DataError(f"{where} has {len(rows)} rows, and the video needs {at[-1] + 1}: give a longer one, or a shorter video")
    views = rows[at].astype(np.float64)
    return (views @ np.linalg.inv(views[0])).astype(np.float32)


def _read_poses(path: Path) -> np.ndarray:
    """World-to-camera matrices (P,4,4) from a .npy of them, or of translations and quaternions."""
    from worldmodel.models.camera import views_from_quaternions

    rows = np.load(path, allow_pickle=False)
    if rows.ndim == 2 and rows.shape[1] == 7:
        if not np.linalg.norm(rows[:, 3:], axis=1).all():
            raise ValueError(f"{path} holds a quaternion of length 0")
        rows = views_from_quaternions(rows).numpy()
    if rows.shape[1:] != (4, 4) or not np.isfinite(rows).all():
        raise ValueError(f"{path} holds {rows.shape}, finite (P,4,4) or (P,7) is needed")
    return rows


def _walked(path: Path, latents: float) -> np.ndarray:
    """Views (P,4,4) of a camera that actions move, as the game moves it: a key one step a latent, the mouse by its degrees.

    latents: that a picture of the video lasts.
    """
    from worldmodel.models.camera import advance
    from worldmodel.video_session import camera_motion

    poses = [np.eye(4)]
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:  # the first led to the first picture
        action = Action.from_json(json.loads(line))
        keys, hand = camera_motion(Action(action.buttons), 1), camera_motion(Action(mouse=action.mouse), 1)
        right, up, forward, yaw, pitch = (latents * key + move for key, move in zip(keys, hand, strict=True))
        poses.append(advance(poses[-1], (right, up, forward, yaw, pitch)))
    return np.linalg.inv(np.stack(poses))


def picture_size(text: str) -> tuple[int, int]:
    """``832x480`` -> (480, 832). Raises ConfigError unless both are multiples of 16."""
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()) or int(width) % 16 or int(height) % 16 or not int(width) * int(height):
        raise ConfigError(f"a size is WIDTHxHEIGHT in multiples of 16, as 832x480, got {text!r}")
    return int(height), int(width)
