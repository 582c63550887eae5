"""Noise-level, action and position embeddings.

Shapes: B batch, T frames, A action, D model width, S tokens a frame, E head width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

TIMESTEPS = 1000.0  # the network was trained by its family on sigma * 1000
FOURIER = 4  # octaves per continuous action axis


def sinusoid(sigma: Tensor, width: int) -> Tensor:
    """Noise level in [0, 1] -> (..., width) float32: cosines then sines of 1000 sigma * 10000^(-2i/width)."""
    real = torch.float32 if sigma.device.type == "mps" else torch.float64
    half = width // 2
    rates = torch.pow(10000.0, -torch.arange(half, dtype=real, device=sigma.device) / half)
    angles = (TIMESTEPS * sigma.to(real))[..., None] * rates
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


class NoiseEmbedding(nn.Module):
    """Noise level -> e (..., D)."""

    def __init__(self, freq_dim: int, dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.mlp = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, sigma: Tensor) -> Tensor:
        return self.mlp(sinusoid(sigma, self.freq_dim).to(self.mlp[0].weight.dtype))  # type: ignore[arg-type]


class ActionEmbedding(nn.Module):
    """Encoded actions (B,T,A) -> (B,T,D), added to the noise embedding of the frame the action leads to.

    Every entry also enters as sines and cosines of a few octaves, so that small turns are told apart. The output layer starts at
    zero: an untrained embedding changes nothing. A learned vector stands for "action unknown" (dropout, guidance).
    """

    def __init__(self, action_dim: int, dim: int) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.zeros(dim))
        hidden, out = nn.Linear(action_dim * (1 + 2 * FOURIER), dim), nn.Linear(dim, dim)
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        self.mlp = nn.Sequential(hidden, nn.SiLU(), out)

    def forward(self, actions: Tensor | None, keep: Tensor | None = None) -> Tensor:
        """keep: bool (B,) or (B,T), False where the action is hidden. actions None -> the null vector."""
        if actions is None:
            return self.null
        octaves = torch.pi / 4 * 2.0 ** torch.arange(FOURIER, device=actions.device)
        angles = (actions.float()[..., None] * octaves).flatten(-2)
        features = torch.cat((actions.float(), angles.cos(), angles.sin()), dim=-1)
        embedded = self.mlp(features.to(self.mlp[0].weight.dtype))  # type: ignore[arg-type]
        if keep is None:
            return embedded
        return torch.where(keep.reshape(*keep.shape, *[1] * (3 - keep.ndim)), embedded, self.null.to(embedded.dtype))


def rope_split(head_dim: int) -> tuple[int, int, int]:
    """How many channel pairs rotate with frame, row and column (Wan 2.1: 22 + 21 + 21 of 64)."""
    pairs, part = head_dim // 2, head_dim // 6
    return pairs - 2 * part, part, part


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # a table that a session asked for may serve a training pass later
def rope_tables(frames: tuple[int, ...], rows: int, cols: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each (len(frames)*rows*cols, E/2) float32, for tokens ordered frame, row, column.

    Angles are made in float64: frame indices grow without bound while one plays, and only differences matter.
    """
    angles = _angles(frames, rope_split(head_dim)[0])[:, None]

    def table(of_frames: Tensor, of_places: Tensor) -> Tensor:
        whole = of_places.repeat(len(frames), 1, 1)
        whole[..., : angles.shape[-1]] = of_frames
        return whole.flatten(0, 1).to(device)

    cos, sin = _of_places(rows, cols, head_dim)
    return table(angles.cos(), cos), table(angles.sin(), sin)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _of_places(rows: int, cols: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """The tables of one frame, (rows*cols, E/2), the same in all of them but for what turns with the frame, which stands still."""
    t, h, w = rope_split(head_dim)
    angles = torch.zeros(rows, cols, t + h + w, dtype=torch.float64)
    angles[..., t : t + h] = _angles(tuple(range(rows)), h)[:, None]
    angles[..., t + h :] = _angles(tuple(range(cols)), w)
    return angles.cos().float().flatten(0, 1), angles.sin().float().flatten(0, 1)


def _angles(positions: tuple[int, ...], pairs: int) -> Tensor:
    return torch.tensor(positions, dtype=torch.float64)[:, None] * _rates(pairs)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _rates(pairs: int) -> Tensor:
    return torch.pow(10000.0, -torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
