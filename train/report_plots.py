"""Pictures of a report: the losses of all runs of a stage, and quality by horizon of all evaluated worlds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.report_runs import Run, at, horizons

Curve = tuple[str, list[float], list[float]]


def _draw(path: Path, curves: Sequence[Curve], labels: tuple[str, str, str], marker: str, log: bool) -> None:
    """labels: title, x, y."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, across, up in curves:
        axis.plot(across, up, linewidth=1.2, marker=marker, label=name)
    axis.set(title=labels[0], xlabel=labels[1], ylabel=labels[2], yscale="log" if log else "linear")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=100)


def losses(runs: Sequence[Run], out: Path) -> None:
    """``loss-STAGE.png`` for every stage: training loss over steps, one curve a run."""
    for stage in sorted({run.stage for run in runs if run.trained}):
        curves: list[Curve] = []
        for run in runs:
            points = [(r["step"], r["loss"]) for r in run.trained if isinstance(r.get("loss"), int | float)]
            if run.stage == stage and points:
                curves.append((run.name, [p[0] for p in points], [p[1] for p in points]))
        if curves:
            positive = min(min(up) for _, _, up in curves) > 0
            _draw(out / f"loss-{stage}.png", curves, (f"{stage}: training loss", "step", "loss"), "", positive)


def gains(runs: Sequence[Run], out: Path) -> None:
    """``gain.png``: PSNR gain over the repeated last frame by horizon, one curve an evaluation."""
    curves: list[Curve] = []
    for run in runs:
        found: list[tuple[int, Any]] = [(h, at(run, h, "psnr", "gain", "mean")) for h in horizons([run])]
        points = [(h, value) for h, value in found if isinstance(value, int | float)]
        if points:
            curves.append((run.name, [float(h) for h, _ in points], [value for _, value in points]))
    if curves:
        labels = ("PSNR gain over the repeated last frame", "frames after the last real one", "dB")
        _draw(out / "gain.png", curves, labels, "o", False)
