"""``python -m train stage=NAME [key=value ...]``: compose settings, then hand a typed RunConfig on.

The last place where a DictConfig exists. Heavy imports wait until a job runs, so that help and wrong settings answer at once.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from train import recipe
from train.config import RunConfig, register
from train.explain import CONF
from train.jobs import attempt, collect_failures, forget_failures, leave_failures, main_process, run, take_gpu
from train.settings import SWEEP, explain_settings, options_first, with_recipe
from worldmodel.errors import WorldModelError

_failures: list[str] = []  # what `job` has to tell `main`: Hydra hands nothing back, and other processes leave theirs in files


def _say(text: str) -> None:
    if main_process():
        print(text, flush=True)


def _do(cfg: DictConfig, folder: Path) -> list[str]:
    """A run, or a recipe of runs; returns what failed in a recipe. A failed run raises."""
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, RunConfig)
    if not recipe.is_recipe(config):
        run(config, folder)
        return []
    entries = recipe.plan(config, list(HydraConfig.get().overrides.task), folder)
    for name, place in recipe.taken(config).items():
        _say(f"{name}: taken from {place}")
    return recipe.run_recipe(entries, config.only, lambda e: attempt(lambda: run(e.config, e.folder), tell_all=True), _say)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def job(cfg: DictConfig) -> None:
    """What Hydra calls once, or once per job of a sweep. A job that fails names itself, and the others go on."""
    settings = HydraConfig.get()
    sweep, folder = settings.mode is RunMode.MULTIRUN, Path(settings.runtime.output_dir)
    name = f"{cfg.name} ({', '.join(settings.overrides.task)})"
    if sweep:
        _say(f"job {settings.job.num}: {name}")
        if settings.runtime.choices.get("hydra/launcher") == "joblib":
            take_gpu(int(settings.job.num))
    failures: list[str] = []
    failed = attempt(lambda: failures.extend(_do(cfg, folder)), tell_all=sweep)
    failures += [failed] if failed else []
    if sweep:
        failures = [f"{name}: {' '.join(failure.split())}" for failure in failures]
        for failure in failures:
            print(f"job failed: {failure}", file=sys.stderr, flush=True)
        leave_failures(folder, failures)
    _failures.extend(failures)


def main() -> int:
    """Exit status: 0 done, 2 wrong settings or a failed job (one sentence on stderr), 130 interrupted."""
    register()
    try:
        sys.argv[1:] = with_recipe(options_first(sys.argv[1:]))
        folders = explain_settings(sys.argv[1:])
        sweeps = folders if SWEEP & set(sys.argv[1:]) else []
        for folder in sweeps:
            forget_failures(folder)
        job()
    except WorldModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    left = [failure for folder in sweeps for failure in collect_failures(folder)]
    for failure in (failures := list(dict.fromkeys([*_failures, *left]))):
        print(f"error: {failure}", file=sys.stderr)
    return 2 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
