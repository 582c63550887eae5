"""The diffusion transformer: by configuration the Wan 2.1 net or a small one for bundled worlds; bidirectional, teacher-forcing,
diffusion-forcing and cached causal use are the same module with another `Layout` or a `KVCache`.

Shapes: B batch, T frames, C H W latent, S tokens a frame, D model width, A action.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel import kernels
from worldmodel.config import DiTConfig
from worldmodel.models.attention import AttentionContext, CrossAttention, Layout, SelfAttention
from worldmodel.models.camera import projections
from worldmodel.models.embeddings import ActionEmbedding, NoiseEmbedding, rope_tables
from worldmodel.models.kv_cache import KVCache

TextStates = list[tuple[Tensor, Tensor]]
END_SHARE = 0.25  # of the level a flow map's step ends at, in the noise embedding


def _hidden(h: Tensor, layer: nn.Linear, activation: str) -> Tensor:
    """What lies between the two layers of a feed-forward net."""
    if activation == "gelu_tanh":
        return kernels.linear_gelu(h, layer.weight, layer.bias)
    if activation == "relu2":  # squared ReLU: as good as GELU in nets we train ourselves and much cheaper on a CPU
        return F.relu(layer(h)).square()
    return F.silu(layer(h))


def _modulation(count: int, dim: int) -> nn.Parameter:
    """A learned table (count, D), N(0, 1/D). On the meta device there is nothing to draw, and trying imports half a compiler."""
    table = torch.empty(count, dim)
    return nn.Parameter(table if table.is_meta else table.normal_().mul_(dim**-0.5))


@dataclass(frozen=True)
class Condition:
    """What the frames of a pass are told besides their latents: e (B,T,D), and modulation (B,T,6,D), which every block shares."""

    e: Tensor
    modulation: Tensor


class Block(nn.Module):
    """x += g1 Attn(mod(x, s1, c1)); x += Cross(LN(x), text); x += g2 FFN(mod(x, s2, c2)), order s1 c1 g1 s2 c2 g2 (Wan 2.1)."""

    def __init__(self, cfg: DiTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.eps, self.activation = layer, cfg.eps, cfg.activation
        self.modulation = _modulation(6, cfg.dim)
        self.attention = SelfAttention(cfg)
        self.cross_norm = nn.LayerNorm(cfg.dim, eps=cfg.eps) if cfg.text_dim else None
        self.cross = CrossAttention(cfg) if cfg.text_dim else None
        self.ffn_in = nn.Linear(cfg.dim, cfg.ffn_dim)
        self.ffn_out = nn.Linear(cfg.ffn_dim, cfg.dim)

    def forward(
        self, x: Tensor, modulation: Tensor, ctx: AttentionContext, text: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """x (B,T,S,D), modulation (B,T,6,D) per frame -> (B,T,S,D). text: embedded (B,L,D), or its keys and values."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + modulation)[:, :, :, None].unbind(2)
        h = kernels.modulate(x, shift1, scale1, self.eps)
        x = kernels.gate_residual(x, self.attention(h.flatten(1, 2), self.layer, ctx).view_as(x), gate1)
        if self.cross is not None and self.cross_norm is not None:
            assert text is not None, "this model needs text"
            states = self.cross.states(text) if isinstance(text, Tensor) else text
            x = x + self.cross(self.cross_norm(x).flatten(1, 2), states).view_as(x)
        h = kernels.modulate(x, shift2, scale2, self.eps)
        return kernels.gate_residual(x, self.ffn_out(_hidden(h, self.ffn_in, self.activation)), gate2)


