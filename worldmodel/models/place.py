"""Where the player is, as further channels of a latent: waves of the place and of the directions that the picture's columns show.

A network that dreams pictures alone loses its way: behind a turn comes some wall of the house, not the one that is there
(docs/results.md). With these channels it dreams, together with the picture, where the picture is taken from. Recordings of engines
that tell the player's pose teach it; at play nobody does: of real pictures the place is unknown, all zeros, and the network finds
it out.

Shapes: (..., 3) places as turns of the longest waves, x, y and direction (1 turn = once across the map, once round; directions
fall to the right); P channels, h w cells of a latent.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

CELLS = 2  # neighbouring cells, in rows and in columns, share the waves among them: so many fewer channels
OCTAVES = 6  # waves of x, y and direction in networks that are trained now; each half as long as the one before
PLACE_CHANNELS = 3 * OCTAVES * 2 // CELLS**2


def place_channels(turns: Tensor, view: float, size: tuple[int, int], channels: int = PLACE_CHANNELS) -> Tensor:
    """(..., P, h, w) at unit scale of places (..., 3), in so many channels P, a multiple of 3.

    view: degrees that a picture shows from its left to its right edge. size: (h, w).
    """
    octaves = _octaves(channels, turns.device)
    shown = turns[..., None, :] - _aside(size[1], view, turns.device)  # (..., w, 3)
    phases = 2 * math.pi * shown[..., None] * octaves
    waves = math.sqrt(2) * torch.cat((phases.sin(), phases.cos()), dim=-1).flatten(-2)
    return waves.flatten(-2)[..., _waves_of_cells(channels, *size, turns.device)]


def place_turns(channels: Tensor, view: float) -> Tensor:
    """(..., 3) float32, the place that channels (..., P, h, w) say: the mean of all cells, from the longest wave to the shortest.

    x and y lie in [0, 1) up to rounding, so does the direction.
    """
    count, h, w = channels.shape[-3:]
    octaves = _octaves(count, channels.device)
    whole = channels[..., : h // CELLS * CELLS, : w // CELLS * CELLS].float()
    cells = whole.unflatten(-2, (-1, CELLS)).unflatten(-1, (-1, CELLS)).mean(-4)  # (..., P, row, w/2, column)
    waves = cells.transpose(-1, -2).flatten(-4, -2).unflatten(-2, (3, 2, -1))  # (..., 3, sine or cosine, octave, w/2)
    sine, cosine = waves.unbind(-3)
    back_sine, back_cosine = _back(count, w, view, channels.device)
    turned = torch.atan2((sine * back_cosine + cosine * back_sine).mean(-1), (cosine * back_cosine - sine * back_sine).mean(-1))
    fine = turned / (2 * math.pi * octaves)  # each octave repeats itself 1 / octave apart
    place, *finer = fine.unbind(-1)
    for i, more in enumerate(finer, 1):
        place = more + ((place - more) * 2.0**i).round() / 2.0**i
    return place % 1.0


def nearest_place(channels: Tensor, view: float, off: Tensor | None = None) -> Tensor:
    """(..., P, h, w): channels of one place, the one that these say. What was dreamed is near to such channels, but not quite.

    off: (..., 2), of a place so many turns of x and y from there.
    """
    count, h, w = channels.shape[-3:]
    turns = place_turns(channels, view)
    if off is not None:
        turns = torch.cat((turns[..., :2] + off, turns[..., 2:]), dim=-1)
    return place_channels(turns, view, (h, w), count).to(channels.dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what a session asked for may serve training later
def _octaves(channels: int, device: torch.device) -> Tensor:
    return 2.0 ** torch.arange(channels * CELLS**2 // 6, device=device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _waves_of_cells(channels: int, height: int, width: int, device: torch.device) -> Tensor:
    """Which wave every cell shows, (P, h, w), of those of all columns one behind the other."""
    channel, row, column = (torch.arange(n, device=device) for n in (channels, height, width))
    wave = (channel[:, None] * CELLS + row % CELLS)[..., None] * CELLS + column % CELLS
    return column * (channels * CELLS**2) + wave


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _back(channels: int, columns: int, view: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sine and cosine, (3, octave, w/2) each, of what turns the waves of every column back to the middle of the picture."""
    octaves = _octaves(channels, device)
    column = torch.arange(len(octaves), device=device) % CELLS  # of a wave, among those that share
    aside = _aside(columns, view, device)[: columns // CELLS * CELLS].unflatten(0, (-1, CELLS)).permute(2, 1, 0)[:, column]
    back = 2 * math.pi * octaves[:, None] * aside
    return back.sin(), back.cos()


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _aside(columns: int, view: float, device: torch.device) -> Tensor:
    """How many turns less a picture's columns say than its middle, (columns, 3): they look in other directions."""
    across = (torch.arange(columns, device=device) + 0.5) / columns * 2 - 1
    aside = torch.atan(across * math.tan(math.radians(view) / 2)) / (2 * math.pi)
    return torch.stack((torch.zeros_like(aside), torch.zeros_like(aside), aside), dim=-1)
