"""Recorded poses as the channels in which a network dreams where the player is (`worldmodel.models.place`), and hiding them."""

from __future__ import annotations

import torch
from torch import Tensor

from worldmodel.models.place import place_channels


def pose_channels(poses: Tensor, span: float, view: float, size: tuple[int, int]) -> Tensor:
    """(..., P, h, w) of poses (..., 3) x, y, degrees (falling to the right), on a map whose longest wave is `span` units."""
    x, y, degrees = poses.unbind(-1)
    return place_channels(torch.stack((x / span, y / span, degrees / 360), dim=-1), view, size)


def without_place(latents: Tensor, channels: int, unknown: Tensor | None = None) -> Tensor:
    """Latents (..., C, h, w) of which nobody knows where they are: the last `channels` zero. unknown: bool, only of these."""
    if not channels:
        return latents
    picture, place = latents.split((latents.shape[-3] - channels, channels), dim=-3)
    hidden = torch.zeros_like(place) if unknown is None else place.masked_fill(unknown[..., None, None, None], 0.0)
    return torch.cat((picture, hidden), dim=-3)
