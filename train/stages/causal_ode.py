"""Stage 2a: causal ODE distillation (arXiv 2602.02214): regression on stored trajectories of the teacher.

The trajectories start from noise and end at the teacher's own sample, with the real past as context; the student, from a stored
state at one level of its list and with the same past, predicts the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.data import ClipBatch, Draws
from train.objectives import endpoint_regression
from train.stage_options import CausalOdeStage
from train.stages import stored
from train.stages.base import Context
from train.stages.distil import Distillation


class CausalOde(Distillation):
    """Trajectories are made by the network that the student starts from."""

    options: CausalOdeStage

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        teacher = self.network().requires_grad_(False)
        self.stored = stored.store(self, self.options, teacher, self.layout, self.options.guidance, self.clips)

    def loss(self, batch: ClipBatch, draws: Draws, keep: Tensor) -> Tensor:
        pair = draws.integers("pair", self.options.pairs)
        batch = self.clips.batch(self.stored.clips[pair])
        states = self.stored.pick(pair, batch.latent.device)
        level = draws.integers("level", self.options.list_steps)
        noisy = states[torch.arange(len(level)), level]
        sigma = self.stored.sigmas[level].to(noisy.device)[:, None].expand(-1, noisy.shape[1])
        made = self.clean(self.model, noisy, sigma, batch, keep, self.clean_context(batch, draws))
        return endpoint_regression(made, states[:, -1], batch.mask)

    def costs(self) -> dict[str, float]:
        return stored.costs(self, self.options, self.layout, self.options.guidance, self.stored)
