"""What no type can catch in the settings of a stage that trains: ranges, and settings that would be read by nothing."""

from __future__ import annotations

from train import record
from train.config import RunConfig
from train.options import CacheGradient, Forcing, SamplerOptions, Source
from train.stage_options import (
    AnyflowStage,
    ArDiffusionStage,
    CausalOdeStage,
    CodecStage,
    DmdStage,
    FlowStage,
    SelfForcingStage,
    TrainingOptions,
)
from worldmodel.config import MOST_STEPS
from worldmodel.errors import ConfigError


def at_least_one(values: dict[str, int]) -> None:
    """Raise ConfigError that names the first value below 1."""
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")


def not_negative(values: dict[str, float]) -> None:
    """Raise ConfigError that names the first value below 0."""
    for name, value in values.items():
        if value < 0:
            raise ConfigError(f"{name} must be a number from 0 up, got {value}")


def validate_training(config: RunConfig, stage: TrainingOptions) -> None:
    """Raise ConfigError for what `stage` cannot be trained with."""
    at_least_one({f"stage.{n}": getattr(stage, n) for n in ("steps", "batch", "accumulate", "ema_every")})
    if not 0.0 <= stage.ema < 1.0:
        raise ConfigError(f"stage.ema lies in [0, 1), got {stage.ema}")
    if not (stage.lr > 0 and stage.clip > 0):
        raise ConfigError(f"stage.lr and stage.clip must be positive, got {stage.lr} and {stage.clip}")
    if not (0 <= stage.beta1 < 1 and 0 <= stage.beta2 < 1):
        raise ConfigError(f"stage.beta1 and stage.beta2 lie in [0, 1), got {stage.beta1} and {stage.beta2}")
    not_negative({f"stage.{n}": getattr(stage, n) for n in ("weight_decay", "warmup")})
    if isinstance(stage, CodecStage):
        at_least_one({"stage.scale_frames": stage.scale_frames})
        names = ("noise_std", "l1_weight", "gradient_weight", "mse_weight", "latent_weight")
        not_negative({f"stage.{n}": getattr(stage, n) for n in names})
    if isinstance(stage, FlowStage):
        _validate_flow(stage, config.model.sampler.chunk)
    if isinstance(stage, ArDiffusionStage):
        _validate_ranges(stage)
        _validate_sampler(stage, config.model.sampler)
        _validate_own_rounds(stage)
        _validate_noised_past(stage, config.model.sampler)
        _validate_drift(stage)
        if config.data.place_span and stage.forcing is Forcing.diffusion:
            raise ConfigError(
                "stage.forcing=diffusion hides no place from a past that shows it: set stage.forcing=teacher, or data.place_span=0"
            )
    if isinstance(stage, DmdStage):
        _validate_rollouts(stage, config.model.sampler)
    if isinstance(stage, SelfForcingStage | AnyflowStage):
        _validate_phases(stage, record.budget(config)["steps"])


def _validate_flow(stage: FlowStage, chunk: int) -> None:
    if stage.clip_frames < 2 or stage.clip_frames % max(chunk, 1):
        raise ConfigError(
            f"stage.clip_frames must be 2 or more and a multiple of model.sampler.chunk {chunk}, got {stage.clip_frames}"
        )
    for name in ("action_dropout", "context_noise_prob", "context_noise_max", "place_unknown_prob"):
        value = float(getattr(stage, name, 0.0))
        if not 0.0 <= value <= 1.0:
            raise ConfigError(f"stage.{name} lies in [0, 1], got {value}")
    if stage.place_weight <= 0:
        raise ConfigError(f"stage.place_weight must be positive, got {stage.place_weight}")
    if stage.place_weight != 1 and stage.kind not in ("teacher", "ar_diffusion"):
        raise ConfigError("stage.place_weight is a setting of the stages teacher and ar_diffusion: leave it out")
    if not (stage.shift > 0 and stage.logit_std > 0):
        raise ConfigError(f"stage.shift and stage.logit_std must be positive, got {stage.shift} and {stage.logit_std}")


