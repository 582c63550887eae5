"""Pure losses. Notation and equations: worldmodel.diffusion. Shapes: B batch, T frames, C H W latent, N pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bell_weight(sigma: Tensor) -> Tensor:
    """Loss weight by noise level (Wan 2.1, stages 0 and 1): exp(-2 (sigma - 1/2)^2) less its minimum, mean 1 over G(1000, 5).

    The minimum over that grid is at sigma = 1; the mean is computed on the grid in float64.
    """
    u = 1 - torch.arange(1000, dtype=torch.float64) / 1000
    grid = 5 * u / (1 + 4 * u)
    least = torch.exp(torch.tensor(-0.5, dtype=torch.float64))
    mean = (torch.exp(-2 * (grid - 0.5) ** 2) - least).mean()
    return ((torch.exp(-2 * (sigma.double() - 0.5) ** 2) - least) / mean).clamp(min=0).to(sigma.dtype)


def flow_matching(velocity: Tensor, target: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over valid frames of weight * mean((velocity - target)^2). velocity, target (B,T,C,H,W); mask bool, weight (B,T)."""
    error = (velocity.float() - target.float()).square().mean(dim=(2, 3, 4))
    valid = mask.to(error.dtype)
    if weight is not None:
        error = error * weight
    return (error * valid).sum() / valid.sum().clamp(min=1)


def picture_gradients(a: Tensor, b: Tensor) -> Tensor:
    """L1 between the finite differences of two pictures (N,3,H,W): keeps edges that L1 alone blurs."""
    d = a - b
    return d.diff(dim=3).abs().mean() + d.diff(dim=2).abs().mean()


def reconstruction(made: Tensor, real: Tensor, l1: float, gradient: float, mse: float) -> Tensor:
    """Weighted L1 + gradient L1 + MSE of pictures (N,3,H,W) in [-1, 1]."""
    made, real = made.float(), real.float()
    return l1 * F.l1_loss(made, real) + gradient * picture_gradients(made, real) + mse * F.mse_loss(made, real)


def psnr(made: Tensor, real: Tensor) -> Tensor:
    """dB per picture (N,) for pictures (N,3,H,W) in [-1, 1] (peak-to-peak 2), made clamped to that range."""
    mse = (made.float().clamp(-1, 1) - real.float()).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return 10 * torch.log10(4 / mse)
