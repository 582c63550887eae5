"""Stage 2b: causal consistency distillation (arXiv 2605.15141; method.md 1.4): a student that jumps from noise to clean.

Three networks start from the same autoregressive weights: the student, the frozen teacher, and the target, a moving average of the
student. For adjacent levels t > t' of a grid, one Euler step of the teacher carries a noised clip from t to t'; the student's clean
prediction at t must match the target's at t'. The context is the real past, one noise level holds for the whole clip. The lowest
level is only ever a target: what anchors the student to the data there is the teacher's own clean prediction that all started from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from train.config import CausalCdStage
from train.data import ClipBatch, Draws
from train.objectives import consistency
from train.stages.ar_diffusion import ArDiffusion
from train.stages.base import Context, Update
from worldmodel.config import SamplerConfig
from worldmodel.diffusion import add_noise, guide, shifted_grid, to_clean
from worldmodel.errors import ConfigError
from worldmodel.models.dit import DiT


class CausalConsistency(ArDiffusion):
    """Exports a world that the consistency sampler plays in one or a few steps."""

    def __init__(self, context: Context) -> None:
        if not context.config.init:
            raise ConfigError("this stage needs a trained autoregressive network: pass init=runs/ar_diffusion")
        super().__init__(context)
        self.teacher, self.target = (self.network().requires_grad_(False) for _ in range(2))
        self.grid = shifted_grid(self._own.levels, self._own.shift).float().to(context.device)

    @property
    def _own(self) -> CausalCdStage:
        assert isinstance(self.options, CausalCdStage)
        return self.options

    def sampler(self) -> SamplerConfig:
        return dataclasses.replace(super().sampler(), kind="consistency", shift=self._own.shift)

    def updates(self, step: int) -> Iterator[Update]:
        if step:  # the step before has just changed the student
            self._follow()
        yield from super().updates(step)

    @torch.no_grad()
    def _follow(self) -> None:
        torch._foreach_lerp_(list(self.target.parameters()), list(self.model.parameters()), 1 - self._own.target_decay)

    def loss(self, batch: ClipBatch, draws: Draws, keep: Tensor) -> Tensor:
        frames, index = batch.latent.shape[1], draws.integers("level", self._own.levels - 1)
        high, low = (self.grid[i.to(self.grid.device)][:, None].expand(-1, frames) for i in (index, index + 1))
        noisy = add_noise(batch.latent, draws.normal("noise", *batch.latent.shape[1:]), high)
        context = self.clean_context(batch, draws)

        def clean(network: DiT, x: Tensor, sigma: Tensor) -> Tensor:
            return to_clean(x, self._velocity(network, x, sigma, batch, keep, context), sigma)

        with torch.no_grad():
            nearer = self._teacher_step(noisy, high, low, batch, keep, context)
            target = clean(self.target, nearer, low)
        return consistency(clean(self.model, noisy, high), target, batch.mask)

    def _teacher_step(
        self, noisy: Tensor, high: Tensor, low: Tensor, batch: ClipBatch, keep: Tensor, context: dict[str, Tensor]
    ) -> Tensor:
        """One Euler step along the (guided) teacher's velocity from the levels `high` to `low`, both (B,T)."""
        velocity = self._velocity(self.teacher, noisy, high, batch, keep, context)
        if self._own.guidance != 1.0:
            hidden = self._velocity(self.teacher, noisy, high, batch, torch.zeros_like(keep), context)
            velocity = guide(hidden, velocity, self._own.guidance)
        return to_clean(noisy, velocity, high - low)  # noisy - (high - low) velocity

    def _velocity(
        self, network: DiT, noisy: Tensor, sigma: Tensor, batch: ClipBatch, keep: Tensor, context: dict[str, Tensor]
    ) -> Tensor:
        with self.context.autocast():
            out = network(noisy, sigma, actions=batch.action, action_keep=keep, layout=self.layout, **context)
        return out.float()

    def flops(self) -> float:
        forwards = 2 if self._own.guidance == 1.0 else 3  # teacher and target, without gradients
        return super().flops() * (1 + forwards / 3)

    def extra_state(self) -> dict[str, Any]:
        return {"target": self.target.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.target.load_state_dict(state["target"])
