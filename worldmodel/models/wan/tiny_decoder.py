"""TAEHV, the tiny video decoder for Wan 2.1 latents: a fraction of the VAE decoder's work for a somewhat softer picture.

Layers see one frame at a time (see `models.video`). Published weights enter through `codec_keys.tiny_from_reference`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.models.video import CausalConv, Memory, MemoryLayer, StreamNet

LATENT = 16
WIDTHS = (256, 128, 64, 64)  # of the published weights


class _Limit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class _Block(MemoryLayer):
    """Three convolutions around a shortcut; the first also sees the frame before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = CausalConv(width, width, taps=2)
        self.conv2, self.conv3 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        y = F.relu(self.conv1(x, memory), inplace=True)
        y = F.relu(self.conv2(y), inplace=True)
        return F.relu(self.conv3(y) + x, inplace=True)


class _GrowTime(MemoryLayer):
    """One or two frames from each."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.frames, self.conv = frames, nn.Conv2d(width, frames * width, 1, bias=False)

    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, ...]:
        return self.conv(x).chunk(self.frames, dim=1)


class _ToUnit(nn.Module):
    """[0,1] -> [-1,1]."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 - 1


def _level(inputs: int, outputs: int, frames: int) -> list[nn.Module]:
    """Three blocks, then twice the height and width and `frames` times the frames.

    The published order doubles the size before it grows time; a 1x1 convolution does not care, and this way it has a quarter of
    the work.
    """
    grow: list[nn.Module] = [_GrowTime(inputs, frames), nn.UpsamplingNearest2d(scale_factor=2)]
    return [*(_Block(inputs) for _ in range(3)), *grow, nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]


class TinyDecoder(StreamNet):
    """Latents (B,16,h,w) -> frames (B,3,8h,8w), nominally in [-1,1]. Always 4 frames a latent: a clip's first 3 precede it."""

    warm_up = 3

    def __init__(self, widths: tuple[int, int, int, int] = WIDTHS) -> None:
        first, second, third, last = widths
        layers = [
            _Limit(),
            nn.Conv2d(LATENT, first, 3, padding=1),
            nn.ReLU(inplace=True),
            *_level(first, second, 1),
            *_level(second, third, 2),
            *_level(third, last, 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(last, 3, 3, padding=1),
            _ToUnit(),
        ]
        super().__init__(LATENT, 3, layers)
