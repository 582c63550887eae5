"""Stage 2b: causal consistency distillation (arXiv 2605.15141): a student that jumps from noise to clean.

Three networks start from the same autoregressive weights: the student, the frozen teacher, and the target, a moving average of the
student. For adjacent levels t > t' of a grid, one Euler step of the teacher carries a noised clip from t to t'; the student's clean
prediction at t must match the target's at t'. The context is the real past, one noise level holds for the whole clip. The lowest
level is only ever a target: what anchors the student to the data there is the teacher's own clean prediction that all started from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from train.data import ClipBatch, Draws
from train.distributed import follow, load_whole
from train.objectives import consistency
from train.stage_options import CausalCdStage
from train.stages.base import Context, Update
from train.stages.distil import Distillation, Extra
from worldmodel.diffusion import add_noise, shifted_grid, to_clean
from worldmodel.models.dit import DiT


class CausalConsistency(Distillation):
    """Online teacher step, moving-average target, clean context."""

    options: CausalCdStage

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.teacher, self.target = (network.requires_grad_(False) for network in (self.teacher_network(), self.network()))
        self.grid = self.levels_of_grid().to(context.device)

    def levels_of_grid(self) -> Tensor:
        """The falling noise levels (N,) that the loss is taken at, float32 on the CPU."""
        return shifted_grid(self.options.levels, self.options.shift).float()

    def teacher_network(self) -> DiT:
        """What the student learns from: the network that it starts from."""
        return self.network()

    def updates(self, step: int) -> Iterator[Update]:
        if step:  # the step before has just changed the student
            self._follow()
        yield from super().updates(step)

    def _follow(self) -> None:
        follow(self.target, self.model, 1 - self.options.target_decay)

    def loss(self, batch: ClipBatch, draws: Draws, keep: Tensor) -> Tensor:
        index = draws.integers("level", self.options.levels - 1)
        high, low = (self._level(i, batch) for i in (index, index + 1))
        noisy = add_noise(batch.latent, draws.normal("noise", *batch.latent.shape[1:]), high)
        extra = self.clean_context(batch, draws)
        with torch.no_grad():
            target = self._target(self._nearer(noisy, high, low, batch, extra), low, batch, keep, extra)
        return consistency(self.clean(self.model, noisy, high, batch, keep, extra), target, batch.mask)

    def _level(self, index: Tensor, batch: ClipBatch) -> Tensor:
        """Levels (B,T) of grid entries (B,)."""
        return self.grid[index.to(self.grid.device)][:, None].expand(-1, batch.latent.shape[1])

    def _nearer(self, noisy: Tensor, high: Tensor, low: Tensor, batch: ClipBatch, extra: Extra) -> Tensor:
        """One Euler step along the (guided) teacher's velocity from the levels `high` to `low`, both (B,T)."""
        velocity = self.guided(self.teacher, noisy, high, batch, self.options.guidance, extra)
        return to_clean(noisy, velocity, high - low)  # noisy - (high - low) velocity

    def _target(self, noisy: Tensor, sigma: Tensor, batch: ClipBatch, keep: Tensor, extra: Extra) -> Tensor:
        """What the student's clean prediction one level up must agree with."""
        return self.clean(self.target, noisy, sigma, batch, keep, extra)

    def flops(self) -> float:
        forwards = 2 if self.options.guidance == 1.0 else 3  # teacher and target, without gradients
        return super().flops() * (1 + forwards / 3)

    def extra_state(self) -> dict[str, Any]:
        return {"target": self.target.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        load_whole(self.target, state["target"])
