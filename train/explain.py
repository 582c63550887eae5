"""What Hydra says about wrong settings, as one sentence with the valid names."""

from __future__ import annotations

import dataclasses
import difflib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher

from train.config import STAGES, RecipeStage, RunConfig
from train.options import DataOptions, SamplerOptions, TrainOptions
from train.stage_options import STUDENTS, DmdStage, StageOptions, TrainingOptions
from worldmodel.errors import ConfigError

CONF = Path(__file__).resolve().parent.parent / "conf"
GROUPS = ("stage", "training", "model", "data", "experiment")
RECIPE = "recipe"
LAUNCHERS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit", "slurm": "submitit"}


def choices(group: str) -> list[str]:
    """The values that ``group=`` may take."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def values(override: Override) -> list[str]:
    """The value of an override, or all of a choice sweep."""
    if override.is_choice_sweep():
        return [str(v) for v in override.sweep_string_iterator()]
    return [str(override.value())]


def check_choice(override: Override) -> None:
    """Raise ConfigError for ``stage=codek`` and its like."""
    group = override.key_or_group
    if override.is_delete() or group not in (*GROUPS, "hydra/launcher"):
        return
    for value in values(override):
        if group == "hydra/launcher":
            _check_launcher(value)
        elif value not in choices(group) and (group, value) != ("stage", RECIPE):
            raise ConfigError(f"there is no {group}={value}: choose one of {', '.join(choices(group)) or '(none yet)'}")


def check_used(overrides: Sequence[Override]) -> None:
    """Raise ConfigError for a setting that one cannot give like this, or that nothing would read."""
    kind = stage_kind(overrides)
    decided: dict[str, str] = {}
    if issubclass(kind, STUDENTS):
        decided["model.sampler.kind"] = "the stage decides how its student is played"
        decided["model.sampler.shift"] = "a student plays at the levels of stage.shift"
    if issubclass(kind, DmdStage):
        decided["model.sampler.presets"] = "a student offers the step counts of stage.student_steps"
    for override in overrides:
        name = override.key_or_group
        if name == "recipe":
            raise ConfigError(
                "recipe= cannot be given as a whole: change an entry by recipe.NAME=['stage=...'] or recipe.NAME=FOLDER, "
                "add one by +recipe.NAME=, take one out by ~recipe.NAME"
            )
        if name.startswith("recipe."):
            if issubclass(kind, tuple(STAGES.values())):
                raise ConfigError(f"{name} belongs to a recipe: leave it out, or leave out stage=")
            if not (override.is_delete() or override.is_sweep_override()):
                check_entry(name, override.value())
        if name in decided:
            raise ConfigError(f"{name} does nothing in this stage, {decided[name]}: leave it out")


def check_entry(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` may be the entry `name` of a recipe: settings, or a folder."""
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(word, str) for word in value)):
        raise ConfigError(f"{name} must be a list of settings, ['stage=...', ...], or a folder to take it from, got {value}")


def _check_launcher(value: str) -> None:
    installed = " ".join(kind.__module__ for kind in Plugins.instance().discover(Launcher))
    if value in LAUNCHERS and LAUNCHERS[value] not in installed:
        raise ConfigError(f"hydra/launcher={value} is not installed: pip install -e '.[sweep]'")
    if value in ("slurm", "submitit_slurm") and shutil.which("srun") is None:
        raise ConfigError(f"hydra/launcher={value} needs a Slurm cluster (there is no srun here): use joblib on one machine")
    if value not in ("basic", *LAUNCHERS):
        raise ConfigError(
            f"there is no hydra/launcher={value}: choose basic (one job after the other), or one of {', '.join(LAUNCHERS)} "
            "(pip install -e '.[sweep]')"
        )


def translate(error: Exception, overrides: Sequence[Override]) -> str:
    """One sentence for what Hydra or OmegaConf raised on composing `overrides`."""
    text = f"{error} {error.__cause__ or ''}"
    if "must specify 'stage'" in text:
        return f"choose what to do: stage={'|'.join(choices('stage'))}, or experiment=NAME for a whole recipe"
    key = re.search(r"Could not (?:override|append to config|delete from config|delete)[^']*'([^']+)'", text) or re.search(
        r"full_key: (\S+)", text
    )
    unknown = "not in struct" in text or "not in '" in text or "No match in the defaults list" in text
    if key and unknown:
        return unknown_key(key.group(1), overrides)
    if key and error.__cause__ is not None:
        return f"{key.group(1)}: {one_line(error.__cause__)}"
    return f"the settings do not fit together: {one_line(error)}"


def stage_kind(overrides: Sequence[Override]) -> type:
    """The dataclass of the stage that the overrides choose."""
    stages = [v for o in overrides if o.key_or_group == "stage" for v in values(o)]
    return {**STAGES, RECIPE: RecipeStage}.get(stages[0], StageOptions) if stages else StageOptions


def trains(stage: str) -> bool:
    """Whether the stage of that name trains; to one that does not, what an experiment sets of ``training`` says nothing."""
    return issubclass(STAGES.get(stage, TrainingOptions), TrainingOptions)


def walk(path: str, overrides: Sequence[Override]) -> tuple[list[str], str, type | None]:
    """Follow a dotted name: (parts that exist, the part that does not or "", the dataclass it was looked for in)."""
    kind: type | None = RunConfig
    seen: list[str] = []
    for part in path.split("."):
        if kind is None:
            return seen, part, None
        fields = {f.name: f for f in dataclasses.fields(kind)}
        if part not in fields:
            return seen, part, kind
        seen.append(part)
        if part == "recipe":
            return seen, "", None  # its parts have names of the user's choice
        default = fields[part].default_factory
        kind = default if isinstance(default, type) and dataclasses.is_dataclass(default) else None
        if seen == ["stage"]:
            kind = stage_kind(overrides)
    return seen, "", kind


def unknown_key(path: str, overrides: Sequence[Override]) -> str:
    """The sentence for a setting that does not exist, with the nearest that does."""
    seen, part, kind = walk(path, overrides)
    chosen = {o.key_or_group: values(o)[0] for o in overrides if not o.is_delete()}
    if "experiment" in chosen and path not in chosen:
        return (
            f"experiment={chosen['experiment']} sets {path}, which stage={chosen.get('stage')} does not have: "
            "leave out experiment=, and give model= and data= by hand"
        )
    if seen == ["recipe"]:
        return f"the recipe has no entry {path.partition('.')[2]!r}: to add one write +{path}="
    if kind is None:
        return f"unknown setting {path!r}: {'.'.join(seen)} holds a plain value, it has no parts"
    names = [f.name for f in dataclasses.fields(kind)]
    close = difflib.get_close_matches(part, names, n=1)
    hints = [".".join([*seen, *close])] if close else []
    if not hints:  # perhaps the name of something one level down: lr for stage.lr
        places = {"stage": stage_kind(overrides), "train": TrainOptions, "data": DataOptions, "model.sampler": SamplerOptions}
        hints = [f"{p}.{part}" for p, k in places.items() if part in {f.name for f in dataclasses.fields(k)}]
    hint = f" (did you mean {hints[0]}?)" if hints else ""
    return f"unknown setting {path!r}{hint}: valid names{' of ' + '.'.join(seen) if seen else ''} are {', '.join(names)}"


def one_line(error: BaseException) -> str:
    """An error's text on one line, without where OmegaConf met it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith(("full_key", "object_type", "reference_type"))).rstrip(".")
