"""Self Forcing (arXiv 2506.08009) and CausVid (arXiv 2412.07772): rivals that start from a bidirectional teacher's trajectories.

First `pretrain_steps` of regression: the student, every chunk at a level of its own and its past as noisy as that level, predicts
where the bidirectional teacher's trajectory ends. That map is not a function of what a causal student sees, so it learns a mean.
Then distribution matching: on own rollouts (Self Forcing), or on predictions from noised data (CausVid).
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.data import ClipBatch, Draws
from train.objectives import endpoint_regression
from train.stage_options import CausvidStage, SelfForcingStage
from train.stages import stored
from train.stages.base import Context
from train.stages.dmd import WHOLE, DistributionMatching
from worldmodel.models.attention import Layout


class OdeThenDmd(DistributionMatching):
    """Two phases in one run."""

    options: SelfForcingStage

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        options = self.options
        self._pairs = self.data.clips(options.clip_frames, False)
        self.stored = stored.store(self, options, self.teacher, WHOLE, options.trajectory_guidance, self._pairs)

    @property
    def pretrain_steps(self) -> int:
        return self.options.pretrain_steps

    def rate(self, target: str, step: int) -> float:
        return self.options.pretrain_lr if step < self.pretrain_steps else super().rate(target, step)

    def first_loss(self, _: ClipBatch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        sampler, kept = self.sampler(), self.options.list_steps
        pair = draws.integers("pair", self.options.pairs)
        batch = self._pairs.batch(self.stored.clips[pair])
        states = self.stored.pick(pair, batch.latent.device)
        count = batch.latent.shape[1] // sampler.chunk
        choices = kept + 1 if isinstance(self.options, CausvidStage) else kept  # CausVid's list ends with clean frames
        level = draws.uniform("level", count).mul(choices).long().clamp(max=choices - 1).repeat_interleave(sampler.chunk, dim=1)
        sigma = torch.cat((self.stored.sigmas, torch.zeros(1))).to(level.device)[level]
        noisy = states.gather(1, level[:, None, :, None, None, None].expand(-1, 1, -1, *states.shape[3:]))[:, 0]
        made = self.clean(self.model, noisy, sigma, batch, layout=Layout.causal(**sampler.kept))
        return endpoint_regression(made, states[:, -1], batch.mask & (sigma > 0)), {}

    def costs(self) -> dict[str, float]:
        return stored.costs(self, self.options, WHOLE, self.options.trajectory_guidance, self.stored)
