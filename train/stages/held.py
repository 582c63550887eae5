"""What holds a student to the recorded world while scores sharpen it: two regressions that are not in the paper (see DmdStage).

``anchor``: its predictions from noised real clips. ``rest``: its rollouts where the recorded world stands still.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.data import ClipBatch, Draws
from train.objectives import endpoint_regression, rest_targets
from train.stage_options import DmdStage
from train.stages.distil import Distillation
from worldmodel.diffusion import add_noise, euler_sigmas

RESTFUL = 4  # one clip in so many is chosen for its rest, and not scored: of restful clips scores teach that little moves


class HeldStudent(Distillation):
    """A student with the regressions, and what they need to know of its rollouts."""

    options: DmdStage

    def steps(self, draws: Draws) -> int:
        """The student's step count of this update."""
        return self.options.student_steps[draws.shared("steps", len(self.options.student_steps))]

    def _list_levels(self, draws: Draws, count: int) -> Tensor:
        """Levels (B,count), each drawn from the student's list."""
        choice = torch.tensor(euler_sigmas(self.steps(draws), self.options.shift))
        picked = draws.uniform("sigma", count).mul(len(choice)).long().clamp(max=len(choice) - 1)
        return choice.to(picked.device)[picked]

    def _length(self, draws: Draws) -> int:
        """Frames of this update's rollouts, the context included; the last clip_frames are scored."""
        more = (self.options.rollout_frames - self.options.clip_frames) // self.sampler().chunk
        return self.options.clip_frames + self.sampler().chunk * draws.shared("length", more + 1)

    def _rests(self, dream: ClipBatch, real: ClipBatch) -> tuple[Tensor, Tensor]:
        shown = real.latent[:, :, : self.pictured]  # a place that slides under equal pictures rests
        return rest_targets(dream.latent, shown, real.action, self.options.context_frames)

    def _restful(self, batch: ClipBatch, draws: Draws) -> tuple[ClipBatch, Tensor]:
        """`batch` with restful clips in some places, and which (B,): of rest_draws clips the one that rests longest where rollouts
        are trained. Beside scores in one place of `RESTFUL`, without them in every one."""
        place = torch.arange(len(batch.latent), device=batch.latent.device)
        chosen = torch.zeros_like(place, dtype=torch.bool)
        if self.options.rest_draws == 1:
            return batch, chosen
        length = self._length(draws)
        best, most = batch, self._resting(batch, length)
        for i in range(1, self.options.rest_draws):
            other = self.clips.batch(draws.integers(f"restful_{i}", self.clips.sampler.count))
            rests = self._resting(other, length)
            best, most = best.where(rests > most, other), torch.maximum(rests, most)
        chosen = place % RESTFUL == RESTFUL - 1 if self.options.score else ~chosen
        return batch.where(chosen, best), chosen

    def _resting(self, batch: ClipBatch, length: int) -> Tensor:
        """In how many frames (B,) of the scored ones of a rollout of `length` the recording rests."""
        clip = batch.cut(0, length)
        rests = self._rests(clip, clip)[1] & clip.mask
        return rests[:, -self.options.clip_frames :].sum(dim=1)

    def _rest_loss(self, dream: ClipBatch, real: ClipBatch) -> Tensor:
        """How far resting frames of a rollout are from what they were when the rest began, where they carry gradients."""
        target, rests = self._rests(dream, real.cut(0, dream.latent.shape[1]))
        made, target, mask = (t[:, -self.options.clip_frames :] for t in (dream.latent, target, rests & dream.mask))
        return endpoint_regression(made, target, mask)

    def _anchor_loss(self, batch: ClipBatch, draws: Draws) -> Tensor:
        """Regression of the student's predictions from noised real clips on these clips, at levels of its own list."""
        real = self.drifted(batch.cut(0, self.options.clip_frames), draws)
        noise = draws.normal("anchor_noise", *real.latent.shape[1:])
        sigma = self._list_levels(draws, self.options.clip_frames // self.sampler().chunk).repeat_interleave(
            self.sampler().chunk, dim=1
        )
        made = self.clean(self.model, add_noise(real.latent, noise, sigma), sigma, real, None, self.clean_context(real, draws))
        return endpoint_regression(made, real.latent, real.mask)
