"""Where the flow stages have their latents from: recorded episodes and a trained codec, or videos that `train.prepare` encoded.

Shapes: N frames of the data set, C H W latent, A action.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from train import videos
from train.data import Clips, Store, encode_latents
from train.place import pose_channels
from train.unpack import Frames, unpack
from train.weights import LoadedCodec, check_codec, load_codec
from worldmodel.action import ActionSpec
from worldmodel.errors import ConfigError
from worldmodel.models.codec import to_float
from worldmodel.models.place import PLACE_CHANNELS

if TYPE_CHECKING:
    from train.stages.base import Context


class Latents(Protocol):
    """A data set as a stage sees it. place: of the channels, how many say where the player is (the last). codec: names the codec.

    folder: where caches of the data set live.
    """

    spec: ActionSpec
    shape: tuple[int, ...]
    place: int
    digest: str
    codec: str
    folder: Path

    def clips(self, frames: int, held_out: bool) -> Clips:
        """Clips of `frames` latents of the training or the held-out part."""
        ...


def open_frames(context: Context) -> Frames:
    """The data set of the run, unpacked once (by rank 0)."""
    options = context.config.data
    with context.ranks.main_first():
        return unpack(Path(options.root), Path(options.cache) if options.cache else None, options.workers, context.report)


def open_latents(context: Context) -> Latents:
    """The data set of the run. Raises DataError, ConfigError, CheckpointError."""
    root, network, place_span = Path(context.config.data.root), context.config.model.dit, context.config.data.place_span
    prepared = context.size is None and videos.is_prepared(root)
    if prepared or network.text_dim or network.camera:
        if place_span:
            raise ConfigError("data.place_span is for recorded worlds that tell poses, not for videos: leave it 0")
        if context.config.model.sampler.past_noise:
            raise ConfigError("model.sampler.past_noise is for recorded worlds, not for videos: leave it 0")
    if context.size is not None:
        place = PLACE_CHANNELS if place_span else 0
        return ShapesOnly(context.config.model.codec.channels, place, context.size)
    if prepared:
        return videos.VideoLatents(context, root)
    if network.text_dim or network.camera:
        raise ConfigError(
            f"this model takes prompts or cameras, and {root} holds no prepared videos: make some by python -m train.prepare and "
            "give them by data=video data.root=FOLDER"
        )
    return RecordedLatents(context)


class RecordedLatents:
    """Recorded episodes, whose pictures a trained codec encodes once."""

    def __init__(self, context: Context) -> None:
        self._context, self.frames = context, open_frames(context)
        self.trained: LoadedCodec = load_codec(context.config.codec, context.device)
        check_codec(self.trained.names, context.config)
        with context.ranks.main_first():
            latents = encode_latents(self.frames, self._encode, self.trained.digest, context.device, context.report)
        on_gpu = context.config.train.on_gpu
        self._latents = Store(latents, context.device, on_gpu)
        self._actions = Store(self.frames.actions, context.device, on_gpu)
        self.spec, self.digest, self.folder = self.frames.spec, self.frames.digest, self.frames.folder
        self.place, self.codec = PLACE_CHANNELS if context.config.data.place_span else 0, self.trained.digest
        self.shape = (latents.shape[1] + self.place, *latents.shape[2:])
        if self.place:
            if self.frames.poses.shape[1] != 3:
                told = f"{self.frames.poses.shape[1]} numbers a frame"
                raise ConfigError(
                    f"data.place_span needs poses x, y, degrees, and {context.config.data.root} tells {told}: leave it 0"
                )
            self._poses = Store(self.frames.poses, context.device, on_gpu)

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        with self._context.autocast():
            codec = self.trained.codec
            return codec.encode(to_float(pixels))[:, : codec.cfg.channels]

    def clips(self, frames: int, held_out: bool) -> Clips:
        """See `Latents`."""
        return Clips(self.frames, self._latents, self._actions, frames, held_out, self._told)

    def _told(self, indices: Tensor) -> dict[str, Any]:
        if not self.place:
            return {}
        options, (_, rows, columns) = self._context.config.data, self.shape
        return {"place": pose_channels(self._poses.pick(indices), options.place_span, options.place_view, (rows, columns))}


class ShapesOnly:
    """Stands in where no data are read, for networks of shapes alone (train.estimate)."""

    digest, codec, folder, spec = "", "", Path(), ActionSpec()

    def __init__(self, channels: int, place: int, size: tuple[int, int]) -> None:
        self.place = place
        self.shape: tuple[int, ...] = (channels + place, size[0] // 8, size[1] // 8)

    def clips(self, frames: int, held_out: bool) -> Clips:
        """Clips that can be counted but not drawn."""
        none = Store(np.zeros((1, 1), np.float16), torch.device("cpu"), False)
        return Clips(videos.Index(np.array([0]), np.array([frames]), np.array([held_out])), none, none, frames, held_out)
