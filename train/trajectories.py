"""Trajectories of a teacher's ODE, made once and stored: what causal ODE, Self Forcing and CausVid regress on.

Shapes: P stored clips, K kept states, B clips of one batch, T frames, C H W latent.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train.data import ClipBatch
from train.made_once import GrowingArray, Report, make_once, open_array
from train.record import read_json
from worldmodel.data.episode import write_atomic
from worldmodel.diffusion import shifted_grid
from worldmodel.runtime import generator

Velocity = Callable[[Tensor, Tensor, ClipBatch], Tensor]
"""(noisy (B,T,C,H,W), sigma (B,T), clips) -> the teacher's velocity."""


@dataclass(frozen=True)
class Trajectories:
    """states: float16 (P,K+1,T,C,H,W), memory-mapped: K falling noise levels `sigmas`, then the end. clips: their numbers (P,).

    seconds: it took to make them, over all sittings; of a killed one, up to where the next went on.
    """

    states: np.ndarray
    sigmas: Tensor
    clips: Tensor
    seconds: float

    @property
    def bytes(self) -> int:
        return int(self.states.nbytes)

    def pick(self, index: Tensor, device: torch.device) -> Tensor:
        """Trajectories (B,K+1,T,C,H,W) float32 at `index` (B,) on the CPU."""
        return torch.from_numpy(self.states[index.numpy()]).to(device).float()


@dataclass(frozen=True)
class Plan:
    """What a stored set depends on. key: names teacher, layout and guidance. kept: how many of the levels are stored."""

    folder: Path
    key: str
    pairs: int
    levels: int
    kept: int
    shift: float
    seed: int
    shape: tuple[int, ...]

    @property
    def grid(self) -> Tensor:
        """Noise levels of the walk, float64, falling."""
        return shifted_grid(self.levels, self.shift)

    @property
    def every(self) -> int:
        """One level in so many is stored."""
        return self.levels // self.kept


@torch.no_grad()
def trajectories(
    plan: Plan, count: int, batch: Callable[[Tensor], ClipBatch], velocity: Velocity, tell: Report, size: int
) -> Trajectories:
    """Load the stored set of `plan`, or make it: Euler from pure noise over G(levels, shift) on `pairs` random clips.

    count: clips there are to choose from. batch: clip numbers -> clips. size: clips at a time. A killed run goes on where it was.
    """
    numbers = torch.randint(count, (plan.pairs,), generator=generator(plan.seed, "trajectories"))
    parts = (plan.key, plan.pairs, plan.levels, plan.kept, plan.shift, plan.seed, plan.shape)
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    final = plan.folder / f"trajectories-{name}.npy"
    clock = final.with_suffix(".json")
    make_once(final, lambda: _make(plan, numbers, batch, velocity, tell, size, final), tell)
    return Trajectories(open_array(final, plan.pairs), plan.grid[:: plan.every].float(), numbers, _seconds(clock))


def imagined(plan: Plan) -> Trajectories:
    """What `trajectories` would make, without its content or its memory: for counting bytes."""
    states = np.broadcast_to(np.float16(0), (plan.pairs, plan.kept + 1, *plan.shape))
    return Trajectories(states, plan.grid[:: plan.every].float(), torch.arange(0), 0.0)


def _seconds(clock: Path) -> float:
    """What the file beside a stored set says of its making; 0 if there is none."""
    value = (read_json(clock) or {}).get("seconds")
    return float(value) if isinstance(value, int | float) else 0.0


def _make(
    plan: Plan,
    numbers: Tensor,
    batch: Callable[[Tensor], ClipBatch],
    velocity: Velocity,
    tell: Report,
    size: int,
    final: Path,
) -> None:
    clock, array = final.with_suffix(".json"), GrowingArray(final, (plan.pairs, plan.kept + 1, *plan.shape))
    told = time.monotonic()
    began = told - (_seconds(clock) if array.done else 0.0)
    for start in range(array.done, plan.pairs, size):
        clips = batch(numbers[start : start + size])
        noise = torch.randn(clips.latent.shape, generator=generator(plan.seed, "trajectory_noise", start)).to(clips.latent.device)
        array.rows[start : start + size] = torch.stack(_walk(noise, plan, clips, velocity), dim=1).half().cpu().numpy()
        if time.monotonic() - told > 10:
            told = time.monotonic()
            write_atomic(clock, json.dumps({"seconds": told - began}).encode())
            array.keep(min(start + size, plan.pairs))
            tell(f"made {array.done} of {plan.pairs} trajectories")
    write_atomic(clock, json.dumps({"seconds": time.monotonic() - began}).encode())
    array.finish()


def _walk(noise: Tensor, plan: Plan, clips: ClipBatch, velocity: Velocity) -> list[Tensor]:
    """Euler from level to level; the states at the stored levels, then the end at level 0."""
    noisy, kept = noise, []
    sigmas = plan.grid.tolist()
    for i, (sigma, following) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        if i % plan.every == 0:
            kept.append(noisy)
        levels = torch.full(noisy.shape[:2], sigma, device=noisy.device)
        noisy = noisy + (following - sigma) * velocity(noisy, levels, clips)
    return [*kept, noisy]