def _validate_ranges(stage: ArDiffusionStage) -> None:
    """Of settings that several stages have."""
    for name in ("levels", "list_steps"):
        if getattr(stage, name, 2) < (2 if name == "levels" else 1):
            raise ConfigError(f"stage.{name} must be at least {2 if name == 'levels' else 1}, got {getattr(stage, name)}")
    shares = ("boundary", "boundary_prob", "mix", "score_min", "score_max", "fm_share", "clean_share", "target_decay")
    for name in shares:
        if not 0.0 <= getattr(stage, name, 0.0) <= (1.0 if name != "target_decay" else 0.99999):
            ends = "[0, 1)" if name == "target_decay" else "[0, 1]"
            raise ConfigError(f"stage.{name} lies in {ends}, got {getattr(stage, name)}")
    factors = ("guidance", "trajectory_guidance", "critic_lr", "pretrain_lr", "fake_weight", "mix_weight", "boundary_weight")
    names = (*factors, "score", "anchor", "rest", "pretrain_steps", "own_rounds", "first_steps")
    not_negative({f"stage.{n}": getattr(stage, n) for n in names if hasattr(stage, n)})
    counts = ("pairs", "critic_updates", "rest_draws")
    at_least_one({f"stage.{n}": getattr(stage, n) for n in counts if hasattr(stage, n)})
    if getattr(stage, "list_steps", 1) > getattr(stage, "levels", 1) or getattr(stage, "levels", 1) % getattr(
        stage, "list_steps", 1
    ):
        raise ConfigError("stage.levels must be a multiple of stage.list_steps: the kept states are levels of the trajectory")
    if isinstance(stage, AnyflowStage):
        if stage.map_guidance <= 0:
            raise ConfigError(f"stage.map_guidance must be positive, got {stage.map_guidance}")
        if stage.fm_share + stage.clean_share > 1:
            raise ConfigError(
                "stage.fm_share and stage.clean_share are shares of the same clips, together at most 1: "
                f"got {stage.fm_share} and {stage.clean_share}"
            )


def _validate_sampler(stage: ArDiffusionStage, sampler: SamplerOptions) -> None:
    if sampler.kind == "flow_map" and not isinstance(stage, AnyflowStage):
        raise ConfigError(
            f"model.sampler.kind=flow_map is for flow maps, which stage=anyflow trains, and {stage.kind} trains none: choose adams"
        )
    longest = max(stage.clip_frames, getattr(stage, "rollout_frames", 0))
    if sampler.memory and longest <= sampler.window:
        raise ConfigError(
            f"model.sampler.memory is of frames before the window, and clips of {longest} frames lie within {sampler.window}: "
            "set stage.clip_frames to about model.sampler.window + memory x memory_every, or model.sampler.memory=0"
        )


def _validate_noised_past(stage: ArDiffusionStage, sampler: SamplerOptions) -> None:
    shown = stage.context_noise_max if stage.context_noise_prob else 0.0
    if shown < sampler.past_noise and stage.forcing is Forcing.teacher and not (stage.own_rounds or _rolls_out_alone(stage)):
        raise ConfigError(
            f"model.sampler.past_noise={sampler.past_noise:g} would be a level that training never shows: set "
            "stage.context_noise_prob above 0 and stage.context_noise_max as high at least, or model.sampler.past_noise=0"
        )
    if not stage.context_noise_past:
        return
    if stage.forcing is Forcing.diffusion or not stage.context_noise_prob:
        raise ConfigError(
            "stage.context_noise_past is of a clean past that is noised: set stage.forcing=teacher and stage.context_noise_prob "
            "above 0, or leave it out"
        )
    if stage.own_rounds:
        raise ConfigError("stage.context_noise_past noises real pasts, and stage.own_rounds makes others: leave one of them out")
    if _rolls_out_alone(stage):
        raise ConfigError(
            "stage.context_noise_past does nothing on rollouts, whose past is the student's own: leave it out, or give the past of "
            "real clips a use with stage.anchor=1"
        )


def _validate_drift(stage: ArDiffusionStage) -> None:
    if not stage.place_drift:
        return
    if not stage.place_drift > 1:
        raise ConfigError(
            f"stage.place_drift, of so many frames one place is right, is above 1, or 0 for none wrong: got {stage.place_drift}"
        )
    if stage.own_rounds:
        raise ConfigError("stage.place_drift leads real pasts astray, and stage.own_rounds makes others: leave one of them out")
    if isinstance(stage, CausalOdeStage):
        raise ConfigError("stage.place_drift does nothing on stored trajectories, whose places are right: leave it out")
    anchored = not isinstance(stage, DmdStage) or stage.anchor or isinstance(stage, AnyflowStage)
    if _rolls_out_alone(stage) or not anchored:
        raise ConfigError(
            "stage.place_drift does nothing on rollouts, whose past is the student's own: leave it out, or give the past of real "
            "clips a use with stage.anchor=1"
        )


def _rolls_out_alone(stage: ArDiffusionStage) -> bool:
    """Whether the past of recorded clips is never seen."""
    data = isinstance(stage, AnyflowStage) and (stage.cotrain or stage.pretrain_steps > 0)
    return isinstance(stage, DmdStage) and stage.source is Source.rollout and not (stage.anchor or data)


