"""How good are dreamed videos? Held-out clips of prepared videos, continued by the network under their own prompts and cameras.

``python -m train stage=evaluate world=PATH data=video data.root=PREPARED`` writes evaluation.json and evaluation.md and, where
something decodes latents, contact_sheet.png and rollouts.mp4. world: the folder of a video world (it has its decoder), or a run on
prepared videos (codec=FILE decodes). Same command and seed, same numbers on one CPU with the same `train.threads`.

What the numbers are. A clip's first third is real (`context`), then the network dreams to its end. Horizons count dreamed latents,
of 4 pictures each. `gain`, `all`, `turning`: dB, differences of two errors of the same clips and noise; `se`: jackknife over clips.

latent by horizon h: root mean squared error of the h-th dreamed latents to the real ones, beside `repeat_last`, the last real
    latent for ever; `gain` = repeat_last over dream. `std`: spread of all values there over that of the real ones.
psnr, ssim by horizon: of the last picture of those latents, both through the same decoder (see `train.evaluate`).
motion: mean change between successive latents and pictures, dream over real.
action_gap: how much nearer to the real latents the right cameras lead than mirrored ones. `turning`: clips whose camera has turned
    by 3 degrees or gone 0.08 to the side by then. prompt_gap: the right prompt against that of another clip.
random_play: longer dreams, with the prompt and, where there is a camera, random keys and mouse. Spread of the latents and their
    motion by windows as long as the cache, over those of the held-out latents: 1 stays, towards 0 fades, far above breaks up.
speed: seconds a dreamed latent, one rollout at a time, its commit included, decoding not.
by_steps: for every count of stage.step_counts gain, spread and motion.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train import report_card, video_examine
from train.config import RunConfig
from train.evaluate import rounded, write
from train.examine import Meter
from train.material import Clips
from train.monitor import Console, clock_text
from train.options import EvaluationSize
from train.stage_options import EvaluateStage
from train.summary import aligned, grid, number, with_error
from train.video_examine import PER_LATENT, Bench
from train.video_player import Player, open_player
from worldmodel import runtime
from worldmodel.errors import ConfigError, WorldModelError

Row = tuple[str, ...]
PLAY = {EvaluationSize.quick: (1, 24), EvaluationSize.compare: (2, 42), EvaluationSize.full: (4, 84)}  # rollouts, latents
QUICK = 6  # rollouts at most
PARTS = 4
NOTE = "Above: the real video.  Below: a network that saw its first third and was given its prompt and camera.  Both as decoded."


def run_stage(config: RunConfig, out: Path) -> dict[str, Any]:
    """What ``stage=evaluate`` does with prepared videos; returns evaluation.json. Raises WorldModelErrors."""
    stage = config.stage
    assert isinstance(stage, EvaluateStage)
    began, console = time.monotonic(), Console(quiet=False)
    try:
        device = runtime.pick_device(config.device)[0]
        out.mkdir(parents=True, exist_ok=True)
        player = open_player(config, out, device, console.say)
        bench = _bench(config, stage, player, Meter(console, PARTS + len(stage.step_counts)))
        result = {"conditions": _conditions(bench, stage)}
        _examine(bench, stage, result)
        result["conditions"]["seconds"] = round(time.monotonic() - began, 1)
        _publish(result, bench, out, console)
        console.say(f"\n{terminal(result)}\n\nin {out} after {clock_text(time.monotonic() - began)}")
    finally:
        console.close()
    return result


def _bench(config: RunConfig, stage: EvaluateStage, player: Player, meter: Meter) -> Bench:
    most = min(stage.rollouts, QUICK) if stage.size is EvaluationSize.quick else stage.rollouts
    clips, told = video_examine.held_out(player, most)
    context, length = video_examine.context_for(player, clips), clips[0].latent.shape[1]
    if context >= length:
        raise ConfigError(
            f"the clips of {config.data.root} hold {length} latents, and a dream's past takes {context}: prepare longer ones"
        )
    return Bench(player, clips, told, context, stage.sampler_steps or player.sampler.steps, config.seed, meter)


def _conditions(bench: Bench, stage: EvaluateStage) -> dict[str, Any]:
    player, context = bench.player, bench.player.context
    return {
        "world": player.name,
        "weights_hash": player.weights_hash,
        "data_hash": player.data.digest,
        "steps": bench.steps,
        "device": context.device.type,
        "dtype": str(context.dtype).removeprefix("torch."),
        "machine": runtime.describe_machine(),
        "threads": torch.get_num_threads(),
        "seed": bench.seed,
        "size": stage.size.name,
        "chunk": player.sampler.chunk,
        "window": player.sampler.window,
        "rollouts": len(bench.clips),
        "clips": [list(told) for told in bench.told],
        "context": bench.context,
        "horizon": bench.horizon,
        "pictures": player.codec is not None,
    }


def _examine(bench: Bench, stage: EvaluateStage, result: dict[str, Any]) -> None:
    result["rollouts"], dreams = video_examine.rollouts(bench)
    seconds = bench.seconds / (len(dreams) * bench.horizon)
    result["action_gap"] = video_examine.camera_gap(bench, dreams)
    result["prompt_gap"] = video_examine.prompt_gap(bench, dreams)
    count, latents = PLAY[stage.size]
    result["random_play"] = video_examine.play_on(bench, count, stage.random_frames or latents, bench.player.sampler.window)
    result["speed"] = {"seconds_per_latent": seconds}
    if stage.step_counts:
        result["by_steps"] = [_at_steps(bench, steps) for steps in sorted(set(stage.step_counts))]


def _at_steps(bench: Bench, steps: int) -> dict[str, Any]:
    found, _ = video_examine.rollouts(replace(bench, steps=steps))
    rows = [{"horizon": r["horizon"], "gain": r["latent"]["gain"]["mean"], "std": r["latent"]["std"]} for r in found["by_horizon"]]
    return {"steps": steps, "by_horizon": rows, "motion_ratio": found["motion"]["by_space"]["latent"]["ratio"]}


def _publish(result: dict[str, Any], bench: Bench, out: Path, console: Console) -> None:
    """Write files; a picture that cannot be drawn is told and costs no number."""
    write(out / "evaluation.json", json.dumps(rounded(result), indent=1) + "\n")
    write(out / "evaluation.md", markdown(result))
    if not bench.shown:
        console.say("no pictures: the world has no decoder, pass codec=Wan2.1_VAE.pth (or taew2_1.safetensors)")
        return
    real, dream = (np.stack(pictures) for pictures in zip(*bench.shown, strict=True))
    first, fps = 1 + PER_LATENT * (bench.context - 1), bench.player.data.fps
    none = np.zeros((*real.shape[:2], 0), np.float32)
    clips = Clips(real, none, none, first, tuple((file, number) for file, number, _ in bench.told[: len(real)]))
    at = [PER_LATENT * h for h in video_examine.horizons(bench.horizon)]
    drawings: dict[str, Callable[[Path], None]] = {
        "contact_sheet.png": lambda path: report_card.contact_sheet(path, clips, dream[:, first:], at, fps, NOTE),
        "rollouts.mp4": lambda path: report_card.film(path, clips, dream[:, first:], fps),
    }
    for name, draw in drawings.items():
        try:
            draw(out / name)
        except (WorldModelError, OSError) as error:
            console.say(f"{name} is left out: {error}")


# --- in words -------------------------------------------------------------------------------------------------------------------


def quality_rows(result: dict[str, Any]) -> list[Row]:
    """The table by horizon; the first row is its head."""
    rows = result["rollouts"]["by_horizon"]
    table: list[Row] = [("dreamed latents", *(str(r["horizon"]) for r in rows))]
    table.append(("latent error, dream", *(number(r["latent"]["dream_rmse"], 3) for r in rows)))
    table.append(("latent error, repeat last", *(number(r["latent"]["repeat_last_rmse"], 3) for r in rows)))
    table.append(("latent gain over repeat last, dB", *(with_error(r["latent"]["gain"], 1, True) for r in rows)))
    table.append(("latent std over the real", *(number(r["latent"]["std"]) for r in rows)))
    for kind, digits, unit in (("psnr", 1, "PSNR dB"), ("ssim", 3, "SSIM")):
        if kind in rows[0]:
            for name, text in (("dream", "dream"), ("repeat_last", "repeat last picture")):
                table.append((f"{unit}, {text}", *(number(r[kind][name]["mean"], digits) for r in rows)))
            table.append((f"{unit}, gain over repeat last", *(with_error(r[kind]["gain"], digits, True) for r in rows)))
    for part, name, text in (
        ("action_gap", "turning", "right minus mirrored cameras, dB, clips that turn or strafe"),
        ("action_gap", "all", "right minus mirrored cameras, dB, all clips"),
        ("prompt_gap", "all", "right minus other prompts, dB"),
    ):
        if "by_horizon" in result[part]:
            found = [r[name] for r in result[part]["by_horizon"]]
            table.append((text, *(f"{with_error(cell, 1, True)} (n {cell['n']})" for cell in found)))
    return table


def fact_rows(result: dict[str, Any]) -> list[Row]:
    """(what, value) of everything that has no horizon."""
    facts: list[Row] = []
    for part, text in (("action_gap", "cameras"), ("prompt_gap", "prompts")):
        if "skipped" in result[part]:
            facts.append((text, f"not compared: {result[part]['skipped']}"))
    spaces = result["rollouts"]["motion"]["by_space"].items()
    facts.append(("motion over the real videos'", ", ".join(f"{name} {number(found['ratio'])}" for name, found in spaces)))
    for row in result["random_play"]["over_data_by_window"]:
        what = f"longer dreams, latents {row['first']} to {row['last']}, over the data's"
        facts.append((what, f"std {number(row['latent'])}, motion {number(row['motion'])}"))
    facts.append(("speed", f"{result['speed']['seconds_per_latent']:.3g} s a latent, {result['conditions']['steps']} steps"))
    for row in result.get("by_steps", []):
        gains = ", ".join(f"{number(r['gain'], 1, True)} at {r['horizon']}" for r in row["by_horizon"])
        facts.append((f"{row['steps']} steps", f"latent gain {gains} dB; motion {number(row['motion_ratio'])}"))
    return facts


def conditions_text(result: dict[str, Any]) -> str:
    """One line: what was measured under which conditions."""
    c = result["conditions"]
    return (
        f"{c['world']} ({c['weights_hash']}), {c['steps']} steps on {c['device']} in {c['dtype']}; videos {c['data_hash']}; "
        f"{c['rollouts']} rollouts from {c['context']} real latents; seed {c['seed']}"
        f"{'; size ' + c['size'] if c['size'] != 'full' else ''}."
    )


def markdown(result: dict[str, Any]) -> str:
    """The README-able table."""
    facts = [f"| {what} | {value} |" for what, value in fact_rows(result)]
    note = "± is one standard error. Definitions: `train/evaluate_video.py`."
    return "\n".join([*grid(quality_rows(result)), "", "| | |", "|---|---|", *facts, "", f"{conditions_text(result)} {note}", ""])


def terminal(result: dict[str, Any]) -> str:
    """The same for a terminal."""
    tables = [quality_rows(result), fact_rows(result)]
    return "\n".join([conditions_text(result), *(line for table in tables for line in ("", *aligned(table)))])
