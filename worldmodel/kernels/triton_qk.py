"""QK-norm, head split, rotary embedding and the write into the cache as one kernel instead of some fifteen.

Shapes: B batch, S tokens, D model width = N heads x E head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worldmodel.kernels.triton_launch import launch, strides
from worldmodel.kernels.triton_tiles import load_float


@triton.jit
def qk_row(x, gain, out, cos, sin, token, eps, o_n, DIM: tl.constexpr, HEAD: tl.constexpr, PAIRS: tl.constexpr):
    """One token's row of D values: normalised, rotated pair by pair, its heads written `o_n` apart."""
    pair = tl.arange(0, PAIRS)
    inside = pair < DIM // 2
    even = load_float(x + 2 * pair, inside)
    odd = load_float(x + 2 * pair + 1, inside)
    scale = tl.rsqrt(tl.sum(even * even + odd * odd, 0) / DIM + eps)
    even = even * scale * load_float(gain + 2 * pair, inside)
    odd = odd * scale * load_float(gain + 2 * pair + 1, inside)
    turn = token * (HEAD // 2) + pair % (HEAD // 2)
    c, s = tl.load(cos + turn, inside, other=0.0), tl.load(sin + turn, inside, other=0.0)
    both = tl.interleave(even * c - odd * s, even * s + odd * c)
    e = tl.arange(0, 2 * PAIRS)
    tl.store(out + e // HEAD * o_n + e % HEAD, both.to(out.dtype.element_ty), e < DIM)


@triton.jit
def qk_norm_rope_kernel(
    q,
    k,
    v,
    gain_q,
    gain_k,
    cos,
    sin,
    q_out,
    k_out,
    v_out,
    eps,
    q_b,
    q_s,
    k_b,
    k_s,
    v_b,
    v_s,
    qo_b,
    qo_n,
    qo_s,
    ko_b,
    ko_n,
    ko_s,
    vo_b,
    vo_n,
    vo_s,
    DIM: tl.constexpr,
    HEAD: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Program (token, batch, which of q, k, v); v is only copied, and only where it has a place in a cache."""
    token, batch, which = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    if which == 0:
        qk_row(
            q + batch * q_b + token * q_s, gain_q, q_out + batch * qo_b + token * qo_s, cos, sin, token, eps, qo_n, DIM, HEAD, PAIRS
        )
    elif which == 1:
        qk_row(
            k + batch * k_b + token * k_s, gain_k, k_out + batch * ko_b + token * ko_s, cos, sin, token, eps, ko_n, DIM, HEAD, PAIRS
        )
    else:
        e = tl.arange(0, 2 * PAIRS)
        row = tl.load(v + batch * v_b + token * v_s + e, e < DIM, other=0.0)
        at = v_out + batch * vo_b + token * vo_s + e // HEAD * vo_n + e % HEAD
        tl.store(at, row.to(v_out.dtype.element_ty), e < DIM)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    slot: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm of q and k over D with a gain, head split, rotation of channel pairs; no gradient.

    q, k, v (B,S,D) with contiguous rows, gains (D,), cos and sin (S,E/2) float32 -> q, k, v (B,N,S,E) in v's dtype. slot: places
    (B,N,S,E) in a cache to write k and v to; they are returned. Without it v is a view. Between norm and rotation nothing is
    rounded to 16 bits.
    """
    (batch, tokens, dim), head = q.shape, q.shape[-1] // heads
    q_out = torch.empty(batch, tokens, heads, head, dtype=v.dtype, device=q.device).transpose(1, 2)
    if slot is None:
        slot = torch.empty_like(q_out), v.unflatten(-1, (heads, head)).transpose(1, 2)
        parts = 2
    else:
        parts = 3
    k_out, v_out = slot
    launch(
        qk_norm_rope_kernel, (tokens, batch, parts), q, k, v, gain_q, gain_k, cos, sin, q_out, k_out, v_out, eps,
        *strides(q), *strides(k), *strides(v), *strides(q_out), *strides(k_out), *strides(v_out),
        DIM=dim, HEAD=head, PAIRS=triton.next_power_of_2(dim // 2), num_warps=4,
    )  # fmt: skip
    return q_out, k_out, v_out
