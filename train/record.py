"""What a run leaves about itself: settings.json when it starts, done.json when it is over. Nothing here loads data or networks.

Two runs are the same if the settings that shape their result are: stage, model, data, seed and the runs they build on. How long it
trains (the budget), where the folder lies, on what device and how often it tells about itself are left out. The
number of processes that share the batch is recorded, but a run may go on with another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from train.config import RunConfig
from train.stage_options import TrainingOptions
from worldmodel.errors import ConfigError

SETTINGS, DONE = "settings.json", "done.json"
REFERENCES = ("codec", "init", "teacher", "world")
_IRRELEVANT = {"name", "runs", "device", "steps", "minutes", "recipe", "only", "scale"}
_IRRELEVANT |= {"stage.steps", "stage.out", "data.cache", "data.workers"}
_RELEVANT_TRAIN = {"train.precision"}


@dataclass(frozen=True)
class Done:
    """A finished run: what it was asked to do, how far it came and when (seconds since 1970)."""

    settings: dict[str, Any]
    steps: int
    seconds: float
    budget: dict[str, float | None]
    finished: float


def shaping(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Dotted names and values of the settings that shape what a run in `folder` becomes."""
    every = {k: v for k, v in flat(dataclasses.asdict(config)).items() if k not in _IRRELEVANT}
    settings = {k: v for k, v in every.items() if not k.startswith("train.") or k in _RELEVANT_TRAIN}
    for name in REFERENCES:
        if settings.get(name):
            settings[name] = _beside(settings[name], folder)
    return {**settings, "processes": int(os.environ.get("WORLD_SIZE", "1"))}


def flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Settings by dotted name, enums by theirs; a recipe stays as it is."""
    settings: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and above + name not in _IRRELEVANT:
            settings |= flat(value, f"{above}{name}.")
        else:
            settings[above + name] = value.name if isinstance(value, Enum) else value
    return settings


def _beside(place: str, folder: Path) -> str:
    """A path below the run's parent folder as ``../NAME``: a whole tree of runs may be moved."""
    path, parent = Path(place).resolve(), folder.resolve().parent
    return f"../{path.relative_to(parent).as_posix()}" if path.is_relative_to(parent) else place


def digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """``stage.lr was 0.001, now 0.002`` for what both know: a newer version may know more settings."""
    if old.get("stage.kind") != new.get("stage.kind"):
        return [f"stage was {old.get('stage.kind')}, now {new.get('stage.kind')}"]
    same = {"processes"}
    if _clips(old) == _clips(new):
        same.add("stage.batch")
    return [f"{k} was {old[k]!r}, now {v!r}" for k, v in new.items() if k in old and old[k] != v and k not in same]


def _clips(settings: dict[str, Any]) -> int:
    """Clips of a micro-batch over all processes."""
    return int(settings.get("stage.batch", 0)) * int(settings.get("processes", 1))


def check_unchanged(config: RunConfig, folder: Path) -> None:
    """Raise ConfigError if `folder` holds work of a run of other settings: two would be mixed, and the record would be wrong."""
    old = begun(folder) if kept(folder) else None
    changed = differences(old, shaping(config, folder)) if old else []
    if changed:
        what = "; ".join(changed[:3]) + (", scale= multiplies it" if changed[0].startswith("stage.pretrain_steps ") else "")
        raise ConfigError(
            f"{folder} was begun with other settings ({what}): delete that folder to do it anew, choose another name=, "
            "or give the old settings to go on"
        )


def budget(config: RunConfig) -> dict[str, float | None]:
    """Steps and minutes after which a run is over (None: no such limit); both None for a stage that does not train."""
    stage = config.stage
    if not isinstance(stage, TrainingOptions):
        return {"steps": None, "minutes": None}
    own = config.steps is None and config.minutes is None
    return {"steps": stage.steps if own else config.steps, "minutes": config.minutes}


def write_settings(config: RunConfig, folder: Path) -> None:
    """What the run in `folder` is about to be, for whoever comes back to it; work that is there keeps its record."""
    if begun(folder) is None or not kept(folder):
        settings = shaping(config, folder)
        _write(folder / SETTINGS, {"digest": digest(settings), "settings": settings})


def write_done(config: RunConfig, folder: Path, wall: float, processes: int, flops: float, costs: dict[str, float]) -> None:
    """wall: seconds of this last sitting, start and exports included. flops: of one step of one process (0: unknown).

    costs: see Stage.costs.
    """
    from train.monitor import read_metrics
    from worldmodel.runtime import describe_machine

    last: dict[str, Any] = next((row for row in reversed(read_metrics(folder / "metrics.jsonl")) if "targets" in row), {})
    settings = shaping(config, folder)
    data = {
        "stage": config.stage.kind,
        "steps": last.get("step", 0),
        "targets": last.get("targets", 0),
        "seconds": last.get("seconds", round(wall, 1)),
        "last_sitting_seconds": round(wall, 1),
        "budget": budget(config),
        "seed": config.seed,
        "processes": processes,
        "device": config.device,
        "machine": describe_machine(),
        "flops_per_step": flops or None,
        "costs": costs,
        "finished": round(time.time(), 3),
        "digest": digest(settings),
        "settings": settings,
    }
    _write(folder / SETTINGS, {"digest": digest(settings), "settings": settings})
    _write(folder / DONE, data)


def _write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file, or nothing that can be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def begun(folder: Path) -> dict[str, Any] | None:
    """The settings of the run that was last started in `folder`; None if there was none."""
    data = read_json(folder / SETTINGS) or read_json(folder / DONE) or {}
    settings = data.get("settings")
    return settings if isinstance(settings, dict) else None


def kept(folder: Path) -> bool:
    """Whether there is work of a run in `folder`: a checkpoint, or a record that it is finished."""
    return (folder / DONE).is_file() or any((folder / "state").glob("step-*.pt"))


def done(folder: Path) -> Done | None:
    """The finished run in `folder`; None if it is not finished."""
    data = read_json(folder / DONE)
    try:
        if data is None:
            return None
        limits = {name: data["budget"][name] for name in ("steps", "minutes")}
        return Done(data["settings"], int(data["steps"]), float(data["seconds"]), limits, float(data["finished"]))
    except (KeyError, TypeError, ValueError):
        return None


def enough(past: Done, config: RunConfig) -> bool:
    """Whether a finished run needs no more training for the budget of `config`."""
    wanted = budget(config)
    if wanted == past.budget or wanted == {"steps": None, "minutes": None}:
        return True
    steps, minutes = wanted["steps"], wanted["minutes"]
    return bool(steps and past.steps >= steps) or bool(minutes and past.seconds >= 60 * minutes)
