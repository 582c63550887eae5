"""What `train.prepare` made of videos, as a stage sees it: latents, prompt embeddings and cameras, mapped from their shards.

A folder holds ``shard-NNNNN.safetensors`` (latents of a few clips one after another, their prompts' embeddings, their cameras; the
table of clips is in the header), ``negative.safetensors`` and, once it is whole, ``latents.json``.
Shapes: N latents of the data set, n of a shard, E clips, B clips of a batch, T frames, C H W latent, L tokens, D text width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.data import Clips, Store
from train.options import DiTOptions
from train.record import read_json
from train.video_codec import VideoCodec
from train.weights import check_codec
from worldmodel.action import ActionSpec
from worldmodel.errors import ConfigError, DataError

if TYPE_CHECKING:
    from train.stages.base import Context

INDEX, PLAN, NEGATIVE = "latents.json", "prepare.json", "negative.safetensors"
HELD_OUT_EVERY = 20  # videos


@dataclass(frozen=True)
class Index:
    """Where clips lie. starts, lengths: int64 (E,). held_out: bool (E,)."""

    starts: np.ndarray
    lengths: np.ndarray
    held_out: np.ndarray

    def part(self, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
        """(starts, lengths) of the training or of the held-out clips."""
        chosen = self.held_out == held_out
        return self.starts[chosen], self.lengths[chosen]


class Shards:
    """Arrays of several files as one, as far as `Store` needs it: rows by slice or by index."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape = (int(self._ends[-1]), *parts[0].shape[1:])
        self.nbytes = sum(part.nbytes for part in parts)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        rows = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        out = np.empty((len(rows), *self.shape[1:]), self._parts[0].dtype)
        for number, part in enumerate(np.searchsorted(self._ends, rows, side="right")):
            begin = self._ends[part - 1] if part else 0
            out[number] = self._parts[part][rows[number] - begin]
        return out


def is_prepared(root: Path) -> bool:
    """Whether `root` is a folder of `train.prepare`, finished or not."""
    return (root / INDEX).is_file() or (root / PLAN).is_file()


