"""What no type can catch: ranges and settings that do not go together, said in one sentence before anything runs."""

from __future__ import annotations

import math

from train.config import RunConfig, codec_config, sampler_config
from train.options import SamplerOptions
from train.stage_options import AnyflowStage, CodecStage, DmdStage, EvaluateStage, FlowStage, TrainingOptions
from worldmodel.errors import ConfigError


def validate(config: RunConfig) -> None:
    """Raise ConfigError for values that no type can catch."""
    stage = config.stage
    codec_config(config)
    sampler_config(config)
    if config.only or config.scale != 1.0:
        raise ConfigError("only= and scale= belong to a recipe: leave them out, or leave out stage=")
    _at_least_one({"train.log_steps": config.train.log_steps, "train.keep": config.train.keep})
    events = ("checkpoint_steps", "checkpoint_minutes", "sample_steps", "sample_minutes", "threads")
    _not_negative({f"train.{n}": getattr(config.train, n) for n in events} | {"data.workers": config.data.workers})
    if not 0 <= config.seed < 2**63:
        raise ConfigError(f"seed is a whole number from 0 to {2**63 - 1}, got {config.seed}")
    if config.steps is not None:
        _at_least_one({"steps": config.steps})
    if config.minutes is not None and not 0 < config.minutes < math.inf:
        raise ConfigError(f"minutes must be positive, got {config.minutes}")
    if isinstance(stage, TrainingOptions):
        _at_least_one({f"stage.{n}": getattr(stage, n) for n in ("steps", "batch", "accumulate", "ema_every")})
        if not 0.0 <= stage.ema < 1.0:
            raise ConfigError(f"stage.ema lies in [0, 1), got {stage.ema}")
        if not (0 < stage.lr < math.inf and stage.clip > 0):
            raise ConfigError(f"stage.lr and stage.clip must be positive, got {stage.lr} and {stage.clip}")
        if not (0 <= stage.beta1 < 1 and 0 <= stage.beta2 < 1):
            raise ConfigError(f"stage.beta1 and stage.beta2 lie in [0, 1), got {stage.beta1} and {stage.beta2}")
        _not_negative({f"stage.{n}": getattr(stage, n) for n in ("weight_decay", "warmup")})
    if isinstance(stage, EvaluateStage):
        _not_negative({f"stage.{n}": getattr(stage, n) for n in ("rollouts", "sampler_steps", "random_frames")})
    if isinstance(stage, CodecStage):
        _at_least_one({"stage.scale_frames": stage.scale_frames})
        names = ("noise_std", "l1_weight", "gradient_weight", "mse_weight", "latent_weight")
        _not_negative({f"stage.{n}": getattr(stage, n) for n in names})
    if isinstance(stage, FlowStage):
        _validate_flow(stage, config.model.sampler.chunk)
        _validate_distillation(stage, config.model.sampler)


def _at_least_one(values: dict[str, int]) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")


def _not_negative(values: dict[str, float]) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name} must be a number from 0 up, got {value}")


def _validate_flow(stage: FlowStage, chunk: int) -> None:
    if stage.clip_frames < 2 or stage.clip_frames % max(chunk, 1):
        raise ConfigError(
            f"stage.clip_frames must be 2 or more and a multiple of model.sampler.chunk {chunk}, got {stage.clip_frames}"
        )
    _not_negative({"stage.own_rounds": getattr(stage, "own_rounds", 0)})
    for name in ("action_dropout", "context_noise_prob", "context_noise_max"):
        value = float(getattr(stage, name, 0.0))
        if not 0.0 <= value <= 1.0:
            raise ConfigError(f"stage.{name} lies in [0, 1], got {value}")
    if not (0 < stage.shift < math.inf and 0 < stage.logit_std < math.inf):
        raise ConfigError(f"stage.shift and stage.logit_std must be positive, got {stage.shift} and {stage.logit_std}")


def _validate_distillation(stage: FlowStage, sampler: SamplerOptions) -> None:
    for name in ("levels", "list_steps"):
        if getattr(stage, name, 2) < (2 if name == "levels" else 1):
            raise ConfigError(f"stage.{name} must be at least {2 if name == 'levels' else 1}, got {getattr(stage, name)}")
    shares = ("boundary", "boundary_prob", "mix", "score_min", "score_max", "fm_share", "clean_share", "target_decay")
    for name in shares:
        if not 0.0 <= getattr(stage, name, 0.0) <= (1.0 if name != "target_decay" else 0.99999):
            ends = "[0, 1)" if name == "target_decay" else "[0, 1]"
            raise ConfigError(f"stage.{name} lies in {ends}, got {getattr(stage, name)}")
    factors = (
        "guidance",
        "trajectory_guidance",
        "critic_lr",
        "pretrain_lr",
        "fake_weight",
        "mix_weight",
        "boundary_weight",
        "anchor",
    )
    _not_negative({f"stage.{n}": getattr(stage, n) for n in (*factors, "pretrain_steps") if hasattr(stage, n)})
    _at_least_one({f"stage.{n}": getattr(stage, n) for n in ("pairs", "critic_updates") if hasattr(stage, n)})
    if getattr(stage, "list_steps", 1) > getattr(stage, "levels", 1) or getattr(stage, "levels", 1) % getattr(
        stage, "list_steps", 1
    ):
        raise ConfigError("stage.levels must be a multiple of stage.list_steps: the kept states are levels of the trajectory")
    if isinstance(stage, DmdStage):
        _validate_rollouts(stage, sampler.chunk)
    if isinstance(stage, AnyflowStage) and not 0 < stage.map_guidance < math.inf:
        raise ConfigError(f"stage.map_guidance must be positive, got {stage.map_guidance}")


def _validate_rollouts(stage: DmdStage, chunk: int) -> None:
    if not stage.student_steps or min(stage.student_steps) < 1 or stage.first_steps < 0:
        raise ConfigError(f"stage.student_steps holds step counts from 1 up, got {stage.student_steps}, first {stage.first_steps}")
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
    if stage.score_min >= stage.score_max:
        raise ConfigError(f"stage.score_min must be below stage.score_max, got {stage.score_min} and {stage.score_max}")
