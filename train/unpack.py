"""Episodes -> flat arrays on disk, once per data set: `frames.npy` and its neighbours, memory-mapped afterwards. No torch.

Cache layout: ``<cache>/<data hash>/{frames,actions,poses}.npy`` and ``index.json``. It is built beside its final name and renamed,
so a killed unpacking leaves nothing that looks finished. Shapes: N frames of all episodes one after another, E episodes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from train.made_once import Report, make_once, new_array
from worldmodel.action import ActionSpec
from worldmodel.data import episode as episodes
from worldmodel.errors import ConfigError, DataError
from worldmodel.plain import from_dict, to_dict


@dataclass(frozen=True)
class Frames:
    """All frames of a data set, in file name order.

    frames: uint8 (N,H,W,3), memory-mapped. actions: float32 (N,A). poses: float32 (N,P). starts, lengths: int64 (E,).
    held_out: bool (E,). digest: hash of the episode files' content. folder: where caches of this data set live.
    """

    frames: np.ndarray
    actions: np.ndarray
    poses: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    held_out: np.ndarray
    spec: ActionSpec
    fps: float
    world: str
    digest: str
    folder: Path

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return int(self.frames.shape[1]), int(self.frames.shape[2])

    def part(self, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
        """(starts, lengths) of the training or of the held-out episodes."""
        chosen = self.held_out == held_out
        return self.starts[chosen], self.lengths[chosen]


@dataclass(frozen=True)
class _Entry:
    path: str
    shape: tuple[int, ...]
    held_out: bool
    checksum: str


def _peek(path: Path) -> tuple[tuple[int, ...], str]:
    """(shape of the frames, checksum of the content) from the zip directory and one header, without unpacking."""
    try:
        with zipfile.ZipFile(path) as archive:
            checksum = ",".join(f"{i.filename}:{i.CRC:08x}:{i.file_size}" for i in archive.infolist())
            with archive.open("frames.npy") as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape = read(member)[0]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError, NotImplementedError) as error:
        raise DataError(f"{path} is damaged or not an episode ({error}): delete it and record it again") from error
    if len(shape) != 4:
        raise DataError(f"{path}: frames must be (T, H, W, 3), got {shape}")
    return shape, checksum


def _survey(root: Path, report: Report) -> list[_Entry]:
    paths = episodes.scan(root)
    held_out = set(episodes.split(paths)[1])
    found: list[_Entry] = []
    for path in paths:
        try:
            shape, checksum = _peek(path)
        except DataError as error:
            report(f"skipped {error}")
            continue
        found.append(_Entry(str(path), shape, path in held_out, f"{path.name} {checksum}"))
    if not found or all(e.held_out for e in found) or not any(e.held_out for e in found):
        raise DataError(f"{root} needs a readable training episode and a readable held-out one: record more frames")
    sizes = {e.shape[1:] for e in found}
    if len(sizes) > 1:
        raise DataError(f"{root} mixes episodes of sizes {sorted(sizes)}: keep one size in a folder")
    return found


def unpack(root: Path, cache: Path | None, workers: int, report: Report) -> Frames:
    """Open the data set `root`, unpacking it first if that was not done yet. workers: processes, 0 = one per core.

    Raises DataError if there is nothing usable. Corrupt episodes are named to `report` and left out.
    """
    entries = _survey(root, report)
    digest = hashlib.sha256("\n".join(e.checksum for e in entries).encode()).hexdigest()[:16]
    folder = (cache or root / "cache") / digest
    make_once(folder, lambda: _build(folder, entries, workers, report), report)
    try:
        return _open(folder, digest)
    except (OSError, ValueError, TypeError, KeyError, IndexError, EOFError, ConfigError) as error:
        raise DataError(f"the cache {folder} is damaged ({error}): delete that folder, it is made again") from error


def _build(folder: Path, entries: list[_Entry], workers: int, report: Report) -> None:
    building = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    first = _first_good(entries)
    counts = [e.shape[0] for e in entries]
    starts = np.concatenate(([0], np.cumsum(counts)))
    total = int(starts[-1])
    for name, like in (("frames", first.frames), ("actions", first.actions), ("poses", first.poses)):
        new_array(building / f"{name}.npy", like.dtype, (total, *like.shape[1:]))
    signature = json.dumps([to_dict(first.spec), first.fps, first.world])
    jobs = [(e.path, str(building), int(s), e.shape[0], signature) for e, s in zip(entries, starts[:-1], strict=True)]
    kept = []
    for i, problem in enumerate(_run(jobs, workers)):
        if problem is None:
            kept.append(i)
        else:
            report(f"skipped {problem}")
        if (i + 1) % max(1, len(jobs) // 10) == 0:
            report(f"unpacked {i + 1} of {len(jobs)} episodes")
    index: dict[str, Any] = {"spec": to_dict(first.spec), "fps": first.fps, "world": first.world}
    index["episodes"] = [[int(starts[i]), counts[i], entries[i].held_out] for i in kept]
    if not {e[2] for e in index["episodes"]} == {True, False}:
        raise DataError(
            f"{Path(entries[0].path).parent} needs a readable training episode and a readable held-out one: record more frames"
        )
    episodes.write_atomic(building / "index.json", json.dumps(index).encode())
    building.replace(folder)


def _first_good(entries: list[_Entry]) -> episodes.Episode:
    for entry in entries:
        with contextlib.suppress(DataError):  # reported when its turn comes
            return episodes.load(Path(entry.path))
    raise DataError(f"none of the {len(entries)} episodes can be read: record them again")


def _run(jobs: list[tuple[Any, ...]], workers: int) -> Iterable[str | None]:
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1 or len(jobs) < 16:  # starting processes costs more than a few episodes
        yield from map(_write_one, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_write_one, jobs, chunksize=2)


def _write_one(job: tuple[Any, ...]) -> str | None:
    """Copy one episode into the arrays; returns what is wrong with it, or None."""
    path, folder, start, count, signature = job
    try:
        episode = episodes.load(Path(path))
    except DataError as error:
        return str(error)
    if json.dumps([to_dict(episode.spec), episode.fps, episode.world]) != signature:
        return f"{path}: its actions, fps or world differ from the other episodes of the folder"
    for name in ("frames", "actions", "poses"):
        values = getattr(episode, name)
        array = np.lib.format.open_memmap(Path(folder) / f"{name}.npy", "r+")
        if values.shape[1:] != array.shape[1:]:
            return f"{path}: {name} are {values.shape[1:]}, in the other episodes {array.shape[1:]}"
        array[start : start + count] = values
        array.flush()
    return None


def _open(folder: Path, digest: str) -> Frames:
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    table = np.array([e[:2] for e in index["episodes"]], dtype=np.int64)
    frames = np.load(folder / "frames.npy", mmap_mode="r")
    if table.min() < 0 or table.sum(1).max() > len(frames):
        raise ValueError(f"index.json speaks of more than its {len(frames)} frames")
    return Frames(
        frames=frames,
        actions=np.load(folder / "actions.npy"),
        poses=np.load(folder / "poses.npy"),
        starts=table[:, 0],
        lengths=table[:, 1],
        held_out=np.array([e[2] for e in index["episodes"]], dtype=bool),
        spec=from_dict(ActionSpec, index["spec"], "spec"),
        fps=float(index["fps"]),
        world=str(index["world"]),
        digest=digest,
        folder=folder,
    )
