"""The table of evaluations on prepared videos (`train.evaluate_video`), which measure other things than those of games."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from train.report_runs import GAP, Row, Run, at, dig, horizons, number

NOTE = "Gains over the repeated last latent (PSNR: picture), gaps to mirrored cameras and another prompt, dB; at the last horizon."


def is_of_videos(run: Run) -> bool:
    """Whether the evaluation that `run` holds is one of videos."""
    return dig(run.evaluation, "speed", "seconds_per_latent") is not None


def video_table(runs: Sequence[Run]) -> list[Row]:
    """One line for every evaluation, and for each further step count of it; the first is the head."""
    steps = horizons(runs)
    head = (
        "evaluation",
        "world",
        "steps",
        *(f"gain h{h}" for h in steps),
        "PSNR gain",
        "cameras",
        "prompts",
        "motion",
        "latent std",
    )
    rows: list[Row] = [(*head, "s/latent")]
    for run in runs:
        result = run.evaluation
        last, world = max(horizons([run]), default=0), str(dig(result, "conditions", "world") or GAP)
        gaps = (_last(dig(result, part, "by_horizon"), "all", "mean") for part in ("action_gap", "prompt_gap"))
        rows.append(
            (
                run.name,
                world,
                number(dig(result, "conditions", "steps"), "d"),
                *(number(at(run, h, "latent", "gain", "mean"), "+.2f") for h in steps),
                number(at(run, last, "psnr", "gain", "mean"), "+.2f"),
                *(number(gap, "+.2f") for gap in gaps),
                number(dig(result, "rollouts", "motion", "by_space", "latent", "ratio"), ".2f"),
                number(at(run, last, "latent", "std"), ".2f"),
                number(dig(result, "speed", "seconds_per_latent"), ".3g"),
            )
        )
        for few in dig(result, "by_steps") or []:
            by = {dig(row, "horizon"): dig(row, "gain") for row in dig(few, "by_horizon") or []}
            tail = (number(dig(few, "motion_ratio"), ".2f"), number(_last(dig(few, "by_horizon"), "std"), ".2f"), GAP)
            counts = (number(dig(few, "steps"), "d"), *(number(by.get(h), "+.2f") for h in steps))
            rows.append((run.name, world, *counts, GAP, GAP, GAP, *tail))
    return rows


def _last(rows: Any, *path: str) -> Any:
    """A number of the last horizon."""
    return dig(rows[-1], *path) if isinstance(rows, list) and rows else None
