"""What `train.evaluate_video` measures; what every number means is told there.

Shapes: T latents of a clip, C h w latent, F pictures; clips come one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train import metrics
from train.clips import PER_LATENT
from train.data import ClipBatch, Draws
from train.distributed import Ranks
from train.examine import Meter
from train.material import random_play
from train.rollout import context_of
from train.video_player import Player
from worldmodel import runtime
from worldmodel.models.camera import STEP, TURN, advance
from worldmodel.video_session import CAMERA_ACTIONS, camera_motion

KEPT = 4  # clips whose pictures are kept to be shown


@dataclass
class Bench:
    """clips: held-out, one each; told: their video, number and prompt. context: real latents before the dream. steps: denoising
    steps of a chunk. shown: real and dreamed pictures (F,H,W,3) of the first few rollouts. seconds: that dreaming has taken so far.
    """

    player: Player
    clips: Sequence[ClipBatch]
    told: Sequence[tuple[str, int, str]]
    context: int
    steps: int
    seed: int
    meter: Meter

    def __post_init__(self) -> None:
        self._student, self.seconds = self.player.student(), 0.0
        self.shown: list[tuple[np.ndarray, np.ndarray]] = []

    @property
    def horizon(self) -> int:
        """Dreamed latents of a clip."""
        return self.clips[0].latent.shape[1] - self.context

    def dream(self, clip: ClipBatch, number: int) -> Tensor:
        """What comes behind the context, (t,C,h,w), float32; the noise depends on seed and number alone."""
        device = clip.latent.device
        begun = time.perf_counter()
        made = self._student.dream(clip, self.context, Draws(self.seed, number, 0, Ranks(0, 1, device), 1), self.steps)[0].float()
        runtime.synchronize(device)
        self.seconds += time.perf_counter() - begun
        self.meter.tick()
        return made


def held_out(player: Player, count: int) -> tuple[list[ClipBatch], list[tuple[str, int, str]]]:
    """Up to `count` held-out clips, evenly chosen, of as many whole chunks as the videos have; and their video, number, prompt."""
    chunk, (_, lengths) = player.sampler.chunk, player.data.index.part(True)
    clips = player.data.clips(int(lengths.max()) // chunk * chunk, held_out=True)
    numbers = clips.sampler.spread(min(count, clips.sampler.count))
    told = player.data.told(held_out=True)
    return [clips.batch(number[None]) for number in numbers], [told[int(number)] for number in numbers]


def context_for(player: Player, clips: Sequence[ClipBatch]) -> int:
    return context_of(clips[0].latent.shape[1], player.sampler.chunk)


def horizons(most: int) -> list[int]:
    """1, 2, 4, 8 ... and the last."""
    doubled = [2**i for i in range(most.bit_length()) if 2**i <= most]
    return sorted({*doubled, most})


def rollouts(bench: Bench) -> tuple[dict[str, Any], list[Tensor]]:
    """Quality by horizon, spread and motion. Also gives the dreams."""
    count, at = len(bench.clips), horizons(bench.horizon)
    bench.meter.begin(f"{count} rollouts of {bench.horizon} latents behind {bench.context} real ones", count)
    dreams: list[Tensor] = []
    errors: dict[str, list[np.ndarray]] = {"dream": [], "repeat_last": []}
    pictured: dict[str, list[np.ndarray]] = {name: [] for name in ("dream", "repeat_last", "ssim", "ssim_last", "moved", "real")}
    for number, clip in enumerate(bench.clips):
        made, real = bench.dream(clip, number), clip.latent[0, bench.context :].float()
        last = clip.latent[0, bench.context - 1].float().expand_as(real)
        dreams.append(made)
        for name, shown in (("dream", made), ("repeat_last", last)):
            errors[name].append((shown - real).square().mean(dim=(1, 2, 3)).cpu().numpy())
        if bench.player.codec is not None:
            _compare_pictures(bench, clip, made, at, pictured)
    stacked = {name: np.stack(rows) for name, rows in errors.items()}
    rows = []
    for i, h in enumerate(at):
        one = {name: rows[:, h - 1] for name, rows in stacked.items()}
        row: dict[str, Any] = {"horizon": h, "latent": {f"{n}_rmse": float(np.sqrt(e.mean())) for n, e in one.items()}}
        row["latent"]["gain"] = metrics.pooled_psnr(one["dream"], one["repeat_last"])
        row["latent"]["std"] = _ratio([d[h - 1] for d in dreams], [c.latent[0, bench.context + h - 1] for c in bench.clips])
        if pictured["dream"]:
            row |= _picture_row(pictured, i)
        rows.append(row)
    motion = {"latent": _motion(bench, dreams)}
    if pictured["dream"]:
        moved, real_moved = (float(np.mean(pictured[name])) for name in ("moved", "real"))
        motion["picture"] = {"dream": moved, "real": real_moved, "ratio": moved / real_moved if real_moved > 0 else None}
    first = motion.get("picture", motion["latent"])
    return {"by_horizon": rows, "motion": first | {"by_space": motion}}, dreams


def _compare_pictures(bench: Bench, clip: ClipBatch, made: Tensor, at: Sequence[int], into: dict[str, list[np.ndarray]]) -> None:
    """The last picture of the latent at every horizon, against that of the real latents through the same decoder."""
    codec, context = bench.player.codec, bench.context
    assert codec is not None
    begin = PER_LATENT * (context - 1)  # the last real picture
    real = codec.pictures(clip.latent[0])
    dream = codec.pictures(torch.cat((clip.latent[0, :context], made.to(clip.latent))))
    if len(bench.shown) < KEPT:
        bench.shown.append((real, dream))
    truth, made_there = (pictures[[begin + PER_LATENT * h for h in at]] for pictures in (real, dream))
    still = np.broadcast_to(real[begin], truth.shape)
    into["dream"].append(metrics.squared_error(made_there, truth))
    into["repeat_last"].append(metrics.squared_error(still, truth))
    into["ssim"].append(metrics.ssim(made_there, truth))
    into["ssim_last"].append(metrics.ssim(still, truth))
    into["moved"].append(np.array(metrics.motion(dream[begin:])))
    into["real"].append(np.array(metrics.motion(real[begin:])))


def _picture_row(pictured: dict[str, list[np.ndarray]], i: int) -> dict[str, Any]:
    dream, last, likeness, likeness_last = (
        np.stack(pictured[name])[:, i] for name in ("dream", "repeat_last", "ssim", "ssim_last")
    )
    psnr = {"dream": metrics.pooled_psnr(dream), "repeat_last": metrics.pooled_psnr(last), "gain": metrics.pooled_psnr(dream, last)}
    ssim = {"dream": likeness, "repeat_last": likeness_last, "gain": likeness - likeness_last}
    return {"psnr": psnr, "ssim": {name: metrics.summary(values) for name, values in ssim.items()}}


def _motion(bench: Bench, dreams: Sequence[Tensor]) -> dict[str, Any]:
    """Mean change between successive latents, from the last real one on."""
    moved = []
    for tail in (list(dreams), [c.latent[0, bench.context :] for c in bench.clips]):
        lasts = (c.latent[0, bench.context - 1 : bench.context] for c in bench.clips)
        moved.append(np.mean([float(torch.cat((a.to(t), t)).diff(dim=0).abs().mean()) for a, t in zip(lasts, tail, strict=True)]))
    dream, real = map(float, moved)
    return {"dream": dream, "real": real, "ratio": dream / real if real > 0 else None}


def _ratio(made: Sequence[Tensor], real: Sequence[Tensor]) -> float | None:
    spread = float(torch.stack([t.float() for t in real]).std())
    return float(torch.stack([t.float() for t in made]).std()) / spread if spread > 0 else None


# --- do the conditions matter ---------------------------------------------------------------------------------------------------


def camera_gap(bench: Bench, dreams: Sequence[Tensor]) -> dict[str, Any]:
    """How much nearer to the real latents the right camera leads than its mirror image, with the same noise."""
    if not bench.player.model.cfg.camera:
        return {"skipped": "nothing moves this world's camera"}
    return _gap(bench, dreams, "mirrored cameras", lambda clip, number: replace(clip, cameras=mirrored(clip)), sideways)


def prompt_gap(bench: Bench, dreams: Sequence[Tensor]) -> dict[str, Any]:
    """The same for the prompt of another clip."""
    texts = [clip.text for clip in bench.clips]
    others = [other for own in range(len(texts)) if (other := _other(texts, own)) is not None]
    if len(others) < len(texts):
        return {"skipped": "all held-out clips have the same prompt"}
    return _gap(bench, dreams, "other prompts", lambda clip, number: replace(clip, text=others[number]), None)


def _other(texts: Sequence[Tensor | None], own: int) -> Tensor | None:
    """The prompt of the next clip that has another."""
    mine = texts[own]
    following = (texts[(own + step) % len(texts)] for step in range(1, len(texts)))
    return next((text for text in following if text is not None and mine is not None and not torch.equal(mine, text)), None)


def _gap(
    bench: Bench,
    dreams: Sequence[Tensor],
    title: str,
    change: Callable[[ClipBatch, int], ClipBatch],
    noticed: Callable[[ClipBatch, int, int], bool] | None,
) -> dict[str, Any]:
    """In dB of the squared errors of latents, right minus changed, paired; turning: of the clips where the change is noticed."""
    bench.meter.begin(f"the same with {title}", len(bench.clips))
    right: list[np.ndarray] = []
    wrong: list[np.ndarray] = []
    for number, (clip, made) in enumerate(zip(bench.clips, dreams, strict=True)):
        real = clip.latent[0, bench.context :].float()
        for into, shown in ((right, made), (wrong, bench.dream(change(clip, number), number))):
            into.append((shown - real).square().mean(dim=(1, 2, 3)).cpu().numpy())
    rows = []
    for h in horizons(bench.horizon):
        a, b = (np.stack(errors)[:, h - 1] for errors in (right, wrong))
        row: dict[str, Any] = {"horizon": h, "all": metrics.pooled_psnr(a, b)}
        if noticed is not None:
            chosen = np.array([noticed(clip, bench.context, bench.context + h) for clip in bench.clips])
            row["turning"] = metrics.pooled_psnr(a[chosen], b[chosen])
        rows.append(row)
    return {"by_horizon": rows}


def mirrored(clip: ClipBatch) -> tuple[Tensor, Tensor]:
    """The clip's cameras with left and right exchanged."""
    assert clip.cameras is not None
    views, intrinsics = clip.cameras
    mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0], device=views.device))
    return mirror @ views @ mirror, intrinsics


