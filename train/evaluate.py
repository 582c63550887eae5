"""How good is a world? Fixed-seed, fixed-action rollouts of a world folder against the real game it was recorded from.

``python -m train stage=evaluate world=PATH data.root=EPISODES`` writes evaluation.json, evaluation.md, contact_sheet.png,
horizons.png, return.png, random_play.png and rollouts.mp4. The same command and seed give the same numbers on one CPU with the
same `train.threads` (set it to 1 where other programs keep the cores busy); a GPU adds rounding noise.

``stage.size`` is quick, compare (to rank worlds) or full (`train.sizes`); ``stage.step_counts=[1,2,4]`` adds a compact table of
several step counts. Trained probes are kept in the folder of all runs, so that evaluations on the same data share them.
Worlds of videos have an evaluation of their own: `train.evaluate_video`.

What the numbers are. Held-out episodes (the last 5 % by file name) are cut into clips; the model is given `window` real frames,
then dreams on its own (open loop) under the recorded actions. All rollouts run as one batch of the library's own parts
(`train.dreamer`). Worlds of chunks use the newest of the `window` frames that fill whole chunks, and every frame of a chunk has its
own recorded action; a player's action is held for the whole chunk.

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
    picture (`detail`, luma), by windows of 100 frames, over the same of held-out real frames; means up to frame 500. `engine`: the
    same in the real game under the same keys, through the codec: what a perfect dream would have.
returns: from a standstill turn 360 degrees by mouse, or walk forward and back as long. `return`: PSNR of the last view to the
    first. `other_view`, to beat: PSNR to the first of the views on the way (90, 180 and 270 degrees; the far end). `margin`:
    their difference, paired. `engine`: the same in the real game, where it can be opened: its momentum and walls make it the
    ceiling.
standing: nobody acts, from the same starts. PSNR of the view to the one after 15 frames, when momentum has died, and its detail
    over that one's; what stays as it is has 100 dB and 1. `engine` as above.
drift: Fréchet distance in probe features (Gaussians fitted to the last hidden layer of the pose probe, or of the inverse-dynamics
    probe where there are no poses) of early and late random play to one half of the held-out episodes, beside the other half
    (`real_to_real`) and the real engine under the same random play; sets of equal size. It is not FID or FVD. `steering`: what
    the inverse-dynamics probe reads off early and late play. `still_share`: of all of the play, the share of pictures that differ
    from the one before by less than a grey level on average; beside the engine, where walls and idle moments make some, it says
    how much of the play stands in front of nothing.
speed: one player's session, eager engine. `first_frame_ms`: action given -> first picture of that step decoded (what waits for the
    step to begin is not in it). `per_frame_ms`: wall time of a step over its pictures, commit and decode included.
by_steps: for every count of stage.step_counts quality by horizon, the gap of turning rollouts, random play up to frame 300,
    standing still, speed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train import by_steps, examine, probes, report_card, returns, sizes, standing, summary
from train.config import RunConfig
from train.dreamer import Dreamer
from train.examine import Bench, Meter
from train.material import cut, gather
from train.monitor import Console, clock_text
from train.options import EvaluationSize
from train.sizes import Size
from train.stage_options import EvaluateStage
from train.video_player import dreams_videos
from train.videos import is_prepared
from worldmodel import runtime
from worldmodel.errors import ConfigError, DataError, WorldModelError
from worldmodel.session import WorldSession, open_session

PARTS = 9


def run(
    world: str | Path,
    data: Path,
    out: Path,
    *,
    device: str = "auto",
    steps: int | None = None,
    rollouts: int = 32,
    seed: int = 0,
    size: Size | EvaluationSize = EvaluationSize.full,
    step_counts: Sequence[int] = (),
    random_frames: int = 0,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a world folder (or bundled world) on the episodes in `data`; write everything to `out` and return evaluation.json.

    steps: denoising steps a frame (None: the world's own). size: how much to dream; one of `train.sizes` ignores `rollouts`.
    step_counts: further counts for the table by steps. random_frames: of random play (0: as the size says).
    cache: where trained probes are kept (None: `out`).
    Raises WorldModelError: world or data missing, damaged, or not made for each other.
    """
    if min(rollouts, steps or 1, *step_counts) < 1:
        raise ConfigError(f"rollouts and steps must be at least 1, got {rollouts}, {[*filter(None, [steps]), *step_counts]}")
    began, console = time.monotonic(), Console(quiet=False)
    try:
        # a fixed thread count: choosing it by measurement would change roundings from run to run
        options: dict[str, Any] = {"device": device, "threads": torch.get_num_threads()}
        session = open_session(world, steps=steps, **options)
        size = size if isinstance(size, Size) else sizes.choose(size, rollouts, session.device, random_frames)
        further = [n for n in dict.fromkeys(step_counts) if n != session.steps]
        try:
            meter = Meter(console, PARTS + by_steps.PARTS * len(further))
            bench = _prepare(session, Path(data), Path(out), cache or Path(out), size, seed, meter)
            result = _conditions(session, bench)
            pictures = _examine(session, bench, result, Path(out))
        finally:
            session.close()
        if step_counts:
            result["by_steps"] = _by_steps(world, bench, result, further, options)
        result["conditions"]["seconds"] = round(time.monotonic() - began, 1)
        _publish(result, bench, pictures, Path(out), console)
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
    if is_prepared(Path(config.data.root)):
        from train import evaluate_video

        return evaluate_video.run_stage(config, Path(stage.out) if stage.out else folder)
    if dreams_videos(config.world):
        raise ConfigError(
            f"world={config.world} dreams videos, and {config.data.root} holds none that are prepared: make some by "
            "python -m train.prepare and give them by data.root="
        )
    return run(
        config.world,
        Path(config.data.root),
        Path(stage.out) if stage.out else folder,
        device=config.device,
        steps=stage.sampler_steps or None,
        rollouts=stage.rollouts,
        seed=config.seed,
        size=stage.size,
        step_counts=stage.step_counts,
        random_frames=stage.random_frames,
        cache=Path(config.runs),
    )


