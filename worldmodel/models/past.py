"""What the network is given of its own work: a dreamed latent as it goes into the past."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from worldmodel.config import SamplerConfig, WorldConfig
from worldmodel.models.place import nearest_place


@dataclass(frozen=True)
class Past:
    """Real latents go into the past as they are; of dreamed ones the picture with some noise, the place as one that can be.

    pictured: channels of the picture, the first; view: degrees that it shows from left to right; sampler: says how much noise. It
    leaves less to go on from than the picture had, above all less of its errors, which would grow from frame to frame: a network
    that knows its world paints what the noise hides anew. The first frames, whose errors are small yet, may be spared.
    """

    pictured: int
    view: float
    sampler: SamplerConfig

    @classmethod
    def in_world(cls, config: WorldConfig) -> Past:
        """How this world keeps what it dreamed."""
        return cls(config.codec.channels, config.codec.place_view, config.sampler)

    def keep(self, clean: Tensor, number: int, draw: Callable[[], Tensor]) -> tuple[Tensor, float]:
        """What is kept of a clean dreamed chunk (..., C, h, w), and the noise level that the network is told of it.

        number: of its first frame behind the real ones, from 1. draw: gives noise of its shape, where there is any.
        """
        noise = self.sampler.past_noise if number > self.sampler.past_noise_after else 0.0
        picture, place = clean.split((self.pictured, clean.shape[-3] - self.pictured), dim=-3)
        if not noise and not place.shape[-3]:
            return clean, self.sampler.context_sigma
        if noise:
            picture = torch.lerp(picture, draw()[..., : self.pictured, :, :].to(picture.dtype), noise)
        if place.shape[-3]:
            place = nearest_place(place, self.view)
        return torch.cat((picture, place), dim=-3), noise or self.sampler.context_sigma
