"""Attention in which whole frames see whole frames (training layouts), prepared once for a device.

Where the layout is a rule and Triton is at hand, the kernel takes the rule (see `worldmodel.kernels`). What is here serves the
rest: no mask over token pairs is built on the CPU (query frames that see the same frames are served by one dense call), and on CUDA
inside a compiled graph FlexAttention computes the mask from the frame table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.kernels import reference

Group = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class FrameRule:
    """Who sees whom, as a rule instead of a table: what a kernel needs to skip keys without reading a mask.

    A frame sees its own and earlier chunks of `chunk` frames (the first of `first`, 0 = `chunk`). window: frames seen, counted back
    from the end of the own chunk, `sink` of them being the first of the clip; 0 = all. doubled: the sequence is [clean | noisy], a
    noisy chunk sees itself and the clean frames of earlier chunks. memory: further frames that are seen, the newest before the
    window (behind the sink) with an index divisible by `every`. frames: of one half.
    """

    frames: int
    chunk: int
    first: int = 0
    window: int = 0
    sink: int = 0
    doubled: bool = False
    memory: int = 0
    every: int = 1


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Who sees whom, prepared for one device. Made by `plan_blocks`, used by `block_attention`.

    groups: how many query frames in a row see the same frames, and which. dense: every query sees every key. rule: the
    same as a rule, where it is one.
    """

    tokens: int
    dense: bool
    groups: tuple[Group, ...]
    table: Tensor
    rule: FrameRule | None = None
    flex: Any = field(default=None)


def _groups(mask: np.ndarray) -> tuple[Group, ...]:
    starts = [0] + [i for i in range(1, len(mask)) if not np.array_equal(mask[i], mask[i - 1])] + [len(mask)]
    return tuple((b - a, tuple(np.flatnonzero(mask[a]).tolist())) for a, b in pairwise(starts))


@lru_cache(maxsize=32)
def _plan(
    mask_bytes: bytes, shape: tuple[int, int], tokens: int, device: torch.device, rule: FrameRule | None, flex: bool
) -> BlockPlan:
    mask = np.frombuffer(mask_bytes, dtype=bool).reshape(shape)
    table = torch.from_numpy(mask.copy()).to(device)
    block_mask = None
    if flex and not mask.all():
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return table[query // tokens, key // tokens]

        block_mask = create_block_mask(visible, None, None, shape[0] * tokens, shape[1] * tokens, device=str(device))
    return BlockPlan(tokens, bool(mask.all()), _groups(mask), table, rule, block_mask)


def make_plan(frame_mask: np.ndarray, tokens: int, device: torch.device, rule: FrameRule | None, flex: bool) -> BlockPlan:
    """A plan for `device`, cached by content. flex: also prepare FlexAttention, whose mask takes memory while it is built."""
    assert frame_mask.any(axis=1).all(), "a frame that sees nothing has no attention"
    mask = np.ascontiguousarray(frame_mask, dtype=bool)
    return _plan(mask.tobytes(), mask.shape, tokens, device, rule, flex)


def attend_by_plan(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Tensor:
    """q (B,N,Q,E), k and v (B,N,K,E), frame-major tokens -> (B,N,Q,E); equals `reference.masked_attention`."""
    if plan.dense:
        return reference.attention(q, k, v)
    if plan.flex is not None and torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(q, k, v, block_mask=plan.flex)
    if q.is_cuda:
        return reference.masked_attention(q, k, v, plan.table, plan.tokens)
    return attend_by_groups(q, k, v, plan)


def attend_by_groups(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Tensor:
    """One dense call for all query frames that see the same frames."""
    # split, not sliced: the gradient of a slice is as large as the whole, and there are as many slices as groups
    keys, values = k.split(plan.tokens, dim=2), v.split(plan.tokens, dim=2)
    parts = []
    for part, (_, seen) in zip(q.split([count * plan.tokens for count, _ in plan.groups], dim=2), plan.groups, strict=True):
        k_seen, v_seen = (torch.cat([frames[i] for i in seen], dim=2) for frames in (keys, values))
        parts.append(reference.attention(part, k_seen, v_seen))
    return torch.cat(parts, dim=2)
