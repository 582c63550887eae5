"""Records play of any world into a folder of episodes, with several processes. Resume is the same command again.

    python -m worldmodel.data.recorder --env rooms --frames 100000 --out data/rooms

Episode i is a function of (seed, i) and the world, whatever the number of workers; ``dataset.json`` says what the folder holds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.data import episode as episodes
from worldmodel.data.policies import PolicyFactory
from worldmodel.data.progress import Progress
from worldmodel.data.record_pool import record_all
from worldmodel.data.record_worker import Job
from worldmodel.errors import ConfigError, DataError, WorldModelError
from worldmodel.flags import FlagParser, whole
from worldmodel.world import World

MANIFEST = "dataset.json"
MANIFEST_VERSION = 1


@dataclass
class Summary:
    """What a recording gave. psnr: mean PSNR in dB of repeating the last frame; flat: share of frames with std < 20."""

    episodes: int = 0
    frames: int = 0
    kept: int = 0
    psnr: float = 0.0
    flat: float = 0.0
    seconds: float = 0.0
    places: set[str] = field(default_factory=set)

    def add(self, stats: dict[str, Any]) -> None:
        """Take in one episode's statistics."""
        self.psnr = (self.psnr * self.episodes + stats["psnr"]) / (self.episodes + 1)
        self.flat = (self.flat * self.episodes + stats["flat"]) / (self.episodes + 1)
        self.episodes += 1
        self.frames += stats["frames"]
        self.kept += bool(stats["kept"])
        self.places |= set(stats["visited"])

    def text(self) -> str:
        lines = [
            f"{self.frames} frames in {self.episodes} episodes ({self.kept} were there already), {self.seconds:.0f} s",
            f"repeat-last PSNR {self.psnr:.2f} dB, flat frames {100 * self.flat:.2f} %",
        ]
        if self.places:
            lines.append(f"coverage: {len(self.places)} places of 64x64 units")
        return "\n".join(lines)


def record(
    open_world: Callable[[], World],
    policy: PolicyFactory,
    out: Path,
    frames: int,
    *,
    env: str = "world",
    seed: int = 0,
    workers: int | None = None,
    episode_frames: int = 400,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Record at least `frames` frames into `out`, in whole episodes; episodes that are already there are kept.

    open_world, policy: picklable, as they are called in worker processes. env: noted in the manifest. workers: default, all cores.
    progress(frames done, frames wanted) is called after each episode.
    Raises DataError (other data in `out`, engine crashes, full disk, no engine), and KeyboardInterrupt after a clean stop.
    """
    if frames < 1 or episode_frames < 2:
        raise ConfigError(f"frames must be at least 1 and episode-frames at least 2, got {frames} and {episode_frames}")
    out = Path(out)
    _prepare(out)
    job = Job(open_world, policy, out, seed, episode_frames)
    identity = {"version": MANIFEST_VERSION, "env": env, "seed": seed, "episode_frames": episode_frames}
    _check_manifest(out, identity)
    summary, start = Summary(), time.monotonic()
    workers = min(workers or os.cpu_count() or 1, -(-frames // episode_frames))
    for stats in record_all(job, frames, workers, lambda found: _check_manifest(out, identity | found, True)):
        summary.add(stats)
        progress(min(summary.frames, frames), frames)
    summary.seconds = time.monotonic() - start
    return summary


def _prepare(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for leftover in out.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {out} ({error.strerror}): choose another --out") from error


def _check_manifest(out: Path, wanted: dict[str, Any], write: bool = False) -> None:
    """Compare `wanted` with ``dataset.json``, write it if there is none yet. Raises DataError at a difference."""
    path = out / MANIFEST
    if not path.exists():
        if episodes.scan(out):
            raise DataError(f"{out} holds episodes but no {MANIFEST}: choose an empty folder for --out")
        if write:
            episodes.write_atomic(path, (json.dumps(wanted, indent=1, sort_keys=True) + "\n").encode())
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}): delete the folder {out} or choose another --out") from error
    wanted = json.loads(json.dumps(wanted))
    different = [k for k in wanted if not isinstance(found, dict) or found.get(k) != wanted[k]]
    if different:
        key = different[0]
        old = found.get(key) if isinstance(found, dict) else found
        raise DataError(
            f"{out} was recorded with {key} {_short(old)}, now it is {_short(wanted[key])}: choose another --out, or the old {key}"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def contact_sheet(folder: Path, path: Path, columns: int = 6, rows: int = 5, scale: int = 2) -> None:
    """Write a PNG of frames spread over the episodes of `folder`."""
    import cv2

    paths = episodes.scan(folder)
    if not paths:
        raise DataError(f"{folder} holds no episodes to preview: record some first")
    tiles = []
    for k in range(rows * columns):
        frames = episodes.load(paths[k * len(paths) // (rows * columns)]).frames
        frame = frames[(k * 7919 + 101) % len(frames)]
        tiles.append(cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC))
    sheet = np.concatenate([np.concatenate(tiles[r * columns : (r + 1) * columns], axis=1) for r in range(rows)])
    ok, data = cv2.imencode(".png", sheet[..., ::-1])
    if not ok:
        raise DataError(f"cannot encode {path}: choose another name")
    try:
        episodes.write_atomic(path, data.tobytes())
    except OSError as error:
        raise DataError(f"cannot write the preview {path} ({error.strerror or error}): choose another --preview") from error


def _existing(folder: Path) -> Path:
    """The nearest folder above that is there."""
    return folder if folder.exists() or folder == folder.parent else _existing(folder.parent)


def _parser() -> argparse.ArgumentParser:
    about = "Record play of a real world into episodes. The same command again goes on where it stopped."
    parser = FlagParser(prog="python -m worldmodel.data.recorder", description=about)
    parser.add_argument("--env", default="rooms", help="rooms, racing, or any Gymnasium id (default: rooms)")
    parser.add_argument("--frames", type=whole(1), default=100_000, help="at least this many, in whole episodes (default: 100000)")
    parser.add_argument("--out", type=Path, help="folder of the episodes (default: data/ENV)")
    parser.add_argument("--seed", type=whole(0), default=0, help="another seed, another play (default: 0)")
    parser.add_argument("--workers", type=whole(1), help="recording processes (default: one per core)")
    parser.add_argument("--episode-frames", type=whole(2, 100_000), default=400, help="frames per episode (default: 400)")
    parser.add_argument("--size", help="HxW of the frames, for Gymnasium ids (default: longer side 128 at most, multiples of 16)")
    parser.add_argument("--preview", type=Path, metavar="FILE.png", help="also write a contact sheet")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    out = args.out or Path("data") / args.env.replace("/", "-")
    try:
        if args.preview and (args.preview.is_dir() or not os.access(_existing(args.preview.parent), os.W_OK)):
            raise DataError(f"cannot write the preview {args.preview}: choose another --preview")
        from worldmodel.data import real

        with Progress("recording") as progress:
            summary = record(
                real.opener(args.env, real.parse_size(args.size)),
                real.policy_for(args.env),
                out,
                args.frames,
                env=args.env,
                seed=args.seed,
                workers=args.workers,
                episode_frames=args.episode_frames,
                progress=progress.update,
            )
        print(summary.text())
        if args.preview:
            contact_sheet(out, args.preview)
            print(f"wrote {args.preview}")
    except KeyboardInterrupt:
        print("stopped; finished episodes are kept, the same command goes on", file=sys.stderr)
        return 130
    except WorldModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
