"""The student's own rollout, with gradients where distribution matching wants them, by the game's cache and sampler.

A chunk starts from noise and runs down a list of levels; its last clean prediction (the exit step) is the chunk's frames and alone
carries a gradient. Then a pass without gradients commits the finished chunk, as in the game.

What a later chunk sees of an earlier one are the keys and values of that commit pass. Their gradient is a choice:
``detached`` (ours: the gradient of a chunk stays in its own exit step) or ``carried`` (what the published code does by way of
recomputed activations: values of the commit pass, gradient of the earlier chunk's exit step).

Shapes: B rollouts, T frames, C H W latent, N heads, S tokens a frame, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from worldmodel import kernels
from worldmodel.config import DiTConfig, Kept
from worldmodel.diffusion import sample
from worldmodel.models.kv_cache import KVCache, Layers

BlockDenoiser = Callable[[Tensor, float, float, slice], Tensor]
"""(noisy, sigma, end, block) -> velocity of the chunk at the frames `block` of the rollout, against the cache."""

Link = list[tuple[Tensor, Tensor]]


class LastingCache(KVCache):
    """A cache that holds rollouts of up to `frames` whole, of which attention sees the last `window`: what a pass saw is still
    there at backward, when it may be made again. Within the window, or without sink and memory: what is seen lies in one piece.
    """

    def __init__(self, *, window: int, frames: int, **options: Any) -> None:
        super().__init__(window=max(window, frames), **options)
        assert frames <= window or not (self.sink or self.memory)
        self.reach = window - self.chunk

    def seen(self) -> SeenFrames:
        """What a pass sees now, to be seen again when the cache has moved on."""
        return SeenFrames([self.visible(layer, 0) for layer in range(len(self.layers))])


class SeenFrames:
    """Past frames as they stay; the chunk of a pass is put behind them and kept nowhere."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers

    def scratch(self, layer: int, tokens: int) -> None:
        """There is no place to write to."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, written: bool) -> Tensor:
        """As `KVCache.attend`."""
        assert not written, "there is no place to write to"
        keys, values = self._layers[layer]
        return kernels.ring_attention(q, torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2))


class CarryingCache(KVCache):
    """A cache whose frames keep the gradient of the pass that made them (``carried``), whatever pass gave their values."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._made: dict[int, tuple[Tensor, Tensor]] = {}
        self._links: dict[int, Link] = {}

    def reset(self) -> None:
        super().reset()
        self._made, self._links = {}, {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not (torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)):
            return super().extend(layer, k, v)
        self._made[layer] = (k, v)
        keys, values = super().extend(layer, k, v)
        end = self.filled * self.tokens
        past = (self._linked(side, layer, tensor[:, :, :end]) for side, tensor in enumerate((keys, values)))
        return tuple(torch.cat((p, t[:, :, end:]), dim=2) for p, t in zip(past, (keys, values), strict=True))  # type: ignore[return-value]

    def _linked(self, side: int, layer: int, past: Tensor) -> Tensor:
        """Values `past` with the gradients of the linked frames: value + (source - sg(source))."""
        parts = list(past.split(self.tokens, dim=2))
        for slot, link in self._links.items():
            if slot < len(parts):
                source = link[layer][side]
                parts[slot] = parts[slot] + (source - source.detach())
        return torch.cat(parts, dim=2) if parts else past

    @torch.enable_grad()  # the commit pass has none, but the slices below must keep theirs
    def commit(self, frames: int | None = None) -> None:
        count = frames or self.chunk
        for offset in range(count):
            slot = self.slot(self.position + offset)
            if slot is None:
                continue
            self._links.pop(slot, None)
            if self._made:
                tokens = slice(offset * self.tokens, (offset + 1) * self.tokens)
                self._links[slot] = [(k[:, :, tokens], v[:, :, tokens]) for _, (k, v) in sorted(self._made.items())]
        self._made = {}
        super().commit(frames)


