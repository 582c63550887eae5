"""What the loop expects of a stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.config import RunConfig
from train.data import Draws
from train.distributed import Ranks
from train.made_once import Report
from train.options import Precision, Switch
from train.stage_options import TrainingOptions
from worldmodel.runtime import pick_dtype


@dataclass(frozen=True)
class Update:
    """One micro-batch, ready for backward. The loop averages `accumulate` of them into one optimiser step of module `target`.

    targets: frames (codec: pictures) the loss was taken over on this rank. metrics: scalars on the device, averaged for the log.
    """

    target: str
    loss: Tensor
    targets: int
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Where a run stands, for the world card. targets: frames learnt from, over all ranks."""

    step: int
    targets: int
    seconds: float


@dataclass(frozen=True)
class Context:
    """What every stage is given: settings, place in the process group, run folder, precision, and a way to tell people things.

    size: (H, W) of pictures that are not there: nothing is read, networks are shapes on the meta device (train.estimate).
    """

    config: RunConfig
    ranks: Ranks
    folder: Path
    report: Report
    size: tuple[int, int] | None = None

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def options(self) -> TrainingOptions:
        """The settings that all training stages share."""
        assert isinstance(self.config.stage, TrainingOptions)
        return self.config.stage

    @property
    def dtype(self) -> torch.dtype:
        """Type that matrices are multiplied in."""
        wanted = self.config.train.precision
        if wanted is Precision.auto:
            fast = pick_dtype(self.device)
            return fast if fast is torch.bfloat16 else torch.float32  # float16 would need scaled losses
        return torch.bfloat16 if wanted is Precision.bf16 else torch.float32

    def autocast(self) -> torch.autocast:
        """For forward passes. Sharded weights are not to be cached: whole copies of them would pile up."""
        on, sharded = self.dtype is torch.bfloat16, self.config.train.fsdp
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on, cache_enabled=not sharded)

    @property
    def compiled(self) -> bool:
        """Whether networks are compiled: by ``train.compile``, auto = on CUDA."""
        wanted = self.config.train.compile
        return wanted is Switch.on or (wanted is Switch.auto and self.device.type == "cuda")

    def draws(self, step: int, micro: int) -> Draws:
        return Draws(self.config.seed, step, micro, self.ranks, self.options.batch)


class Stage(ABC):
    """One way to train. The loop owns optimisers, averages, clocks and files; a stage owns networks, data and losses.

    `validate`, `rollout_statistics`, `sheet` and `export` are called with the averaged weights in place, on rank 0 only, where
    sharded networks are whole meanwhile. tokens: of the transformer, per target (0: there is none).
    """

    tokens: int = 0

    def __init__(self, context: Context) -> None:
        self.context = context

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """The trained networks by target name, on the device, fp32."""

    @abstractmethod
    def updates(self, step: int) -> Iterator[Update]:
        """The updates of optimiser step `step` (from 0), lazily: each loss is backpropagated before the next is asked for."""

    @abstractmethod
    def flops(self) -> float:
        """Floating-point operations, forward and backward, of one step on this rank (2 per multiply-add)."""

    def rate(self, target: str, step: int) -> float:
        """Learning rate of a target at a step as a share of ``stage.lr``."""
        return 1.0

    def costs(self) -> dict[str, float]:
        """What the run took beside its steps: prepare_seconds, prepare_flops, stored_bytes."""
        return {}

    def validate(self) -> dict[str, float]:
        """Numbers on held-out episodes, the same draws every time."""
        return {}

    def rollout_statistics(self) -> dict[str, float] | None:
        """Own rollouts against held-out clips, for train.guards: rollout_std and rollout_motion, ratios, and more; or None.

        rollout_std: standard deviation of the latents. rollout_motion: mean absolute change between successive latents.
        """
        return None

    def sheet(self, path: Path, exported: Path | None) -> None:
        """Write a picture that shows what the network can do now. exported: the folder exported a moment ago, if any."""
        return None

    def export(self, progress: Progress, final: bool) -> Path | None:
        """Write public weights; returns the folder."""
        return None

    def extra_state(self) -> dict[str, Any]:
        """What else must survive a restart."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of `extra_state`."""
        return None
