"""AnyFlow (arXiv 2605.13724): a two-time flow map u(x, t, r), the average velocity from level t down to r.

First `pretrain_steps` on data: u must satisfy u = v - (t - r) du/dt, the derivative along the path by a central difference. Then
on-policy: rollouts with the map's own jumps (to a drawn level, one step on, to clean, all with gradients), judged by distribution
matching. The network, full attention over a clean context and full-rank training are ours; the paper trains low-rank updates.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from train.data import ClipBatch, Draws
from train.objectives import beta_weight, flow_map_target
from train.stage_options import AnyflowStage
from train.stages.dmd import DistributionMatching
from train.stages.flow import Pass
from worldmodel.config import SamplerConfig
from worldmodel.diffusion import add_noise, euler_sigmas, shift_sigma, velocity_target

STEP = 0.005  # half width of the central difference, in noise level


class AnyFlow(DistributionMatching):
    """Exports a world that the flow-map sampler plays in any number of steps."""

    options: AnyflowStage

    def sampler(self) -> SamplerConfig:
        return dataclasses.replace(super().sampler(), kind="flow_map")

    @property
    def pretrain_steps(self) -> int:
        return self.options.pretrain_steps

    def rate(self, target: str, step: int) -> float:
        return self.options.pretrain_lr if step < self.pretrain_steps else super().rate(target, step)

    def generator_loss(self, batch: ClipBatch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().generator_loss(batch, draws)
        loss = 2 * loss  # published without the factor 1/2
        return (loss + self.first_loss(batch, draws)[0] if self.options.cotrain else loss), metrics

    def first_loss(self, batch: ClipBatch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow-map loss on data under teacher forcing, one (t, r) per chunk."""
        options, chunk = self.options, self.sampler().chunk
        batch = self.drifted(batch.cut(0, options.clip_frames), draws)
        count = options.clip_frames // chunk
        a, b = (
            shift_sigma(draws.uniform(name, count), options.shift).repeat_interleave(chunk, dim=1) for name in ("map_t", "map_r")
        )
        kind = draws.uniform("map_kind")[:, None]
        high = torch.maximum(a, b)
        low = torch.where(kind < options.fm_share, high, torch.minimum(a, b))
        low = torch.where((kind >= options.fm_share) & (kind < options.fm_share + options.clean_share), 0.0, low)
        noise = draws.normal("map_noise", *batch.latent.shape[1:])
        noisy, velocity = add_noise(batch.latent, noise, high), velocity_target(batch.latent, noise)
        context = self.clean_context(batch, draws)
        weight = options.map_guidance

        def average(x: Tensor, t: Tensor, keep: Tensor | None = None) -> Tensor:
            return self.velocity(self.model, x, t, batch, keep, {**context, "end": low})

        made = average(noisy, high)
        if weight != 1.0:  # what is learnt is the guided map: its unguided part must fit the data
            with torch.no_grad():
                hidden = average(noisy, high, torch.zeros(len(noisy), dtype=torch.bool, device=noisy.device))
            made = (made - (1 - weight) * hidden) / weight
        with torch.no_grad():
            ahead, behind = (average(noisy + side * STEP * velocity, high + side * STEP) for side in (1.0, -1.0))
            target = flow_map_target(velocity, (ahead - behind) / (2 * STEP * weight), high - low)
        error = (made - target).square().mean(dim=(2, 3, 4)) * beta_weight(high) * batch.mask
        return balance(error.sum(dim=1) / batch.mask.sum(dim=1).clamp(min=1), kind[:, 0] < options.fm_share), {}

    def exit_levels(self, steps: int, draws: Draws, purpose: str) -> list[float]:
        """Three jumps at most: from noise to a level of the grid, to the next, to clean."""
        grid = euler_sigmas(steps, self.options.shift)
        exit_step = draws.shared(purpose, steps)
        return sorted({1.0, *grid[exit_step : exit_step + 2]}, reverse=True)

    def passes(self) -> list[Pass]:
        """All jumps of a rollout keep theirs."""
        dream, *others = super().passes()
        data = [Pass("model", self.layout, self.options.clip_frames, share=dream.share)] if self.options.cotrain else []
        return [dream] * min(3, 1 + max(self.options.student_steps)) + data + others

    def jumps(self) -> tuple[str, bool]:
        return "flow_map", True


def balance(losses: Tensor, plain: Tensor) -> Tensor:
    """Mean loss over clips (B,), those that are no plain flow matching rescaled (no gradient) to the mean of those that are."""
    if not bool(plain.any()):
        return losses.mean()
    level = losses[plain].mean().detach()
    return torch.where(plain, losses, losses * (level / (losses.detach() + 1e-5))).mean()
