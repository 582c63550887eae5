"""The examinations that `train.evaluate` puts a world through; what every number means is told there.

Each takes a `Bench` and gives a JSON-able dict (None where something cannot be said), some of them with pictures.
Shapes: B rollouts, T frames, H W pixels, A action; pictures are uint8 (..., H, W, 3).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train import metrics, probes
from train.dreamer import Dreamer
from train.material import Clips, Material, mirror, random_play, sideways
from train.monitor import Console, clock_text
from train.sizes import Size
from worldmodel import runtime
from worldmodel.action import Action, ActionSpec
from worldmodel.checkpoint import Spawn
from worldmodel.session import WorldSession

WINDOW = 100  # frames per window of the statistics of random play
LATE = 200  # frames that the drift test calls early, and late


@dataclass
class Bench:
    """What every examination needs. spawns: the world's own starting places, real frames and the actions that led to them."""

    dreamer: Dreamer
    spawns: Sequence[Spawn]
    material: Material
    clips: Clips
    probes: probes.Probes
    size: Size
    seed: int
    meter: Meter

    @property
    def spec(self) -> ActionSpec:
        return self.dreamer.config.actions

    def seeds(self, count: int) -> list[int]:
        """The noise seeds of `count` rollouts."""
        return [self.seed * 1000 + i for i in range(count)]


