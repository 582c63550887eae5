"""Video networks with random weights, for measurements: they cost what trained ones cost, and nothing has to be fetched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from worldmodel import runtime
from worldmodel.action import ActionSpec
from worldmodel.config import CodecConfig, DiTConfig, SamplerConfig, WorldConfig
from worldmodel.models.dit import DiT
from worldmodel.models.wan.tiny_decoder import TinyDecoder
from worldmodel.video_session import VideoSession

SIZES = {
    "1.3b": WorldConfig(
        name="random-1.3b",
        height=480,
        width=832,
        fps=16,
        family="wan",
        frames_per_latent=4,
        model=DiTConfig(
            dim=1536, layers=30, heads=12, ffn_dim=8960, in_channels=16, out_channels=16, text_dim=4096, activation="gelu_tanh"
        ),
        actions=ActionSpec(),
        codec=CodecConfig(kind="taehv"),
        sampler=SamplerConfig(kind="consistency", shift=5.0, presets=(1, 2, 4), steps=2, window=12, first_steps=4),
    )
}
"""By name: the 1.3B network of Wan 2.1 at 832x480, two steps and a commit a latent, and the tiny decoder."""


def random_video(
    size: str,
    device: torch.device,
    dtype: torch.dtype,
    steps: int | None = None,
    window: int | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> VideoSession:
    """A session of a size of `SIZES`; weights are drawn on `device` in `dtype`. steps, window: None is the size's own.

    say: is told what begins.
    """
    config = SIZES[size]
    if window is not None:
        config = replace(config, sampler=replace(config.sampler, window=window))
    say(f"drawing random weights on {device.type} in {str(dtype).removeprefix('torch.')}")
    torch.manual_seed(0)
    with torch.device(device), _default(dtype):
        model, decoder = DiT(config.model), TinyDecoder()
    runtime.synchronize(device)
    say("dreaming the first chunk")
    return VideoSession(config, model, decoder, [torch.randn(64, config.model.text_dim)], device, dtype, steps)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
