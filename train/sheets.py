"""Sample sheets: rows of pictures with labels, one PNG. Real frames are always the upper row of a pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from train.dreamer import Dreamer
from train.unpack import Frames
from worldmodel.diffusion import euler_sigmas, sample
from worldmodel.session import open_session

if TYPE_CHECKING:
    from train.stages.flow import FlowMatching
    from train.video_codec import VideoCodec

LABEL_WIDTH = 64
ONE_STEP_FRAMES = 8
ROLLOUT_FRAMES = 16
TEACHER_STEPS = 16
SHEET_CLIPS = 2
COLUMNS, PICTURE_WIDTH = 9, 208  # of videos


def write_rows(path: Path, rows: list[tuple[str, np.ndarray]]) -> None:
    """Draw rows of (label, uint8 (n,H,W,3)) below each other."""
    height, width = rows[0][1].shape[1:3]
    longest = max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (LABEL_WIDTH + longest * (width + 2), len(rows) * (height + 2)), (24, 24, 28))
    draw = ImageDraw.Draw(sheet)
    for row, (label, pictures) in enumerate(rows):
        top = row * (height + 2)
        draw.text((4, top + height // 2 - 6), label, fill=(230, 230, 230))
        for column, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (LABEL_WIDTH + column * (width + 2), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.png")
    sheet.save(temporary)
    temporary.replace(path)


def _held_out_stretch(data: Frames, number: int, length: int) -> slice:
    """Frames of a held-out episode, `length` of them or as many as it has; other numbers, other episodes."""
    starts, lengths = data.part(held_out=True)
    start, available = int(starts[number % len(starts)]), int(lengths[number % len(starts)])
    offset = max(0, available - length) // 2
    return slice(start + offset, start + offset + min(length, available))


def rollout_sheet(path: Path, world: Path, data: Frames, device: torch.device, stretches: int = 2) -> None:
    """Rollouts of 16 frames of the exported world, and its predictions one step (one chunk) beyond real context."""
    session = open_session(world, device=device.type, threads=torch.get_num_threads())
    try:
        dreamer = Dreamer(session.config, session.model, session.codec, session.steps)
        rows = [row for number in range(stretches) for row in _rollout_rows(dreamer, data, number)]
    finally:
        session.close()
    write_rows(path, rows)


def _rollout_rows(dreamer: Dreamer, data: Frames, number: int) -> list[tuple[str, np.ndarray]]:
    chunk, window = dreamer.chunk, dreamer.config.sampler.window
    stretch = _held_out_stretch(data, number, window + ROLLOUT_FRAMES)
    real, actions = np.array(data.frames[stretch]), np.array(data.actions[stretch])
    context = max(chunk, min(window, len(real) - ROLLOUT_FRAMES))
    part = slice(context, context + ROLLOUT_FRAMES)
    dream = np.concatenate(list(dreamer.rollout(real[None, :context], actions[None, :context], actions[None, part], [number])))
    firsts = [first for first in range(0, ONE_STEP_FRAMES, chunk) if first + context + chunk <= len(real)]
    starts, acts = (np.stack([x[first : first + context] for first in firsts]) for x in (real, actions))
    scripts = np.stack([actions[first + context : first + context + chunk] for first in firsts])
    made = np.stack(list(dreamer.rollout(starts, acts, scripts, [number] * len(firsts))), axis=1)
    return [("real", real[part]), ("rollout", dream), ("one step", made.reshape(-1, *made.shape[2:])[:ONE_STEP_FRAMES])]


def spread(pictures: np.ndarray, count: int = COLUMNS) -> np.ndarray:
    """About `count` of the pictures (F,H,W,3), evenly chosen, the first and the last among them; wide ones are made smaller."""
    chosen = pictures[np.unique(np.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().astype(int))]
    height, width = chosen.shape[1:3]
    if width <= PICTURE_WIDTH:
        return chosen
    size = PICTURE_WIDTH, round(height * PICTURE_WIDTH / width)
    return np.stack([np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX)) for picture in chosen])


def video_sheet(path: Path, codec: VideoCodec, real: Tensor, made: Tensor, label: str) -> None:
    """Clips of latents `real` (B,T,C,h,w) above the same with their last frames replaced by `made` (B,t,C,h,w)."""
    kept, rows = real.shape[1] - made.shape[1], []
    for clip, dream in zip(real, made, strict=True):
        rows += [("real", spread(codec.pictures(clip))), (label, spread(codec.pictures(torch.cat((clip[:kept], dream.to(clip))))))]
    write_rows(path, rows)


@torch.no_grad()
def teacher_sheet(path: Path, stage: FlowMatching, pictures: Callable[[Tensor], np.ndarray]) -> None:
    """Whole held-out clips that a bidirectional network makes from noise and the clip's conditions, below the real ones.

    pictures: latents (T,C,h,w) of a clip -> what to show of it, uint8 (n,H,W,3).
    """
    batch = stage.held_out.batch(stage.held_out.sampler.spread(SHEET_CLIPS))
    noise = torch.randn(batch.latent.shape, generator=torch.Generator().manual_seed(0)).to(batch.latent.device)

    def denoise(noisy: Tensor, sigma: float, end: float) -> Tensor:
        level = torch.full(noisy.shape[:2], sigma, device=noisy.device)
        with stage.context.autocast():
            return stage.model(noisy, level, layout=stage.layout, **batch.conditions()).float()

    with torch.compiler.set_stance("force_eager"):
        made = sample(denoise, noise, euler_sigmas(TEACHER_STEPS, stage.options.shift))
        clips = zip(batch.latent, made, strict=True)
        write_rows(path, [row for real, dream in clips for row in (("real", pictures(real)), ("teacher", pictures(dream)))])
