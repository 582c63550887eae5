"""What teacher and autoregressive stage share: latents, the transformer, noise levels, held-out loss.

Shapes: B clips of this process, T frames, C H W latent, A action.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from train.config import dit_config, sampler_config
from train.data import ClipBatch, Clips, Draws
from train.distributed import Ranks, prepare_network
from train.latents import RecordedLatents, open_latents
from train.objectives import bell_weight, flow_matching
from train.options import NoiseLevels, Weighting
from train.sources import places
from train.stage_options import FlowStage
from train.stages.base import Context, Progress, Stage, Update
from train.weights import export_network, load_network
from worldmodel.config import DiTConfig, SamplerConfig
from worldmodel.diffusion import add_noise, shift_sigma, velocity_target
from worldmodel.errors import ConfigError
from worldmodel.models.attention import Layout
from worldmodel.models.dit import DiT

HELD_OUT_CLIPS = 64


def dit_flops(config: DiTConfig, tokens: int, layout: Layout, frames: int) -> float:
    """Forward operations of one clip: 2 per multiply-add of dense layers, patch and head, and of visible query-key pairs.

    With prompts also what makes their keys and values in every block; a camera branch attends a second time.
    """
    mask = layout.frame_mask(frames)
    length = len(mask) * tokens
    block = (5 if config.camera else 4) * config.dim**2 + 2 * config.dim * config.ffn_dim
    ends = (config.in_channels + config.out_channels) * config.patch**2 * config.dim
    per_frame = config.freq_dim * config.dim + config.dim**2 + 6 * config.dim**2
    text = 0
    if config.text_dim:
        text = config.text_len * (config.text_dim * config.dim + config.dim**2)
        text += config.layers * (2 * (length + config.text_len) * config.dim**2 + 2 * length * config.text_len * config.dim)
    return (
        2.0 * length * (config.layers * block + ends)
        + 2.0 * len(mask) * per_frame
        + 2.0 * text
        + attention_flops(config, tokens, layout, frames)
    )


def attention_flops(config: DiTConfig, tokens: int, layout: Layout, frames: int) -> float:
    """Of them the self-attention: two products over the visible pairs of queries and keys, in all layers."""
    pairs = int(layout.frame_mask(frames).sum()) * tokens**2
    return 4.0 * pairs * config.dim * config.layers * (2 if config.camera else 1)


@dataclass(frozen=True)
class Pass:
    """A pass over a clip of `frames` that keeps activations for `target`'s backward. cached: chunk by chunk against a cache.

    share: of the steps that make it.
    """

    target: str
    layout: Layout
    frames: int
    cached: bool = False
    share: float = 1.0


class FlowMatching(Stage):
    """Velocity regression on clips of latents. Subclasses say who sees whom and how noise levels are shared."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        options = context.config.stage
        assert isinstance(options, FlowStage)
        self.options = options  # a stage that has settings of its own declares their type anew
        self.data = open_latents(context)
        self.model_config = dit_config(context.config, self.data.shape[0], self.data.spec.width)
        self.clips, self.held_out = self.make_clips(False), self.make_clips(True)
        self.latent_shape = self.data.shape
        rows, cols = self.latent_shape[1:]
        if rows % self.model_config.patch or cols % self.model_config.patch:
            raise ConfigError(
                f"a latent of {rows}x{cols} cannot be cut into patches of {self.model_config.patch}: change model.dit.patch"
            )
        self.tokens = rows * cols // self.model_config.patch**2
        self.model = self.network()

    def network(self, path: str | None = None, key: str = "init", config: DiTConfig | None = None) -> DiT:
        """A transformer for this data on the device, fp32, with the weights of the run `path` (default: what this run starts from).

        key: the setting that `path` is the value of. config: default that of the trained network.
        """
        context = self.context
        path = context.config.init if path is None else path
        torch.manual_seed(context.config.seed)  # initial weights only: all later randomness is derived
        with torch.device("cpu" if context.size is None else "meta"):
            model = DiT(config or self.model_config)
        model = model.to(context.device)
        if path and context.size is None:
            load_network(path, model, key=key, place=self.data.place)
        return prepare_network(model, context.ranks, context.config.train, context.compiled)

    @property
    def pictured(self) -> int:
        """Channels of a latent that are of the picture: the first."""
        return self.latent_shape[0] - self.data.place

    @property
    def recorded(self) -> RecordedLatents:
        """The data, of a run on recorded episodes."""
        assert isinstance(self.data, RecordedLatents)
        return self.data

    def make_clips(self, held_out: bool) -> Clips:
        return self.data.clips(self.options.clip_frames, held_out)

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """Who sees whom in training."""

    @abstractmethod
    def sigma(self, draws: Draws, frames: int) -> Tensor:
        """Noise levels (B,T) of a batch."""

    def clean_context(self, batch: ClipBatch, draws: Draws) -> dict[str, Tensor]:
        """Extra inputs of the network: the clean half of teacher forcing."""
        return {}

    def sampler(self) -> SamplerConfig:
        """How an exported world is played."""
        return sampler_config(self.context.config)

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    def levels(self, draws: Draws, count: int) -> Tensor:
        """Noise levels (B,count) of the configured distribution."""
        if self.options.noise_levels is NoiseLevels.logit_normal:
            normal = draws.normal("sigma", count) * self.options.logit_std + self.options.logit_mean
            return shift_sigma(normal.sigmoid(), self.options.shift)
        return shift_sigma(1 - draws.uniform("sigma", count), self.options.shift)

    def loss(self, batch: ClipBatch, draws: Draws, keep: Tensor) -> Tensor:
        """Flow-matching loss of a batch; keep: bool (B,), False hides the actions from the network."""
        frames = batch.latent.shape[1]
        sigma, noise = self.sigma(draws, frames), draws.normal("noise", *batch.latent.shape[1:])
        with self.context.autocast():
            velocity = self.model(
                add_noise(batch.latent, noise, sigma),
                sigma,
                layout=self.layout,
                **batch.conditions(keep),
                **self.clean_context(batch, draws),
            )
        weight = bell_weight(sigma) if self.options.weighting is Weighting.bell else None
        target = velocity_target(batch.latent, noise)
        if self.data.place and self.options.place_weight != 1.0:
            scale = torch.ones(len(target[0, 0]), device=target.device)
            scale[self.pictured :] = self.options.place_weight**0.5
            velocity, target = (v * scale[:, None, None] for v in (velocity, target))
        return flow_matching(velocity, target, batch.mask, weight)

    def drifted(self, batch: ClipBatch, draws: Draws) -> ClipBatch:
        """`batch` as it is learned from: see ArDiffusion."""
        return batch

    def updates(self, step: int) -> Iterator[Update]:
        for micro in range(self.options.accumulate):
            draws = self.context.draws(step, micro)
            keep = draws.uniform("action") >= self.options.action_dropout
            loss = self.loss(self.drifted(self.clips.draw(draws), draws), draws, keep)
            yield Update("model", loss, self.options.batch * self.options.clip_frames)

    def export_weights(self, progress: Progress, sampler: SamplerConfig | None = None) -> Path:
        """Write ``<run>/export`` with the network alone, in fp32; docs/video.md says how one plays it. sampler: of its rollouts."""
        stage = self.options.kind
        info = {
            "stage": stage,
            "data": self.data.digest,
            "codec": self.data.codec,
            "step": progress.step,
            "targets": progress.targets,
            **places(self.context.config),
        }
        return export_network(self.context.folder / "export", self.model_config, self.model.state_dict(), info, sampler)

    def passes(self) -> list[Pass]:
        """The passes with gradients of a step's updates; those of one target are kept at the same time."""
        return [Pass("model", self.layout, self.options.clip_frames)]

    def flops(self) -> float:
        one = dit_flops(self.model_config, self.tokens, self.layout, self.options.clip_frames)
        return 3.0 * one * self.options.batch * self.options.accumulate

    def validate(self) -> dict[str, float]:
        """Loss on fixed held-out clips with fixed noise; and how much worse it gets when the actions are hidden."""
        size = min(self.options.batch, 16)
        alone = Ranks(0, 1, self.context.device)
        numbers = self.held_out.sampler.spread(HELD_OUT_CLIPS)
        sums = np.zeros(2)
        with torch.compiler.set_stance("force_eager"):  # a compiled graph for these few passes would cost more than it saves
            for i, part in enumerate(numbers.split(size)):
                for column, known in enumerate((True, False)):
                    draws = Draws(0, i, 0, alone, len(part))
                    keep = torch.full((len(part),), known, device=self.context.device)
                    sums[column] += float(self.loss(self.held_out.batch(part), draws, keep)) * len(part)
        right, hidden = sums / len(numbers)
        return {"held_out_loss": float(right), "action_gain": float(hidden - right)}
