"""A recipe: several runs, one after the other, by one command. ``python -m train experiment=NAME`` without ``stage=``.

A file of conf/experiment/ holds ``recipe: {codec: [stage=codec, minutes=5], ar: [stage=ar_diffusion, codec=@codec], ...}``: names
of entries and their settings. ``@codec`` is the run folder of that entry (``world=@ar``: what it exported). Each entry is composed
from the experiment, its own settings and the words of the command line; the command line wins. What is finished is skipped.
An entry that is a folder (``ar: assets/worlds/rooms``) is taken from there: nothing is trained for it.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train import record, sources
from train.checks import validate
from train.config import STAGES, RunConfig
from train.explain import RECIPE, check_entry, check_used, trains, translate, values
from train.stage_options import StageOptions, TrainingOptions
from worldmodel.config import EXPORT, find_world
from worldmodel.errors import ConfigError

_OWN = {"name", "runs", "stage", "recipe", "only", "scale"}  # of the recipe as a whole: no entry sees them
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Entry:
    """One run of a recipe. text: its settings as written. needs: earlier entries whose folders it reads."""

    number: int
    name: str
    text: str
    config: RunConfig
    folder: Path
    needs: tuple[str, ...]


def plan(outer: RunConfig, words: Sequence[str], output: Path) -> list[Entry]:
    """The entries of `outer`.recipe with typed settings and folders below `output`; Hydra must be initialised.

    words: the command line's settings (no sweeps). Raises ConfigError that names the entry.
    """
    if not outer.recipe:
        raise ConfigError("this experiment holds no recipe: choose what to do with stage=, or add `recipe:` to its file")
    elsewhere = taken(outer)
    own = [name for name in outer.recipe if name not in elsewhere]
    for name in outer.only:
        if name in elsewhere:
            raise ConfigError(f"only={name}: that entry is taken from {elsewhere[name]}, there is nothing to do for it")
        if name not in own:
            raise ConfigError(f"only={name}: the recipe has no such entry, it has {', '.join(own)}")
    if not own:
        raise ConfigError("every entry of this recipe is taken from elsewhere, there is nothing to do: leave one as it was")
    if not 0 < outer.scale < float("inf"):
        raise ConfigError(f"scale must be a positive number, got {outer.scale}")
    asked = OverridesParser.create().parse_overrides(list(words))
    entries: list[Entry] = []
    for name in own:
        try:
            if not _NAME.fullmatch(name):
                raise ConfigError("an entry's name is made of letters, digits, _ and -: it is a folder")
            entries.append(_entry(outer, asked, name, output, entries, elsewhere))
        except ConfigError as error:
            raise ConfigError(f"recipe entry {name!r}: {error}") from error
    _check_stage_settings(asked, entries)
    return entries


def taken(outer: RunConfig) -> dict[str, Path]:
    """The entries of a recipe that exist elsewhere: name -> folder. Raises ConfigError if there is no such thing."""
    folders: dict[str, Path] = {}
    for name, value in outer.recipe.items():
        check_entry(f"recipe.{name}", value)
        if isinstance(value, str):
            try:
                sources.check_folder(Path(value))
            except ConfigError as error:
                raise ConfigError(f"recipe entry {name!r}: {error}") from error
            folders[name] = Path(value)
    return folders


def _entry(
    outer: RunConfig, asked: Sequence[Override], name: str, output: Path, earlier: Sequence[Entry], elsewhere: Mapping[str, Path]
) -> Entry:
    own = outer.recipe[name]
    overrides = _merged(own, asked)
    try:
        config = OmegaConf.to_object(compose("train", overrides=[o.input_line or "" for o in overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(translate(error, overrides)) from error
    assert isinstance(config, RunConfig)
    folders = {**elsewhere, **{e.name: e.folder for e in earlier}}
    found = {k: str(getattr(config, k))[1:] for k in record.REFERENCES if str(getattr(config, k)).startswith("@")}
    for key, other in found.items():
        if other not in folders:
            raise ConfigError(f"{key}=@{other} is no earlier entry of this recipe ({', '.join(folders) or 'it is the first'})")
    _check_networks(config.stage, found, {e.name: e for e in earlier}, elsewhere)
    config = _scaled(config, outer.scale)
    places: dict[str, Any] = {key: str(folders[other]) for key, other in found.items()}
    if base := found.get("world"):
        places["world"] = str(find_world(elsewhere[base]) if base in elsewhere else folders[base] / EXPORT)
    config = dataclasses.replace(config, name=f"{outer.name}/{name}", runs=outer.runs, recipe={}, only=[], scale=1.0, **places)
    validate(config)
    return Entry(len(earlier) + 1, name, " ".join(own), config, output / name, tuple(dict.fromkeys(found.values())))


def _check_networks(
    stage: StageOptions, found: Mapping[str, str], here: Mapping[str, Entry], elsewhere: Mapping[str, Path]
) -> None:
    """What is known of the networks that an entry builds on before they are trained. found: setting -> entry."""
    codec = here.get(found.get("codec", ""))
    for key in ("init", "teacher"):
        if (name := found.get(key)) is None:
            continue
        kind = sources.kind_in(elsewhere[name]) if name in elsewhere else sources.kind_of_stage(here[name].config.stage.kind)
        sources.check_kind(stage, key, f"@{name}", kind)
        if name in elsewhere and codec and not record.kept(codec.folder):
            raise ConfigError(
                f"{key}=@{name} is taken from elsewhere and knows nothing of the codec that is trained here: take that from there, "
                f"too, with recipe.{codec.name}=FOLDER"
            )


def _merged(own: Sequence[str], asked: Sequence[Override]) -> list[Override]:
    """An entry's settings and those of the command line that concern it."""
    try:
        mine = OverridesParser.create().parse_overrides(list(own))
    except HydraException as error:
        raise ConfigError(f"its settings cannot be read: {str(error).splitlines()[0]}") from error
    stages = [v for o in mine if o.key_or_group == "stage" for v in values(o)]
    if len(stages) != 1 or stages[0] not in STAGES:
        raise ConfigError(f"it must name one stage, as stage={'|'.join(STAGES)}")
    check_used(mine)
    known = {f"stage.{f.name}" for f in dataclasses.fields(STAGES[stages[0]])}
    theirs = [o for o in asked if o.key_or_group.split(".")[0] not in _OWN or o.key_or_group in known]
    if not trains(stages[0]):
        mine += OverridesParser.create().parse_overrides(["~training"])
        theirs = [o for o in theirs if o.key_or_group != "training"]
    taken = {o.key_or_group for o in theirs}
    if taken & {"steps", "minutes"}:
        taken |= {"steps", "minutes"}  # one budget replaces the other
    return [*(o for o in mine if o.key_or_group not in taken), *theirs]


