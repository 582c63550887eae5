"""What a build of `kernels/native` computes, compared with what PyTorch computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from worldmodel.config import CodecConfig, DiTConfig
from worldmodel.errors import DeviceError
from worldmodel.models.attention import Layout
from worldmodel.models.codec import FrameCodec, to_uint8
from worldmodel.models.dit import DiT
from worldmodel.models.native import NativeWorld, load_library

Module = TypeVar("Module", bound=nn.Module)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # as a part of the largest number
CHUNK, WINDOW = 2, 8  # frames of a pass, and those that it sees: more rows and more keys than are taken at a time
GAIN = 3.0  # of queries and keys: some keys are looked at far more than others
LEVELS = {torch.float32: 1, torch.bfloat16: 6}  # of 256 of a picture


@torch.no_grad()
def trial(path: Path, dtype: torch.dtype, tiles: bool) -> None:
    """Load the build and compare a small world by it with PyTorch in float32. Raises DeviceError where they differ."""
    torch.manual_seed(0)
    library, (height, width) = load_library(path, dtype, tiles), (10, 14)  # 35 tokens: no multiple of anything
    cfg = DiTConfig(dim=128, layers=2, heads=2, ffn_dim=192, in_channels=8, out_channels=8, freq_dim=32, action_dim=0)
    codec_cfg = CodecConfig(channels=8, decoder_widths=(32, 32, 64))
    truth = random_weights(DiT(cfg))
    for name, gain in truth.named_parameters():
        if "norm_" in name:
            gain.fill_(GAIN)
    truth = truth.to(dtype).float()
    codec = random_weights(FrameCodec(codec_cfg)).to(dtype).float()
    ours, our_codec = copy.deepcopy(truth).to(dtype), copy.deepcopy(codec).to(dtype)
    native = NativeWorld(library, ours, our_codec, (height, width))
    caches = [network.make_cache((height, width), window=WINDOW, chunk=CHUNK) for network in (truth, ours)]
    for _ in range(WINDOW // CHUNK + 1):
        noisy, level = torch.randn(1, CHUNK, cfg.in_channels, height, width), truth.level(torch.rand(1, CHUNK))
        seen = [truth.context(noisy.shape, noisy.device, Layout.bidirectional(), cache=cache) for cache in caches]
        wanted = truth.velocity(noisy, truth.condition(level), seen[0])
        _same(path, native.network(noisy.to(dtype), level, seen[1]), wanted, TOLERANCE[dtype] * float(wanted.abs().max()))
        for cache in caches:
            cache.commit()
    latent = torch.randn(1, codec_cfg.channels, height, width)
    _same(path, native.decoder(latent), to_uint8(codec.decode(latent)), LEVELS[dtype])


def random_weights(module: Module) -> Module:
    """`module`, with weights under which numbers stay about as large as they are."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    return module


def _same(path: Path, given: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = float((given.float() - wanted.float()).abs().max())
    if not error <= tolerance:
        raise DeviceError(f"the compiled engine {path} computes something else (off by {error:.2g}, {tolerance:.2g} is rounding)")
