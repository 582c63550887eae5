"""Wrong settings, explained in one sentence before Hydra runs: an unknown key, an unknown choice, a value of the wrong type."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from train.config import STAGES, DataOptions, RunConfig, SamplerOptions, StageOptions, TrainOptions
from worldmodel.errors import ConfigError

CONF = Path(__file__).resolve().parent.parent / "conf"
GROUPS = ("stage", "model", "data", "experiment")
OPTIONS = {"-m", "--multirun", "-c", "--cfg", "--resolve", "-p", "--package", "-i", "--info", "-r", "--run", "-h", "--help"}
OPTIONS |= {"--hydra-help", "--version", "-sc", "--shell-completion", "-cp", "--config-path", "-cn", "--config-name"}
OPTIONS |= {"-cd", "--config-dir", "--experimental-rerun"}
MOST_TRIED = 32


def options_first(arguments: Sequence[str]) -> list[str]:
    """The words of a command line with Hydra's options before the settings: it reads no option behind one. Unknown: ConfigError."""
    settings = [a for a in arguments if not a.startswith("-") and ("=" in a or a.startswith("~"))]
    options = [a for a in arguments if a not in settings]
    for option in options:
        if option.startswith("-") and option.partition("=")[0] not in OPTIONS:
            raise ConfigError(f"unknown option {option!r}: settings are written key=value, options are -m, --cfg job and --help")
    return options + settings


def explain_settings(arguments: Sequence[str]) -> None:
    """Try to compose the settings of a command line; raise ConfigError with one clear sentence if that fails.

    Every value of a sweep (``seed=0,1``) is tried, beside the first of the others; each job is composed again when its turn comes.
    """
    if any(a in ("--help", "-h", "--hydra-help", "--version", "--shell-completion", "-sc") for a in arguments):
        return
    words = [a for a in arguments if not a.startswith("-") and ("=" in a or a.startswith("~"))]
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        raise ConfigError(f"cannot read the settings: {_flat(error)}") from error
    for override in overrides:
        _check_choice(override)
        name = override.key_or_group
        if override.is_add() and not name.startswith("hydra") and name not in GROUPS and _walk(name, overrides)[1]:
            raise ConfigError(_unknown_key(name, overrides))  # Hydra would add it, and nothing would read it
    plain = [_first(o) for o in overrides]
    try:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", overrides=plain)
            if not cfg.name:
                raise ConfigError("name= cannot be empty: it is the run's folder below runs=")
            folder = None if any(o.key_or_group.startswith("hydra") for o in overrides) else Path(cfg.runs) / cfg.name
            for i, other in ((i, word) for i, o in enumerate(overrides) for word in _others(o)):
                compose("train", overrides=[*plain[:i], other, *plain[i + 1 :]])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_translate(error, overrides)) from error
    if folder is not None and not {"--cfg", "-c", "--info", "-i", "--resolve"} & {a.partition("=")[0] for a in arguments}:
        _check_folder(folder)


def _check_folder(folder: Path) -> None:
    """Make the run folder now: where Hydra makes and fills it, a failure is a traceback."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}.tmp"  # the processes of torchrun all try at once
        probe.write_bytes(bytes(16384))
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write the run folder {folder} ({error.strerror}): choose another runs= or name=") from error


def _values(override: Override) -> list[str]:
    if override.is_choice_sweep():
        return [str(v) for v in override.sweep_string_iterator()]
    return [str(override.value())]


def _first(override: Override) -> str:
    if not override.is_sweep_override():
        return override.input_line or ""
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"


def _others(override: Override) -> list[str]:
    """The values of a sweep but the first (of a very long one, some), each as a plain override."""
    if not override.is_sweep_override():
        return []
    return [f"{override.get_key_element()}={v}" for v in islice(override.sweep_string_iterator(), 1, MOST_TRIED)]


def _choices(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def _check_choice(override: Override) -> None:
    group = override.key_or_group
    if group not in GROUPS or override.is_delete():
        return
    for value in _values(override):
        if value not in _choices(group) and not (group == "experiment" and value in ("null", "None")):
            raise ConfigError(f"there is no {group}={value}: choose one of {', '.join(_choices(group)) or '(none yet)'}")


def _translate(error: Exception, overrides: Sequence[Override]) -> str:
    text = f"{error} {error.__cause__ or ''}"
    if "must specify 'stage'" in text:
        return f"choose what to do: stage={'|'.join(_choices('stage'))}"
    key = re.search(r"Could not (?:override|append to config|delete from config|delete)[^']*'([^']+)'", text) or re.search(
        r"full_key: (\S+)", text
    )
    unknown = "not in struct" in text or "not in '" in text or "No match in the defaults list" in text
    if key and unknown:
        return _unknown_key(key.group(1), overrides)
    if key and error.__cause__ is not None:
        return f"{key.group(1)}: {_flat(error.__cause__)}"
    return f"the settings do not fit together: {_flat(error)}"


def _stage_kind(overrides: Sequence[Override]) -> type:
    stages = [v for o in overrides if o.key_or_group == "stage" for v in _values(o)]
    return STAGES.get(stages[0], StageOptions) if stages else StageOptions


def _walk(path: str, overrides: Sequence[Override]) -> tuple[list[str], str, type | None]:
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
        default = fields[part].default_factory
        kind = default if isinstance(default, type) and dataclasses.is_dataclass(default) else None
        if seen == ["stage"]:
            kind = _stage_kind(overrides)
    return seen, "", kind


def _unknown_key(path: str, overrides: Sequence[Override]) -> str:
    seen, part, kind = _walk(path, overrides)
    if kind is None:
        return f"unknown setting {path!r}: {'.'.join(seen)} holds a plain value, it has no parts"
    names = [f.name for f in dataclasses.fields(kind)]
    close = difflib.get_close_matches(part, names, n=1)
    hints = [".".join([*seen, *close])] if close else []
    if not hints:  # perhaps the name of something one level down: lr for stage.lr
        places = {"stage": _stage_kind(overrides), "train": TrainOptions, "data": DataOptions, "model.sampler": SamplerOptions}
        hints = [f"{p}.{part}" for p, k in places.items() if part in {f.name for f in dataclasses.fields(k)}]
    hint = f" (did you mean {hints[0]}?)" if hints else ""
    return f"unknown setting {path!r}{hint}: valid names{' of ' + '.'.join(seen) if seen else ''} are {', '.join(names)}"


def _flat(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith(("full_key", "object_type", "reference_type"))).rstrip(".")
