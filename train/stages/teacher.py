"""Stage 0: bidirectional, action-conditioned flow matching. Every frame sees the whole clip; one noise level per clip."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from train.data import Draws
from train.latents import RecordedLatents
from train.sheets import teacher_sheet
from train.stages.base import Progress
from train.stages.flow import FlowMatching
from worldmodel.models.attention import Layout


class Teacher(FlowMatching):
    """The network that later scores whole clips; its weights also start the autoregressive stage (``init=``)."""

    @property
    def layout(self) -> Layout:
        return Layout.bidirectional()

    def sigma(self, draws: Draws, frames: int) -> Tensor:
        return self.levels(draws, 1).expand(-1, frames)

    def sheet(self, path: Path, exported: Path | None) -> None:
        """Real held-out clips above what the teacher makes of their actions alone."""
        if isinstance(self.data, RecordedLatents):
            teacher_sheet(path, self)

    def export(self, progress: Progress, final: bool) -> Path | None:
        return self.export_weights(progress)
