"""Block attention as one differentiable operator over the kernels of `triton_blocks` and `triton_blocks_grad`: compilers see a box
with known outputs and leave it as it is.

Shapes: B batch, N heads, Q tokens of the sequence, E head width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from worldmodel.kernels.block_attention import FrameRule
from worldmodel.kernels.triton_blocks import block_forward_kernel
from worldmodel.kernels.triton_blocks_grad import block_delta_kernel, block_keys_kernel, block_queries_kernel
from worldmodel.kernels.triton_launch import LOG2E, capability, launch, precision, strides
from worldmodel.kernels.triton_tiles import Tiles


@lru_cache(maxsize=16)
def block_tiles(head: int, arch: int) -> tuple[Tiles, Tiles, Tiles]:
    """Tiles of the forward kernel, of the kernel for dk and dv (rows are keys), and of the one for dq, on capability `arch`."""
    if head <= 64:
        return Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2)
    if arch >= 90:
        return Tiles(128, 64, 8, 3), Tiles(64, 32, 4, 3), Tiles(64, 64, 4, 2)  # by time on an H200
    return Tiles(128, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(128, 32, 8, 2)


@lru_cache(maxsize=256)
def _constants(rule: FrameRule, tokens: int, head: int, dtype: torch.dtype) -> dict[str, Any]:
    whole = rule.frames if rule.chunk >= rule.frames else rule.chunk
    return {
        "TOKENS": tokens,
        "CHUNK": whole,
        "FIRST": rule.first or whole,
        "REACH": rule.window - rule.sink if rule.window else -1,
        "SINK": rule.sink if rule.window else 0,
        "MEMORY": rule.memory if rule.window else 0,
        "EVERY": rule.every,
        "HALVES": 2 if rule.doubled else 1,
        "HEAD": head,
        "WIDTH": max(16, triton.next_power_of_2(head)),
        "PRECISION": precision(dtype),
    }


def _options(tiles: Tiles) -> dict[str, int]:
    return {"ROWS": tiles.rows, "COLS": tiles.cols, "num_warps": tiles.warps, "num_stages": tiles.stages}


def _grid(rule: FrameRule, tokens: int, tiles: Tiles, pairs: int) -> tuple[int, int]:
    return (2 if rule.doubled else 1) * triton.cdiv(rule.frames * tokens, tiles.rows), pairs


def _like(q: Tensor) -> Tensor:
    """An empty (B,N,Q,E) laid out (B,Q,N,E)."""
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def block_forward(q: Tensor, k: Tensor, v: Tensor, rule: FrameRule, tokens: int) -> tuple[Tensor, Tensor]:
    """q, k, v (B,N,Q,E) -> the result, laid out (B,Q,N,E), and the base-2 log-sum-exp of its scores (B,N,Q) float32."""
    batch, heads, queries, head = q.shape
    tiles = block_tiles(head, capability(q.device))[0]
    out = _like(q)
    logs = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    launch(
        block_forward_kernel, _grid(rule, tokens, tiles, batch * heads), q, k, v, out, logs, LOG2E / head**0.5, rule.frames, heads,
        *strides(q), *strides(k), *strides(v), *strides(out), **_constants(rule, tokens, head, q.dtype), **_options(tiles),
    )  # fmt: skip
    return out, logs


def block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, rule: FrameRule, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, each laid out (B,Q,N,E), for the gradient (B,N,Q,E) of the result of `block_forward`."""
    batch, heads, queries, head = q.shape
    _, key_tiles, query_tiles = block_tiles(head, capability(q.device))
    dq, dk, dv = _like(q), _like(q), _like(q)
    delta = torch.empty_like(logs)
    constants, scale = _constants(rule, tokens, head, q.dtype), LOG2E / head**0.5
    grid = (triton.cdiv(queries, 64), batch * heads)
    widths = {"HEAD": head, "WIDTH": constants["WIDTH"], "ROWS": 64}
    launch(block_delta_kernel, grid, out, grad, delta, queries, heads, *strides(out), *strides(grad), **widths, num_warps=4)
    places = (*strides(q), *strides(k), *strides(v), *strides(grad), *strides(dq))
    launch(
        block_keys_kernel, _grid(rule, tokens, key_tiles, batch * heads), q, k, v, grad, logs, delta, dk, dv, scale, rule.frames,
        heads, *places, **constants, **_options(key_tiles),
    )  # fmt: skip
    launch(
        block_queries_kernel, _grid(rule, tokens, query_tiles, batch * heads), q, k, v, grad, logs, delta, dq, scale, rule.frames,
        heads, *places, **constants, **_options(query_tiles),
    )  # fmt: skip
    return dq, dk, dv


Numbers = list[int]  # a FrameRule and the tokens of a frame, as operators take them


def _unpack(numbers: Numbers) -> tuple[FrameRule, int]:
    frames, chunk, first, window, sink, doubled, memory, every, tokens = numbers
    return FrameRule(frames, chunk, first, window, sink, bool(doubled), memory, every), tokens


@torch.library.custom_op("worldmodel::block_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, rule: Numbers) -> tuple[Tensor, Tensor]:
    return block_forward(q, k, v, *_unpack(rule))


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, rule: Numbers) -> tuple[Tensor, Tensor]:
    return _like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


@torch.library.custom_op("worldmodel::block_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, rule: Numbers
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    return block_backward(grad, q, k, v, out, logs, *_unpack(rule))


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, rule: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(q), _like(q)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.rule = inputs[3]
    ctx.set_materialize_grads(False)


def _pull(ctx: Any, grad: Tensor | None, _logs: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    return *_backward(grad, *ctx.saved_tensors, ctx.rule), None


_forward.register_autograd(_pull, setup_context=_keep)


def block_attention(q: Tensor, k: Tensor, v: Tensor, rule: FrameRule, tokens: int) -> Tensor:
    """Attention of a sequence to itself by `rule`, scale 1/sqrt(E), with gradients for q, k and v.

    q, k, v (B,N,Q,E) of any strides, Q = frames x tokens, twice that for a doubled rule. Returns (B,N,Q,E) in q's dtype, laid out
    (B,Q,N,E) so that merging heads copies nothing.
    """
    assert q.shape[2] == rule.frames * tokens * (2 if rule.doubled else 1), "the sequence does not fit the rule"
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    numbers = [rule.frames, rule.chunk, rule.first, rule.window, rule.sink, int(rule.doubled), rule.memory, rule.every, tokens]
    return _forward(q, k, v, numbers)[0]  # type: ignore[no-any-return]
