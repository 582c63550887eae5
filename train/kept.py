"""What a step keeps in memory beside its networks, of a stage that is not run: activations, masks, what rollouts see.

What a block keeps for backward is measured on one block of real width with a few tokens on the CPU, and scaled.
Shapes: T frames, S tokens a frame.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from train.rollout import LastingCache
from worldmodel import kernels
from worldmodel.models.attention import Layout
from worldmodel.models.dit import Block, DiT

if TYPE_CHECKING:
    from train.stages.flow import FlowMatching, Pass
    from worldmodel.config import DiTConfig


def activations(stage: FlowMatching, recompute: bool) -> dict[str, float]:
    """By target: bytes that autograd keeps of its passes over all clips of a micro-batch. Those of two targets never meet."""
    config, tokens, kind = stage.model_config, stage.tokens, stage.context.dtype
    one_token, fixed = block_bytes(config, kind)
    totals: dict[str, float] = {}
    for one in stage.passes():
        length = one.frames if one.cached else len(one.layout.frame_mask(one.frames))
        again = recompute and (not one.cached or lasting(stage))
        at_once = stage.sampler().chunk if again and one.cached else length
        block = one_token * at_once * tokens + fixed
        if one.cached:
            seen = stage.sampler().window if again else _seen(stage, one.frames)
            block += seen * tokens * config.dim * 2 * kind.itemsize * (2 if config.camera else 1)
        # either all blocks, or the input of each, the attention that is kept, and all of the one that is made again
        each = length * tokens * config.dim * 4 + (_attention_bytes(stage, length) if by_kernel(stage, one) else 0)
        kept = config.layers * each + block if again else config.layers * block
        head = 3 * one.frames * tokens * config.dim * 4  # its input, that normed, and that modulated
        totals[one.target] = totals.get(one.target, 0.0) + kept + head
    return {target: total * stage.options.batch for target, total in totals.items()}


def mask_bytes(stage: FlowMatching, one: Pass) -> float:
    """Bytes of who sees whom by token, which FlexAttention is told once; nothing where all see all, or a kernel takes the rule."""
    mask = one.layout.frame_mask(one.frames)
    return 0.0 if one.cached or mask.all() or by_kernel(stage, one) else float((len(mask) * stage.tokens) ** 2)


def by_kernel(stage: FlowMatching, one: Pass) -> bool:
    """Whether a GPU makes the attention of a pass by the kernel of block attention."""
    dense = one.layout.frame_mask(one.frames).all()
    return not one.cached and not dense and kernels.serves("block_attention", stage.context.dtype)


def _attention_bytes(stage: FlowMatching, length: int) -> int:
    """Of one clip of `length` frames, in one layer: the kernel's result (B,N,Q,E) and its log-sum-exp (B,N,Q) float32."""
    config = stage.model_config
    heads = config.heads * (2 if config.camera else 1)
    return length * stage.tokens * heads * (config.head_dim * stage.context.dtype.itemsize + 4)


def lasting(stage: FlowMatching) -> bool:
    """Whether passes of rollouts can be made again."""
    return isinstance(stage.student.cache, LastingCache)  # type: ignore[attr-defined]


def _seen(stage: FlowMatching, frames: int) -> int:
    """Frames whose keys and values the chunks of a rollout see, all chunks together: each chunk has a copy of its own."""
    sampler = stage.sampler()
    return sum(min(end, sampler.window) for end in range(sampler.chunk, frames + 1, sampler.chunk))


def block_bytes(config: DiTConfig, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes a token, bytes a clip) that one block keeps for backward, measured with a few tokens on the CPU."""
    small, large = (_kept(config, dtype, frames) for frames in (1, 2))
    tokens = 64
    one = (large - small) / tokens
    return one, small - one * tokens


def _kept(config: DiTConfig, dtype: torch.dtype, frames: int) -> int:
    """Bytes of one block's saved tensors for `frames` frames of 64 tokens; weights and what all blocks share are left out."""
    with torch.device("meta"):
        plan = DiT(replace(config, layers=1))
    side = 8 * config.patch
    shape = (1, frames, config.in_channels, side, side)
    cameras = (torch.eye(4).expand(1, frames, 4, 4), torch.eye(3).expand(1, frames, 3, 3)) if config.camera else None
    ctx = plan.context(torch.Size(shape), torch.device("cpu"), Layout.bidirectional(), cameras=cameras)
    block = Block(config, 0)
    x = torch.zeros(1, frames, 64, config.dim, requires_grad=True)
    modulation, text = (
        torch.zeros(1, frames, 6, config.dim),
        torch.zeros(1, config.text_len, config.dim) if config.text_dim else None,
    )
    shared = [modulation, ctx.cos, ctx.sin, *(ctx.cameras or ()), *block.parameters(), *([] if text is None else [text])]
    left_out, kept = {t.untyped_storage().data_ptr() for t in shared}, dict[int, int]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    casts = _casts(block, dtype)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16, cache_enabled=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        out = block(x, modulation, ctx, text)
    total = sum(kept.values()) - casts
    del out
    return total


def _casts(block: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the bf16 copies of matrices that autocast makes: counted beside the weights."""
    return sum(p.numel() * 2 for p in block.parameters() if p.ndim == 2) if dtype is torch.bfloat16 else 0
