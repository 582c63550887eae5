"""Frames <-> latents. `Codec` is the face; `FrameCodec` is the small autoencoder of the bundled worlds.

Shapes: N pictures, H W pixels, C latent channels, h w = H/8, W/8. Pictures are floats in [-1, 1]; latents have unit scale.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.config import CodecConfig


class Codec(Protocol):
    """Encode and decode pictures. One latent is one frame here, so streaming is simply one call a frame.

    Codecs of whole videos remember earlier frames and make 1 or 4 frames of a latent: `models.video` has their face.
    """

    def encode(self, rgb: Tensor) -> Tensor:
        """(N,3,H,W) in [-1,1] -> (N,C,h,w) at unit scale."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """(N,C,h,w) at unit scale -> (N,3,H,W) in [-1,1]."""
        ...


def to_float(rgb: np.ndarray | Tensor) -> Tensor:
    """uint8 (N,H,W,3) -> float32 (N,3,H,W) in [-1,1]."""
    pixels = torch.tensor(rgb) if isinstance(rgb, np.ndarray) else rgb
    return pixels.movedim(-1, 1).float() / 127.5 - 1.0


def to_uint8(rgb: Tensor) -> Tensor:
    """float (N,3,H,W) -> uint8 (N,H,W,3), on the same device."""
    levels = rgb.float().clamp(-1.0, 1.0).add_(1.0).mul_(127.5).round_()  # in place: pictures may be large
    return levels.to(torch.uint8).movedim(1, -1).contiguous()


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))); starts as the identity, so no normalisation is needed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def _stack(width: int, blocks: int) -> list[nn.Module]:
    return [Residual(width) for _ in range(blocks)]


class FrameCodec(nn.Module):
    """Convolutional autoencoder, 8x in height and width. Down- and upsampling move pixels into channels (pixel shuffle): the
    decoder never convolves at full resolution, which is what makes it fast on a CPU."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, cfg: CodecConfig) -> None:
        super().__init__()
        self.cfg = cfg
        (e1, e2, e3), (d1, d2, d3) = cfg.widths, cfg.decoder_widths
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, e1, 3, padding=1),
            *_stack(e1, 1),
            nn.Conv2d(e1, e2, 4, stride=2, padding=1),
            *_stack(e2, 1),
            nn.Conv2d(e2, e3, 4, stride=2, padding=1),
            *_stack(e3, cfg.blocks),
            nn.ReLU(),
            nn.Conv2d(e3, cfg.channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(cfg.channels, d3, 3, padding=1),
            *_stack(d3, cfg.blocks),
            nn.Conv2d(d3, 4 * d2, 3, padding=1),
            nn.PixelShuffle(2),
            *_stack(d2, 1),
            nn.Conv2d(d2, 4 * d1, 3, padding=1),
            nn.PixelShuffle(2),
            *_stack(d1, 1),
            nn.ReLU(),
            nn.Conv2d(d1, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.register_buffer("latent_mean", torch.zeros(cfg.channels))
        self.register_buffer("latent_std", torch.ones(cfg.channels))

    def encode(self, rgb: Tensor) -> Tensor:
        """(N,3,H,W) in [-1,1] -> (N,C,h,w) at unit scale. Where the player is, no picture tells: those channels are zero."""
        latent = (self.encoder(rgb) - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]
        return F.pad(latent, (0, 0, 0, 0, 0, self.cfg.place)) if self.cfg.place else latent

    def decode(self, latent: Tensor) -> Tensor:
        """(N,C,h,w) at unit scale -> (N,3,H,W), nominally in [-1,1] (not clamped)."""
        latent = latent[:, : self.cfg.channels]
        return self.decoder(latent * self.latent_std[:, None, None] + self.latent_mean[:, None, None])

    def training_forward(self, rgb: Tensor, noise_std: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Reconstruction through noised raw latents, and the raw latents (N,C,h,w) before noise.

        The noise makes nearby latents decode alike, so small errors of the world model stay small in the picture.
        """
        raw = self.encoder(rgb)
        noise = torch.randn(raw.shape, generator=generator, device=raw.device, dtype=raw.dtype)
        return self.decoder(raw + noise_std * noise), raw

    def set_scale(self, mean: Tensor, std: Tensor) -> None:
        """Fix the unit scale from data statistics of raw latents: mean and std, both (C,)."""
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)