def _validate_own_rounds(stage: ArDiffusionStage) -> None:
    if not stage.own_rounds:
        return
    if stage.forcing is Forcing.diffusion:
        raise ConfigError(
            "stage.own_rounds does nothing with stage.forcing=diffusion, which has no clean past: set stage.own_rounds=0, "
            "or stage.forcing=teacher"
        )
    if _rolls_out_alone(stage):
        raise ConfigError(
            "stage.own_rounds does nothing on rollouts, whose past is the student's own: set stage.own_rounds=0, or give the past "
            "of real clips a use with stage.anchor=1"
        )


def _validate_rollouts(stage: DmdStage, sampler: SamplerOptions) -> None:
    chunk = sampler.chunk
    counts = [*stage.student_steps, stage.first_steps or 1]
    if not stage.student_steps or min(counts) < 1 or max(counts) > MOST_STEPS:
        raise ConfigError(
            f"stage.student_steps and stage.first_steps are step counts from 1 to {MOST_STEPS}, "
            f"got {stage.student_steps} and {stage.first_steps}"
        )
    frames = {n: getattr(stage, n) for n in ("context_frames", "rollout_frames")}
    if any(value % chunk for value in frames.values()):
        raise ConfigError(
            f"stage.context_frames and stage.rollout_frames must be multiples of model.sampler.chunk {chunk}, got {frames}"
        )
    if not 0 <= stage.context_frames < stage.clip_frames <= stage.rollout_frames:
        raise ConfigError(
            "0 <= stage.context_frames < stage.clip_frames <= stage.rollout_frames must hold, got "
            f"{stage.context_frames}, {stage.clip_frames}, {stage.rollout_frames}"
        )
    if not stage.score and (stage.kind != "dmd" or not (stage.anchor or stage.rest)):
        raise ConfigError(
            "stage.score=0 leaves nothing to learn from: set stage.rest or stage.anchor of stage=dmd, or a score above 0"
        )
    if stage.rest_draws > 1 and not stage.rest:
        raise ConfigError(
            "stage.rest_draws chooses clips for stage.rest, which is 0: set stage.rest, or leave stage.rest_draws out"
        )
    if stage.carry_on:
        _validate_carry_on(stage, sampler)
    if stage.score_min >= stage.score_max:
        raise ConfigError(f"stage.score_min must be below stage.score_max, got {stage.score_min} and {stage.score_max}")
    if stage.source is not Source.rollout:
        carried = stage.cache_gradient is CacheGradient.carried
        rollouts = {"carry_on": stage.carry_on, "first_steps": stage.first_steps, "cache_gradient": carried, "rest": stage.rest}
        for name, wanted in rollouts.items():
            if wanted:
                raise ConfigError(
                    f"stage.{name} is a setting of rollouts, and stage.source={stage.source.name} makes none: leave it out, "
                    "or set stage.source=rollout"
                )
    if stage.first_steps and stage.context_frames:
        raise ConfigError(
            "stage.first_steps is for rollouts that begin with nothing: set stage.context_frames=0, or leave stage.first_steps out"
        )


def _validate_carry_on(stage: DmdStage, sampler: SamplerOptions) -> None:
    stretch = stage.clip_frames - stage.context_frames
    more = stage.rollout_frames - stage.context_frames
    if not stage.context_frames or more < 2 * stretch or more % stretch:
        raise ConfigError(
            f"stage.carry_on goes on by stage.clip_frames - stage.context_frames = {stretch} frames: set stage.rollout_frames to "
            f"{stage.context_frames} + 2 or more times {stretch}, and stage.context_frames above 0"
        )
    reach = sampler.window + sampler.memory * sampler.memory_every
    if stage.context_frames > reach:
        raise ConfigError(
            f"stage.carry_on commits the {reach} frames again that a pass can see (model.sampler.window + memory x memory_every), "
            f"and stage.context_frames={stage.context_frames} is more: lower it"
        )
    if stage.rest:
        raise ConfigError(
            "stage.rest asks where the recording stands still, and rollouts that carry on are elsewhere: set stage.rest=0, or "
            "leave stage.carry_on out"
        )
    if not stage.score:
        raise ConfigError("stage.carry_on is of rollouts, and stage.score=0 makes none: leave it out")
    if sampler.sink:
        raise ConfigError("stage.carry_on forgets how a rollout began, and model.sampler.sink keeps it: leave one of them out")


def _validate_phases(stage: SelfForcingStage | AnyflowStage, steps: float | None) -> None:
    if steps is not None and stage.pretrain_steps >= steps:
        raise ConfigError(
            f"the second phase of {stage.kind} would never begin: stage.pretrain_steps ({stage.pretrain_steps}) must be below "
            f"the steps of the whole run ({steps}), lower it or raise steps="
        )
