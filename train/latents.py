"""Where the flow stages have their latents from: recorded episodes and a trained codec, or videos that `train.prepare` encoded.

Shapes: N frames of the data set, C H W latent, A action.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from train import videos
from train.data import Clips, Store, encode_latents
from train.unpack import Frames, unpack
from train.weights import LoadedCodec, check_codec, load_codec
from worldmodel.action import ActionSpec
from worldmodel.errors import ConfigError
from worldmodel.models.codec import to_float

if TYPE_CHECKING:
    from train.stages.base import Context


class Latents(Protocol):
    """A data set as a stage sees it. codec: names the codec. folder: where caches of the data set live."""

    spec: ActionSpec
    shape: tuple[int, ...]
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
    if context.size is not None:
        return ShapesOnly(context.config.model.codec.channels, context.size)
    root, network = Path(context.config.data.root), context.config.model.dit
    if videos.is_prepared(root):
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
        self.shape, self.codec = latents.shape[1:], self.trained.digest

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        with self._context.autocast():
            return self.trained.codec.encode(to_float(pixels))

    def clips(self, frames: int, held_out: bool) -> Clips:
        """See `Latents`."""
        return Clips(self.frames, self._latents, self._actions, frames, held_out)


class ShapesOnly:
    """Stands in where no data are read, for networks of shapes alone (train.estimate)."""

    digest, codec, folder, spec = "", "", Path(), ActionSpec()

    def __init__(self, channels: int, size: tuple[int, int]) -> None:
        self.shape: tuple[int, ...] = (channels, size[0] // 8, size[1] // 8)

    def clips(self, frames: int, held_out: bool) -> Clips:
        """Clips that can be counted but not drawn."""
        none = Store(np.zeros((1, 1), np.float16), torch.device("cpu"), False)
        return Clips(videos.Index(np.array([0]), np.array([frames]), np.array([held_out])), none, none, frames, held_out)
