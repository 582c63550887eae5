"""Flow-matching algebra, noise schedules and the few-step sampler. Pure functions of tensors.

noisy = (1 - sigma) clean + sigma noise; velocity = noise - clean; sigma in [0, 1], 1 = pure noise. Sigma tensors broadcast from the
left: (B,) or (B,T) against latents (B,T,C,H,W).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, float, float], Tensor]
"""(noisy, sigma, end) -> velocity of the shape of noisy; end: the next lower level, which flow maps need to know (0 = clean)."""


def _wide(sigma: Tensor, like: Tensor) -> Tensor:
    return sigma.reshape(*sigma.shape, *[1] * (like.ndim - sigma.ndim)).to(like.dtype)


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) clean + sigma noise."""
    return torch.lerp(clean, noise, _wide(sigma, clean))


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """What the network learns to predict: noise - clean."""
    return noise - clean


def to_clean(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The clean latent a velocity implies: noisy - sigma velocity."""
    return noisy - _wide(sigma, noisy) * velocity


def guide(unknown: Tensor, known: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, form A: unknown + scale (known - unknown); scale 1 is `known` itself."""
    return torch.lerp(unknown, known, scale)


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """Warp even noise levels towards 1: sigma = s u / (1 + (s - 1) u); shift 1 changes nothing."""
    return shift * u / (1 + (shift - 1) * u)


def shifted_grid(steps: int, shift: float) -> Tensor:
    """G(n, s) of the method: falling noise levels W_s(1 - i/n), i = 0..n-1, float64; 0 is not a member."""
    return shift_sigma(1 - torch.arange(steps, dtype=torch.float64) / steps, shift)


def euler_sigmas(steps: int, shift: float) -> list[float]:
    """`shifted_grid` as a list of floats."""
    return shifted_grid(steps, shift).tolist()


def noise_levels(steps: int, shift: float, listed: Mapping[str, Sequence[float]]) -> list[float]:
    """Falling noise levels of `steps` steps: those `listed` for this count (`SamplerConfig.sigmas`), else the grid's."""
    return list(listed.get(str(steps), ())) or euler_sigmas(steps, shift)


def bell_weights(sigmas: Tensor) -> Tensor:
    """Loss weight of every level of a noise grid: a bell around the middle, zero at its least entry, mean 1 (Wan, stages 0 and 1).

    y = exp(-2 ((t - 500) / 1000)^2) with t = 1000 sigma; w = n (y - min y) / sum(y - min y).
    """
    bell = torch.exp(-2 * (sigmas - 0.5) ** 2)
    bell = bell - bell.min()
    return bell * (len(sigmas) / bell.sum())


def sample(
    denoise: Denoiser, noise: Tensor, sigmas: Sequence[float], kind: str = "euler", renoise: Callable[[int], Tensor] | None = None
) -> Tensor:
    """Noise -> clean over falling noise levels `sigmas` (the end, 0, is implied); one network call a level.

    ``euler`` integrates d noisy / d sigma = velocity, ``adams`` to second order (two-step Adams-Bashforth) by continuing the
    change since the last level: no extra network call, and with few levels far less of the spread is lost to blur. ``consistency``
    jumps to the clean latent and re-noises it with the fresh draw renoise(i) at the next level (stochastic, not an ODE).
    ``flow_map`` goes from level to level by the average velocity that the network predicts for that stretch.
    """
    noisy, last, last_width = noise, None, 0.0
    for i, sigma in enumerate(sigmas):
        following = sigmas[i + 1] if i + 1 < len(sigmas) else 0.0
        velocity, width = denoise(noisy, sigma, following), following - sigma
        if kind == "consistency":
            noisy = noisy - sigma * velocity
            if following > 0.0:
                assert renoise is not None, "the consistency sampler needs fresh noise between its levels"
                noisy = (1 - following) * noisy + following * renoise(i)
        elif kind == "adams" and last is not None:
            noisy = noisy + width * torch.lerp(last, velocity, 1 + width / (2 * last_width))
        else:
            noisy = noisy + width * velocity
        last, last_width = velocity, width
    return noisy
