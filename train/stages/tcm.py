"""Truncated consistency (arXiv 2410.14895), ported to causal flow matching. The port is ours, not the paper's.

The paper trains in two stages: a plain consistency network, then one that spends all its capacity on the levels from a boundary up,
while below it the frozen result of the first stage gives the targets. Here the first stage is a causal_cd student (``init=``), the
levels are those of its grid, and the step to the lower level is one Euler step of the autoregressive teacher (``teacher=``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.data import ClipBatch, Draws
from train.objectives import consistency
from train.stage_options import TcmStage
from train.stages.base import Context
from train.stages.causal_cd import CausalConsistency
from train.stages.distil import Extra
from worldmodel.diffusion import add_noise
from worldmodel.errors import ConfigError
from worldmodel.models.dit import DiT


class TruncatedConsistency(CausalConsistency):
    """Trained above the boundary, anchored to the frozen student below it."""

    options: TcmStage

    def __init__(self, context: Context) -> None:
        if not context.config.teacher:
            raise ConfigError(
                "this stage goes on from a student: pass init=runs/causal_cd, and teacher=runs/ar_diffusion that it learnt from"
            )
        super().__init__(context)
        self.frozen = self.network().requires_grad_(False)
        self.boundary = int((self.levels_of_grid() >= self.options.boundary).sum()) - 1  # the lowest level that is trained
        if self.boundary < 0:
            raise ConfigError(f"stage.boundary {self.options.boundary} lies above every level of the grid: lower it")

    def teacher_network(self) -> DiT:
        """The autoregressive network that the student of the first stage learnt from."""
        return self.network(self.context.config.teacher, "teacher")

    def loss(self, batch: ClipBatch, draws: Draws, keep: Tensor) -> Tensor:
        at_boundary = draws.uniform("boundary") < self.options.boundary_prob
        index = draws.integers("level", self.boundary + 1).to(at_boundary.device)
        index = torch.where(at_boundary, self.boundary, index)
        high = self._level(index, batch)
        low = self._level((index + 1).clamp(max=len(self.grid) - 1), batch)
        noisy = add_noise(batch.latent, draws.normal("noise", *batch.latent.shape[1:]), high)
        extra = self.clean_context(batch, draws)
        with torch.no_grad():
            target = self._target(self._nearer(noisy, high, low, batch, extra), low, batch, keep, extra)
        made = self.clean(self.model, noisy, high, batch, keep, extra)
        inner, edge = (
            consistency(made, target, batch.mask & part[:, None]) for part in (index < self.boundary, index == self.boundary)
        )
        share = (index == self.boundary).float().mean()
        return (1 - share) * inner + self.options.boundary_weight * share * edge

    def _target(self, noisy: Tensor, sigma: Tensor, batch: ClipBatch, keep: Tensor, extra: Extra) -> Tensor:
        """h(x, t): the moving average from the boundary up, the frozen student below it."""
        above = super()._target(noisy, sigma, batch, keep, extra)
        below = self.clean(self.frozen, noisy, sigma, batch, keep, extra)
        trained = sigma >= self.grid[self.boundary]
        return torch.where(trained[..., None, None, None], above, below)

    def flops(self) -> float:
        return super().flops() * 1.2  # one forward pass more, of the frozen student
