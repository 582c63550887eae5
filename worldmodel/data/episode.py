"""Episode: the frames, actions and poses of one stretch of play, in one checked file. No torch.

A file ``episode-000123.npz`` is a plain zip (zlib level 1) of ``frames.npy``, ``actions.npy``, ``poses.npy`` and
``header.json`` (format version, action spec, fps, world, seed, meta, shapes); `numpy.load` opens it too.
Shapes: T frames, H and W pixels, A length of the encoded action, P numbers of a pose.
"""

from __future__ import annotations

import io
import json
import os
import struct
import uuid
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.action import ActionSpec
from worldmodel.errors import ConfigError, DataError
from worldmodel.plain import from_dict, to_dict

FORMAT_VERSION = 1
PREFIX, SUFFIX = "episode-", ".npz"
HELD_OUT_SHARE = 0.05
_DAMAGE: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    NotImplementedError,
)
_DAMAGE += (MemoryError, RecursionError, RuntimeError, struct.error)
_ARRAYS = ("frames", "actions", "poses")
_MEMBERS = ("header.json", *(f"{name}.npy" for name in _ARRAYS))


@dataclass(frozen=True)
class Episode:
    """One stretch of play.

    frames: uint8 (T, H, W, 3). actions: float32 (T, A), encoded by `spec`; actions[t] led to frames[t], actions[0] is zeros.
    poses: float32 (T, P), ground truth per frame (rooms: x, y, degrees); P may be 0. fps: frames per second of the play.
    world: name of the world. seed: what the episode was made from. meta: JSON-able extras.
    Raises DataError on construction if shapes, dtypes or values do not fit together.
    """

    frames: np.ndarray
    actions: np.ndarray
    poses: np.ndarray
    spec: ActionSpec
    fps: float
    world: str
    seed: int = 0
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.frames) if self.frames.ndim == 4 else 0
        _require(
            self.frames.dtype == np.uint8 and self.frames.ndim == 4 and self.frames.shape[3] == 3 and min(self.frames.shape) > 0,
            f"frames must be uint8 (T, H, W, 3) with T at least 1, got {self.frames.dtype} {self.frames.shape}",
        )
        _require(
            self.actions.dtype == np.float32 and self.actions.shape == (count, self.spec.width),
            f"actions must be float32 ({count}, {self.spec.width}), got {self.actions.dtype} {self.actions.shape}",
        )
        _require(
            self.poses.dtype == np.float32 and self.poses.ndim == 2 and len(self.poses) == count,
            f"poses must be float32 ({count}, P), got {self.poses.dtype} {self.poses.shape}",
        )
        _require(bool(np.isfinite(self.actions).all()), "actions hold a number that is not finite")
        _require(bool(np.isfinite(self.poses).all()), "poses hold a number that is not finite")
        _require(not self.actions[0].any(), "actions[0] must be zeros: no action led to the first frame")
        _require(np.isfinite(self.fps) and self.fps > 0, f"fps must be positive, got {self.fps}")

    def __len__(self) -> int:
        """Number of frames T."""
        return len(self.frames)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise DataError(message)


def episode_path(folder: Path, index: int) -> Path:
    """``folder/episode-000123.npz``; six digits or more, so that file name order is episode order."""
    return Path(folder) / f"{PREFIX}{index:06d}{SUFFIX}"


def _header(episode: Episode) -> bytes:
    header = {
        "format_version": FORMAT_VERSION,
        "spec": to_dict(episode.spec),
        "fps": float(episode.fps),
        "world": episode.world,
        "seed": int(episode.seed),
        "shapes": {name: list(getattr(episode, name).shape) for name in _ARRAYS},
        "meta": episode.meta,
    }
    return (json.dumps(header, indent=1, sort_keys=True) + "\n").encode()


def _pack(episode: Episode) -> bytes:
    """The file's bytes: equal episodes give equal bytes (fixed time stamps)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:

        def add(name: str, data: bytes) -> None:
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            archive.writestr(info, data, compress_type=zipfile.ZIP_DEFLATED, compresslevel=1)

        add("header.json", _header(episode))
        for name in _ARRAYS:
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(getattr(episode, name)), allow_pickle=False)
            add(f"{name}.npy", member.getvalue())
    return buffer.getvalue()


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside `path`, fsync, rename: `path` holds its old or its new content at any instant, also after a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, episode: Episode) -> None:
    """Write `episode` atomically. Raises OSError (for example a full disk); no partial file is left under `path`."""
    write_atomic(Path(path), _pack(episode))


def load(path: Path) -> Episode:
    """Read and check one file. Raises DataError that names the file and the reason."""
    path = Path(path)
    try:
        return _unpack(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except (DataError, ConfigError) as error:
        raise DataError(f"{path}: {error}") from error
    except _DAMAGE as error:
        raise DataError(f"{path} is damaged or not an episode ({error}): delete it and record it again") from error


def _unpack(path: Path) -> Episode:
    with zipfile.ZipFile(path) as archive:
        missing = [name for name in _MEMBERS if name not in archive.namelist()]
        _require(not missing, f"not an episode: {missing[0] if missing else ''} is missing")
        header = _read_header(archive)
        members = {name: io.BytesIO(archive.read(f"{name}.npy")) for name in _ARRAYS}
    arrays = {name: np.lib.format.read_array(member, allow_pickle=False) for name, member in members.items()}
    for name, array in arrays.items():
        wanted = header["shapes"].get(name)
        _require(list(array.shape) == wanted, f"{name} is {list(array.shape)}, the header says {wanted}")
    return Episode(
        **arrays,
        spec=from_dict(ActionSpec, header["spec"], "spec"),
        fps=header["fps"],
        world=header["world"],
        seed=header["seed"],
        meta=header["meta"],
    )


def _read_header(archive: zipfile.ZipFile) -> dict[str, Any]:
    header = json.loads(archive.read("header.json"))
    _require(isinstance(header, dict), "header.json is not an object")
    version = header.get("format_version")
    _require(
        version == FORMAT_VERSION,
        f"its format is {version}, this program reads {FORMAT_VERSION}: record it again or update worldmodel",
    )
    kinds: dict[str, Any] = {"spec": dict, "fps": (int, float), "world": str, "seed": int, "shapes": dict, "meta": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(header.get(key), kind)]
    _require(not wrong, f"header.json has no valid {wrong[0] if wrong else ''!r}")
    return header


def scan(folder: Path) -> list[Path]:
    """Episode files in `folder`, sorted by name; temporary leftovers of a kill are ignored. DataError if the folder is absent."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: record episodes with `python -m worldmodel.data.recorder --out {folder}`")
    return sorted(p for p in folder.iterdir() if p.name.startswith(PREFIX) and p.suffix == SUFFIX and p.is_file())


def split(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """(train, held-out): the last 5 % by file name, at least one, are held out. Raises DataError for fewer than two episodes."""
    ordered = sorted(paths)
    if len(ordered) < 2:
        raise DataError(f"a data set needs at least 2 episodes, one of them held out, got {len(ordered)}: record more frames")
    held_out = max(1, round(len(ordered) * HELD_OUT_SHARE))
    return ordered[:-held_out], ordered[-held_out:]
