"""What run folders hold, read for a report: metrics.jsonl, settings.json, done.json, evaluation.json. Damaged files are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.record import DONE, SETTINGS, done, read_json
from worldmodel.errors import DataError

METRICS, EVALUATION = "metrics.jsonl", "evaluation.json"
GAP = "\N{EN DASH}"
Row = tuple[str, ...]


def number(value: Any, pattern: str = ".4g", unit: str = "") -> str:
    """A measured number as text, a dash where there is none."""
    return f"{value:{pattern}}{unit}" if isinstance(value, int | float) and not isinstance(value, bool) else GAP


@dataclass
class Run:
    """What a run folder holds; empty where a file is missing."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    done: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        """Its kind; "" if no file says it."""
        kind = self.done.get("stage") or self.settings.get("stage.kind") or ("evaluate" if self.evaluation else "")
        return str(kind)

    @property
    def parent(self) -> str:
        """The run that it started from or evaluated, named as runs are here; "" if there is none."""
        place = str(self.settings.get("init") or self.settings.get("world") or "").removesuffix("/export")
        return (Path(self.name).parent / place[3:]).as_posix() if place.startswith("../") else place

    @property
    def trained(self) -> list[dict[str, Any]]:
        """The rows of training; the others are held-out measurements."""
        return [row for row in self.rows if "lr" in row]


def dig(data: Any, *path: str) -> Any:
    """The value at a path of keys; None if there is none."""
    for part in path:
        data = data.get(part) if isinstance(data, dict) else None
    return data


def gather(root: Path) -> tuple[list[Run], list[str]]:
    """(the runs below `root`, sorted by path; a sentence for each file that cannot be read). Raises DataError if there are none."""
    if not root.is_dir():
        raise DataError(f"{root} is no folder: give the one that holds the runs, as runs/")
    found = {p.parent for name in (METRICS, EVALUATION, DONE) for p in root.rglob(name)}
    folders = sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(root).parts))
    problems: list[str] = []
    runs = [run for folder in folders if (run := _read(folder, root, problems)) is not None]
    if not runs:
        damaged = f" that can be read ({'; '.join(problems)})" if problems else ""
        raise DataError(
            f"there is no run in {root}{damaged}: "
            "train one first (python -m train experiment=tiny data.root=EPISODES), or give another folder"
        )
    return runs, problems


def _read(folder: Path, root: Path, problems: list[str]) -> Run | None:
    from train.monitor import read_metrics

    run = Run(folder.relative_to(root).as_posix() if folder != root else folder.resolve().name)
    files = {}
    for name in (DONE, SETTINGS, EVALUATION):
        files[name] = read_json(folder / name) or {}
        whole = done(folder) is not None if name == DONE else bool(files[name])
        if not whole and (folder / name).exists():
            files[name] = {}
            problems.append(f"{folder / name} is damaged: left out")
    run.done, run.evaluation = files[DONE], files[EVALUATION]
    settings = dig(files[SETTINGS], "settings") or dig(files[DONE], "settings") or _composed(folder)
    run.settings = settings if isinstance(settings, dict) else {}
    try:
        run.rows = read_metrics(folder / METRICS)
        if not run.rows and (folder / METRICS).is_file() and (folder / METRICS).stat().st_size:
            raise ValueError
    except (OSError, ValueError):
        problems.append(f"{folder / METRICS} is damaged: left out")
    return run if run.done or run.rows or run.evaluation else None


def _composed(folder: Path) -> dict[str, Any]:
    """What Hydra left of a run that never wrote its own record."""
    from omegaconf import OmegaConf

    try:
        config = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "config.yaml"), resolve=False)
    except Exception:  # it may hold anything; the run's own files say more
        return {}
    names = ("codec", "init", "teacher", "world", "seed")
    return {"stage.kind": dig(config, "stage", "kind"), **{n: dig(config, n) for n in names}}


def horizons(runs: Sequence[Run]) -> list[int]:
    """All horizons that any evaluation measured."""
    rows = [row for run in runs for row in dig(run.evaluation, "rollouts", "by_horizon") or []]
    return sorted({h for row in rows if isinstance(h := dig(row, "horizon"), int)})


def at(run: Run, horizon: int, *path: str) -> Any:
    """A number of the rollouts at a horizon."""
    rows = dig(run.evaluation, "rollouts", "by_horizon") or []
    return next((dig(row, *path) for row in rows if dig(row, "horizon") == horizon), None)
