"""The Wan 2.1 video VAE: 8x smaller in height and width, 4x in time, causal; a clip of 1+4n frames is 1+n latents of 16 channels.

Layers see one frame at a time (see `models.video`). Published weights enter through `codec_keys.vae_from_reference`, which also
folds the published mean and deviation of the latents into the outermost 1x1 convolutions: latents here are at unit scale.

A decoder at 832x480 and the published width carries 3.5 GiB from latent to latent in float32, half of that in bfloat16: the two
newest inputs of every convolution over time, which seamless streaming needs. Measured peak of a process
with weights, on a CPU: 5.3 and 2.9 GiB.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel import kernels
from worldmodel.models.video import CausalConv, Memory, MemoryLayer, StreamNet

LATENT = 16
WIDTH = 96  # of the published weights


class _Norm(nn.Module):
    """RMS norm over channels, in the form x / |x| * sqrt(C) * weight; (B,C,H,W), weight (C,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * (self.weight * x.shape[1] ** 0.5)[:, None, None]


class _Residual(MemoryLayer):
    """Two causal convolutions, each behind norm and SiLU, around a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _Norm(inputs), CausalConv(inputs, outputs)
        self.norm2, self.conv2 = _Norm(outputs), CausalConv(outputs, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        # one name throughout, so that each step frees its input: at full size a tensor is over 150 MB
        y = F.silu(self.norm1(x), inplace=True)
        y = self.conv1(y, memory)
        y = F.silu(self.norm2(y), inplace=True)
        y = self.conv2(y, memory)
        return y + self.shortcut(x)


class _Attention(nn.Module):
    """One head over all pixels of a frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _Norm(width)
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT[:, None].chunk(3, dim=-1)
        return x + self.out(kernels.attention(q, k, v)[:, 0].mT.unflatten(2, x.shape[2:]))


class _Shrink(nn.Module):
    """Half the height and width: zeros to the right and below, then stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _ShrinkTime(MemoryLayer):
    """One frame for every two new ones, mixed with the one before them. A clip's first passes as it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time = nn.Conv2d(3 * width, width, 1)

    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, ...]:
        first, frames = self not in memory, (*memory.get(self, ()), x)
        full = len(frames) == 3
        memory[self] = (x,) if full else frames
        if first:
            return (x,)
        return (self.time(torch.cat(frames, dim=1)),) if full else ()


class _Grow(nn.Module):
    """Double the height and width, half the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class _GrowTime(MemoryLayer):
    """Two frames from each. A clip's first passes as it is, and the convolution over time never sees it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time = CausalConv(width, 2 * width, kernel=1)

    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, ...]:
        if self not in memory:
            memory[self] = ()
            return (x,)
        return self.time(x, memory).chunk(2, dim=1)


class _Head(MemoryLayer):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.conv = _Norm(inputs), CausalConv(inputs, outputs)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        return self.conv(F.silu(self.norm(x), inplace=True), memory)


def _middle(width: int) -> list[nn.Module]:
    return [_Residual(width, width), _Attention(width), _Residual(width, width)]


def _level(inputs: int, outputs: int, blocks: int) -> list[nn.Module]:
    return [_Residual(inputs if i == 0 else outputs, outputs) for i in range(blocks)]


class WanEncoder(StreamNet):
    """Frames (B,3,H,W) -> latents (B,16,H/8,W/8), the mean of the posterior (nothing is sampled). d: width."""

    def __init__(self, d: int = WIDTH) -> None:
        layers = [
            CausalConv(3, d),
            *_level(d, d, 2),
            _Shrink(d),
            *_level(d, 2 * d, 2),
            _Shrink(2 * d),
            _ShrinkTime(2 * d),
            *_level(2 * d, 4 * d, 2),
            _Shrink(4 * d),
            _ShrinkTime(4 * d),
            *_level(4 * d, 4 * d, 2),
            *_middle(4 * d),
            _Head(4 * d, 2 * LATENT),
            nn.Conv2d(2 * LATENT, LATENT, 1),
        ]
        super().__init__(3, LATENT, layers)


class WanDecoder(StreamNet):
    """Latents (B,16,h,w) -> frames (B,3,8h,8w). d: width."""

    def __init__(self, d: int = WIDTH) -> None:
        layers = [
            nn.Conv2d(LATENT, LATENT, 1),
            CausalConv(LATENT, 4 * d),
            *_middle(4 * d),
            *_level(4 * d, 4 * d, 3),
            _GrowTime(4 * d),
            _Grow(4 * d),
            *_level(2 * d, 4 * d, 3),
            _GrowTime(4 * d),
            _Grow(4 * d),
            *_level(2 * d, 2 * d, 3),
            _Grow(2 * d),
            *_level(d, d, 3),
            _Head(d, 3),
        ]
        super().__init__(LATENT, 3, layers)


class WanVAE(nn.Module):
    """Both halves; a player that is past its start frames needs only `decoder`. d: width, 96 in the published weights."""

    def __init__(self, d: int = WIDTH) -> None:
        super().__init__()
        self.encoder, self.decoder = WanEncoder(d), WanDecoder(d)