def _check_stage_settings(asked: Sequence[Override], entries: Sequence[Entry]) -> None:
    """A ``stage.x=`` that reaches no entry is a mistake."""
    known = {f"stage.{f.name}" for e in entries for f in dataclasses.fields(e.config.stage)}
    for override in asked:
        key = override.key_or_group
        if key.startswith("stage.") and key not in known:
            stages = ", ".join(dict.fromkeys(e.config.stage.kind for e in entries))
            raise ConfigError(f"{key} is a setting of no stage of this recipe ({stages})")


def _scaled(config: RunConfig, scale: float) -> RunConfig:
    stage = config.stage
    if scale == 1.0 or not isinstance(stage, TrainingOptions):
        return config
    pretrain = getattr(stage, "pretrain_steps", 0)
    if pretrain:  # the first of two phases shrinks with the whole
        config = dataclasses.replace(config, stage=dataclasses.replace(stage, pretrain_steps=max(1, round(pretrain * scale))))  # type: ignore[call-arg]
    limits = record.budget(config)
    steps, minutes = limits["steps"], limits["minutes"]
    return dataclasses.replace(
        config, steps=max(1, round(steps * scale)) if steps else None, minutes=minutes * scale if minutes else None
    )


def check_folders(entries: Sequence[Entry]) -> None:
    """Raise ConfigError if one of the folders holds a run of other settings: two would be mixed."""
    for entry in entries:
        record.check_unchanged(entry.config, entry.folder)


