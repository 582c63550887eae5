"""The video network and its frames in plain PyTorch, written as the public code of its family is: what `plain` compares with.

The habits are those of the causal inference code of Self Forcing, which Causal Forcing and others build upon, and of Wan 2.1 below
it. q, k and v are linears of their own; RMS norms are written out in float32; rotation multiplies complex float64 numbers; time
and text embedding and modulation are made anew in every pass, keys and values of the text once; a cache of fixed size a layer rolls
by clone and copy when it is full, and where it ends are numbers on the GPU, read by ``.item()``; latents are made in float64.

Some things are quicker than there: the factors of the rotation are put together once a pass (there twice a layer), a layer reads
two numbers a pass (there two to six), patches are a 2-D convolution, and noise levels are not looked up in a scheduler's table.
Attention is whatever PyTorch picks; that code calls the FlashAttention packages where they are installed, and on cards whose name
it knows FlashAttention 3, which can be faster. One video, frame by frame, without a sink.

Shapes: C H W latent, S tokens a frame, D model width, N heads, E head width, L text tokens, K tokens the cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.config import DiTConfig, SamplerConfig
from worldmodel.models.dit import DiT
from worldmodel.models.embeddings import rope_split, sinusoid

POSITIONS = 1024  # frames, rows and columns that have a place in the table of rotations
Pair = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Over the last axis, step by step in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm of x (1,S,D) without affine, then (1 + scale) and shift (1,1,D)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def rotate(x: Tensor, factors: Tensor) -> Tensor:
    """Adjacent channels of x (1,S,N,E) as complex numbers, times factors (S,1,E/2)."""
    pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factors).flatten(-2).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (1,S,N,E), k and v (1,K,N,E) -> (1,S,D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """The linears and norms that self-attention and cross-attention have alike."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.q, self.k, self.v, self.out = (nn.Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(cfg.dim, cfg.eps), RMSNorm(cfg.dim, cfg.eps)

    def queries(self, x: Tensor) -> Tensor:
        """(1,S,D) -> (1,S,N,E)."""
        return self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))

    def states(self, x: Tensor) -> Pair:
        """Keys and values (1,S,N,E) of (1,S,D)."""
        k, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.norm_k(self.k(x)), self.v(x)))
        return k, v


class Block(nn.Module):
    """One layer. It takes the cache as tensors, and where the frame belongs as a number: so it compiles in one piece."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.eps, self.modulation = cfg.eps, nn.Parameter(torch.empty(6, cfg.dim))
        self.attention, self.cross = Attention(cfg), Attention(cfg)
        self.cross_norm = nn.LayerNorm(cfg.dim, eps=cfg.eps)
        self.ffn_in, self.ffn_out = nn.Linear(cfg.dim, cfg.ffn_dim), nn.Linear(cfg.ffn_dim, cfg.dim)

    def forward(self, x: Tensor, modulation: Tensor, factors: Tensor, k: Tensor, v: Tensor, end: int, text: Pair) -> Tensor:
        """x (1,S,D), modulation (1,1,6,D) -> (1,S,D). k and v (1,K,N,E): of the cache, of which this pass fills S tokens up to
        `end` and sees all before. text: keys and values (1,L,N,E)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + modulation).unbind(2)
        h = modulated(x, shift1, scale1, self.eps)
        start, q, fresh = end - x.shape[1], rotate(self.attention.queries(h), factors), self.attention.states(h)
        k[:, start:end] = rotate(fresh[0], factors)
        v[:, start:end] = fresh[1]
        x = x + self.attention.out(attend(q, k[:, :end], v[:, :end])) * gate1
        x = x + self.cross.out(attend(self.cross.queries(self.cross_norm(x)), *text))
        h = F.gelu(self.ffn_in(modulated(x, shift2, scale2, self.eps)), approximate="tanh")
        return x + self.ffn_out(h) * gate2


class LayerCache:
    """Keys and values (1,K,N,E) of one layer, oldest first, and those of the text once it has been seen."""

    def __init__(self, cfg: DiTConfig, size: int, like: Tensor, indices: torch.device) -> None:
        """size: K. like: has the device and type of the network. indices: where the numbers lie that say what is held."""
        self.k, self.v = (torch.zeros(1, size, cfg.heads, cfg.head_dim, device=like.device, dtype=like.dtype) for _ in range(2))
        self.seen, self.held = (torch.zeros((), dtype=torch.long, device=indices) for _ in range(2))  # tokens of the video, of it
        self.text: Pair | None = None

    def make_room(self, until: int) -> int:
        """Where the tokens up to `until` of the video end in here; those of earlier passes over the same frame are overwritten."""
        seen, held = int(self.seen.item()), int(self.held.item())
        over = max(held + until - seen - self.k.shape[1], 0)
        if over:
            for rows in (self.k, self.v):
                rows[:, : held - over] = rows[:, over:held].clone()
        end = held + until - seen - over
        self.seen.fill_(until)
        self.held.fill_(end)
        return end


