"""What the network is given of its own work: a dreamed latent as it goes into the past."""

from __future__ import annotations

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

    @property
    def noisy(self) -> bool:
        """Whether there is any noise, for which draws are needed."""
        return self.sampler.past_noise > 0

    def level(self, number: int) -> float:
        """The noise level that the network is told of the dreamed frame of this number, from 1."""
        clean = not self.noisy or number <= self.sampler.past_noise_after
        return self.sampler.context_sigma if clean else self.sampler.past_noise

    def of(self, clean: Tensor, number: int, noise: Tensor | None = None) -> Tensor:
        """What is kept of a clean dreamed chunk (..., C, h, w), whose first frame has that number. noise: a draw of its shape."""
        picture, place = clean.split((self.pictured, clean.shape[-3] - self.pictured), dim=-3)
        if self.noisy:
            assert noise is not None, "a noisy past needs a draw"
            picture = torch.lerp(picture, noise[..., : self.pictured, :, :].to(picture.dtype), self.level(number))
        elif not place.shape[-3]:
            return clean
        return torch.cat((picture, nearest_place(place, self.view) if place.shape[-3] else place), dim=-3)
