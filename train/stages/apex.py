"""APEX (arXiv 2604.12322), the paper's form under teacher forcing. The causal port is ours.

The network itself plays the critic: under a shifted condition (here: of the action and the prompt) it learns the flow of its own
samples, and its prediction under the true condition is pulled to a mixture of the data and of the fake flow's prediction. No
teacher, no critic.
What the paper leaves open and we chose: mix = 0.5, weight 1 / omega(t) = 1, noise shared between a sample and its fake.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from train.data import ClipBatch, Draws
from train.objectives import endpoint_regression, flow_matching
from train.stage_options import ApexStage
from train.stages.distil import Distillation
from train.stages.flow import Pass
from worldmodel.diffusion import add_noise, to_clean, velocity_target


class Apex(Distillation):
    """L = fake_weight L_fake + mix_weight L_mix."""

    options: ApexStage

    def loss(self, batch: ClipBatch, draws: Draws, keep: Tensor) -> Tensor:
        options = self.options
        sigma, noise = self.sigma(draws, batch.latent.shape[1]), draws.normal("noise", *batch.latent.shape[1:])
        noisy, extra = add_noise(batch.latent, noise, sigma), self.clean_context(batch, draws)
        made = self.clean(self.model, noisy, sigma, batch, keep, extra)
        shift, text = (lambda c: options.condition_scale * c + options.condition_offset), batch.text
        shifted = dataclasses.replace(batch, action=shift(batch.action), text=None if text is None else shift(text))
        fake = made.detach() if options.detach_fake else made
        flow = self.velocity(self.model, add_noise(fake, noise, sigma), sigma, shifted, keep, extra)
        with torch.no_grad():
            judged = to_clean(noisy, self.velocity(self.model, noisy, sigma, shifted, keep, extra), sigma)
            target = torch.lerp(batch.latent, judged, options.mix)
        fake_loss = flow_matching(flow, velocity_target(fake, noise), batch.mask)
        return options.fake_weight * fake_loss + options.mix_weight * endpoint_regression(made, target, batch.mask)

    def passes(self) -> list[Pass]:
        return super().passes() * 2

    def flops(self) -> float:
        return super().flops() * (2 + 1 / 3)