def _check_given(chosen: Sequence[Entry], entries: Sequence[Entry]) -> None:
    """Raise ConfigError if an entry of ``only=`` needs another that is not among them and has left nothing yet."""
    names = {e.name for e in chosen}
    empty = [e.name for e in entries if not ((e.folder / EXPORT).is_dir() or (e.folder / "state").is_dir())]
    for entry in chosen:
        lacking = [n for n in entry.needs if n not in names and n in empty]
        if lacking:
            raise ConfigError(
                f"{entry.name} needs {lacking[0]}, which has not been trained yet: name it in only=, too, or leave only= out"
            )


def _state(entry: Entry) -> tuple[bool, str]:
    """(whether there is nothing to do, why)."""
    past = record.done(entry.folder)
    if past is None:
        return False, "goes on" if record.kept(entry.folder) else ""
    if record.enough(past, entry.config):
        return True, f"finished before{f' ({past.steps} steps)' if past.steps else ''}"
    return False, f"its budget was raised after {past.steps} steps, goes on"


def _outdated(entry: Entry, entries: Sequence[Entry]) -> str:
    """A warning if an entry that this finished one builds on was trained on since; "" if not."""
    past = record.done(entry.folder)
    for other in entries:
        base = record.done(other.folder) if other.name in entry.needs else None
        if past is not None and base is not None and base.finished > past.finished:
            return f"warning: {other.name} was trained on since {entry.name} was finished: delete {entry.folder} to do it again"
    return ""


def run_recipe(
    entries: Sequence[Entry], only: Sequence[str], do: Callable[[Entry], str | None], say: Callable[[str], None]
) -> list[str]:
    """Do the entries in order; returns one sentence for each that failed or could not start.

    do: runs one, returns what failed (None: nothing). Every process decides for itself by the same files: none changes a folder
    before all have joined the run.
    """
    chosen = [e for e in entries if not only or e.name in only]
    check_folders(chosen)
    _check_given(chosen, entries)
    failures: dict[str, str] = {}
    lines: list[tuple[str, float, str]] = []
    for entry in chosen:
        finished, why = _state(entry)
        say(f"[{entry.number}/{len(entries)}] {entry.name}: {entry.text}{f' -- {why}' if why else ''}")
        warning = _outdated(entry, entries) if finished else ""
        if warning:
            say(warning)
        began, missing = time.perf_counter(), [n for n in entry.needs if n in failures]
        failed = f"not started, it needs {missing[0]}" if missing else None if finished else do(entry)
        if failed:
            failures[entry.name] = failed
            say(f"{entry.name} failed: {failed}")
        lines.append((entry.name, time.perf_counter() - began, failed or ("skipped" if finished else "done")))
    say(_summary(lines))
    return [f"{name}: {failed}" for name, failed in failures.items()]


def _summary(lines: Sequence[tuple[str, float, str]]) -> str:
    from train.monitor import clock_text

    width = max(len(name) for name, _, _ in lines)
    rows = [f"  {name:{width}}  {clock_text(seconds):>8}  {outcome[:100]}" for name, seconds, outcome in lines]
    return "\n".join([f"the recipe took {clock_text(sum(s for _, s, _ in lines))}", *rows])


def is_recipe(config: RunConfig) -> bool:
    """Whether these settings stand for a recipe."""
    return config.stage.kind == RECIPE
