"""Stage 1: autoregressive diffusion by teacher forcing, or by diffusion forcing.

The sequence is [clean | noisy]; each chunk of noisy frames has its own noise level and sees itself and the clean frames before it.
At play time the context is the network's own, imperfect work. Three things prepare it. With ``place_drift`` places of the context
go wrong, and what is to be predicted goes on from there, so that steps are learned from actions. In a share of the clips the clean
half is noised a little, and the network is told. With ``own_rounds`` the clean half is what the network makes of it by the sampler
of the game, all frames at once, several times over: after r rounds a frame carries the errors of r generations, at the price of r x
steps forward passes and without a rollout frame by frame; what is to be predicted stays the real clip. Only for networks that are
trained already (``init=``): from scratch the pasts that it paints teach it nothing (docs/results.md).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from train.data import ClipBatch, Draws
from train.distributed import Ranks
from train.export import export_run
from train.latents import RecordedLatents
from train.options import Forcing
from train.place import drifted_off, moved_place, place_steps, without_place
from train.rollout import compare_rollouts, context_of
from train.sheets import SHEET_CLIPS, rollout_sheet, video_sheet
from train.stage_options import ArDiffusionStage
from train.stages.base import Progress
from train.stages.flow import FlowMatching
from train.student import Student
from train.videos import VideoLatents
from worldmodel.diffusion import add_noise, euler_sigmas, sample
from worldmodel.models.attention import Layout

ROLLOUTS = 16
REAL_FRAMES = 4  # of every clip, where the past is too short to say what comes


class ArDiffusion(FlowMatching):
    """Frame-wise (chunk 1) or chunk-wise, by ``model.sampler.chunk``; the training window is the sampler's."""

    options: ArDiffusionStage

    @property
    def layout(self) -> Layout:
        forcing = Layout.causal if self.options.forcing is Forcing.diffusion else Layout.teacher_forcing
        return forcing(**super().sampler().kept)

    def sigma(self, draws: Draws, frames: int) -> Tensor:
        chunk = self.context.config.model.sampler.chunk
        return self.levels(draws, frames // chunk).repeat_interleave(chunk, dim=1)

    def clean_context(self, batch: ClipBatch, draws: Draws) -> dict[str, Tensor]:
        options = self.options
        if options.forcing is Forcing.diffusion:
            return {}  # the context is the noisy clip itself
        frames = batch.latent.shape[1]
        noised = draws.uniform("context_choice", 1) < options.context_noise_prob
        level = draws.uniform("context_sigma", 1 if options.context_noise_past else frames) * options.context_noise_max
        sigma = torch.where(noised & self._dreamed_from(draws, frames) if options.context_noise_past else noised, level, 0.0)
        noise = draws.normal("context_noise", *batch.latent.shape[1:])
        clean = self._own_context(batch, draws)
        pictures = add_noise(clean, noise, sigma)[:, :, : self.pictured]
        return {"clean": torch.cat((pictures, clean[:, :, self.pictured :]), dim=2), "clean_sigma": sigma}

    def _dreamed_from(self, draws: Draws, frames: int) -> Tensor:
        """Which frames of a past stand for dreamed ones, bool (B,frames): in every clip those from a chunk drawn evenly on."""
        chunk = self.context.config.model.sampler.chunk
        begin = draws.uniform("dreamed_from", 1) * (frames // chunk + 1) - 1  # when rounded up, any chunk, or none of them
        return torch.arange(frames, device=begin.device) // chunk >= begin

    def _unplaced(self, draws: Draws, frames: int) -> Tensor:
        """In which frames of a past nobody says where the player is, bool (B,frames): in some clips those that are not dreamed."""
        chosen = draws.uniform("place_unknown", 1) < self.options.place_unknown_prob
        return chosen & ~self._dreamed_from(draws, frames)

    def drifted(self, batch: ClipBatch, draws: Draws) -> ClipBatch:
        """`batch` whose places go on from those of the past, which are off by what the batch says (stage.place_drift)."""
        length, view, frames = self.options.place_drift, self.context.config.data.place_view, batch.latent.shape[1]
        if not (self.data.place and length):
            return batch
        steps = place_steps(batch.latent, self.data.place, view)
        restarts = draws.uniform("place_restart", frames) * length < 1
        off = drifted_off(steps, restarts, draws.uniform("place_share", frames) * 2 - 0.5)  # from a little back to half too far
        chunk = self.context.config.model.sampler.chunk
        before = torch.arange(frames, device=off.device) // chunk * chunk - 1  # the last frame of the chunk before
        known = ~self._unplaced(draws, frames)[:, before.clamp(min=0)] & (before >= 0)
        carried = off[:, before.clamp(min=0)] * known[..., None]
        return replace(batch, latent=moved_place(batch.latent, self.data.place, view, carried), off=off - carried)

    def _partly_placed(self, batch: ClipBatch, draws: Draws) -> Tensor:
        """Latents (B,T,C,H,W) of which in some clips only those that stand for dreamed ones say where the player is."""
        if not self.data.place:
            return batch.latent
        latent = batch.latent
        if batch.off is not None:
            latent = moved_place(latent, self.data.place, self.context.config.data.place_view, batch.off)
        return without_place(latent, self.data.place, self._unplaced(draws, latent.shape[1]))

    @torch.no_grad()
    def _own_context(self, batch: ClipBatch, draws: Draws) -> Tensor:
        """Context latents (B,T,C,H,W): real, or made by the network from the context of the round before."""
        options, sampler = self.options, self.sampler()
        real = context = self._partly_placed(batch, draws)
        shape, kept = context.shape, min(REAL_FRAMES, context.shape[1])
        for own_round in range(draws.shared("own_rounds", options.own_rounds + 1)):

            def denoise(noisy: Tensor, sigma: float, end: float, clean: Tensor = context) -> Tensor:
                levels = torch.full(shape[:2], sigma, device=noisy.device)
                with self.context.autocast():
                    return self.model(noisy, levels, layout=self.layout, clean=clean, **batch.conditions()).float()

            def fresh(i: int, own_round: int = own_round) -> Tensor:
                return draws.normal(f"own_noise_{own_round}_{i}", *shape[1:])

            made = sample(denoise, fresh(-1), euler_sigmas(sampler.steps, sampler.shift), sampler.kind, fresh)
            context = torch.cat((real[:, :kept], made[:, kept:]), dim=1)
        return context

    @torch.no_grad()
    def rollout_statistics(self) -> dict[str, float] | None:
        """Held-out rollouts of the current weights by the game's sampler, latents against the real ones: spread, motion, gain in dB
        over repeating the last real frame (first 8 dreamed frames). None where every held-out episode ends within the context."""
        # the cache of a large network is as large as its rollouts are many: no more of them than training makes
        count = min(ROLLOUTS, self.options.batch) if self.model_config.text_dim else ROLLOUTS
        clips, made = self._held_out_dream(count)
        context = clips.latent.shape[1] - made.shape[1]
        shown, mask = clips.latent[:, :, : self.pictured], clips.mask[:, context:]
        real, last = shown[:, context:], shown[:, context - 1 : context]
        numbers = compare_rollouts(made[:, :, : self.pictured], real, last, mask)
        if numbers and self.data.place:
            numbers |= self._steps_off(made, clips.latent[:, context:], mask)
        return numbers or None

    def _steps_off(self, made: Tensor, real: Tensor, mask: Tensor) -> dict[str, float]:
        """rollout_steps_off: how far what places move from frame to frame is off, over how far they move: 0 is right, 1 as bad as
        standing still. {} where nobody moves."""
        dreamed, true = (place_steps(x, self.data.place, self.context.config.data.place_view)[:, 1:] for x in (made, real))
        error, way = ((x * mask[:, 1:, None]).norm(dim=-1).sum() for x in (dreamed - true, true))
        still = 1e-4 * int(mask[:, 1:].sum())  # what places are read by is no more exact
        return {"rollout_steps_off": float(error / way)} if way > still else {}

    def _held_out_dream(self, count: int) -> tuple[ClipBatch, Tensor]:
        """`count` held-out clips, and what the network dreams behind the first third of each."""
        sampler = self.sampler()
        clips = self.held_out.batch(self.held_out.sampler.spread(count))
        student = Student(self.model, self.context, self.latent_shape, sampler, count, graphs=False, pictured=self.pictured)
        draws = Draws(0, 0, 0, Ranks(0, 1, self.context.device), count)
        return clips, student.dream(clips, context_of(self.options.clip_frames, sampler.chunk), draws)

    def flops(self) -> float:
        return super().flops() * (1 + self.options.own_rounds / 2 * self.context.config.model.sampler.steps / 3)

    def sheet(self, path: Path, exported: Path | None) -> None:
        """Held-out frames above a rollout, and of worlds of single frames above one-step predictions."""
        if isinstance(self.data, VideoLatents):
            if self.data.shown_by is not None:
                clips, made = self._held_out_dream(min(SHEET_CLIPS, self.options.batch))
                video_sheet(path, self.data.shown_by, clips.latent, made, "rollout")
        elif exported is not None and isinstance(self.data, RecordedLatents):
            rollout_sheet(path, exported, self.data.frames, self.context.device)

    def export(self, progress: Progress, final: bool) -> Path | None:
        return (
            export_run(self, progress) if isinstance(self.data, RecordedLatents) else self.export_weights(progress, self.sampler())
        )
