"""Where the player is, as further channels of a latent: waves of the place and of the directions that the picture's columns show.

A network that dreams pictures alone loses its way: behind a turn comes some wall of the house, not the one that is there
(docs/results.md). With these channels it dreams, together with the picture, where the picture is taken from. Recordings of engines
that tell the player's pose teach it; at play nobody does: of real pictures the place is unknown, all zeros, and the network finds
it out.

Shapes: (..., 3) poses x, y, degrees (falling to the right); P channels, h w cells of a latent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

OCTAVES = 4  # waves of x, y and direction; each half as long as the one before
CELLS = 2  # neighbouring cells, in rows and in columns, share the waves among them: so many fewer channels
PLACE_CHANNELS = 3 * OCTAVES * 2 // CELLS**2


def place_channels(poses: Tensor, span: float, view: float, size: tuple[int, int]) -> Tensor:
    """(..., P, h, w) at unit scale of poses (..., 3) on a map whose longest wave is `span` units.

    view: degrees that a picture shows from its left to its right edge. size: (h, w).
    """
    rows, columns = (torch.arange(n, device=poses.device) for n in size)
    aside = torch.atan(((columns + 0.5) / size[1] * 2 - 1) * math.tan(math.radians(view) / 2))
    x, y, degrees = poses[..., None].unbind(-2)
    turns = torch.stack((x / span + 0 * aside, y / span + 0 * aside, degrees / 360 - aside / (2 * math.pi)), dim=-1)  # (..., w, 3)
    phases = 2 * math.pi * turns[..., None] * 2.0 ** torch.arange(OCTAVES, device=poses.device)
    waves = math.sqrt(2) * torch.cat((phases.sin(), phases.cos()), dim=-1).flatten(-2)
    cells = waves.unflatten(-1, (PLACE_CHANNELS, CELLS, CELLS))  # (..., w, P, row, column)
    shown = cells.movedim(-4, -1)[..., columns % CELLS, columns]  # (..., P, row, w)
    return shown[..., rows % CELLS, :]


def without_place(latents: Tensor, channels: int, unknown: Tensor | None = None) -> Tensor:
    """Latents (..., C, h, w) of which nobody knows where they are: the last `channels` zero. unknown: bool, only of these."""
    if not channels:
        return latents
    picture, place = latents.split((latents.shape[-3] - channels, channels), dim=-3)
    hidden = torch.zeros_like(place) if unknown is None else place.masked_fill(unknown[..., None, None, None], 0.0)
    return torch.cat((picture, hidden), dim=-3)
