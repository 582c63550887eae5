"""Pure losses. Notation and equations: worldmodel.diffusion. Shapes: B batch, T frames, C H W latent, N pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.diffusion import shifted_grid

REST = 0.02  # latents, of unit spread, of equal pictures differ by less: they are kept in half precision


def bell_weight(sigma: Tensor) -> Tensor:
    """Loss weight by noise level (Wan 2.1, stages 0 and 1): exp(-2 (sigma - 1/2)^2) less its minimum, mean 1 over G(1000, 5).

    As `worldmodel.diffusion.bell_weights`, between the levels of the grid too. Its minimum is at sigma = 1; the mean is computed in
    float64.
    """

    def bell(level: Tensor) -> Tensor:
        return torch.exp(-2 * (level - 0.5) ** 2)

    least = bell(torch.ones((), dtype=torch.float64))
    mean = (bell(shifted_grid(1000, 5.0)) - least).mean()
    return ((bell(sigma.double()) - least) / mean).clamp(min=0).to(sigma.dtype)


def _frame_errors(made: Tensor, target: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over valid frames of weight * mean((made - target)^2). made, target (B,T,C,H,W); mask bool, weight (B,T)."""
    error = (made.float() - target.float()).square().mean(dim=(2, 3, 4))
    valid = mask.to(error.dtype)
    if weight is not None:
        error = error * weight
    return (error * valid).sum() / valid.sum().clamp(min=1)


def flow_matching(velocity: Tensor, target: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Flow matching, stages 0 and 1: mean of weight * |velocity - (noise - clean)|^2 over valid frames."""
    return _frame_errors(velocity, target, mask, weight)


def consistency(student_clean: Tensor, target_clean: Tensor, mask: Tensor) -> Tensor:
    """Consistency distillation (arXiv 2605.15141, code form with w = 1): mean |G(x_t, t) - sg G'(x_t', t')|^2 over valid frames.

    Both are clean predictions x - sigma v: of the student at the higher noise level, of its moving average (no gradient) at the
    adjacent lower one.
    """
    return _frame_errors(student_clean, target_clean.detach(), mask)


def endpoint_regression(clean: Tensor, endpoint: Tensor, mask: Tensor) -> Tensor:
    """Causal ODE regression (arXiv 2602.02214): mean |clean prediction - end of the teacher's trajectory|^2 over valid frames."""
    return _frame_errors(clean, endpoint, mask)


def distribution_gradient(made: Tensor, fake_clean: Tensor, real_clean: Tensor, mask: Tensor) -> Tensor:
    """Distribution matching (DMD), the direction in which samples must not move: (fake - real) / mean |made - real|, per clip.

    fake_clean, real_clean: clean predictions of critic and teacher for the same noised samples. The mean is over valid frames; a
    clip that the teacher would leave exactly as it is gives 0.
    """
    valid = mask[..., None, None, None].to(made.dtype)
    entries = valid.sum(dim=(1, 2, 3, 4)) * made[0, 0].numel()
    scale = ((made - real_clean).abs() * valid).sum(dim=(1, 2, 3, 4)) / entries.clamp(min=1)
    return torch.nan_to_num((fake_clean - real_clean) / scale.clamp(min=1e-8)[:, None, None, None, None])


def distribution_matching(made: Tensor, gradient: Tensor, mask: Tensor) -> Tensor:
    """A loss whose gradient in `made` is `gradient` (over the number of entries): mean (made - sg(made - gradient))^2 / 2."""
    return 0.5 * _frame_errors(made, (made - gradient).detach(), mask)


def rest_targets(dream: Tensor, real: Tensor, action: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Where the recorded world rests a rollout must rest, too: what its frames should be, (B,T,C,H,W), and which have to, (B,T).

    dream: `context` real frames and what was dreamed behind them; real: the recorded clip's pictures; action (B,T,A) led to its
    frames.
    A frame rests if the recording does not change and nobody acts, or if it stopped within the context: who acts is then held up
    where the dream stands, too. Its target is the frame of the dream that this rest began with.
    """
    unmoved = F.pad(real.diff(dim=1).abs().amax(dim=(2, 3, 4)) < REST, (1, 0))
    idle = unmoved & (action == 0).all(dim=2)
    index = torch.arange(dream.shape[1], device=dream.device).expand_as(idle)
    stopped, began = (torch.where(still, 0, index).cummax(dim=1).values for still in (unmoved, idle))
    known = unmoved & (stopped < context)
    began = torch.where(known, stopped, began)
    return dream.detach()[torch.arange(len(dream), device=dream.device)[:, None], began], idle | known


def flow_map_target(velocity: Tensor, slope: Tensor, gap: Tensor) -> Tensor:
    """Average velocity that a flow map u(x, t, r) must have (arXiv 2605.13724): v - (t - r) du/dt; gap = t - r, (B,T)."""
    return (velocity - gap[..., None, None, None] * slope).detach()


def beta_weight(sigma: Tensor) -> Tensor:
    """Loss weight sigma (1 - sigma)^0.5 of the flow map, mean 1 over an even sigma (its integral is 4/15)."""
    return sigma * (1 - sigma).clamp(min=0).sqrt() * (15 / 4)


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
