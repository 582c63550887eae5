"""The noise grid of the Wan 2.1 family: levels at fixed grid entries, looked up by timestep = 1000 * sigma in 0..1000.

Neither playing nor training needs it: it is what recorded outputs of the public code are checked against (tests/parity).
Grids are float32, as in public training code, so that nearest-entry look-ups and few-step lists come out the same.
Shapes: n grid entries; timesteps t of shape (B,) or (B,T) go with latents (B,C,H,W) or (B,T,C,H,W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worldmodel import diffusion
from worldmodel.errors import ConfigError

TIMESTEPS = 1000


@dataclass(frozen=True, eq=False)
class FlowGrid:
    """Noise levels `sigmas` (n,) float32 and what is derived from them. Made by `flow_grid`."""

    sigmas: Tensor

    @property
    def timesteps(self) -> Tensor:
        """(n,) float32, 1000 * sigma."""
        return self.sigmas * TIMESTEPS

    @property
    def weights(self) -> Tensor:
        """(n,) training weight of every entry, mean 1: exp(-2 ((t - n/2) / n)^2), less its minimum, scaled."""
        return diffusion.bell_weights(self.timesteps / len(self.sigmas))

    def nearest(self, t: Tensor) -> Tensor:
        """Index of the grid entry nearest to every timestep of `t`, the first one on a tie."""
        distance = (self.timesteps.to(t.device) - t.float()[..., None]).abs()
        return distance.argmin(dim=-1)

    def sigma_at(self, t: Tensor) -> Tensor:
        """Level of the nearest entry, shape of `t`. Timestep 0 gives the last entry's small level, not 0."""
        return self.sigmas.to(t.device)[self.nearest(t)]

    def weight_at(self, t: Tensor) -> Tensor:
        return self.weights.to(t.device)[self.nearest(t)]

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return diffusion.add_noise(clean, noise, self.sigma_at(t))

    def to_clean(self, noisy: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """Clean latent that a velocity at timestep `t` implies; in float64, returned in the dtype of `velocity`."""
        return diffusion.to_clean(noisy.double(), velocity.double(), self.sigma_at(t).double()).to(velocity.dtype)

    def to_velocity(self, noisy: Tensor, clean: Tensor, t: Tensor) -> Tensor:
        """Velocity that a clean prediction at timestep `t` implies: (noisy - clean) / sigma; in float64, returned as `clean`."""
        sigma = self.sigma_at(t).double()
        return ((noisy.double() - clean.double()) / sigma.reshape(*sigma.shape, *[1] * (noisy.ndim - sigma.ndim))).to(clean.dtype)

    def step(self, noisy: Tensor, velocity: Tensor, t: Tensor, to_final: bool = False) -> Tensor:
        """One Euler step from timestep `t` to the next grid entry, or to level 0.

        As in the public code, one batch entry at the end of the grid sends the whole batch to 0.
        """
        index = self.nearest(t)
        sigmas = self.sigmas.to(t.device)
        final = to_final or bool((index + 1 >= len(sigmas)).any())
        following = torch.zeros_like(sigmas[index]) if final else sigmas[index + 1]
        change = following - sigmas[index]
        return noisy + velocity * change.reshape(*change.shape, *[1] * (noisy.ndim - change.ndim))

    def warp(self, steps: Sequence[int]) -> list[float]:
        """Few-step list of a student (1000 = pure noise, falling) -> timesteps: L becomes entry 1000 - L of the 1000-entry grid.

        Raises ConfigError for a step outside 0..1000 or a grid of another size.
        """
        if len(self.sigmas) != TIMESTEPS:
            raise ConfigError(f"few-step lists index a grid of {TIMESTEPS} entries, this one has {len(self.sigmas)}")
        wrong = [step for step in steps if not 0 <= step <= TIMESTEPS]
        if wrong:
            raise ConfigError(f"a few-step list holds steps from 0 to {TIMESTEPS}, got {wrong[0]}")
        levels = [*self.timesteps.tolist(), 0.0]
        return [levels[TIMESTEPS - step] for step in steps]


def flow_grid(
    steps: int = TIMESTEPS,
    shift: float = 5.0,
    sigma_min: float = 0.0,
    sigma_max: float = 1.0,
    extra_step: bool = True,
    strength: float = 1.0,
    reverse: bool = False,
) -> FlowGrid:
    """`steps` levels falling from sigma_max to sigma_min, warped by `shift`.

    extra_step: divide the way into one step more and leave its end out, so that sigma_min itself is not an entry.
    strength: start at this share of the way up (for denoising a partly noised clip). reverse: 1 - sigma instead.
    """
    start = sigma_min + (sigma_max - sigma_min) * strength
    even = torch.linspace(start, sigma_min, steps + 1)[:-1] if extra_step else torch.linspace(start, sigma_min, steps)
    sigmas = diffusion.shift_sigma(even, shift)
    return FlowGrid(1 - sigmas if reverse else sigmas)
