"""Video codecs that remember: a clip goes through frame by frame, and the seams between calls do not show.

A network is a list of layers, and every layer handles ONE frame at a time: it returns the frame it made, or a tuple of them where
time grows (two) or shrinks (none, until enough has arrived). What a layer must know of earlier frames lies in a `Memory` that is
handed in; networks hold weights only. A whole clip and the same clip in pieces are thus the same calls and the same bits, and only
one frame's activations are alive at a time, where four pictures at once would need four times as much.

Shapes: B batch, T latents or frames of a call, C latent channels, H W pixels, h w = H/8, W/8, I and O channels in and out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.errors import ConfigError

SPATIAL = 8  # pixels per latent pixel, in height and in width

# By layer: the frames it keeps. Tensors in it are replaced, never written to, so a shallow copy is a snapshot.
Memory = dict[nn.Module, tuple[Tensor, ...]]


class MemoryLayer(nn.Module):
    """A layer that is called as ``layer(frame, memory)`` and returns a frame or a tuple of frames."""


class CausalConv(MemoryLayer):
    """Convolution over the newest `taps` frames, zeros before the first. Weight (O, taps*I, k, k), the oldest frame's part first.

    The frames are laid side by side as channels: a 2-D convolution does the sum over time. While the history is short the parts of
    the weight that would meet zeros are left out.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, taps: int = 3) -> None:
        super().__init__()
        self.taps, self.padding = taps, kernel // 2
        self.weight = nn.Parameter(torch.empty(outputs, taps * inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(B,I,H,W) -> (B,O,H,W)."""
        window, weight = self.meet(x, memory)
        return F.conv2d(window, weight, self.bias, padding=self.padding)

    def meet(self, x: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """The frames that are seen with `x`, the newest one, side by side, and the part of the weight that they meet."""
        frames = (*memory.get(self, ()), x)
        memory[self] = frames[-(self.taps - 1) :]
        window = torch.cat(frames, dim=1)
        return window, self.weight[:, -window.shape[1] :]


class StreamNet(nn.Module):
    """A network that `VideoEncoder` or `VideoDecoder` runs. inputs, outputs: channels of what goes in and comes out.

    warm_up: how many of the frames that come out first are no part of the clip.
    """

    warm_up = 0

    def __init__(self, inputs: int, outputs: int, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.inputs, self.outputs, self.layers = inputs, outputs, nn.ModuleList(layers)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack this form

    def stream(self, frame: Tensor, memory: Memory) -> Iterator[Tensor]:
        """Put one frame (B,inputs,H,W) in; yields what comes out, in order of time. `memory` changes and may keep `frame`."""
        pending, layers = [(frame, 0)], list(self.layers)
        del frame  # a frame is let go as soon as the next layer has used it
        while pending:
            x, depth = pending.pop()
            if depth == len(layers):
                yield x
                continue
            layer = layers[depth]
            made = layer(x, memory) if isinstance(layer, MemoryLayer) else layer(x)
            pending += [(y, depth + 1) for y in reversed(made if isinstance(made, tuple) else (made,))]
            del x, made


@dataclass(frozen=True)
class StreamSnapshot:
    """Where a stream stood. Shares its tensors with the stream, which never writes to them: taking one costs nothing, but it keeps
    that moment's memory alive."""

    memory: Memory
    position: int
    shape: tuple[int, ...] | None


class _Stream:
    """One clip (or B clips in step) on its way through a network. position: latents or frames put in so far."""

    _shape: tuple[int, ...] | None

    def __init__(self, net: StreamNet) -> None:
        self.net = net
        self.reset()

    def reset(self) -> None:
        """Begin a new clip, of any size."""
        self._memory: Memory = {}
        self.position, self._shape = 0, None

    def snapshot(self) -> StreamSnapshot:
        """The state, to come back to with `restore`; what follows is then what followed the first time."""
        return StreamSnapshot(dict(self._memory), self.position, self._shape)

    def restore(self, snapshot: StreamSnapshot) -> None:
        """Go back to a snapshot of a stream through this network."""
        self._memory, self.position, self._shape = dict(snapshot.memory), snapshot.position, snapshot.shape

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.net.parameters()).dtype

    def _push(self, clip: Tensor) -> list[Tensor]:
        self._begin(clip)
        dtype = self._dtype
        made: list[Tensor] = []
        for frame in clip.unbind(1):
            # a copy, because the memory may keep the frame while the caller writes to his own
            own = frame.to(dtype, copy=True, memory_format=torch.channels_last)
            made += islice(self.net.stream(own, self._memory), self.net.warm_up if self.position == 0 else 0, None)
            self.position += 1
        return made

    def _begin(self, clip: Tensor) -> None:
        if clip.ndim != 5 or clip.shape[1] == 0 or clip.shape[2] != self.net.inputs:
            raise ConfigError(f"this codec takes (B,T,{self.net.inputs},height,width) with T at least 1, got {tuple(clip.shape)}")
        shape = (clip.shape[0], *clip.shape[2:])
        if self._shape is not None and shape != self._shape:
            raise ConfigError(f"the clip so far was (B,C,height,width) = {self._shape}, now {shape}: reset() begins a new clip")
        self._shape = shape


class VideoDecoder(_Stream):
    """Latents -> frames, any number of latents a call; after an exception, `reset` or `restore`.

    The first latent of a clip makes 1 frame, every later one 4.
    """

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """(B,T,C,h,w) at unit scale -> (B,frames,3,H,W), nominally in [-1,1] (not clamped), in the network's dtype.

        Raises ConfigError for a wrong shape, also for a size that changes within a clip.
        """
        return torch.stack(self._push(latent), dim=1)


class VideoEncoder(_Stream):
    """Frames -> latents, any number of frames a call. A latent is due after the first frame and after every 4 later ones."""

    @torch.no_grad()
    def encode(self, rgb: Tensor) -> Tensor:
        """(B,T,3,H,W) in [-1,1] -> (B,latents,C,h,w) at unit scale, in the network's dtype. Frames that fill no latent yet wait.

        Raises ConfigError for a wrong shape, also for a size that changes within a clip or is no multiple of 8.
        """
        if any(side % SPATIAL for side in rgb.shape[-2:]):
            raise ConfigError(f"height and width must be multiples of {SPATIAL}, got {rgb.shape[-2]}x{rgb.shape[-1]}")
        if made := self._push(rgb):
            return torch.stack(made, dim=1)
        batch, height, width = rgb.shape[0], rgb.shape[3] // SPATIAL, rgb.shape[4] // SPATIAL
        return rgb.new_empty((batch, 0, self.net.outputs, height, width), dtype=self._dtype)