def rollout_cache(
    config: DiTConfig,
    latent_hw: tuple[int, int],
    batch: int,
    kept: Kept,
    device: torch.device,
    dtype: torch.dtype,
    carried: bool = False,
    cameras: bool = False,
    frames: int = 0,
    whole: bool = False,
) -> KVCache:
    """An empty cache for rollouts of `batch` latents of `latent_hw`, in the type that attention computes in.

    frames: of the longest rollout, where that is known (0: it is not). whole: hold rollouts longer than the window, too.
    """
    kind: Callable[..., KVCache] = CarryingCache if carried else KVCache
    within, in_one_piece = 0 < frames <= kept["window"], not (kept["sink"] or kept["memory"])
    if not carried and (within or (frames and whole and in_one_piece)):
        kind = partial(LastingCache, frames=frames)
    return kind(
        layers=config.layers,
        heads=config.heads * (2 if cameras else 1),
        head_dim=config.head_dim,
        tokens=latent_hw[0] * latent_hw[1] // config.patch**2,
        **kept,
        batch=batch,
        device=device,
        dtype=dtype,
    )


def self_rollout(
    denoise: BlockDenoiser,
    cache: KVCache,
    noise: Tensor,
    levels: Callable[[int], Sequence[float]],
    renoise: Callable[[int, int], Tensor],
    *,
    start: int = 0,
    kind: str = "consistency",
    grad_from: int = 0,
    every_step: bool = False,
    context: Callable[[int, Tensor], tuple[Tensor, float]] = lambda _, clean: (clean, 0.0),
) -> Tensor:
    """Dream frames start..T behind what the cache holds; returns them, (B,T-start,C,H,W).

    noise (B,T,C,H,W): what every chunk starts from. levels(chunk number): its falling noise levels, cut behind the exit step.
    renoise(chunk number, step): fresh noise of the chunk's shape. Gradients (where enabled) begin with the chunk that holds frame
    `grad_from` and go through the last denoising step only, or with `every_step` through all. context(chunk number, clean): what
    the commit pass sees of a finished chunk, and what noise level it is told.
    """
    chunks = []
    for number, first in enumerate(range(start, noise.shape[1], cache.chunk)):
        block = slice(first, min(first + cache.chunk, noise.shape[1]))
        sigmas, wanted = list(levels(number)), torch.is_grad_enabled() and block.stop > grad_from

        def step(
            noisy: Tensor, sigma: float, end: float, block: slice = block, last: float = sigmas[-1], wanted: bool = wanted
        ) -> Tensor:
            with torch.set_grad_enabled(wanted and (every_step or sigma == last)):
                return denoise(noisy, sigma, end, block)

        clean = sample(step, noise[:, block], sigmas, kind, lambda i, number=number: renoise(number, i))  # type: ignore[misc]
        chunks.append(clean)
        if block.stop < noise.shape[1]:  # nothing comes behind the last
            seen, level = context(number, clean.detach())
            commit(denoise, cache, seen, block, level)
    return torch.cat(chunks, dim=1)


@torch.no_grad()
def commit(denoise: BlockDenoiser, cache: KVCache, clean: Tensor, block: slice, context_sigma: float = 0.0) -> None:
    """Make the frames `clean` at `block` part of the cache's past."""
    denoise(clean, context_sigma, context_sigma, block)
    cache.commit(clean.shape[1])


def context_of(frames: int, chunk: int) -> int:
    """Real frames before a held-out rollout in clips of `frames`: about a third, whole chunks."""
    return max(frames // 3 // chunk, 1) * chunk


def compare_rollouts(made: Tensor, real: Tensor, last: Tensor, mask: Tensor) -> dict[str, float]:
    """Dreamed against real latents (B,T,C,H,W), `last` (B,1,C,H,W) being the real frame before them. {} if nothing can be compared.

    mask: bool (B,T), False for frames behind the end of an episode, which count nowhere. rollout_std: spread over spread;
    rollout_motion: mean change between successive frames over the same (left out where the real frames stand still);
    rollout_gain: dB over repeating `last`, first 8 frames.
    """
    if not bool(mask.any()):
        return {}
    changes = [torch.cat((last, clip), dim=1).diff(dim=1)[mask].abs().mean() for clip in (made, real)]
    near = mask[:, :8]
    error, still = ((clip[:, :8] - real[:, :8])[near].square().mean() for clip in (made, last.expand_as(real)))
    numbers = {"rollout_std": float(made[mask].std() / real[mask].std())}
    if changes[1] > 0:
        numbers["rollout_motion"] = float(changes[0] / changes[1])
    return numbers | {"rollout_gain": float(10 * torch.log10(still.clamp(min=1e-9) / error.clamp(min=1e-9)))}
