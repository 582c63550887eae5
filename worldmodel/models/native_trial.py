"""What a build of `kernels/native` computes, compared with what PyTorch computes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from worldmodel.config import CodecConfig, DiTConfig
from worldmodel.errors import DeviceError
from worldmodel.models.attention import Layout
from worldmodel.models.codec import FrameCodec, to_uint8
from worldmodel.models.dit import DiT
from worldmodel.models.native import NativeWorld, load_library

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # as a part of the largest number
LEVELS = {torch.float32: 1, torch.bfloat16: 6}  # of 256 of a picture


@torch.no_grad()
def trial(path: Path, dtype: torch.dtype, tiles: bool) -> None:
    """Load the build and compare a small world by it with PyTorch in float32. Raises DeviceError where they differ."""
    torch.manual_seed(0)
    library, (height, width) = load_library(path, dtype, tiles), (10, 14)  # 35 tokens: no multiple of anything
    cfg = DiTConfig(dim=128, layers=2, heads=2, ffn_dim=192, in_channels=8, out_channels=8, freq_dim=32, action_dim=0)
    networks, codecs = (
        [DiT(cfg) for _ in range(2)],
        [FrameCodec(CodecConfig(channels=8, decoder_widths=(32, 32, 64))) for _ in range(2)],
    )
    for parameter in (*networks[0].parameters(), *codecs[0].parameters()):
        std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1  # numbers stay as large as they are
        nn.init.normal_(parameter, std=std).copy_(parameter.to(dtype))
    for truth, ours in zip((networks[0], codecs[0]), (networks[1], codecs[1]), strict=True):
        ours.to(dtype).load_state_dict(truth.state_dict())
    native = NativeWorld(library, networks[1], codecs[1], (height, width))
    caches = [network.make_cache((height, width), window=4) for network in networks]
    for _ in range(5):
        noisy, level = torch.randn(1, 1, cfg.in_channels, height, width), networks[0].level(torch.rand(1, 1))
        seen = [networks[0].context(noisy.shape, noisy.device, Layout.bidirectional(), cache=cache) for cache in caches]
        wanted = networks[0].velocity(noisy, networks[0].condition(level), seen[0])
        _same(path, native.network(noisy.to(dtype), level, seen[1]), wanted, TOLERANCE[dtype] * float(wanted.abs().max()))
        for cache in caches:
            cache.commit()
    latent = torch.randn(1, 8, height, width)
    _same(path, native.decoder(latent[0]), to_uint8(codecs[0].decode(latent))[0], LEVELS[dtype])


def _same(path: Path, given: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = float((given.float() - wanted.float()).abs().max())
    if not error <= tolerance:
        raise DeviceError(f"the compiled engine {path} computes something else (off by {error:.2g}, {tolerance:.2g} is rounding)")
