"""The tables of a comparison: what each run cost, and each evaluated world at one, two, four steps."""

from __future__ import annotations

from collections.abc import Sequence

from train.report_runs import GAP, Row, Run, dig, number


def cost_table(runs: Sequence[Run]) -> list[Row]:
    """One line a finished run. PFLOP: of its steps and of what it prepared; stored: files that it had to make first."""
    head = ("run", "stage", "prepare s", "training s", "all s", "PFLOP", "stored MiB")
    rows: list[Row] = [head]
    for run in runs:
        seconds, prepared = dig(run.done, "seconds"), dig(run.done, "costs", "prepare_seconds") or 0.0
        if not dig(run.done, "flops_per_step") or not isinstance(seconds, int | float):
            continue
        work = run.done["flops_per_step"] * run.done["steps"] * (dig(run.done, "processes") or 1)
        flops = work + (dig(run.done, "costs", "prepare_flops") or 0.0)
        cells = (number(prepared, ".0f"), number(seconds, ".0f"), number(seconds + prepared, ".0f"))
        stored = number((dig(run.done, "costs", "stored_bytes") or 0.0) / 2**20, ".0f")
        rows.append((run.name, run.stage, *cells, number(flops / 1e15, ".3g"), stored))
    return rows


def steps_table(runs: Sequence[Run]) -> list[Row]:
    """One line for every step count that a world was evaluated at. Gains and gaps in dB, times in ms."""
    chosen = (1, 8, 16, 32)
    head = ("evaluation", "from", "steps", *(f"gain h{h}" for h in chosen), "SSIM h8", "gap h8", "motion", "latent std", "detail")
    rows: list[Row] = [(*head, "first frame", "per frame")]
    for run in runs:
        for row in dig(run.evaluation, "by_steps") or []:
            by = {dig(h, "horizon"): h for h in dig(row, "by_horizon") or []}
            rows.append(
                (
                    run.name,
                    run.parent or GAP,
                    number(dig(row, "steps"), "d"),
                    *(number(dig(by.get(h), "psnr_gain"), "+.2f") for h in chosen),
                    number(dig(by.get(8), "ssim"), ".3f"),
                    number(dig(by.get(8), "gap_turning"), "+.2f"),
                    number(dig(row, "motion_ratio"), ".2f"),
                    number(dig(row, "random_play", "latent"), ".2f"),
                    number(dig(row, "random_play", "detail"), ".2f"),
                    number(dig(row, "speed", "first_frame_ms", "p50"), ".1f"),
                    number(dig(row, "speed", "per_frame_ms"), ".1f"),
                )
            )
    return rows
