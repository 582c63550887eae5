"""How good is a world? Fixed-seed, fixed-action rollouts of a world folder against the real game it was recorded from.

``python -m train stage=evaluate world=PATH data.root=EPISODES`` writes evaluation.json, evaluation.md, contact_sheet.png,
horizons.png, return.png and rollouts.mp4. The same command and seed give the same numbers on one CPU with the
same `train.threads` (set it to 1 where other programs keep the cores busy); a GPU adds rounding noise.

What the numbers are. Held-out episodes (the last 5 % by file name) are cut into clips; the model is given `window` real frames,
then dreams on its own (open loop) under the recorded actions. All rollouts run as one batch of the library's own parts
(`train.dreamer`).

psnr, ssim by horizon h: PSNR of the squared error of the h-th dreamed pictures to the real ones, pooled over rollouts (a mean of
    per-picture dB would be ruled by the few clips in which nothing moves and a repeated picture is perfect); mean SSIM after
    Wang et al. 2004 on luma (11x11 Gaussian, sigma 1.5). Beside two baselines: `repeat_last` shows the last real picture for
    ever, `codec` is the real picture through the codec and back. `gain` = dream minus repeat_last, paired. `se`: standard error
    (PSNR: jackknife over rollouts). Beyond about h16 PSNR says little on its own: a flat wall scores well.
motion: mean absolute change between successive pictures under the same actions, dream over real; 0 = a still.
action_gap: PSNR to the real picture with the right actions minus that with mirrored ones (left and right exchanged), same noise,
    paired. `turning`: only rollouts that turn or strafe noticeably (the rule: `material.sideways`); `all`: every one.
probes: small nets trained on real training frames only (`train.probes`). Inverse dynamics: two successive pictures -> mouse
    motion (R^2) and keys (accuracy, balanced accuracy). Pose: picture -> place and heading, median errors in map units and
    degrees. First on all real held-out frames, then on the clips of the rollouts: real, through the codec, dreamed.
random_play: fixed random keys and mouse. Standard deviation of all latent values, of all pixel values, and the mean one within a
    picture (`detail`, luma), by windows of 100 frames, over the same of held-out real frames; means up to frame 500.
returns: from a standstill turn 360 degrees by mouse, or walk forward and back as long. `return`: PSNR of the last view to the
    first. `other_view`, to beat: PSNR to the first of the views on the way (90, 180 and 270 degrees; the far end). `margin`:
    their difference, paired. `engine`: the same in the real game, where it can be opened: its momentum and walls make it the
    ceiling.
drift: Fréchet distance in probe features (Gaussians fitted to the last hidden layer of the pose probe, or of the inverse-dynamics
    probe where there are no poses) of early and late random play to one half of the held-out episodes, beside the other half
    (`real_to_real`) and the real engine under the same random play; sets of equal size. It is not FID or FVD. `steering`: what
    the inverse-dynamics probe reads off early and late play.
speed: one player's session, milliseconds a frame, commit and decode included, eager engine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train import examine, probes, report_card, returns, summary
from train.config import EvaluateStage, RunConfig
from train.dreamer import Dreamer
from train.examine import Bench, Meter, Size
from train.material import cut, gather
from train.monitor import Console, clock_text
from worldmodel import runtime
from worldmodel.errors import ConfigError, DataError, WorldModelError
from worldmodel.session import WorldSession, open_session

PARTS = 8


def full_size(rollouts: int, device: str) -> Size:
    """The evaluation one reports: a quarter of an hour on two CPU cores, where the probes learn from smaller pictures."""
    if device == "cpu":
        return Size(rollouts=rollouts, probes=probes.ProbeOptions(steps=1500, batch=64, frames=20_000, scale=2))
    return Size(rollouts=rollouts)


def quick_size(rollouts: int = 6) -> Size:
    """A look in passing: two minutes on two CPU cores."""
    learning = probes.ProbeOptions(steps=200, batch=32, frames=6000, scale=2)
    return Size(
        rollouts=min(rollouts, 6),
        horizons=(1, 4, 8, 16, 32),
        random_rollouts=2,
        random_frames=120,
        returns=2,
        turn_frames=36,
        walk_frames=8,
        speed_frames=15,
        codec_frames=128,
        probes=learning,
    )


def run(
    world: str | Path,
    data: Path,
    out: Path,
    *,
    device: str = "auto",
    steps: int | None = None,
    rollouts: int = 32,
    seed: int = 0,
    quick: bool = False,
    size: Size | None = None,
) -> dict[str, Any]:
    """Evaluate a world folder (or bundled world) on the episodes in `data`; write everything to `out` and return evaluation.json.

    steps: denoising steps a frame (None: the world's own). size: how much to dream, instead of `rollouts` and `quick`.
    Raises WorldModelError: world or data missing, damaged, or not made for each other.
    """
    if rollouts < 1 or (steps is not None and steps < 1):
        raise ConfigError(f"an evaluation needs at least one rollout and one step, got {rollouts} and {steps}")
    began, console = time.monotonic(), Console(quiet=False)
    try:
        # a fixed thread count: choosing it by measurement would change roundings from run to run
        session = open_session(world, device=device, steps=steps, threads=torch.get_num_threads())
        size = size or (quick_size(rollouts) if quick else full_size(rollouts, session.device))
        try:
            bench = _prepare(session, Path(data), Path(out), size, seed, console)
            result = _conditions(session, bench, quick)
            clips_and_dream = _examine(session, bench, result, Path(out), console)
        finally:
            session.close()
        result["conditions"]["seconds"] = round(time.monotonic() - began, 1)
        _publish(result, bench, *clips_and_dream, Path(out), console)
        console.say(f"\n{summary.terminal(result)}\n\nin {Path(out)} after {clock_text(time.monotonic() - began)}")
    finally:
        console.close()
    return result


def run_stage(config: RunConfig, folder: Path) -> dict[str, Any]:
    """What ``python -m train stage=evaluate`` calls; folder: the run folder."""
    stage = config.stage
    assert isinstance(stage, EvaluateStage)
    if not config.world:
        raise ConfigError("say which world to evaluate: world=FOLDER, or the name of a bundled world")
    out = Path(stage.out) if stage.out else folder
    steps = stage.sampler_steps or None
    options: dict[str, Any] = {"rollouts": stage.rollouts, "seed": config.seed, "quick": stage.quick}
    return run(config.world, Path(config.data.root), out, device=config.device, steps=steps, **options)


def _prepare(session: WorldSession, data: Path, out: Path, size: Size, seed: int, console: Console) -> Bench:
    out.mkdir(parents=True, exist_ok=True)
    meter = Meter(console, PARTS)
    meter.begin(f"reading episodes of {data}", 1)
    material = gather(data, session.config, size.probes.frames, console.say)
    clips = cut(material, session.config.sampler.window, max(size.horizons), size.rollouts, seed)
    if len(clips.frames) < size.rollouts or clips.horizon < max(size.horizons):
        console.say(f"    held-out episodes give {len(clips.frames)} clips of {clips.horizon} frames behind the context")
    meter.begin("probes: taken from the last evaluation, or trained on real frames", 2 * size.probes.steps)
    device = torch.device(session.device)
    trained = probes.obtain(material.train, material.digest, size.probes, out, device, lambda *_: meter.tick())
    dreamer = Dreamer(session.config, session.model, session.codec, session.steps)
    return Bench(dreamer, session.world.spawns, material, clips, trained, size, seed, meter)


def _conditions(session: WorldSession, bench: Bench, quick: bool) -> dict[str, Any]:
    """Everything that a number depends on."""
    held = bench.material.held_out
    return {
        "conditions": {
            "world": session.name,
            "weights_hash": session.weights_hash,
            "data_hash": bench.material.digest,
            "steps": session.steps,
            "device": session.device,
            "dtype": session.dtype,
            "machine": runtime.describe_machine(),
            "threads": session.threads,
            "seed": bench.seed,
            "quick": quick,
            "rollouts": len(bench.clips.frames),
            "context": bench.clips.context,
            "horizon": bench.clips.horizon,
            "clips": [list(place) for place in bench.clips.places],
            "held_out_episodes": len(held),
            "held_out_frames": sum(len(e) for e in held),
            "probe_training_frames": sum(len(e) for e in bench.material.train),
            "random_play": [min(bench.size.random_rollouts, len(bench.clips.frames)), bench.size.random_frames],
            "return_starts": bench.size.returns,
        }
    }


def _examine(
    session: WorldSession, bench: Bench, result: dict[str, Any], out: Path, console: Console
) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
    """Fill `result`, saving it after every part. Gives the pictures of the rollouts and of the return tests."""
    meter = bench.meter

    def keep(name: str, value: dict[str, Any]) -> None:
        result[name] = value
        _write(out / "evaluation.partial.json", json.dumps(_rounded(result), indent=1))

    keep("speed", _measured_speed(session, bench, meter))
    scores, dream = examine.rollouts(bench)
    keep("rollouts", scores)
    keep("action_gap", examine.action_gap(bench, dream))
    keep("probes", examine.probe_scores(bench, dream))
    scores, played, script = examine.play_at_random(bench)
    keep("random_play", scores)
    engine, why_not = returns.open_engine(bench.material.held_out[0].world, session.size, bench.spec)
    if engine is None:
        console.say(f"    the real game is left out: {why_not}")
    try:
        scores, views = returns.return_tests(bench, engine, why_not)
        keep("returns", scores)
        meter.begin("drift, and the real game under the same random play", 1)
        keep("drift", examine.drift(bench, played, script, returns.engine_play(engine, bench.spec, script, bench.seed)))
    finally:
        if engine is not None:
            engine.close()
    return dream, views


def _measured_speed(session: WorldSession, bench: Bench, meter: Meter) -> dict[str, Any]:
    meter.begin("speed of one player's session", 1)
    return examine.speed(session, bench.size.speed_frames, max(3, bench.clips.context))


def _publish(result: dict[str, Any], bench: Bench, dream: np.ndarray, views: dict[str, Any], out: Path, console: Console) -> None:
    """Write files; a picture that cannot be drawn is told and costs no number."""
    fps, horizons = bench.dreamer.config.fps, bench.size.horizons
    _write(out / "evaluation.json", json.dumps(_rounded(result), indent=1) + "\n")
    _write(out / "evaluation.md", summary.markdown(result))
    (out / "evaluation.partial.json").unlink(missing_ok=True)
    drawings: dict[str, Callable[[Path], None]] = {
        "contact_sheet.png": lambda path: report_card.contact_sheet(path, bench.clips, dream, horizons, fps),
        "horizons.png": lambda path: report_card.plots(path, result),
        "return.png": lambda path: report_card.return_sheet(path, views),
        "rollouts.mp4": lambda path: report_card.film(path, bench.clips, dream, fps),
    }
    for name, draw in drawings.items():
        try:
            draw(out / name)
        except (WorldModelError, OSError) as error:
            console.say(f"{name} is left out: {error}")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def _rounded(value: Any) -> Any:
    """Floats to six significant digits; values that are not finite become None, which JSON can say."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