class PlainDiT(nn.Module):
    """The network of a `DiT` for text alone, with the very weights of that: nothing is copied."""

    def __init__(self, model: DiT) -> None:
        cfg = model.cfg
        assert cfg.text_dim and cfg.activation == "gelu_tanh", "this is the network of Wan 2.1"
        assert not (cfg.action_dim or cfg.camera or cfg.flow_map), "this network knows text alone"
        super().__init__()
        self.cfg = cfg
        with torch.device("meta"):
            self.patch = nn.Conv2d(cfg.in_channels, cfg.dim, cfg.patch, cfg.patch)
            self.time = nn.Sequential(nn.Linear(cfg.freq_dim, cfg.dim), nn.SiLU(), nn.Linear(cfg.dim, cfg.dim))
            self.noise_projection = nn.Linear(cfg.dim, 6 * cfg.dim)
            self.text = nn.Sequential(nn.Linear(cfg.text_dim, cfg.dim), nn.GELU(approximate="tanh"), nn.Linear(cfg.dim, cfg.dim))
            self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
            self.head_modulation = nn.Parameter(torch.empty(2, cfg.dim))
            self.head = nn.Linear(cfg.dim, cfg.out_channels * cfg.patch**2)
        self.load_state_dict(_weights(model), assign=True)
        self.tables = [_turns(pairs).to(self.head.weight.device) for pairs in rope_split(cfg.head_dim)]

    def forward(self, noisy: Tensor, sigma: Tensor, text: Tensor, caches: Sequence[LayerCache], frame: int) -> Tensor:
        """Velocity (1,1,C,H,W) of frame number `frame` at noise level sigma (1,1). text: encoder's output (1,<=L,text_dim)."""
        x = self.patch(noisy[:, 0])
        factors, x = self._factors(frame, *x.shape[2:]), x.flatten(2).mT
        e = self.time(sinusoid(sigma, self.cfg.freq_dim).type_as(x))
        modulation = self.noise_projection(F.silu(e)).unflatten(-1, (6, -1))
        context = self.text(F.pad(text, (0, 0, 0, self.cfg.text_len - text.shape[1])))
        for block, cache in zip(self.blocks, caches, strict=True):
            cache.text = cache.text or block.cross.states(context)  # type: ignore[operator, union-attr]
            end = cache.make_room((frame + 1) * x.shape[1])
            x = block(x, modulation, factors, cache.k, cache.v, end, cache.text)
        shift, scale = (self.head_modulation + e[:, :, None]).unbind(2)
        x = self.head(modulated(x, shift, scale, self.cfg.eps))
        p, (rows, cols) = self.cfg.patch, (side // self.cfg.patch for side in noisy.shape[3:])
        x = x.view(1, 1, rows, cols, p, p, -1).permute(0, 1, 6, 2, 4, 3, 5)  # a token's values: row, column, channel
        return x.reshape(noisy.shape)

    def _factors(self, frame: int, rows: int, cols: int) -> Tensor:
        """Complex float64 (S,1,E/2): how far the tokens of a frame are turned, by frame, row and column."""
        t, h, w = self.tables
        parts = (t[frame].expand(rows, cols, -1), h[:rows, None].expand(-1, cols, -1), w[:cols].expand(rows, -1, -1))
        return torch.cat(parts, dim=-1).flatten(0, 1)[:, None]


def _turns(pairs: int) -> Tensor:
    """Unit complex numbers (POSITIONS, pairs) in float64."""
    rates = torch.pow(10000.0, -torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
    angles = torch.outer(torch.arange(POSITIONS, dtype=torch.float64), rates)
    return torch.polar(torch.ones_like(angles), angles)


def _weights(model: DiT) -> dict[str, Tensor]:
    """The parameters of `model` under the names of `PlainDiT`, as views; what one linear makes of several things is taken apart."""
    found = {}
    for name, value in model.state_dict().items():
        *place, last, kind = name.replace("noise.mlp", "time").split(".") if "." in name else ("", name)
        if name == "patch.weight":
            value = value.unflatten(1, (-1, model.cfg.patch, model.cfg.patch))
        for part, piece in zip(last, value.chunk(len(last)), strict=True) if last in ("qkv", "kv") else ((last, value),):
            found[".".join(word for word in (*place, part, kind) if word)] = piece
    return found


class PlainRollout:
    """A video dreamed frame by frame: the passes of a consistency sampler, and the pass that commits the frame."""

    def __init__(
        self,
        network: PlainDiT,
        sampler: SamplerConfig,
        levels: Sequence[float],
        text: Tensor,
        latent_hw: tuple[int, int],
        indices: torch.device,
        steady: PlainDiT | None = None,
    ) -> None:
        """indices: as of `LayerCache`. steady: runs once the cache is full, when every pass has the same shapes."""
        self._network, self._steady, self._text, self._context = network, steady or network, text, sampler.context_sigma
        self._levels, self._window, self.frame = levels, sampler.window, 0
        tokens = latent_hw[0] * latent_hw[1] // network.cfg.patch**2
        size, like = sampler.window * tokens, network.head.weight
        self._caches = [LayerCache(network.cfg, size, like, indices) for _ in range(network.cfg.layers)]

    def act(self, noise: Tensor, draws: Sequence[Tensor]) -> Tensor:
        """The next clean frame (1,1,C,H,W) from noise of its shape; draws: fresh noise for every level behind the first."""
        noisy = noise
        for i, level in enumerate(self._levels):
            clean = self._clean(noisy, level)
            if i + 1 < len(self._levels):
                noisy = (1 - self._levels[i + 1]) * clean + self._levels[i + 1] * draws[i]
        self._pass(clean, self._context)
        self.frame += 1
        return clean

    def _clean(self, noisy: Tensor, level: float) -> Tensor:
        velocity, sigma = self._pass(noisy, level)
        return (noisy.double() - sigma.double() * velocity.double()).type_as(noisy)

    def _pass(self, latent: Tensor, level: float) -> Pair:
        """Velocity, and the noise level as a tensor."""
        network = self._steady if self.frame + 1 >= self._window else self._network
        sigma = torch.full((1, 1), level, device=latent.device)
        return network(latent, sigma, self._text, self._caches, self.frame), sigma
