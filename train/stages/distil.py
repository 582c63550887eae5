"""What the distilling stages share: a student that jumps from noise to clean, and other networks that tell it where."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from train.data import ClipBatch
from train.stages.ar_diffusion import ArDiffusion
from train.stages.base import Context
from worldmodel.config import SamplerConfig
from worldmodel.diffusion import guide, to_clean
from worldmodel.errors import ConfigError
from worldmodel.models.attention import Layout
from worldmodel.models.dit import DiT

Extra = dict[str, Tensor]


class Distillation(ArDiffusion):
    """Exports a world that the consistency sampler plays in one or a few steps, at the levels of the grid G(steps, stage.shift)."""

    def __init__(self, context: Context) -> None:
        if not context.config.init:
            raise ConfigError("this stage needs a trained autoregressive network: pass init=runs/ar_diffusion")
        super().__init__(context)

    def sampler(self) -> SamplerConfig:
        return dataclasses.replace(super().sampler(), kind="consistency", shift=self.options.shift)

    def velocity(
        self,
        network: DiT,
        noisy: Tensor,
        sigma: Tensor,
        batch: ClipBatch,
        keep: Tensor | None = None,
        extra: Extra | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """float32 velocity of noisy (B,T,C,H,W) at sigma (B,T); extra: the clean half and the like.

        layout: who sees whom, by default as for the student.
        """
        with self.context.autocast():
            out = network(noisy, sigma, layout=layout or self.layout, **batch.conditions(keep), **(extra or {}))
        return out.float()

    def guided(
        self,
        network: DiT,
        noisy: Tensor,
        sigma: Tensor,
        batch: ClipBatch,
        scale: float,
        extra: Extra | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """`velocity` with guidance of `scale` against hidden actions (1 = none, at no cost)."""
        known = self.velocity(network, noisy, sigma, batch, None, extra, layout)
        if scale == 1.0:
            return known
        hide = torch.zeros(len(noisy), dtype=torch.bool, device=noisy.device)
        return guide(self.velocity(network, noisy, sigma, batch, hide, extra, layout), known, scale)

    def clean(
        self,
        network: DiT,
        noisy: Tensor,
        sigma: Tensor,
        batch: ClipBatch,
        keep: Tensor | None = None,
        extra: Extra | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """The network's clean prediction noisy - sigma v: the consistency function."""
        return to_clean(noisy, self.velocity(network, noisy, sigma, batch, keep, extra, layout), sigma)
