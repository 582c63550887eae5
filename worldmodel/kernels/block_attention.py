"""Attention in which whole frames see whole frames (training layouts): picks the fastest exact way for the device at hand.

No mask over token pairs is built on the CPU (query frames that see the same frames are served by one dense call), and on CUDA
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

Group = tuple[slice, tuple[slice, ...]]


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Who sees whom, prepared for one device. Made by `plan_blocks`, used by `block_attention`.

    groups: query frames (as token slices) with the token slices of the keys they see. dense: every query sees every key.
    """

    tokens: int
    dense: bool
    groups: tuple[Group, ...]
    table: Tensor
    flex: Any = field(default=None)


def _runs(row: np.ndarray, tokens: int) -> tuple[slice, ...]:
    """Token slices of the contiguous True runs of one row of the frame mask."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], row.astype(np.int8), [0]))))
    return tuple(slice(int(a) * tokens, int(b) * tokens) for a, b in zip(edges[0::2], edges[1::2], strict=True))


def _groups(mask: np.ndarray, tokens: int) -> tuple[Group, ...]:
    starts = [0] + [i for i in range(1, len(mask)) if not np.array_equal(mask[i], mask[i - 1])] + [len(mask)]
    return tuple((slice(a * tokens, b * tokens), _runs(mask[a], tokens)) for a, b in pairwise(starts))


@lru_cache(maxsize=32)
def _plan(mask_bytes: bytes, shape: tuple[int, int], tokens: int, device: torch.device, flex: bool) -> BlockPlan:
    mask = np.frombuffer(mask_bytes, dtype=bool).reshape(shape)
    table = torch.from_numpy(mask.copy()).to(device)
    block_mask = None
    if flex and not mask.all():
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return table[query // tokens, key // tokens]

        block_mask = create_block_mask(visible, None, None, shape[0] * tokens, shape[1] * tokens, device=str(device))
    return BlockPlan(tokens, bool(mask.all()), _groups(mask, tokens), table, block_mask)


def plan_blocks(frame_mask: np.ndarray, tokens: int, device: torch.device) -> BlockPlan:
    """Prepare `frame_mask` (bool, query frames x key frames; every row sees something) for `device`. Cached by content."""
    assert frame_mask.any(axis=1).all(), "a frame that sees nothing has no attention"
    mask = np.ascontiguousarray(frame_mask, dtype=bool)
    return _plan(mask.tobytes(), mask.shape, tokens, torch.device(device), torch.device(device).type == "cuda")


def block_attention(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Tensor:
    """q (B,N,Q,E), k and v (B,N,K,E), frame-major tokens -> (B,N,Q,E); equals `reference.masked_attention`."""
    if plan.dense:
        return reference.attention(q, k, v)
    if plan.flex is not None:
        if torch.compiler.is_compiling():
            from torch.nn.attention.flex_attention import flex_attention

            return flex_attention(q, k, v, block_mask=plan.flex)
        return reference.masked_attention(q, k, v, plan.table, plan.tokens)
    parts = []
    for queries, keys in plan.groups:
        k_seen = k[:, :, keys[0]] if len(keys) == 1 else torch.cat([k[:, :, s] for s in keys], dim=2)
        v_seen = v[:, :, keys[0]] if len(keys) == 1 else torch.cat([v[:, :, s] for s in keys], dim=2)
        parts.append(reference.attention(q[:, :, queries], k_seen, v_seen))
    return torch.cat(parts, dim=2)