class DiT(nn.Module):
    """Predicts velocity = noise - clean of noisy latents."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.patch = nn.Linear(cfg.in_channels * cfg.patch**2, cfg.dim)
        self.noise = NoiseEmbedding(cfg.freq_dim, cfg.dim)
        self.end_noise = NoiseEmbedding(cfg.freq_dim, cfg.dim) if cfg.flow_map else None
        self.noise_projection = nn.Linear(cfg.dim, 6 * cfg.dim)
        self.action = ActionEmbedding(cfg.action_dim, cfg.dim) if cfg.action_dim else None
        self.text = (
            nn.Sequential(nn.Linear(cfg.text_dim, cfg.dim), nn.GELU(approximate="tanh"), nn.Linear(cfg.dim, cfg.dim))
            if cfg.text_dim
            else None
        )
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.layers))
        self.head_modulation = _modulation(2, cfg.dim)
        self.head = nn.Linear(cfg.dim, cfg.out_channels * cfg.patch**2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def text_states(self, text: Tensor) -> TextStates:
        """Text encoder output (B, Lc, text_dim), Lc <= text_len -> keys and values per block. Once per prompt.

        Rows beyond Lc are zero before the text net and are attended like all others: there is no text mask (Wan 2.1).
        """
        embedded = self._embedded(text)
        return [block.cross.states(embedded) for block in self.blocks]  # type: ignore[operator, union-attr]

    def _embedded(self, text: Tensor) -> Tensor:
        assert self.text is not None, "this model takes no text"
        weight: Tensor = self.text[0].weight  # type: ignore[assignment]
        return self.text(F.pad(text.to(weight.dtype), (0, 0, 0, self.cfg.text_len - text.shape[1])))

    def make_cache(
        self,
        latent_hw: tuple[int, int],
        window: int,
        chunk: int = 1,
        sink: int = 0,
        batch: int = 1,
        cameras: bool = False,
        apart: bool = False,
        memory: int = 0,
        every: int = 1,
    ) -> KVCache:
        """An empty cache for latents of `latent_hw` = (H, W), on this model's device and in its dtype."""
        weight = self.patch.weight
        return KVCache(
            layers=self.cfg.layers,
            heads=self.cfg.heads * (2 if cameras else 1),
            head_dim=self.cfg.head_dim,
            tokens=latent_hw[0] * latent_hw[1] // self.cfg.patch**2,
            window=window,
            chunk=chunk,
            sink=sink,
            memory=memory,
            every=every,
            apart=apart,
            batch=batch,
            device=weight.device,
            dtype=weight.dtype,
        )

    def forward(
        self,
        noisy: Tensor,
        sigma: Tensor,
        actions: Tensor | None = None,
        action_keep: Tensor | None = None,
        text: TextStates | Tensor | None = None,
        cameras: tuple[Tensor, Tensor | None] | None = None,
        clean: Tensor | None = None,
        clean_sigma: Tensor | None = None,
        layout: Layout | None = None,
        cache: KVCache | None = None,
        end: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B,T,C,H,W) of noisy (B,T,C,H,W) at noise levels sigma in [0,1], (B,T) or (B,).

        actions (B,T,A) encoded, None = unknown; action_keep bool (B,) or (B,T), False hides the action. cameras: view matrices
        (B,T,4,4) and intrinsics (B,T,3,3). text: `text_states`, or in training the text encoder's output itself. With `clean`
        (B,T,C,H,W) the sequence is [clean | noisy] (teacher forcing), clean_sigma (B,T) being the noise level of the context
        (default 0). With `cache`, the T frames continue the cached rollout. Flow maps predict the average velocity from sigma down
        to the level `end` (B,T) (default: sigma itself).
        """
        ctx = self.context(noisy.shape, noisy.device, layout or Layout.bidirectional(), clean is not None, cameras, cache)
        return self.denoise(noisy, sigma, ctx, actions, action_keep, text, clean, clean_sigma, end)

    def denoise(
        self,
        noisy: Tensor,
        sigma: Tensor,
        ctx: AttentionContext,
        actions: Tensor | None = None,
        action_keep: Tensor | None = None,
        text: TextStates | Tensor | None = None,
        clean: Tensor | None = None,
        clean_sigma: Tensor | None = None,
        end: Tensor | None = None,
    ) -> Tensor:
        """`forward` with its `context` made beforehand: tensors only, static shapes, the part that is worth compiling."""
        sigma = sigma[:, None].expand(-1, noisy.shape[1]) if sigma.ndim == 1 else sigma
        action = None if self.action is None else self.action(actions, action_keep)
        level = self.level(sigma, end)
        if clean is not None:
            level = torch.cat((self.level(torch.zeros_like(sigma) if clean_sigma is None else clean_sigma), level), dim=1)
            action = torch.cat((action, action), dim=1) if action is not None and action.ndim == 3 else action
        return self.velocity(noisy, self.condition(level, action), ctx, text, clean)

    def level(self, sigma: Tensor, end: Tensor | None = None) -> Tensor:
        """Embedding (B,T,D) of noise levels and of the levels (B,T) that flow maps step down to. It depends on nothing else."""
        e = self.noise(sigma)
        if self.end_noise is not None:  # mixed as in AnyFlow (arXiv 2605.13724); the copy starts equal, so a plain net is unchanged
            e = torch.lerp(e, self.end_noise(sigma if end is None else end), END_SHARE)
        return e

    def condition(self, level: Tensor, action: Tensor | None = None) -> Condition:
        """What `velocity` takes. action: embedded, (B,T,D) or (D,), in worlds that have actions."""
        e = level if action is None else level + action
        return Condition(e, self.noise_projection(F.silu(e)).unflatten(-1, (6, -1)))

    def velocity(
        self,
        noisy: Tensor,
        condition: Condition,
        ctx: AttentionContext,
        text: TextStates | Tensor | None = None,
        clean: Tensor | None = None,
    ) -> Tensor:
        """Velocity of `noisy`. With `clean`, of the same shape, those frames come first in the sequence and in `condition`."""
        x, frames = self._tokens(noisy), noisy.shape[1]
        if clean is not None:
            x = torch.cat((self._tokens(clean), x), dim=1)
        # a block makes its own keys and values of the text: sharded weights are whole only while it runs
        embedded = self._embedded(text) if isinstance(text, Tensor) else None
        for i, block in enumerate(self.blocks):
            x = block(x, condition.modulation, ctx, text[i] if isinstance(text, list) else embedded)
        x, e = x[:, -frames:], condition.e[:, -frames:]
        shift, scale = (self.head_modulation + e[:, :, None])[:, :, :, None].unbind(2)
        return self._latents(self.head(kernels.modulate(x, shift, scale, self.cfg.eps)), noisy.shape)

    def context(
        self,
        shape: torch.Size | tuple[int, ...],
        device: torch.device,
        layout: Layout,
        doubled: bool = False,
        cameras: tuple[Tensor, Tensor | None] | None = None,
        cache: KVCache | None = None,
    ) -> AttentionContext:
        """What the attention layers share in one pass over latents of `shape` (B,T,C,H,W): positions, cameras, who sees whom."""
        assert not (doubled and cache is not None), "teacher forcing has its context in the sequence, not in a cache"
        assert doubled == (layout.kind == "teacher_forcing"), "clean latents go with the teacher-forcing layout"
        frames, rows, cols = shape[1], shape[3] // self.cfg.patch, shape[4] // self.cfg.patch
        start = cache.position if cache is not None else 0
        index = tuple(range(start, start + frames)) * (2 if doubled else 1)
        cos, sin = rope_tables(index, rows, cols, self.cfg.head_dim, device)
        matrices = None
        if cameras is not None and self.cfg.camera:
            matrices = projections(*cameras)
            if doubled:
                matrices = (matrices[0].repeat(1, 2, 1, 1), matrices[1].repeat(1, 2, 1, 1))
        plan = None
        if cache is None:
            plan = kernels.plan_blocks(layout.frame_mask(frames), rows * cols, device, layout.rule(frames))
        return AttentionContext(cos, sin, matrices, plan, cache)

    def rolling_cache(self, cache: KVCache, frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """What `RollingCache` takes beside `cache`, for a pass over `frames` frames; on the CPU."""
        rows, moved = cache.beside(frames)
        return rows, *rope_tables((moved,), 1, 1, self.cfg.head_dim, rows.device)

    def _tokens(self, latents: Tensor) -> Tensor:
        """(B,T,C,H,W) -> (B,T,S,D); tokens ordered row, column; a token's values ordered channel, row, column."""
        p = self.cfg.patch
        x = latents.unflatten(4, (-1, p)).unflatten(3, (-1, p))  # B T C h p w p
        return self.patch(x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3))

    def _latents(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        """(B,T,S,p*p*C) with the channel fastest -> (B,T,C,H,W)."""
        p = self.cfg.patch
        x = tokens.unflatten(3, (p, p, -1)).unflatten(2, (shape[3] // p, shape[4] // p))  # B T h w p p C
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(shape[0], shape[1], -1, shape[3], shape[4])
