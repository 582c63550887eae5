"""One world at several step counts: the same clips, scripts and noise, a compact row of numbers for each count."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from train import examine, standing
from train.dreamer import Dreamer
from train.examine import Bench

PLAY_FRAMES = 300  # of random play that the counts are compared over
PARTS = 5  # of the evaluation's progress, for every further count


def examine_count(bench: Bench, steps: int, speed: dict[str, Any]) -> dict[str, Any]:
    """The row of a step count that is not the evaluated one; `speed` as measured with a session of that count."""
    dreamer, size = bench.dreamer, bench.size
    bench = dataclasses.replace(
        bench,
        dreamer=Dreamer(dreamer.config, dreamer.model, dreamer.codec, steps),
        size=dataclasses.replace(size, random_frames=min(PLAY_FRAMES, size.random_frames)),
    )
    rollouts, dream = examine.rollouts(bench)
    play, _, _ = examine.play_at_random(bench)
    gap = examine.action_gap(bench, dream)
    rest = standing.standing_still(bench)
    return row(steps, {"rollouts": rollouts, "action_gap": gap, "random_play": play, "standing": rest, "speed": speed})


def row(steps: int, result: dict[str, Any]) -> dict[str, Any]:
    """The compact numbers of one step count, from an evaluation's parts (None where something cannot be said)."""
    gaps = {r["horizon"]: r for r in result["action_gap"]["by_horizon"]}
    horizons = []
    for r in result["rollouts"]["by_horizon"]:
        gap = gaps.get(r["horizon"])
        scores = {f"{kind}{suffix}": r[kind][name]["mean"] for kind in ("psnr", "ssim") for suffix, name in _SCORES}
        horizons.append({"horizon": r["horizon"], **scores, "gap_turning": gap["turning"]["mean"] if gap else None})
    windows = result["random_play"]["over_data_by_window"]
    windows = [w for w in windows if w["last"] <= PLAY_FRAMES] or windows[:1]
    means = {name: sum(w[name] for w in windows) / len(windows) for name in ("latent", "pixel", "detail", "motion")}
    speed = {name: result["speed"][name] for name in ("first_frame_ms", "per_frame_ms", "fps", "frames_per_action")}
    return {
        "steps": steps,
        "by_horizon": horizons,
        "motion_ratio": result["rollouts"]["motion"]["ratio"],
        "random_play": {"frames": windows[-1]["last"], **means},
        "standing": [{"frames": r["frames"], "psnr": r["dream"]["psnr"]["mean"]} for r in result["standing"]["by_frames"]],
        "speed": speed,
    }


_SCORES = (("", "dream"), ("_gain", "gain"))


def table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A column per step count; the first line is the head."""

    def line(name: str, values: Sequence[float | None], digits: int, sign: str = "") -> tuple[str, ...]:
        return (name, *("-" if v is None else f"{v:{sign}.{digits}f}" for v in values))

    lines: list[tuple[str, ...]] = [("", *(f"{r['steps']} step{'s' if r['steps'] != 1 else ''}" for r in rows))]
    kinds = (("psnr", "PSNR dB", 1, ""), ("psnr_gain", "gain over repeat last, dB", 1, "+"), ("ssim", "SSIM", 3, ""))
    for kind, name, digits, sign in (*kinds, ("gap_turning", "right minus mirrored actions, turning, dB", 1, "+")):
        for i, h in enumerate(r["horizon"] for r in rows[0]["by_horizon"]):
            values = [r["by_horizon"][i][kind] for r in rows]
            if any(v is not None for v in values):
                lines.append(line(f"{name}, h{h}", values, digits, sign))
    lines.append(line("motion with recorded actions, over the real game's", [r["motion_ratio"] for r in rows], 2))
    over = f"{rows[0]['random_play']['frames']} frames of random play"
    for name, words in (("latent", "latent std over the data's"), ("detail", "std within a picture"), ("motion", "motion")):
        lines.append(line(f"{words}, {over}", [r["random_play"][name] for r in rows], 2))
    for i, rest in enumerate(rows[0].get("standing", ())):  # evaluations of earlier versions have none
        values = [r["standing"][i]["psnr"] for r in rows]
        lines.append(line(f"PSNR dB to the view one stands before, after {rest['frames']} frames at rest", values, 1))
    lines.append(line("action to first picture, ms, p50", [r["speed"]["first_frame_ms"]["p50"] for r in rows], 1))
    lines.append(line("per frame, ms", [r["speed"]["per_frame_ms"] for r in rows], 1))
    return lines
