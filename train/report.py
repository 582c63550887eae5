"""``python -m train.report RUNS [--out FOLDER]``: every run and every evaluation below a folder, side by side.

Writes report.md (tables of runs, evaluations, costs, and of worlds by step count), loss-STAGE.png (the runs of a stage in one
picture) and gain.png (by horizon, the PSNR gain over the repeated last frame). What a run did not measure is a dash. Definitions:
train/evaluate.py, of videos train/evaluate_video.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from train import report_plots
from train.report_compare import cost_table, steps_table
from train.report_runs import GAP, Row, Run, at, dig, gather, horizons, number
from train.report_videos import NOTE as VIDEO_NOTE
from train.report_videos import is_of_videos, video_table
from worldmodel.errors import DataError, WorldModelError


def _last(rows: Sequence[dict[str, Any]], prefix: str) -> tuple[str, float] | None:
    """The newest value whose name starts with `prefix`, and its name."""
    for row in reversed(rows):
        for name, value in row.items():
            if name.startswith(prefix) and isinstance(value, int | float):
                return name, float(value)
    return None


def _middle(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if isinstance(row.get(name), int | float)]
    return median(values) if values else None


def run_table(runs: Sequence[Run]) -> list[Row]:
    """One line a run; the first is the head."""
    head = (
        "run",
        "stage",
        "from",
        "seed",
        "steps",
        "targets",
        "minutes",
        "targets/s",
        "tokens/s",
        "of peak",
        "loss",
        "held-out",
        "machine",
    )
    return [head, *(_run_row(run) for run in runs)]


def _run_row(run: Run) -> Row:
    rows = run.trained
    newest = rows[-1] if rows else {}
    held, share = _last(run.rows, "held_out"), _middle(rows, "share")
    seconds = newest.get("seconds", run.done.get("seconds"))
    machine = dig(run.done, "machine") or dig(run.evaluation, "conditions", "machine")
    return (
        run.name,
        run.stage or GAP,
        run.parent or GAP,
        number(run.settings.get("seed"), "d"),
        number(newest.get("step") or run.done.get("steps") or None, "d"),
        number(newest.get("targets") or run.done.get("targets") or None, "d"),
        number(seconds / 60 if isinstance(seconds, int | float) else None, ".2f"),
        number(_middle(rows, "targets_per_s"), ",.0f"),
        number(_middle(rows, "tokens_per_s"), ",.0f"),
        number(share * 100 if share is not None else None, ".0f", " %"),
        number(newest.get("loss")),
        f"{number(held[1])}{' dB' if held[0].endswith('psnr') else ''}" if held else GAP,
        str(dig(machine, "gpu") or dig(machine, "cpu") or GAP),
    )


def evaluation_table(runs: Sequence[Run]) -> list[Row]:
    """One line an evaluation; the first is the head. Gains and gaps in dB."""
    steps = horizons(runs)
    likeness = [h for h in steps if h in (1, 8, 32)] or steps[:1]
    head = ("evaluation", "world", "steps", *(f"gain h{h}" for h in steps), *(f"SSIM h{h}" for h in likeness))
    head += (
        "action gap h4",
        "probe R²",
        "pose error h8",
        "motion",
        "latent std",
        "late/early",
        "turn margin",
        "walk margin",
        "ms/frame",
    )
    return [head, *(_evaluation_row(run, steps, likeness) for run in runs)]


def _evaluation_row(run: Run, steps: Sequence[int], likeness: Sequence[int]) -> Row:
    result = run.evaluation
    gaps = {dig(g, "horizon"): dig(g, "all", "mean") for g in dig(result, "action_gap", "by_horizon") or []}
    ratios = dig(result, "probes", "inverse_dynamics", "r2_dream_over_real")
    poses = {dig(p, "horizon"): dig(p, "dream", "position") for p in dig(result, "probes", "pose", "by_horizon") or []}
    speed = dig(result, "speed")
    return (
        run.name,
        str(dig(result, "conditions", "world") or GAP),
        number(dig(result, "conditions", "steps"), "d"),
        *(number(at(run, h, "psnr", "gain", "mean"), "+.2f") for h in steps),
        *(number(at(run, h, "ssim", "dream", "mean"), ".3f") for h in likeness),
        number(gaps.get(4), "+.2f"),
        ", ".join(f"{axis} {number(value, '.2f')}" for axis, value in ratios.items())
        if isinstance(ratios, dict) and ratios
        else GAP,
        number(poses.get(8), ".0f"),
        number(dig(result, "rollouts", "motion", "ratio"), ".2f"),
        number(dig(result, "random_play", "over_data_first_500", "latent"), ".2f"),
        number(dig(result, "drift", "late_over_early"), ".2f"),
        number(dig(result, "returns", "turn_360", "dream", "margin", "mean"), "+.2f"),
        number(dig(result, "returns", "walk_and_back", "dream", "margin", "mean"), "+.2f"),
        number(dig(speed, "per_frame_ms") or dig(speed, "frame_ms"), ".1f"),
    )


def grid(table: Sequence[Row]) -> list[str]:
    """A table in Markdown, its columns aligned for readers of the plain text, too."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in table]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def text(runs: Sequence[Run], problems: Sequence[str]) -> str:
    """The whole report."""
    lines = ["# Runs", "", *grid(run_table(runs))]
    evaluated = [run for run in runs if run.evaluation and not is_of_videos(run)]
    if videos := [run for run in runs if is_of_videos(run)]:
        lines += ["", "# Evaluations on videos", "", *grid(video_table(videos)), "", VIDEO_NOTE]
    if evaluated:
        note = "Gains: PSNR of the dream minus that of the repeated last frame, dB, by frames after the last real one."
        lines += ["", "# Evaluations", "", *grid(evaluation_table(evaluated)), "", note]
    for title, table in (("Costs", cost_table(runs)), ("By step count", steps_table(evaluated))):
        lines += ["", f"# {title}", "", *grid(table)] if len(table) > 1 else []
    lines += ["", *(f"- {problem}" for problem in problems)] if problems else []
    return "\n".join([*lines, ""])


def write(root: Path, out: Path) -> str:
    """Gather the runs below `root`, write report.md and the plots to `out`; returns the text. Raises WorldModelError."""
    runs, problems = gather(root)
    report = text(runs, problems)
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = out / ".report.md.tmp"
        temporary.write_text(report, encoding="utf-8")
        temporary.replace(out / "report.md")
        report_plots.losses(runs, out)
        report_plots.gains(runs, out)
    except OSError as error:
        reason = "it is a file" if out.is_file() else error.strerror or error
        raise DataError(f"the report cannot be written to {out} ({reason}): give another folder with --out") from error
    return report


def main() -> int:
    """Exit status: 0 done, 2 nothing to report or a folder that cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m train.report", description=__doc__.split("\n\n")[1] if __doc__ else None)
    parser.add_argument("runs", type=Path, help="the folder that holds the runs, as runs/")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the report goes (default: report/ in it)")
    args = parser.parse_args()
    try:
        out = args.out or args.runs / "report"
        print(write(args.runs, out))
    except WorldModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
