"""The family's video codec as training needs it: a clip's latents -> its pictures, and its last picture -> a first latent.

The files are the published ones: Wan2.1_VAE, which does both, or taew2_1, which only shows.
Shapes: T latents, F = 1 + 4 (T - 1) pictures, C h w latent, H W pixels.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from worldmodel.assemble import read_decoder, read_encoder
from worldmodel.errors import CheckpointError
from worldmodel.footprint import alive, weights
from worldmodel.models.codec import to_uint8
from worldmodel.models.video import StreamNet, VideoDecoder, VideoEncoder
from worldmodel.models.wan.vae import LATENT, WanDecoder, WanEncoder
from worldmodel.video_world import decoder_of


def load_encoder(path: Path, device: torch.device) -> tuple[WanEncoder, str]:
    """The encoder of a published Wan2.1_VAE, float32, and its id, which latents made by it are known by. Raises CheckpointError."""
    state = read_encoder(path)
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    net = WanEncoder(len(state["layers.0.bias"]))
    net.load_state_dict(state)
    return net.to(device).eval().requires_grad_(False), digest.hexdigest()[:16]


class VideoCodec:
    """encoder_id: see `load_encoder`; "" where only a decoder is known: such a codec shows, but cannot `restart`."""

    def __init__(self, decoder: StreamNet, encoder: WanEncoder | None = None, encoder_id: str = "") -> None:
        """Both on their device."""
        self._decoder, self._encoder, self.encoder_id = decoder, encoder, encoder_id

    @staticmethod
    def load(path: Path, device: torch.device) -> VideoCodec:
        """From a published file. Raises CheckpointError."""
        config, state = read_decoder(path)
        decoder = decoder_of(config)
        try:
            decoder.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(
                f"{path} is no whole decoder ({str(error).splitlines()[-1].strip()}): download it again"
            ) from error
        encoder, name = load_encoder(path, device) if config.kind == "wan_vae" else (None, "")
        return VideoCodec(decoder.to(device).eval().requires_grad_(False), encoder, name)

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> np.ndarray:
        """(T,C,h,w), a clip from its beginning -> uint8 (F,H,W,3)."""
        stream, shown = VideoDecoder(self._decoder), []
        for latent in latents.split(1):  # a whole clip of pictures at once would be gigabytes of numbers
            shown.append(to_uint8(stream.decode(self._here(latent)[None])[0]).cpu().numpy())
        return np.concatenate(shown)

    @torch.no_grad()
    def restart(self, latents: Tensor) -> Tensor:
        """(B,T,C,h,w), clips from their beginning -> (B,1,C,h,w): the last picture of each as the first latent of a new clip."""
        assert self._encoder is not None, "a decoder alone makes no latents"
        stream = VideoDecoder(self._decoder)
        for latent in latents.split(1, dim=1):
            decoded = stream.decode(self._here(latent))
        last = decoded[:, -1:].float().clamp(-1, 1)
        return VideoEncoder(self._encoder).encode(last).to(latents)

    @property
    def encodes(self) -> bool:
        """Whether `restart` is possible."""
        return self._encoder is not None

    def _here(self, latents: Tensor) -> Tensor:
        return latents.to(next(self._decoder.parameters()).device)


def restart_bytes(size: tuple[int, int], batch: int) -> int:
    """Bytes that `VideoCodec.restart` takes with the published codec, weights included. size: (H, W) of the pictures."""
    with torch.device("meta"):
        latents = torch.empty(batch, 3, LATENT, size[0] // 8, size[1] // 8)  # the decoder's memory is full then
        halves = WanDecoder(), WanEncoder()
    codec = VideoCodec(*halves)
    return 2 * sum(map(weights, halves)) + alive(lambda: codec.restart(latents))
