"""How much an evaluation dreams: a look in passing, a comparison of several worlds, or the numbers one reports."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from train.options import EvaluationSize
from train.probes import ProbeOptions


@dataclass(frozen=True)
class Size:
    """rollouts, horizons, gaps: of the rollouts with recorded actions, right and mirrored. random_*: of random play.

    returns: starts of the return tests; 0 leaves them and the real game out. rest_frames: of standing still, from as many starts
    as random play has. speed_steps: steps of one player's session.
    """

    name: str = "full"
    rollouts: int = 32
    horizons: tuple[int, ...] = (1, 4, 8, 16, 32, 64)
    gaps: tuple[int, ...] = (1, 4, 8, 16)
    random_rollouts: int = 8
    random_frames: int = 1000
    returns: int = 16
    turn_frames: int = 80
    walk_frames: int = 10
    rest_frames: int = 180
    speed_steps: int = 60
    codec_frames: int = 1024
    probes: ProbeOptions = field(default_factory=ProbeOptions)


def choose(size: EvaluationSize, rollouts: int, device: str, random_frames: int = 0) -> Size:
    """The amounts of a size for `rollouts` held-out stretches (at most 6 in the quick one).

    random_frames: of random play, 0 = as many as the size has.
    """
    made = {
        EvaluationSize.quick: lambda: _quick(min(rollouts, 6)),
        EvaluationSize.compare: lambda: _compare(rollouts),
        EvaluationSize.full: lambda: _full(rollouts, device),
    }[size]()
    return replace(made, random_frames=random_frames or made.random_frames)


def _full(rollouts: int, device: str) -> Size:
    """The evaluation one reports: a quarter of an hour on two CPU cores, where the probes learn from smaller pictures."""
    if device == "cpu":
        return Size(rollouts=rollouts, probes=ProbeOptions(steps=1500, batch=64, frames=20_000, scale=2))
    return Size(rollouts=rollouts)


def _compare(rollouts: int) -> Size:
    """To rank worlds: under a minute on a GPU, four on two CPU cores."""
    return Size(
        name="compare",
        rollouts=rollouts,
        horizons=(1, 4, 8, 16, 32),
        random_rollouts=4,
        random_frames=300,
        returns=0,
        rest_frames=120,
        speed_steps=30,
        codec_frames=256,
        probes=ProbeOptions(steps=300, batch=48, frames=8000, scale=2),
    )


def _quick(rollouts: int) -> Size:
    """A look in passing: two minutes on two CPU cores."""
    return Size(
        name="quick",
        rollouts=rollouts,
        horizons=(1, 4, 8, 16, 32),
        random_rollouts=2,
        random_frames=120,
        returns=2,
        turn_frames=36,
        walk_frames=8,
        rest_frames=60,
        speed_steps=20,
        codec_frames=128,
        probes=ProbeOptions(steps=200, batch=32, frames=6000, scale=2),
    )
