"""Stage 3: distribution matching (DMD) on the student's own rollouts (arXiv 2605.15141).

Three networks: the causal student, a frozen bidirectional teacher that scores real clips, and a critic, bidirectional and trained,
that scores what the student makes. Every step trains the critic by flow matching on fresh rollouts; every `critic_updates`-th step
first moves the student along the difference of the two scores. The past that a rollout goes on from is real (`context_frames`), as
in the game; longer rollouts than the teacher's clips are scored on their last `clip_frames`. Of videos the first latent of a clip
is a single picture: there the first of those frames is made anew, its last picture as a clip's first latent, and is not trained.

Two regressions that are not in the paper can be added, or with ``stage.score=0`` be all there is, without teacher and critic:
see train.stages.held.

With ``stage.carry_on`` a rollout goes on from update to update (see train.ongoing) instead of beginning anew in each.

The gradient of a dreamed frame stays in its own exit step unless ``stage.cache_gradient=carried`` (see train.rollout).
With ``stage.source`` the scored frames are not rollouts but predictions from noised data: CausVid's and "causal DMD".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from train.data import ClipBatch, Clips, Draws
from train.objectives import distribution_gradient, distribution_matching, flow_matching
from train.ongoing import OngoingRollouts
from train.options import CacheGradient, Source
from train.rollout import self_rollout
from train.stage_options import DmdStage
from train.stages.base import Context, Update
from train.stages.flow import Pass, dit_flops
from train.stages.held import HeldStudent
from train.student import Student
from train.videos import VideoLatents
from worldmodel.config import SamplerConfig
from worldmodel.diffusion import add_noise, euler_sigmas, shift_sigma, to_clean, velocity_target
from worldmodel.errors import ConfigError
from worldmodel.models.attention import Layout

Loss = Callable[[ClipBatch, Draws], tuple[Tensor, dict[str, Tensor]]]
WHOLE = Layout.bidirectional()


class DistributionMatching(HeldStudent):
    """Targets: ``model`` (the student) and ``critic``."""

    options: DmdStage

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        if self.options.score and not context.config.teacher:
            raise ConfigError("this stage needs a bidirectional network that judges rollouts: pass teacher=runs/teacher")
        self._check_longer()
        if self.options.rest and isinstance(self.data, VideoLatents):
            raise ConfigError("stage.rest is for worlds in which nothing moves by itself, and videos do: set stage.rest=0")
        if self.options.score:
            plain = replace(self.model_config, flow_map=False)
            self.teacher = self.network(context.config.teacher, "teacher", plain).requires_grad_(False)
            self.critic = self.network(context.config.teacher, "teacher", plain)
        self._ongoing = {target: self._to_carry_on() for target in self.modules()} if self.options.carry_on else {}
        self._stale = True  # whether the student has changed since the copy that makes rollouts was taken

    def _to_carry_on(self) -> OngoingRollouts:
        options, sampler = self.options, self.sampler()
        if isinstance(self.data, VideoLatents):
            raise ConfigError("stage.carry_on is for recorded worlds, and these are videos: leave it out")
        return OngoingRollouts(
            self.clips,
            options.context_frames,
            options.clip_frames - options.context_frames,
            options.rollout_frames,
            sampler.window + sampler.memory * sampler.memory_every,
            math.lcm(sampler.chunk, sampler.memory_every) if sampler.memory else sampler.chunk,
        )

    @property
    def _resumed(self) -> dict[str, OngoingRollouts]:
        """Rollouts that a checkpoint keeps: those of one process; of several they begin anew."""
        return self._ongoing if self.context.ranks.world == 1 else {}

    def extra_state(self) -> dict[str, Any]:
        return {f"ongoing {target}": rollouts.state() for target, rollouts in self._resumed.items()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        for target, rollouts in self._resumed.items():
            saved = state.get(f"ongoing {target}", {})
            if len(saved.get("numbers", ())) == self.options.batch:
                rollouts.load_state(saved)

    def _check_longer(self) -> None:
        """Raise ConfigError if rollouts of videos are longer than clips, and nothing here can begin a clip anew."""
        options, data = self.options, self.data
        longer = options.source is Source.rollout and options.rollout_frames != options.clip_frames
        if isinstance(data, VideoLatents) and longer and not (data.shown_by is not None and data.shown_by.encodes):
            raise ConfigError(
                f"rollouts of {options.rollout_frames} latents are scored by their last {options.clip_frames}, of which the first "
                "is encoded anew: pass codec=Wan2.1_VAE.pth, or set stage.rollout_frames to stage.clip_frames"
            )

    def sampler(self) -> SamplerConfig:
        """Offers the step counts that are trained; by default the one nearest to ``model.sampler.steps``."""
        plain, counts = super().sampler(), tuple(sorted(set(self.options.student_steps)))
        steps = min(counts, key=lambda count: abs(count - plain.steps))
        return replace(plain, presets=counts, steps=steps, first_steps=self.options.first_steps)

    @cached_property
    def student(self) -> Student:
        """What makes rollouts: the student against a cache."""
        sampler = self.sampler()
        carried = self.options.cache_gradient is CacheGradient.carried
        longest = max(self.options.rollout_frames, self.options.clip_frames)
        return Student(
            self.model,
            self.context,
            self.latent_shape,
            sampler,
            self.options.batch,
            carried,
            frames=longest,
            pictured=self.pictured,
        )

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "critic": self.critic} if self.options.score else {"model": self.model}

    @property
    def pretrain_steps(self) -> int:
        """Steps of `first_loss` before distribution matching begins."""
        return 0

    def first_loss(self, batch: ClipBatch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """What the student learns in those steps."""
        raise NotImplementedError

    def rate(self, target: str, step: int) -> float:
        return self.options.critic_lr if target == "critic" else 1.0

    def make_clips(self, held_out: bool) -> Clips:
        frames = self.options.clip_frames if held_out else max(self.options.clip_frames, self.options.rollout_frames)
        return self.data.clips(frames, held_out)

    # -- what is scored --------------------------------------------------------------------------------------------------

    def _dreamed(self, target: str, batch: ClipBatch, draws: Draws) -> tuple[ClipBatch, ClipBatch]:
        """Recorded clips and the rollouts along them that `target` learns from: `batch`, or where those that go on are now."""
        if target not in self._ongoing:
            return batch, self.dream(batch, draws)
        along, past, real = self._ongoing[target].along(draws)
        dream = self.dream(along, draws, past, real)
        self._ongoing[target].add(dream.latent[:, past.shape[1] :])
        return along, dream

    def dream(self, batch: ClipBatch, draws: Draws, past: Tensor | None = None, real: int = 0) -> ClipBatch:
        """Clips with what the student made of them; mask: valid frames that it did make. The last clip_frames are scored.

        past (B,n,C,H,W): the first frames of `batch` in rollouts that go on, the first `real` of them recorded, the rest dreamed
        (below 0: so many dreamed ones are left out before them).
        """
        if self.options.source is Source.rollout:
            return self._rollout(batch, draws, past, real)
        return self._predict(batch, draws)

    def _scored(self, dream: ClipBatch) -> ClipBatch:
        """The last clip_frames of a dream."""
        if isinstance(self.data, VideoLatents):
            return self._begun_anew(dream)
        last = dream.latent.shape[1]
        return dream.cut(last - self.options.clip_frames, last)

    def levels(self, draws: Draws, count: int) -> Tensor:
        return super().levels(draws, count) if self.options.source is Source.rollout else self._list_levels(draws, count)

    def _predict(self, batch: ClipBatch, draws: Draws) -> ClipBatch:
        """One step of the student from noised data, a list level per chunk, all frames at once."""
        batch = batch.cut(0, self.options.clip_frames)
        sigma, noise = self.sigma(draws, self.options.clip_frames), draws.normal("dream", *batch.latent.shape[1:])
        noisy = add_noise(batch.latent, noise, sigma)
        extra = self.clean_context(batch, draws)
        return replace(batch, latent=self.clean(self.model, noisy, sigma, batch, None, extra))

    def _rollout(self, batch: ClipBatch, draws: Draws, past: Tensor | None, real: int) -> ClipBatch:
        options, student = self.options, self.student
        if past is None:
            batch = batch.cut(0, self._length(draws))
            past, real = batch.seen(options.context_frames), options.context_frames
        context, length, (kind, every_step) = past.shape[1], batch.latent.shape[1], self.jumps()
        student.begin(batch, self._stale)
        self._stale = False
        student.see(past, draws, real)
        made = self_rollout(
            student.denoise,
            student.cache,
            draws.normal("dream", *batch.latent.shape[1:]),
            self._schedule(draws),
            self._renoise(draws, batch.latent.shape[1:], context),
            start=context,
            grad_from=length - options.clip_frames,
            kind=kind,
            every_step=every_step,
            context=lambda number, clean: student.kept(clean, draws, context - real + 1 + number * student.cache.chunk),
        )
        latent = torch.cat((batch.told(past), made), dim=1)
        dreamed = (torch.arange(length, device=latent.device) >= context).expand_as(batch.mask)
        # that recorded clips of videos end earlier is no matter: the prompt goes on, and a camera stands still
        return replace(batch, latent=latent, mask=dreamed if isinstance(self.data, VideoLatents) else batch.mask & dreamed)

    def _begun_anew(self, whole: ClipBatch) -> ClipBatch:
        """The last clip_frames of rollouts of videos, whose first latent is that of a single picture."""
        assert isinstance(self.data, VideoLatents)
        first, chunk = whole.latent.shape[1] - self.options.clip_frames, self.sampler().chunk
        clip = whole.cut(first, whole.latent.shape[1])
        if not first:
            return clip
        assert self.data.shown_by is not None
        begin = self.data.shown_by.restart(whole.latent[:, : first + 1].detach())
        trained = torch.arange(self.options.clip_frames, device=begin.device) >= chunk
        return replace(clip, latent=torch.cat((begin, clip.latent[:, 1:]), dim=1), mask=clip.mask & trained)

    def jumps(self) -> tuple[str, bool]:
        """Kind of sampler that makes a rollout, and whether all of its steps carry gradients (flow maps) or the last alone."""
        return "consistency", False

    def _schedule(self, draws: Draws) -> Callable[[int], list[float]]:
        """Levels of a chunk, cut behind its exit step: one for all chunks but perhaps the first."""
        levels = self.exit_levels(self.steps(draws), draws, "exit")
        first = self.exit_levels(self.options.first_steps, draws, "first_exit") if self.options.first_steps else levels
        return lambda number: first if number == 0 and self.options.context_frames == 0 else levels

    def exit_levels(self, steps: int, draws: Draws, purpose: str) -> list[float]:
        return euler_sigmas(steps, self.options.shift)[: draws.shared(purpose, steps) + 1]

    def _renoise(self, draws: Draws, shape: torch.Size, context: int) -> Callable[[int, int], Tensor]:
        """Fresh noise by step, drawn for the whole clip at once and cut into chunks behind the context."""
        drawn: dict[int, Tensor] = {}
        chunk = self.sampler().chunk

        def fresh(number: int, step: int) -> Tensor:
            if step not in drawn:
                drawn[step] = draws.normal(f"renoise_{step}", *shape)
            first = context + number * chunk
            return drawn[step][:, first : first + chunk]

        return fresh

    # -- losses ----------------------------------------------------------------------------------------------------------

    def _noised(self, made: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """noise, level (B,T) and noised clips for the scores: one shifted uniform level per clip."""
        level = shift_sigma(draws.uniform("score_level"), self.options.shift).clamp(self.options.score_min, self.options.score_max)
        sigma, noise = level[:, None].expand(-1, made.shape[1]), draws.normal("score_noise", *made.shape[1:])
        return noise, sigma, add_noise(made.detach(), noise, sigma)

    def generator_loss(self, batch: ClipBatch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        options, metrics = self.options, dict[str, Tensor]()
        loss = batch.latent.new_zeros(())
        if options.score or options.rest:
            dreamed, chosen = self._restful(batch, draws)
            dreamed, dream = self._dreamed("model", dreamed, draws)
        if options.score:
            lively = replace(dream, mask=dream.mask & ~chosen[:, None])
            loss = options.score * self._match_loss(self._scored(lively), draws)
        if options.anchor:
            loss = loss + options.anchor * self._anchor_loss(batch, draws)
        if options.rest:
            metrics["rest"] = self._rest_loss(dream, dreamed)
            loss = loss + options.rest * metrics["rest"]
        return loss, {name: value.detach() for name, value in metrics.items()}

    def _match_loss(self, dream: ClipBatch, draws: Draws) -> Tensor:
        _, sigma, noisy = self._noised(dream.latent, draws)
        with torch.no_grad():
            fake = self.clean(self.critic, noisy, sigma, dream, layout=WHOLE)
            real = to_clean(noisy, self.guided(self.teacher, noisy, sigma, dream, self.options.guidance, layout=WHOLE), sigma)
            gradient = distribution_gradient(dream.latent, fake, real, dream.mask)
        return distribution_matching(dream.latent, gradient, dream.mask)

    def critic_loss(self, batch: ClipBatch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            dream = self._scored(self._dreamed("critic", batch, draws)[1])
        noise, sigma, noisy = self._noised(dream.latent, draws)
        loss = flow_matching(
            self.velocity(self.critic, noisy, sigma, dream, layout=WHOLE), velocity_target(dream.latent, noise), dream.mask
        )
        with torch.no_grad():  # the teacher on real clips: a critic that follows is about as good on dreams
            # a clip of videos can only be cut behind its first latent, which is a single picture
            first = 0 if isinstance(self.data, VideoLatents) else batch.latent.shape[1] - self.options.clip_frames
            real = batch.cut(first, first + self.options.clip_frames)
            noise, sigma, noisy = self._noised(real.latent, draws)
            known = self.velocity(self.teacher, noisy, sigma, real, layout=WHOLE)
            reference = flow_matching(known, velocity_target(real.latent, noise), real.mask)
        return loss, {"critic_gap": loss.detach() / reference.clamp(min=1e-6)}

    def updates(self, step: int) -> Iterator[Update]:
        if step < self.pretrain_steps:
            yield from self._updates("model", self.first_loss, step, 0)
        else:
            yield from self._match(step - self.pretrain_steps)

    def _match(self, step: int) -> Iterator[Update]:
        if not self.options.score or step % self.options.critic_updates == 0:
            yield from self._updates("model", self.generator_loss, step, 0)
            self._stale = True
        if self.options.score:
            yield from self._updates("critic", self.critic_loss, step, self.options.accumulate)

    def _updates(self, target: str, loss: Loss, step: int, first: int) -> Iterator[Update]:
        for micro in range(first, first + self.options.accumulate):
            draws = self.context.draws(step, micro)
            value, metrics = loss(self.clips.draw(draws), draws)
            yield Update(target, value, self.options.batch * self.options.clip_frames, metrics)

    def validate(self) -> dict[str, float]:
        """Nothing: held-out rollouts say how good the student is (`rollout_statistics`), its loss does not."""
        return {}

    def passes(self) -> list[Pass]:
        options, share, sampler = self.options, 1 / self.options.critic_updates if self.options.score else 1.0, self.sampler()
        rollout = options.source is Source.rollout
        seen = Layout.causal(**sampler.kept) if rollout else self.layout
        dream = Pass("model", seen, options.clip_frames, rollout, share)
        anchor = [Pass("model", self.layout, options.clip_frames, share=share)] if options.anchor else []
        return [dream, *anchor, Pass("critic", WHOLE, options.clip_frames)] if options.score else [dream, *anchor]

    def flops(self) -> float:
        """Of an average step: rollouts (half of the levels, and the commit pass), scores, backward."""
        options = self.options
        one = dit_flops(self.model_config, self.tokens, WHOLE, options.clip_frames) * options.batch * options.accumulate
        passes = 1 + sum((n + 1) / 2 for n in options.student_steps) / len(options.student_steps)
        frames = passes * (options.clip_frames + options.rollout_frames) / 2
        if options.carry_on:  # what came before is committed again
            frames = passes * options.clip_frames + min(self._ongoing["model"].reach, options.rollout_frames / 2)
        rollout = one * frames / options.clip_frames if options.source is Source.rollout else one
        if not options.score:
            return rollout + 2 * one
        generator = rollout + 2 * one + (2 if options.guidance == 1.0 else 3) * one
        return generator / options.critic_updates + rollout + 4 * one
