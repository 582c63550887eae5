"""The truth, in plain PyTorch, for every op of this package. Shapes: B batch, N heads, Q/K query and key tokens, E head width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention without a mask, scale 1/sqrt(E). q (B,N,Q,E), k and v (B,N,K,E) -> (B,N,Q,E)."""
    return F.scaled_dot_product_attention(q, k, v)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, frame_mask: Tensor, tokens: int) -> Tensor:
    """Attention where `frame_mask` (bool, query frames x key frames) says which frame sees which; `tokens` tokens a frame.

    The mask is materialised over all token pairs: right on any device, wasteful in memory.
    """
    mask = frame_mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of adjacent channel pairs (2i, 2i+1). x (..., S, E), cos and sin (S, E/2) float32; result in x's dtype."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm without affine, then (1 + scale) and shift. x (B,F,S,D); shift and scale (B,F,1,D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate. x and y (B,F,S,D); gate (B,F,1,D)."""
    return torch.addcmul(x, y, gate)


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
    """RMS norm of q and k over D, gain, head split and rotation. q, k, v (B,S,D) -> (B,N,S,E) in v's dtype.

    gains (D,), cos and sin (S,E/2) float32. slot: places (B,N,S,E) in a cache that k and v are written to and returned as.
    """
    turned = []
    for x, gain in ((q, gain_q), (k, gain_k)):
        normed = F.rms_norm(x, x.shape[-1:], gain.to(x.dtype), eps)
        turned.append(rotate(normed.unflatten(-1, (heads, -1)).transpose(1, 2), cos, sin).to(v.dtype))
    values = v.unflatten(-1, (heads, -1)).transpose(1, 2)
    if slot is None:
        return turned[0], turned[1], values
    slot[0].copy_(turned[1])
    slot[1].copy_(values)
    return turned[0], *slot


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `worldmodel.kernels.linear_gelu`."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor | None, plus: Tensor | None = None) -> Tensor:
    """See `worldmodel.kernels.conv_relu`."""
    y = F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))
    return F.relu(y if plus is None else y + plus, inplace=True)