def sideways(clip: ClipBatch, first: int, last: int) -> bool:
    """Whether the camera turns by a published step (3 degrees) or goes to the side by one, from latent first - 1 to last - 1."""
    assert clip.cameras is not None
    views = clip.cameras[0][0].double().cpu().numpy()
    moved = np.linalg.inv(views[last - 1] @ np.linalg.inv(views[first - 1]))  # the later camera, seen from the earlier
    yaw = np.degrees(np.arctan2(moved[0, 2], moved[2, 2]))
    return bool(abs(yaw) >= TURN - 1e-3 or abs(moved[0, 3]) >= STEP - 1e-5)


# --- playing on -------------------------------------------------------------------------------------------------------------------


def play_on(bench: Bench, rollouts: int, latents: int, window: int) -> dict[str, Any]:
    """Spread and motion of long dreams, by windows, over those of the held-out latents. A camera moves at random."""
    clips = [bench.clips[i] for i in np.unique(np.linspace(0, len(bench.clips) - 1, rollouts).astype(int))]
    bench.meter.begin(f"{len(clips)} rollouts of {latents} latents", len(clips))
    script = random_play(CAMERA_ACTIONS, len(clips), latents, bench.seed)
    dreams = torch.stack([bench.dream(_longer(clip, bench.context, script[i]), i) for i, clip in enumerate(clips)])
    real = torch.cat([clip.latent for clip in bench.clips]).float()
    whole, moved = float(real.std()), float(real.diff(dim=1).abs().mean())
    rows = []
    for start in range(0, latents - min(window, latents) + 1, window):
        part = dreams[:, start : start + window]
        change = float(part.diff(dim=1).abs().mean()) if part.shape[1] > 1 else None
        ratio = change / moved if change is not None and moved > 0 else None
        rows.append({"first": start + 1, "last": start + part.shape[1], "latent": float(part.std()) / whole, "motion": ratio})
    return {"rollouts": len(clips), "data": {"latent": whole, "motion": moved}, "over_data_by_window": rows}


def _longer(clip: ClipBatch, context: int, script: np.ndarray) -> ClipBatch:
    """The clip's beginning, then room for a dream of as many latents as the script has actions (N,A), which move its camera."""
    more = len(script)
    latent = torch.cat((clip.latent[:, :context], clip.latent.new_zeros(1, more, *clip.latent.shape[2:])), dim=1)
    longer = ClipBatch(
        latent, clip.action.new_zeros(1, context + more, 0), torch.ones_like(latent[:, :, 0, 0, 0], dtype=torch.bool)
    )
    if clip.cameras is None:
        return replace(longer, text=clip.text, negative=clip.negative)
    views, intrinsics = (part[:, :context] for part in clip.cameras)
    pose, walked = np.linalg.inv(views[0, -1].double().cpu().numpy()), []
    for row in script:
        pose = advance(pose, camera_motion(CAMERA_ACTIONS.decode(row), 1))
        walked.append(np.linalg.inv(pose))
    on = torch.from_numpy(np.stack(walked)).to(views)[None]
    cameras = torch.cat((views, on), dim=1), torch.cat((intrinsics, intrinsics[:, -1:].expand(-1, more, -1, -1)), dim=1)
    return replace(longer, text=clip.text, negative=clip.negative, cameras=cameras)