def read_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Mapped tensors of a shard, and what its header says. Raises DataError that names the file."""
    try:
        with safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {})["worldmodel"])
            return {name: file.get_tensor(name) for name in file.keys()}, note  # noqa: SIM118 - safe_open has no iteration
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is damaged ({error}): delete it and run python -m train.prepare again") from error


def held_out_clips(files: Sequence[str]) -> np.ndarray:
    """bool (E,): the held-out clips, named by their video: of every 20th video, at least of one; of a single one its last clip."""
    names = list(dict.fromkeys(files))
    chosen = set(names[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or names[-1:])
    if len(names) == 1:
        return np.arange(len(files)) == len(files) - 1
    return np.array([file in chosen for file in files])


class VideoLatents:
    """The folder `root`, open for training. Clips begin where videos were cut: a latent holds what came before it in its clip, and
    the first one a single picture.

    fps: pictures a second. shown_by: what decodes the latents (``codec=FILE``), None without. Raises DataError if the folder is
    unfinished or damaged, ConfigError if the run's other settings do not go with it.
    """

    spec = ActionSpec()  # what players do moves the camera
    place = 0

    def __init__(self, context: Context, root: Path) -> None:
        index = read_json(root / INDEX)
        if index is None:
            raise DataError(f"{root} is not finished: run the same python -m train.prepare again, it goes on where it stopped")
        self.folder, self.codec, self._text_len = root, str(index["codec"]), context.config.model.dit.text_len
        self.fps = float(index["fps"])
        self.shown_by = self._codec(context.config.codec, context.device)
        check_codec({self.codec}, context.config)
        shards = [read_shard(path) for path in sorted(root.glob("shard-*.safetensors"))]
        if len(shards) != index["shards"]:
            raise DataError(f"{root} has {len(shards)} of its {index['shards']} shards: run the same python -m train.prepare again")
        self._index(shards)
        tensors = [tensors for tensors, _ in shards]

        def stored(name: str) -> Store:  # a step takes a few clips of many gigabytes: they stay on the disk
            return Store(Shards([part[name].numpy() for part in tensors]), context.device, False)

        self._latents, self.shape = stored("latents"), tuple(tensors[0]["latents"].shape[1:])
        self._cameras = (stored("views"), stored("intrinsics")) if "views" in tensors[0] else None
        self._actions = Store(np.zeros((len(self._latents), 0), np.float32), context.device, False)
        self._negative = read_shard(root / NEGATIVE)[0]["embedding"]
        self._device = context.device
        self._check_fits(context.config.model.dit)

    def _codec(self, place: str, device: torch.device) -> VideoCodec | None:
        """The codec that shows the latents, if there is one."""
        if not place:
            return None
        if not Path(place).exists():
            raise ConfigError(f"there is no codec={place}: give the file of the video codec, or leave out codec=")
        if not Path(place).is_file():
            raise ConfigError(
                f"{self.folder} holds latents already, made by the video codec: leave out codec=, or give that codec's file "
                "(Wan2.1_VAE.pth, or taew2_1.safetensors) to see pictures"
            )
        codec = VideoCodec.load(Path(place), device)
        if codec.encoder_id and codec.encoder_id != self.codec:
            raise ConfigError(
                f"the latents of {self.folder} are those of another VAE than codec={place}: give the one that made them"
            )
        return codec

    def _index(self, shards: Sequence[tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
        self._table = table = [clip for _, note in shards for clip in note["clips"]]
        lengths = np.array([clip["latents"] for clip in table], np.int64)
        held_out = held_out_clips([clip["file"] for clip in table])
        if held_out.all():
            raise DataError(f"{self.folder} holds one clip only: training needs another to be held out, add videos")
        self.index = Index(np.cumsum(lengths) - lengths, lengths, held_out)
        self._clip_of = torch.from_numpy(np.repeat(np.arange(len(table)), lengths))
        self._texts = [
            rows for tensors, note in shards for rows in tensors["text"].split([clip["tokens"] for clip in note["clips"]])
        ]
        self.digest = hashlib.sha256(json.dumps([note for _, note in shards], sort_keys=True).encode()).hexdigest()[:16]

    def told(self, held_out: bool) -> list[tuple[str, int, str]]:
        """(video, which clip of it, prompt) of the clips, in their order; "" where an older version kept no prompt."""
        chosen = zip(self._table, self.index.held_out, strict=True)
        return [(str(c["file"]), int(c["number"]), str(c.get("prompt", ""))) for c, held in chosen if held == held_out]

    def clips(self, frames: int, held_out: bool) -> Clips:
        """One clip of `frames` latents from the beginning of each that was prepared."""
        cut = Index(self.index.starts, np.minimum(self.index.lengths, frames), self.index.held_out)
        return Clips(cut, self._latents, self._actions, frames, held_out, self._conditions)

    def _check_fits(self, network: DiTOptions) -> None:
        """Raise ConfigError for a network with other prompts, or with a camera that nothing moves."""
        width = self._negative.shape[1]
        if network.text_dim != width:
            raise ConfigError(
                f"{self.folder} has prompts of width {width}, the model takes {network.text_dim or 'none'}: choose model=wan_1_3b, "
                f"or set model.dit.text_dim={width}"
            )
        longest = max(len(rows) for rows in (*self._texts, self._negative))
        if longest > network.text_len:
            raise ConfigError(f"a prompt has {longest} tokens, the model takes {network.text_len}: raise model.dit.text_len")
        if network.camera and self._cameras is None:
            raise ConfigError(f"{self.folder} has no camera poses: set model.dit.camera=false, or prepare videos that have some")

    def _conditions(self, indices: Tensor) -> dict[str, Any]:
        """Prompts and cameras of clips, by the numbers (B,T) of their latents."""
        texts = [self._padded(self._texts[clip]) for clip in self._clip_of[indices[:, 0]].tolist()]
        cameras = None if self._cameras is None else tuple(store.pick(indices) for store in self._cameras)
        return {
            "text": torch.stack(texts).to(self._device),
            "negative": self._padded(self._negative).to(self._device),
            "cameras": cameras,
        }

    def _padded(self, embedding: Tensor) -> Tensor:
        return torch.nn.functional.pad(embedding, (0, 0, 0, self._text_len - len(embedding)))
