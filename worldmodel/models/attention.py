"""Self-attention (QK-norm, RoPE, optional camera branch, cache or block layout) and cross-attention to text.

Shapes: B batch, F frames, S tokens a frame, D model width, N heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel import kernels
from worldmodel.config import DiTConfig
from worldmodel.models.camera import transform
from worldmodel.models.kv_cache import Attended


@dataclass(frozen=True)
class Layout:
    """Which frame may see which. Bidirectional and causal nets are the same module with another layout.

    chunk: frames denoised together. window: frames seen, counted back from the end of the own chunk, that chunk included; 0 = all.
    first: size of the first chunk where it differs (0 = `chunk`). sink: of the window, how many are the first frames of the clip.
    memory: further frames that are seen, the newest before the window with an index divisible by `every` (behind the sink).
    """

    kind: str = "bidirectional"
    chunk: int = 1
    window: int = 0
    first: int = 0
    sink: int = 0
    memory: int = 0
    every: int = 1

    @staticmethod
    def bidirectional() -> Layout:
        return Layout()

    @staticmethod
    def causal(chunk: int = 1, window: int = 0, first: int = 0, sink: int = 0, memory: int = 0, every: int = 1) -> Layout:
        """Diffusion forcing: a frame sees its own and earlier chunks, all of them noisy."""
        return Layout("causal", chunk, window, first, sink, memory, every)

    @staticmethod
    def teacher_forcing(chunk: int = 1, window: int = 0, sink: int = 0, memory: int = 0, every: int = 1) -> Layout:
        """[clean | noisy]: clean frames are chunk-causal; a noisy chunk sees itself and the clean frames of earlier chunks."""
        return Layout("teacher_forcing", chunk, window, 0, sink, memory, every)

    def chunk_ends(self, frames: int) -> np.ndarray:
        """For every frame the index just behind its chunk; the last chunk may be cut by the end of the clip."""
        first = self.first or self.chunk
        index = np.arange(frames)
        ends = np.where(index < first, first, first + ((index - first) // self.chunk + 1) * self.chunk)
        return np.minimum(ends, frames)

    def frame_mask(self, frames: int) -> np.ndarray:
        """bool (query frames, key frames), True where the query sees the key; both axes doubled for teacher forcing."""
        if self.kind == "bidirectional":
            return np.ones((frames, frames), dtype=bool)
        ends, key = self.chunk_ends(frames)[:, None], np.arange(frames)[None]
        seen = np.ones((frames, frames), dtype=bool)
        if self.window:
            low = ends - (self.window - self.sink)
            remembered = (key % self.every == 0) & (key >= low - self.memory * self.every)
            seen = (key < self.sink) | (key >= low) | remembered
        causal = (key < ends) & seen
        if self.kind == "causal":
            return causal
        own = ends == ends.T
        return np.block([[causal, np.zeros_like(causal)], [causal & ~own, own]])

    def rule(self, frames: int) -> kernels.FrameRule:
        """`frame_mask` as kernels take it."""
        chunk = frames if self.kind == "bidirectional" else self.chunk
        doubled = self.kind == "teacher_forcing"
        return kernels.FrameRule(frames, chunk, self.first, self.window, self.sink, doubled, self.memory, self.every)


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """What all self-attention layers of one pass share.

    cos, sin: (F*S, E/2). cameras: P and its inverse, (B,F,4,4), or None. Exactly one of plan and cache is set.
    """

    cos: Tensor
    sin: Tensor
    cameras: tuple[Tensor, Tensor] | None = None
    plan: kernels.BlockPlan | None = None
    cache: Attended | None = None


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class QKNorm(nn.RMSNorm):
    """RMS norm with its gain in the type of its input: autocast leaves the gain float32, and mixed types lose the fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SelfAttention(nn.Module):
    """q and k are RMS-normalised over the full width D before the head split (Wan 2.1)."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.heads, self.eps = cfg.heads, cfg.eps
        self.qkv = nn.Linear(cfg.dim, 3 * cfg.dim)
        self.out = nn.Linear(cfg.dim, cfg.dim)
        self.norm_q = QKNorm(cfg.dim, eps=cfg.eps)
        self.norm_k = QKNorm(cfg.dim, eps=cfg.eps)
        self.camera_out = nn.Linear(cfg.dim, cfg.dim) if cfg.camera else None
        if self.camera_out is not None:
            nn.init.zeros_(self.camera_out.weight)
            nn.init.zeros_(self.camera_out.bias)

    def forward(self, x: Tensor, layer: int, ctx: AttentionContext) -> Tensor:
        """x (B, F*S, D) -> (B, F*S, D)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        cameras, scratch = ctx.cameras if self.camera_out is not None else None, None
        if cameras is not None:
            q, k, v = self._with_cameras(q, k, v, ctx, cameras)
        else:
            if ctx.cache is not None and not torch.is_grad_enabled():  # autograd may still need what lies there
                scratch = ctx.cache.scratch(layer, x.shape[1])  # keys and values are written to their place at once, not copied
            gains, angles = (self.norm_q.weight, self.norm_k.weight), (ctx.cos, ctx.sin)
            q, k, v = kernels.qk_norm_rope(q, k, v, *gains, self.eps, *angles, self.heads, scratch)
        if ctx.cache is not None:
            out = ctx.cache.attend(layer, q, k, v, written=scratch is not None)
        else:
            assert ctx.plan is not None
            out = kernels.block_attention(q, k, v, ctx.plan)
        y = self.out(_merge(out[:, : self.heads]))
        if cameras is not None:
            assert self.camera_out is not None
            y = y + self.camera_out(_merge(transform(out[:, self.heads :], cameras[0])))
        return y

    def _with_cameras(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext, cameras: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The camera branch is a second set of heads: unrotated, in projective coordinates."""
        to_world, from_world = cameras
        q, k, v = _heads(self.norm_q(q), self.heads), _heads(self.norm_k(k), self.heads), _heads(v, self.heads)
        q_all = (kernels.rotate(q, ctx.cos, ctx.sin).to(v.dtype), transform(q, to_world.mT).to(v.dtype))
        k_all = (kernels.rotate(k, ctx.cos, ctx.sin).to(v.dtype), transform(k, from_world).to(v.dtype))
        return torch.cat(q_all, dim=1), torch.cat(k_all, dim=1), torch.cat((v, transform(v, from_world)), dim=1)


class CrossAttention(nn.Module):
    """Attention to text states; keys and values are made once per prompt by `states`."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.q = nn.Linear(cfg.dim, cfg.dim)
        self.kv = nn.Linear(cfg.dim, 2 * cfg.dim)
        self.out = nn.Linear(cfg.dim, cfg.dim)
        self.norm_q = QKNorm(cfg.dim, eps=cfg.eps)
        self.norm_k = QKNorm(cfg.dim, eps=cfg.eps)

    def states(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded text (B, S, D) -> keys and values (B,N,S,E)."""
        k, v = self.kv(text).chunk(2, dim=-1)
        return _heads(self.norm_k(k), self.heads).to(v.dtype), _heads(v, self.heads)

    def forward(self, x: Tensor, states: tuple[Tensor, Tensor]) -> Tensor:
        q = _heads(self.norm_q(self.q(x)), self.heads)
        return self.out(_merge(kernels.attention(q.to(states[1].dtype), *states)))
