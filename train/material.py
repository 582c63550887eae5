"""What an evaluation is held against: held-out episodes, clips cut from them, and fixed scripts of random play. No model here.

Shapes: B clips, T frames, A action, P pose.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from worldmodel.action import Action, ActionSpec
from worldmodel.config import WorldConfig
from worldmodel.data import episode as episodes
from worldmodel.data.episode import Episode
from worldmodel.data.policies import MouseHand, StickyKeys
from worldmodel.errors import DataError

Report = Callable[[str], None]


@dataclass(frozen=True)
class Clips:
    """B stretches of real play; the model is given the first `context` frames of each.

    frames (B,T,H,W,3), actions (B,T,A), poses (B,T,P), places: (file name, first frame) of every clip.
    """

    frames: np.ndarray
    actions: np.ndarray
    poses: np.ndarray
    context: int
    places: tuple[tuple[str, int], ...]

    @property
    def horizon(self) -> int:
        """Frames behind the context."""
        return self.frames.shape[1] - self.context


@dataclass(frozen=True)
class Material:
    """Episodes of one data set. train: those that probes learn from (a subset). digest: short hash of all episode files."""

    train: list[Episode]
    held_out: list[Episode]
    names: list[str]
    digest: str


def gather(root: Path, config: WorldConfig, train_frames: int, report: Report) -> Material:
    """Read the held-out episodes and about `train_frames` training frames spread evenly over the rest.

    Raises DataError if the folder has nothing usable or does not fit the world.
    """
    train_paths, held_paths = episodes.split(episodes.scan(root))
    held = _read(held_paths, report)
    if not held:
        raise DataError(f"none of the {len(held_paths)} held-out episodes of {root} can be read: record the data set again")
    wanted = max(1, -(-train_frames // max(1, len(held[0][1]))))
    spread = np.unique(np.linspace(0, len(train_paths) - 1, min(wanted, len(train_paths))).round().astype(int))
    train = _read([train_paths[i] for i in spread], report)
    if not train:
        raise DataError(f"no training episode of {root} can be read: record the data set again")
    for path, episode in (*train, *held):
        _check_fit(path, episode, config)
    return Material([e for _, e in train], [e for _, e in held], [p.name for p, _ in held], digest((*train_paths, *held_paths)))


def _read(paths: Sequence[Path], report: Report) -> list[tuple[Path, Episode]]:
    found = []
    for path in paths:
        try:
            found.append((path, episodes.load(path)))
        except DataError as error:
            report(f"skipped {error}")
    return found


def _check_fit(path: Path, episode: Episode, config: WorldConfig) -> None:
    size, wanted = episode.frames.shape[1:3], (config.height, config.width)
    if size != wanted:
        raise DataError(
            f"{path} has {size[1]}x{size[0]} frames, world {config.name!r} {wanted[1]}x{wanted[0]}: give the world's own data"
        )
    if (episode.spec.names, episode.spec.axes) != (config.actions.names, config.actions.axes):
        raise DataError(f"{path} has other actions than world {config.name!r}: give the data that the world was trained on")


def digest(paths: Sequence[Path]) -> str:
    """Short hash of a data set: names and the checksums that the episode files carry, so no frame need be read."""
    total = hashlib.sha256()
    for path in sorted(paths):
        try:
            with zipfile.ZipFile(path) as archive:
                sums = [(i.filename, i.CRC, i.file_size) for i in archive.infolist()]
        except (OSError, zipfile.BadZipFile):
            sums = []
        total.update(repr((path.name, sums)).encode())
    return total.hexdigest()[:16]


def cut(material: Material, context: int, horizon: int, count: int, seed: int) -> Clips:
    """`count` clips of context + horizon held-out frames, at places drawn by `seed`, overlapping only if they must.

    The horizon shrinks to what the longest episode holds, and fewer clips come back where there are not enough places.
    Raises DataError if no held-out episode is longer than the context.
    """
    longest = max(len(e) for e in material.held_out)
    horizon = min(horizon, longest - context)
    if horizon < 1:
        raise DataError(
            f"held-out episodes have at most {longest} frames, but the context alone takes {context}: record longer ones"
        )
    length = stride = context + horizon
    places: list[tuple[int, int]] = []
    while stride >= 1:
        places = [(e, s) for e, x in enumerate(material.held_out) for s in range(0, len(x) - length + 1, stride)]
        if len(places) >= count:
            break
        stride //= 2
    order = np.random.default_rng(seed).permutation(len(places))[:count]
    chosen = [places[i] for i in sorted(order)]

    def stack(name: str) -> np.ndarray:
        return np.stack([getattr(material.held_out[e], name)[s : s + length] for e, s in chosen])

    named = tuple((material.names[e], s) for e, s in chosen)
    return Clips(stack("frames"), stack("actions"), stack("poses"), context, named)


def mirror(actions: np.ndarray, spec: ActionSpec) -> np.ndarray:
    """Encoded actions (..., A) with left and right exchanged."""
    flat = actions.reshape(-1, spec.width)
    return np.stack([spec.encode(spec.mirrored(spec.decode(row))) for row in flat]).reshape(actions.shape).astype(np.float32)


def sideways(actions: np.ndarray, spec: ActionSpec) -> np.ndarray:
    """Which rollouts turn or strafe noticeably over all their T frames: actions (B, T, A) -> bool (B,).

    The rule: the net horizontal mouse motion is at least 0.5 axis scales (rooms: 2 degrees) times min(T, 4); or left or right is
    held, on balance, in at least half of the frames.
    """
    frames, count = actions.shape[1], len(spec.buttons)
    noticed = np.zeros(len(actions), dtype=bool)
    for i, axis in enumerate(spec.axes):
        if axis.source == "mouse_x":
            noticed |= np.abs(actions[:, :, count + i].sum(1)) >= 0.5 * min(frames, 4) - 1e-6
    if "left" in spec.names and "right" in spec.names:
        strafe = actions[:, :, spec.names.index("right")] - actions[:, :, spec.names.index("left")]
        noticed |= np.abs(strafe.sum(1)) >= 0.5 * frames
    return noticed


def random_play(spec: ActionSpec, rollouts: int, frames: int, seed: int) -> np.ndarray:
    """Random play by the keys and the mouse hand of the recorder's `RandomPolicy`, encoded (B, T, A); fixed by `seed`."""
    script = np.zeros((rollouts, frames, spec.width), dtype=np.float32)
    for b in range(rollouts):
        rng = np.random.default_rng([seed, b, 0xA11])
        keys, hands = StickyKeys(rng, spec), {a.source: MouseHand(rng, a.limit, a.per_pixel) for a in spec.axes}
        for t in range(frames):
            mouse = {source: hand.wander() for source, hand in hands.items()}
            script[b, t] = spec.encode(Action(keys.next(), (mouse.get("mouse_x", 0.0), mouse.get("mouse_y", 0.0))))
    return script
