"""The command line before Hydra sees it: options first, a recipe where no stage is named, wrong settings in one sentence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train import recipe
from train.checks import check_name
from train.config import RunConfig
from train.explain import CONF, GROUPS, RECIPE, check_choice, check_used, one_line, trains, translate, unknown_key, walk
from worldmodel.errors import ConfigError

SWEEP = {"-m", "--multirun"}
ASKS = {"--help", "-h", "--hydra-help", "--version", "--shell-completion", "-sc"}
SHOWS = {"--cfg", "-c", "--info", "-i", "--resolve"}
OPTIONS = SWEEP | ASKS | SHOWS | {"-p", "--package", "-r", "--run", "-cp", "--config-path", "-cn", "--config-name"}
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


def with_recipe(arguments: Sequence[str]) -> list[str]:
    """``experiment=NAME`` without ``stage=`` means the whole recipe of that experiment, in a folder of the same name.

    ``only=cd,dmd`` is taken as the list that it is meant to be. A stage that does not train goes without ``training``.
    """
    arguments = [f"only=[{a[5:]}]" if a.startswith("only=") and not a.startswith("only=[") else a for a in arguments]
    given = dict(a.lstrip("+").split("=", 1) for a in arguments if "=" in a and not a.startswith("-"))
    experiment = given.get("experiment", "null")
    if not trains(given.get("stage", "")):
        return [*(a for a in arguments if a.lstrip("~").partition("=")[0] != "training"), "~training"]
    if "stage" in given or experiment in ("", "null", "None"):
        return arguments
    name = [] if "name" in given else [f"name={experiment.replace(',', '-')}"]
    return [*arguments, f"stage={RECIPE}", *name]


def explain_settings(arguments: Sequence[str]) -> list[Path]:
    """Try to compose the settings of a command line; raise ConfigError with one clear sentence if that fails.

    Every value of a sweep (``seed=0,1``) is tried, beside the first of the others; each job is composed again when its turn comes.
    Returns the folder that the run writes into, or those that the jobs of a sweep have theirs in.
    """
    options = {a.partition("=")[0] for a in arguments}
    if options & ASKS:
        return []
    words = [a for a in arguments if not a.startswith("-") and ("=" in a or a.startswith("~"))]
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        entry = any(w.lstrip("+").startswith("recipe.") for w in words)
        hint = ": settings of an entry stand in quotes, \"recipe.NAME=['stage=...', 'minutes=5']\"" if entry else ""
        raise ConfigError(f"cannot read the settings: {one_line(error)}{hint}") from error
    for override in overrides:
        check_choice(override)
        name = override.key_or_group
        if override.is_add() and not name.startswith("hydra") and name not in GROUPS and walk(name, overrides)[1]:
            raise ConfigError(unknown_key(name, overrides))  # Hydra would add it, and nothing would read it
    try:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            folders = [_try(words, bool(options & SWEEP)) for words in _combinations(overrides)]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(translate(error, overrides)) from error
    folders = list(dict.fromkeys(folders))
    placed = any(o.key_or_group.startswith(("hydra.run", "hydra.sweep")) for o in overrides)
    if not (placed or options & SHOWS):
        for folder in folders:
            _check_folder(folder)
    return folders


def _combinations(overrides: Sequence[Override]) -> list[list[str]]:
    """The first value of every sweep, then each other value (of a very long sweep, some) beside the first of the others."""
    plain = [_first(o) for o in overrides]
    others = [[*plain[:i], word, *plain[i + 1 :]] for i, o in enumerate(overrides) for word in _others(o)]
    return [plain, *others]


def _try(words: list[str], sweep: bool) -> Path:
    """Compose one job's settings and those of its recipe; returns the folder that `explain_settings` promises."""
    check_used(OverridesParser.create().parse_overrides(words))
    cfg = compose("train", overrides=words)
    check_name(cfg.name)
    if cfg.stage.kind == RECIPE:
        outer = OmegaConf.to_object(cfg)
        assert isinstance(outer, RunConfig)
        recipe.plan(outer, [w for w in words if not w.lstrip("+~").startswith("hydra")], Path(outer.runs) / outer.name)
    hydra = compose("train", overrides=[*words, "hydra.job.num=0"], return_hydra_config=True).hydra
    return (Path(hydra.sweep.dir) / hydra.sweep.subdir).parent if sweep else Path(hydra.run.dir)


def _check_folder(folder: Path) -> None:
    """Make the run folder now: where Hydra makes and fills it, a failure is a traceback."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}.tmp"  # the processes of torchrun all try at once
        probe.write_bytes(bytes(16384))
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write the run folder {folder} ({error.strerror}): choose another runs= or name=") from error


def _first(override: Override) -> str:
    if not override.is_sweep_override():
        return override.input_line or ""
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"


def _others(override: Override) -> list[str]:
    """The values of a sweep but the first, each as a plain override."""
    if not override.is_sweep_override():
        return []
    return [f"{override.get_key_element()}={v}" for v in islice(override.sweep_string_iterator(), 1, MOST_TRIED)]