def _prepare(session: WorldSession, data: Path, out: Path, cache: Path, size: Size, seed: int, meter: Meter) -> Bench:
    out.mkdir(parents=True, exist_ok=True)
    meter.begin(f"reading episodes of {data}", 1)
    material = gather(data, session.config, size.probes.frames, meter.say)
    clips = cut(material, session.config.sampler.window, max(size.horizons), size.rollouts, seed)
    if len(clips.frames) < size.rollouts or clips.horizon < max(size.horizons):
        meter.say(f"    held-out episodes give {len(clips.frames)} clips of {clips.horizon} frames behind the context")
    meter.begin("probes: taken from an earlier evaluation, or trained on real frames", 2 * size.probes.steps)
    device = torch.device(session.device)
    trained = probes.obtain(material.train, material.digest, size.probes, cache, device, lambda *_: meter.tick())
    dreamer = Dreamer(session.config, session.model, session.codec, session.steps)
    return Bench(dreamer, session.world.spawns, material, clips, trained, size, seed, meter)


def _conditions(session: WorldSession, bench: Bench) -> dict[str, Any]:
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
            "size": bench.size.name,
            "frames_per_action": session.frames_per_action,
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
    session: WorldSession, bench: Bench, result: dict[str, Any], out: Path
) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Fill `result`, saving it after every part. Gives the pictures of the rollouts, of the return tests and of random play."""
    meter = bench.meter

    def keep(name: str, value: dict[str, Any]) -> None:
        result[name] = value
        write(out / "evaluation.partial.json", json.dumps(rounded(result), indent=1))

    keep("speed", _measured_speed(session, bench, meter))
    scores, dream = examine.rollouts(bench)
    keep("rollouts", scores)
    keep("action_gap", examine.action_gap(bench, dream))
    keep("probes", examine.probe_scores(bench, dream))
    scores, played, script = examine.play_at_random(bench)
    keep("random_play", scores)
    engine, why_not = None, "not part of this size"
    if bench.size.returns:
        engine, why_not = returns.open_engine(bench.material.held_out[0].world, session.size, bench.spec)
    if engine is None:
        meter.say(f"    the real game is left out: {why_not}")
    try:
        scores, views = returns.return_tests(bench, engine, why_not)
        keep("returns", scores)
        keep("standing", standing.standing_still(bench, engine))
        meter.begin("drift, and the real game under the same random play", 1)
        real_play = returns.engine_play(engine, bench.spec, script, bench.seed)
        if real_play is not None:
            whole = result["random_play"]["data"]
            keep("random_play", result["random_play"] | {"engine": examine.engine_spreads(bench, real_play, whole)})
        keep("drift", examine.drift(bench, played, script, real_play))
    finally:
        if engine is not None:
            engine.close()
    return dream, views, {"dream": played} if real_play is None else {"dream": played, "engine": real_play}


def _measured_speed(session: WorldSession, bench: Bench, meter: Meter) -> dict[str, Any]:
    meter.begin("speed of one player's session", 1)
    return examine.speed(session, bench.size.speed_steps, max(3, bench.clips.context))


def _by_steps(world: str | Path, bench: Bench, result: dict[str, Any], counts: list[int], options: dict[str, Any]) -> list[Any]:
    """The rows of the evaluated step count and of `counts`, the lowest first."""
    rows = [by_steps.row(bench.dreamer.steps, result)]
    rows += [by_steps.examine_count(bench, n, _speed_of(world, n, bench, options)) for n in counts]
    return sorted(rows, key=lambda row: int(row["steps"]))


def _speed_of(world: str | Path, steps: int, bench: Bench, options: dict[str, Any]) -> dict[str, Any]:
    session = open_session(world, steps=steps, **options)
    try:
        return _measured_speed(session, bench, bench.meter)
    finally:
        session.close()


def _publish(
    result: dict[str, Any],
    bench: Bench,
    pictures: tuple[np.ndarray, dict[str, Any], dict[str, np.ndarray]],
    out: Path,
    console: Console,
) -> None:
    """Write files; a picture that cannot be drawn is told and costs no number. pictures: as `_examine` gives them."""
    dream, views, plays = pictures
    fps, horizons = bench.dreamer.config.fps, bench.size.horizons
    write(out / "evaluation.json", json.dumps(rounded(result), indent=1) + "\n")
    write(out / "evaluation.md", summary.markdown(result))
    (out / "evaluation.partial.json").unlink(missing_ok=True)
    drawings: dict[str, Callable[[Path], None]] = {
        "contact_sheet.png": lambda path: report_card.contact_sheet(path, bench.clips, dream, horizons, fps),
        "horizons.png": lambda path: report_card.plots(path, result),
        "return.png": lambda path: report_card.return_sheet(path, views),
        "random_play.png": lambda path: report_card.play_sheet(path, plays),
        "rollouts.mp4": lambda path: report_card.film(path, bench.clips, dream, fps),
    }
    for name, draw in drawings.items():
        try:
            draw(out / name)
        except (WorldModelError, OSError) as error:
            console.say(f"{name} is left out: {error}")


def write(path: Path, text: str) -> None:
    """A file as a whole, or DataError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def rounded(value: Any) -> Any:
    """Floats to six significant digits; values that are not finite become None, which JSON can say."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
