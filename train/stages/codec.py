"""Stage "codec": the small frame autoencoder. Shapes: N pictures, H W pixels, C h w latent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from train.config import codec_config
from train.data import Store
from train.latents import open_frames
from train.objectives import psnr, reconstruction
from train.sheets import write_rows
from train.stage_options import CodecStage
from train.stages.base import Context, Progress, Stage, Update
from train.weights import export_codec
from worldmodel.errors import ConfigError
from worldmodel.models.codec import FrameCodec, to_float, to_uint8

HELD_OUT_FRAMES = 512
SHEET_FRAMES = 8


class CodecTraining(Stage):
    """L1 + gradient L1 + MSE through noised latents, with a light pull of the latents to zero so that the noise keeps its bite."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        options = context.config.stage
        assert isinstance(options, CodecStage)
        self.options = options
        self.data = open_frames(context)
        height, width = self.data.size
        if height % 8 or width % 8:
            raise ConfigError(
                f"the codec needs frames whose sides are multiples of 8, got {width}x{height}: record at another size"
            )
        self._frames = Store(self.data.frames, context.device, context.config.train.on_gpu)
        self._train_index, self._held_out_index = self._indices(False), self._indices(True)
        torch.manual_seed(context.config.seed)  # initial weights only: all later randomness is derived
        self.config = codec_config(context.config)
        self.codec = FrameCodec(self.config).to(context.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if context.compiled:
            self.codec.encoder.compile(dynamic=False)
            self.codec.decoder.compile(dynamic=False)
        self._held_out: dict[str, float] = {}

    def _indices(self, held_out: bool) -> Tensor:
        starts, lengths = self.data.part(held_out)
        return torch.from_numpy(np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]))

    def modules(self) -> dict[str, nn.Module]:
        return {"codec": self.codec}

    def _pictures(self, indices: Tensor) -> Tensor:
        return to_float(self._frames.pick(indices)).contiguous(memory_format=torch.channels_last)

    def updates(self, step: int) -> Iterator[Update]:
        o = self.options
        for micro in range(o.accumulate):
            draws = self.context.draws(step, micro)
            real = self._pictures(self._train_index[draws.integers("frames", len(self._train_index))])
            with self.context.autocast():
                made, raw = self.codec.training_forward(real, o.noise_std, draws.generator("latent_noise"))
            error = reconstruction(made, real, o.l1_weight, o.gradient_weight, o.mse_weight)
            loss = error + o.latent_weight * raw.float().square().mean()
            with torch.no_grad():
                metrics = {"psnr": psnr(made, real).mean(), "latent_std": raw.float().std()}
            yield Update("codec", loss, o.batch, metrics)

    def flops(self) -> float:
        height, width = self.data.size
        model = FrameCodec(self.config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.training_forward(torch.zeros(1, 3, height, width), 0.0)
        return 3.0 * counter.get_total_flops() * self.options.batch * self.options.accumulate

    @torch.no_grad()
    def _scale(self, count: int) -> None:
        """Fix the unit scale from raw latents of `count` training frames spread evenly."""
        chosen = self._train_index[torch.linspace(0, len(self._train_index) - 1, min(count, len(self._train_index))).long()]
        total = torch.zeros(2, self.config.channels, dtype=torch.float64, device=self.context.device)
        pixels = 0
        for part in chosen.split(256):
            with self.context.autocast():
                raw = self.codec.encoder(self._pictures(part)).double()
            total += torch.stack((raw.sum(dim=(0, 2, 3)), raw.square().sum(dim=(0, 2, 3))))
            pixels += raw.shape[0] * raw.shape[2] * raw.shape[3]
        mean = total[0] / pixels
        std = (total[1] / pixels - mean.square()).clamp(min=1e-12).sqrt()
        self.codec.set_scale(mean.float(), std.float())

    def _round_trip(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        real = self._pictures(indices)
        with torch.compiler.set_stance("force_eager"), self.context.autocast():
            return real, self.codec.decode(self.codec.encode(real))

    def validate(self) -> dict[str, float]:
        """PSNR of held-out frames, without latent noise, through the unit scale that the export gets."""
        with torch.compiler.set_stance("force_eager"):
            self._scale(1024)
        count = min(HELD_OUT_FRAMES, len(self._held_out_index))
        chosen = self._held_out_index[torch.linspace(0, len(self._held_out_index) - 1, count).long()]
        values = [psnr(made, real) for real, made in map(self._round_trip, chosen.split(64))]
        self._held_out = {"held_out_psnr": float(torch.cat(values).mean())}
        return self._held_out

    def sheet(self, path: Path, exported: Path | None) -> None:
        """Held-out frames above their round trip."""
        chosen = self._held_out_index[torch.linspace(0, len(self._held_out_index) - 1, SHEET_FRAMES).long()]
        real, made = self._round_trip(chosen)
        write_rows(path, [("real", to_uint8(real).cpu().numpy()), ("codec", to_uint8(made).cpu().numpy())])

    def export(self, progress: Progress, final: bool) -> Path | None:
        if final:
            with torch.compiler.set_stance("force_eager"):
                self._scale(self.options.scale_frames)
        info: dict[str, Any] = {"data": self.data.digest, "step": progress.step, "pictures": progress.targets, **self._held_out}
        return export_codec(self.context.folder / "export", self.config, self.codec.state_dict(), info)