class Meter:
    """Progress with the time that is left, part by part; silent for parts that are over at once."""

    def __init__(self, console: Console, parts: int) -> None:
        self._console, self._parts, self._part = console, parts, 0
        self._every = 0.5 if console._live else 10.0

    def say(self, words: str) -> None:
        """A line of its own between the parts."""
        self._console.say(words)

    def begin(self, title: str, total: int) -> None:
        self._part += 1
        self._title, self._total, self._done = title, max(total, 1), 0
        self._start = self._told = time.monotonic()
        self._console.say(f"{self._part}/{self._parts} {title}")

    def tick(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._told >= self._every and self._done < self._total:
            self._told = now
            left = (now - self._start) * (self._total - self._done) / self._done
            self._console.progress(f"    {self._title}: {100 * self._done // self._total} % · ETA {clock_text(left)}")


def _dream(bench: Bench, clips: Clips, script: np.ndarray) -> np.ndarray:
    """Open-loop rollouts behind the context of every clip under a script (B, T, A) -> pictures (B, T, H, W, 3)."""
    n, pictures = clips.context, []
    for frame in bench.dreamer.rollout(clips.frames[:, :n], clips.actions[:, :n], script, bench.seeds(len(clips.frames))):
        pictures.append(frame)
        bench.meter.tick()
    return np.stack(pictures, axis=1)


def rollouts(bench: Bench) -> tuple[dict[str, Any], np.ndarray]:
    """Quality by horizon beside the two baselines, and motion. Also gives the dreamed pictures (B, T, H, W, 3)."""
    clips, n = bench.clips, bench.clips.context
    bench.meter.begin(f"{len(clips.frames)} rollouts of {clips.horizon} frames with recorded actions", clips.horizon)
    dream = _dream(bench, clips, clips.actions[:, n:])
    real, last = clips.frames[:, n:], clips.frames[:, n - 1]
    rows = []
    for h in (h for h in bench.size.horizons if h <= clips.horizon):
        truth = real[:, h - 1]
        shown = {"dream": dream[:, h - 1], "repeat_last": last, "codec": bench.dreamer.round_trip(truth)}
        errors = {name: metrics.squared_error(x, truth) for name, x in shown.items()}
        likeness = {name: metrics.ssim(x, truth) for name, x in shown.items()}
        row: dict[str, Any] = {"horizon": h}
        row["psnr"] = {name: metrics.pooled_psnr(x) for name, x in errors.items()}
        row["psnr"]["gain"] = metrics.pooled_psnr(errors["dream"], errors["repeat_last"])
        row["ssim"] = {name: metrics.summary(x) for name, x in likeness.items()}
        row["ssim"]["gain"] = metrics.summary(likeness["dream"] - likeness["repeat_last"])
        rows.append(row)
    moved = metrics.motion(real)
    ratio = metrics.motion(dream) / moved if moved > 0 else None
    return {"by_horizon": rows, "motion": {"dream": metrics.motion(dream), "real": moved, "ratio": ratio}}, dream


def action_gap(bench: Bench, dream: np.ndarray) -> dict[str, Any]:
    """How much nearer to the real frames the right actions lead than mirrored ones, with the same noise."""
    clips, n = bench.clips, bench.clips.context
    horizons = [h for h in bench.size.gaps if h <= clips.horizon]
    bench.meter.begin(f"the same with mirrored actions, {max(horizons)} frames", max(horizons))
    mirrored = _dream(bench, clips, mirror(clips.actions[:, n : n + max(horizons)], bench.spec))
    rows = []
    for h in horizons:
        truth = clips.frames[:, n + h - 1]
        right, wrong = metrics.psnr(dream[:, h - 1], truth), metrics.psnr(mirrored[:, h - 1], truth)
        turning = sideways(clips.actions[:, n : n + h], bench.spec)
        row = {"horizon": h, "all": metrics.summary(right - wrong), "turning": metrics.summary((right - wrong)[turning])}
        rows.append(row | {"right": metrics.summary(right), "mirrored": metrics.summary(wrong)})
    return {"by_horizon": rows}


def probe_scores(bench: Bench, dream: np.ndarray) -> dict[str, Any]:
    """What the probes read: on real held-out frames first, then through the codec, then off the dreams."""
    spec, clips, n = bench.spec, bench.clips, bench.clips.context
    held = bench.material.held_out
    read = [bench.probes.actions(e.frames[:-1], e.frames[1:]) for e in held]
    inverse: dict[str, Any] = {
        "real_held_out": probes.action_scores(np.concatenate(read), np.concatenate([e.actions[1:] for e in held]), spec)
    }
    truth = clips.actions[:, n + 1 :].reshape(-1, spec.width)
    real, shape = clips.frames[:, n:], clips.frames.shape[2:]
    coded = bench.dreamer.round_trip(real.reshape(-1, *shape)).reshape(real.shape)
    for name, pictures in (("real_clips", real), ("codec_clips", coded), ("dream", dream)):
        before, after = (x.reshape(-1, *shape) for x in (pictures[:, :-1], pictures[:, 1:]))
        inverse[name] = probes.action_scores(bench.probes.actions(before, after), truth, spec)
    ratios = {}
    for axis in spec.axes:
        on_real, on_dream = (inverse[k]["axes"][axis.name]["r2"] for k in ("real_clips", "dream"))
        ratios[axis.name] = on_dream / on_real if on_real and on_real > 0 and on_dream is not None else None
    inverse["r2_dream_over_real"] = ratios
    return {"inverse_dynamics": inverse, "pose": _pose_scores(bench, dream, coded)}


def _pose_scores(bench: Bench, dream: np.ndarray, coded: np.ndarray) -> dict[str, Any]:
    if bench.probes.pose is None:
        return {"skipped": "the data has no (x, y, degrees) poses"}
    clips, n, held = bench.clips, bench.clips.context, bench.material.held_out
    frames, poses = np.concatenate([e.frames for e in held]), np.concatenate([e.poses for e in held])
    rows = []
    for h in (h for h in bench.size.horizons if h <= clips.horizon):
        shown = {
            "real": clips.frames[:, n + h - 1],
            "codec": coded[:, h - 1],
            "dream": dream[:, h - 1],
            "repeat_last": clips.frames[:, n - 1],
        }
        truth = clips.poses[:, n + h - 1]
        rows.append({"horizon": h} | {k: probes.pose_scores(bench.probes.poses(x), truth) for k, x in shown.items()})
    return {"real_held_out": probes.pose_scores(bench.probes.poses(frames), poses), "by_horizon": rows}


def _spread(values: np.ndarray) -> float:
    return float(values.std(dtype=np.float64))


def play_at_random(bench: Bench) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Long random play: spread of latents and pixels by window over the data's. Also gives the pictures and the script."""
    size = bench.size
    clips = thin_out(bench.clips, size.random_rollouts)
    script = random_play(bench.spec, len(clips.frames), size.random_frames, bench.seed)
    bench.meter.begin(f"{len(script)} rollouts of {size.random_frames} frames of random play", size.random_frames)
    n, pictures, latents = clips.context, [], []
    for frame in bench.dreamer.rollout(clips.frames[:, :n], clips.actions[:, :n], script, bench.seeds(len(script))):
        pictures.append(frame)
        latents.append(bench.dreamer.latent.float().cpu().numpy().astype(np.float16))
        bench.meter.tick()
    frames, stack = np.stack(pictures, axis=1), np.stack(latents, axis=1)
    data = np.concatenate([e.frames for e in bench.material.held_out])
    data = data[np.unique(np.linspace(0, len(data) - 1, size.codec_frames).astype(int))]
    whole = {"latent": _spread(_pictured(bench, data)), "pixel": _spread(data), "detail": detail(data)}
    return {"data": whole} | _spreads(stack, frames, whole), frames, script


def engine_spreads(bench: Bench, real_play: np.ndarray, whole: dict[str, float]) -> dict[str, Any]:
    """The same spreads of the real engine's play (B, T, H, W, 3), through the codec, over those of the data (`whole`): what a
    perfect dream would have under these keys."""
    return _spreads(np.stack([_pictured(bench, play) for play in real_play]), real_play, whole)


def _pictured(bench: Bench, frames: np.ndarray) -> np.ndarray:
    """Latents (T, C, h, w) of real pictures (T, H, W, 3), the channels of the picture alone."""
    return bench.dreamer.encode(frames)[:, : bench.dreamer.config.codec.channels].float().cpu().numpy()


def _spreads(latents: np.ndarray, frames: np.ndarray, whole: dict[str, float]) -> dict[str, Any]:
    """Of plays (B, T, ...): spreads of latents and pixels and detail over `whole`, motion, by window; means up to frame 500."""
    rows, played = [], frames.shape[1]
    for start in range(0, played - min(WINDOW, played) + 1, WINDOW):
        part = slice(start, start + WINDOW)
        now = {"latent": _spread(latents[:, part]), "pixel": _spread(frames[:, part]), "detail": detail(frames[:, part])}
        rows.append({"first": start + 1, "last": min(start + WINDOW, played)} | {k: now[k] / whole[k] for k in now})
        rows[-1]["motion"] = metrics.motion(frames[:, part])
    head = [r for r in rows if r["last"] <= 500] or rows[:1]
    mean = {k: float(np.mean([r[k] for r in head])) for k in whole}
    return {"over_data_by_window": rows, "over_data_first_500": mean, "frames_averaged": head[-1]["last"]}


def detail(frames: np.ndarray) -> float:
    """Mean over pictures of the standard deviation of luma within a picture."""
    luma = frames @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return float(luma.reshape(*luma.shape[:-2], -1).std(-1).mean())


def thin_out(clips: Clips, count: int) -> Clips:
    picked = np.unique(np.linspace(0, len(clips.frames) - 1, min(count, len(clips.frames))).astype(int))
    places = tuple(clips.places[i] for i in picked)
    return Clips(clips.frames[picked], clips.actions[picked], clips.poses[picked], clips.context, places)


def drift(bench: Bench, played: np.ndarray, script: np.ndarray, real_play: np.ndarray | None) -> dict[str, Any]:
    """Fréchet distance in probe features of early and late random play to real frames, beside real to real."""
    held, span = bench.material.held_out, min(LATE, played.shape[1] // 3)
    halves = [held[0::2], held[1::2]]
    if len(held) == 1:  # one episode: its first and second half
        middle = len(held[0]) // 2
        halves_of_one = [held[0].frames[:middle], held[0].frames[middle:]]
        real = [bench.probes.features(x) for x in halves_of_one]
    else:
        real = [np.concatenate([bench.probes.features(e.frames) for e in half]) for half in halves]
    sets = {"real": real[1]}
    for name, frames in (("", played), ("engine_", real_play)):
        if frames is not None:
            sets[f"{name}early"] = np.concatenate([bench.probes.features(x[:span]) for x in frames])
            sets[f"{name}late"] = np.concatenate([bench.probes.features(x[-span:]) for x in frames])
    count = min(len(x) for x in (real[0], *sets.values()))
    if count < 2:
        return {"skipped": "too few frames for a covariance"}
    thinned = {k: _thin(x, count) for k, x in sets.items()}
    distances = {k: metrics.frechet_distance(x, _thin(real[0], count)) for k, x in thinned.items()}
    steer = {}
    for name, part in (("early", slice(0, span)), ("late", slice(played.shape[1] - span, None))):
        shown, acts = played[:, part], script[:, part][:, 1:].reshape(-1, bench.spec.width)
        before, after = (x.reshape(-1, *played.shape[2:]) for x in (shown[:, :-1], shown[:, 1:]))
        scores = probes.action_scores(bench.probes.actions(before, after), acts, bench.spec)
        steer[name] = {a: v["r2"] for a, v in scores["axes"].items()} | {"key_balanced_accuracy": scores["key_balanced_accuracy"]}
    return {
        "frames_in_each_set": count,
        "span": span,
        "played": int(played.shape[1]),
        "still_share": {"dream": metrics.still_share(played)}
        | ({} if real_play is None else {"engine": metrics.still_share(real_play)}),
        "real_to_real": distances.pop("real"),
        "to_real": distances,
        "late_over_early": distances["late"] / distances["early"] if distances["early"] > 0 else None,
        "steering": steer,
        "features": "pose probe" if bench.probes.pose is not None else "inverse-dynamics probe",
    }


def _thin(x: np.ndarray, count: int) -> np.ndarray:
    return x[np.linspace(0, len(x) - 1, count).round().astype(int)]


def speed(session: WorldSession, steps: int, warmup: int) -> dict[str, Any]:
    """Milliseconds as a player gets them: one session, eager engine, over `steps` steps.

    first_frame_ms: action given -> first picture of that step decoded. per_frame_ms and its parts: of a step with its commit, over
    its pictures.
    """
    first, whole, parts = [], [], []
    session.reset(seed=0, spawn=0)
    for i in range(warmup + steps):
        start = time.perf_counter()
        frames = session.step(Action())
        ready = time.perf_counter()
        session.finish()
        runtime.synchronize(session.cache.store.device)
        if i >= warmup:
            first.append((ready - start) * 1e3)
            whole.append((time.perf_counter() - start) * 1e3)
            parts.append(frames[-1].timing_ms)
    chunk = session.frames_per_action
    mean = float(np.mean(whole)) / chunk
    result: dict[str, Any] = {"first_frame_ms": _percentiles(first), "per_frame_ms": mean}
    result["per_frame_ms_p95"] = _percentiles(whole)["p95"] / chunk
    result |= {f"{k}_ms": float(np.mean([p[k] for p in parts if k in p])) / chunk for k in ("denoise", "commit", "decode")}
    result |= {"fps": 1e3 / mean, "frames_per_action": chunk, "steps_timed": steps}
    return result | {"engine": session.engine, "threads": session.threads}


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(values, p)) for p in (50, 95)}
