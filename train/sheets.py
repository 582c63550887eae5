"""Sample sheets: rows of pictures with labels, one PNG. Real frames are always the upper row of a pair."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw

from train.dreamer import Dreamer
from train.unpack import Frames
from worldmodel.diffusion import euler_sigmas, sample
from worldmodel.models.codec import to_uint8
from worldmodel.session import open_session

if TYPE_CHECKING:
    from train.stages.flow import FlowMatching

LABEL_WIDTH = 64
ONE_STEP_FRAMES = 8
ROLLOUT_FRAMES = 16
TEACHER_STEPS = 16


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


@torch.no_grad()
def teacher_sheet(path: Path, stage: FlowMatching) -> None:
    """Whole held-out clips that a bidirectional network makes from noise and the clip's actions, below the real ones."""
    batch = stage.held_out.batch(stage.held_out.sampler.spread(2))
    noise = torch.randn(batch.latent.shape, generator=torch.Generator().manual_seed(0)).to(batch.latent.device)

    def denoise(noisy: torch.Tensor, sigma: float, end: float) -> torch.Tensor:
        level = torch.full(noisy.shape[:2], sigma, device=noisy.device)
        with stage.context.autocast():
            return stage.model(noisy, level, layout=stage.layout, **batch.conditions()).float()

    with torch.compiler.set_stance("force_eager"):
        made = sample(denoise, noise, euler_sigmas(TEACHER_STEPS, stage.options.shift))
        rows: list[tuple[str, np.ndarray]] = []
        for name, latents in (("real", batch.latent), ("teacher", made)):
            pictures = stage.recorded.trained.codec.decode(latents[:, ::2].flatten(0, 1)).unflatten(0, (latents.shape[0], -1))
            rows += [(name, to_uint8(clip).cpu().numpy()) for clip in pictures]
    write_rows(path, [rows[0], rows[2], rows[1], rows[3]])
