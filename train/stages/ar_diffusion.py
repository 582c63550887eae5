"""Stage 1: autoregressive diffusion by teacher forcing (method.md 1.2).

The sequence is [clean | noisy]; each chunk of noisy frames has its own noise level and sees itself and the clean frames before it.
In a share of the clips the clean half is noised a little, and the network is told: at play time the context is its own,
imperfect work.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from train.config import ArDiffusionStage
from train.data import ClipBatch, Draws
from train.export import export_run
from train.sheets import rollout_sheet
from train.stages.base import Progress
from train.stages.flow import FlowMatching
from worldmodel.diffusion import add_noise
from worldmodel.models.attention import Layout


class ArDiffusion(FlowMatching):
    """Frame-wise (chunk 1) or chunk-wise, by ``model.sampler.chunk``; the training window is the sampler's."""

    @property
    def layout(self) -> Layout:
        sampler = self.context.config.model.sampler
        return Layout.teacher_forcing(sampler.chunk, sampler.window)

    def sigma(self, draws: Draws, frames: int) -> Tensor:
        chunk = self.context.config.model.sampler.chunk
        return self.levels(draws, frames // chunk).repeat_interleave(chunk, dim=1)

    def clean_context(self, batch: ClipBatch, draws: Draws) -> dict[str, Tensor]:
        options = self.options
        assert isinstance(options, ArDiffusionStage)
        frames = batch.latent.shape[1]
        noised = draws.uniform("context_choice", 1) < options.context_noise_prob
        sigma = torch.where(noised, draws.uniform("context_sigma", frames) * options.context_noise_max, 0.0)
        noise = draws.normal("context_noise", *batch.latent.shape[1:])
        return {"clean": add_noise(batch.latent, noise, sigma), "clean_sigma": sigma}

    def sheet(self, path: Path, exported: Path | None) -> None:
        """Held-out frames above one-step predictions, and above a rollout, made by the session that also plays the world."""
        if exported is not None:
            rollout_sheet(path, exported, self.data, self.context.device)

    def export(self, progress: Progress, final: bool) -> Path | None:
        return export_run(self, progress)
