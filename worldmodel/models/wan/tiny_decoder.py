"""TAEHV, the tiny video decoder for Wan 2.1 latents: a fraction of the VAE decoder's work for a somewhat softer picture.

Layers see one frame at a time (see `models.video`). Published weights enter through `codec_keys.tiny_from_reference`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel import kernels
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
        y = kernels.conv_relu(*self.conv1.meet(x, memory), self.conv1.bias)
        y = kernels.conv_relu(y, self.conv2.weight, self.conv2.bias)
        return kernels.conv_relu(y, self.conv3.weight, self.conv3.bias, plus=x)


class _GrowTime(MemoryLayer):
    """One or two frames from each."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.frames, self.conv = frames, nn.Conv2d(width, frames * width, 1, bias=False)

    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, ...]:
        return self.conv(x).chunk(self.frames, dim=1)


class _Double(nn.Module):
    """Every pixel as a square of four."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        pixels = x.permute(0, 2, 3, 1)  # a copy of whole pixels takes a GPU half the time of PyTorch's own way
        b, h, w, c = pixels.shape
        doubled = pixels[:, :, None, :, None].expand(b, h, 2, w, 2, c).reshape(b, 2 * h, 2 * w, c)
        return doubled.permute(0, 3, 1, 2)


class _ToUnit(nn.Module):
    """[0,1] -> [-1,1]."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 - 1


def _level(inputs: int, outputs: int, frames: int) -> list[nn.Module]:
    """Three blocks, then twice the height and width and `frames` times the frames.

    The published order doubles the size before it grows time; a 1x1 convolution does not care, and this way it has a quarter of
    the work.
    """
    grow: list[nn.Module] = [_GrowTime(inputs, frames), _Double()]
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
