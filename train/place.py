"""Recorded poses as the channels in which a network dreams where the player is (`worldmodel.models.place`), and hiding them."""

from __future__ import annotations

import torch
from torch import Tensor

from worldmodel.models.place import nearest_place, place_channels, place_turns


def pose_channels(poses: Tensor, span: float, view: float, size: tuple[int, int]) -> Tensor:
    """(..., P, h, w) of poses (..., 3) x, y, degrees (falling to the right), on a map whose longest wave is `span` units."""
    x, y, degrees = poses.unbind(-1)
    return place_channels(torch.stack((x / span, y / span, degrees / 360), dim=-1), view, size)


def place_steps(latents: Tensor, channels: int, view: float) -> Tensor:
    """(B,T,2) turns of the longest wave: how far x and y, as the last `channels` of latents (B,T,C,h,w) say them, moved since the
    frame before; of the first 0."""
    turns = place_turns(latents[:, :, -channels:], view)[..., :2]
    return (torch.cat((turns[:, :1], turns), dim=1).diff(dim=1) + 0.5) % 1 - 0.5


def drifted_off(steps: Tensor, restarts: Tensor, share: Tensor) -> Tensor:
    """(B,T,2): how far off somebody is who goes but a share (B,T) of the steps (B,T,2), and is right again at restarts, bool (B,T).

    The share is the one drawn for the restart.
    """
    since = torch.where(restarts, torch.arange(restarts.shape[1], device=restarts.device), 0).cummax(dim=1).values
    wrong = ((share.gather(1, since) - 1)[..., None] * steps).cumsum(dim=1)
    return wrong - wrong.gather(1, since[..., None].expand_as(wrong))


def moved_place(latents: Tensor, channels: int, view: float, off: Tensor) -> Tensor:
    """Latents (..., C, h, w) whose last `channels` say a place that is off by (..., 2) turns of x and y."""
    picture, place = latents.split((latents.shape[-3] - channels, channels), dim=-3)
    return torch.cat((picture, nearest_place(place, view, off)), dim=-3)


def without_place(latents: Tensor, channels: int, unknown: Tensor | None = None) -> Tensor:
    """Latents (..., C, h, w) of which nobody knows where they are: the last `channels` zero. unknown: bool, only of these."""
    if not channels:
        return latents
    picture, place = latents.split((latents.shape[-3] - channels, channels), dim=-3)
    hidden = torch.zeros_like(place) if unknown is None else place.masked_fill(unknown[..., None, None, None], 0.0)
    return torch.cat((picture, hidden), dim=-3)
