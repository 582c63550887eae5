"""What no type can catch: ranges and settings that do not go together, said in one sentence before anything runs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from train import record, sources
from train.config import RunConfig, codec_config, sampler_config
from train.stage_checks import at_least_one, not_negative, validate_training
from train.stage_options import AverageStage, EvaluateStage, TrainingOptions
from worldmodel.config import MOST_STEPS
from worldmodel.errors import ConfigError


def validate(config: RunConfig) -> None:
    """Raise ConfigError for values that no type can catch."""
    check_name(config.name)
    for name, value in record.flat(dataclasses.asdict(config)).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} must be a finite number, got {value}")
    codec_config(config)
    sampler_config(config)
    if config.only or config.scale != 1.0:
        raise ConfigError("only= and scale= belong to a recipe: leave them out, or leave out stage=")
    at_least_one({"train.log_steps": config.train.log_steps, "train.keep": config.train.keep})
    events = ("checkpoint_steps", "checkpoint_minutes", "sample_steps", "sample_minutes", "threads")
    not_negative({f"train.{n}": getattr(config.train, n) for n in events})
    not_negative({f"data.{n}": getattr(config.data, n) for n in ("workers", "place_span")})
    if not 0 < config.data.place_view < 180:
        raise ConfigError(f"data.place_view lies between 0 and 180 degrees, got {config.data.place_view}")
    if not 0 <= config.seed < 2**63:
        raise ConfigError(f"seed is a whole number from 0 to {2**63 - 1}, got {config.seed}")
    if config.steps is not None:
        at_least_one({"steps": config.steps})
    if config.minutes is not None and config.minutes <= 0:
        raise ConfigError(f"minutes must be positive, got {config.minutes}")
    if isinstance(config.stage, EvaluateStage):
        _validate_evaluation(config.stage)
    if isinstance(config.stage, AverageStage) and not 0 <= config.stage.share <= 1:
        raise ConfigError(f"stage.share is a part of the weights from 0 to 1, got {config.stage.share}")
    if isinstance(config.stage, TrainingOptions):
        validate_training(config, config.stage)
        sources.check_kinds(config)


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` is that of a folder below runs=."""
    path = Path(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ConfigError(f"name={name} is no folder below runs=: give a plain name, and choose the place with runs=")


def _validate_evaluation(stage: EvaluateStage) -> None:
    at_least_one({"stage.rollouts": stage.rollouts})
    not_negative({f"stage.{n}": getattr(stage, n) for n in ("sampler_steps", "random_frames")})
    if not all(1 <= count <= MOST_STEPS for count in (stage.sampler_steps or 1, *stage.step_counts)):
        raise ConfigError(
            f"stage.sampler_steps and stage.step_counts are step counts from 1 to {MOST_STEPS}, "
            f"got {stage.sampler_steps} and {stage.step_counts}"
        )
