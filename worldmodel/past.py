"""What the network is given of its own work: a dreamed latent as it goes into the past."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from worldmodel.config import WorldConfig
from worldmodel.models.place import nearest_place


@dataclass(frozen=True)
class Past:
    """Real latents go into the past as they are; of dreamed ones the picture with so much noise, the place as one that can be.

    pictured: channels of the picture, the first; view: degrees that it shows from left to right; noise: level in [0, 1), which the
    network is told (`SamplerConfig.past_noise`). Noise leaves less to go on from than the picture had, above all less of its
    errors, which would grow from frame to frame: a network that knows its world paints what the noise hides anew.
    """

    pictured: int
    view: float
    noise: float = 0.0

    @classmethod
    def in_world(cls, config: WorldConfig) -> Past:
        """How this world keeps what it dreamed."""
        return cls(config.codec.channels, config.codec.place_view, config.sampler.past_noise)

    def of(self, clean: Tensor, noise: Tensor | None = None) -> Tensor:
        """What is kept of clean dreamed latents (..., C, h, w). noise: a draw of their shape, needed where there is any."""
        picture, place = clean.split((self.pictured, clean.shape[-3] - self.pictured), dim=-3)
        if self.noise:
            assert noise is not None, "a noisy past needs a draw"
            picture = torch.lerp(picture, noise[..., : self.pictured, :, :].to(picture.dtype), self.noise)
        elif not place.shape[-3]:
            return clean
        return torch.cat((picture, nearest_place(place, self.view) if place.shape[-3] else place), dim=-3)
