"""Stage 0: bidirectional, action-conditioned flow matching. Every frame sees the whole clip; one noise level per clip."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from train.data import Draws
from train.latents import RecordedLatents
from train.sheets import spread, teacher_sheet
from train.stages.base import Progress
from train.stages.flow import FlowMatching
from train.videos import VideoLatents
from worldmodel.models.attention import Layout
from worldmodel.models.codec import to_uint8


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
            codec = self.data.trained.codec
            teacher_sheet(path, self, lambda clip: to_uint8(codec.decode(clip[::2])).cpu().numpy())
        elif isinstance(self.data, VideoLatents) and (shown_by := self.data.shown_by) is not None:
            teacher_sheet(path, self, lambda clip: spread(shown_by.pictures(clip)))

    def export(self, progress: Progress, final: bool) -> Path | None:
        return self.export_weights(progress)
