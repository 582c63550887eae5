"""One frame as a program over fixed buffers: all its denoising passes, and the pass that commits it.

What changes from frame to frame is copied into the buffers; which rows of the cache a pass reads and writes depends on how many
frames it holds, which the host knows. So on an NVIDIA GPU a program is captured once for every fill of the cache, as a CUDA graph,
and afterwards a frame is one launch; elsewhere the same code runs as it is, over the same buffers.

Shapes: B = 1, T frames of a chunk, C H W latent, A action.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worldmodel.diffusion import sample
from worldmodel.models.attention import AttentionContext, Layout
from worldmodel.models.dit import DiT, TextStates
from worldmodel.models.kv_cache import KVCache
from worldmodel.runtime import capture_graph


@dataclass(frozen=True, eq=False)
class Given:
    """What a frame is dreamed under: encoded actions (1,T,A), text states, view matrices (1,T,4,4) with intrinsics (1,T,3,3)."""

    actions: Tensor | None = None
    text: TextStates | None = None
    cameras: tuple[Tensor, Tensor | None] | None = None


class FrameProgram:
    """The passes of one session: what `sample` and `DiT.denoise` give against the same cache, whose scratch is written likewise.

    capture: as CUDA graphs (a CUDA device is needed). Chunks always have the same shape; so have texts. Use it without gradients.
    """

    def __init__(self, model: DiT, cache: KVCache, kind: str, context_sigma: float, capture: bool) -> None:
        self._model, self._cache, self._kind, self._context_sigma, self._capture = model, cache, kind, context_sigma, capture
        self._buffers: dict[str, Tensor] = {}
        self._levels: dict[float, Tensor] = {}
        self._draws: dict[tuple[float, ...], dict[int, Tensor]] = {}
        self._text: TextStates | None = None
        self._text_source: TextStates | None = None
        self._captured: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @property
    def graphs(self) -> int:
        """How many have been captured so far."""
        return len(self._captured)

    def denoise(self, noise: Tensor, levels: Sequence[float], renoise: Callable[[int], Tensor], given: Given) -> Tensor:
        """The clean chunk (1,T,C,H,W) that `noise` becomes over the falling noise levels; `renoise` as `sample` takes it."""
        noisy, ctx = self._stage(noise, given)
        draws = self._draws.setdefault(tuple(levels), {})
        for i, kept in draws.items():
            kept.copy_(renoise(i))

        def draw(i: int) -> Tensor:
            if i not in draws:  # in the first run, which is never a captured one
                draws[i] = renoise(i).clone()
            return draws[i]

        def run() -> Tensor:
            return sample(lambda x, sigma, end: self._pass(x, sigma, end, ctx, given), noisy, list(levels), self._kind, draw)

        for level in (*levels, 0.0):
            self._level(level, noise)
        return self._run(("denoise", *levels), run)

    def commit(self, clean: Tensor, given: Given) -> None:
        """Put the finished chunk (1,T,C,H,W) into the cache."""
        noisy, ctx = self._stage(clean, given)
        level = self._context_sigma
        self._level(level, clean)
        self._run(("commit",), lambda: self._pass(noisy, level, level, ctx, given))
        self._cache.commit()

    def _pass(self, x: Tensor, sigma: float, end: float, ctx: AttentionContext, given: Given) -> Tensor:
        actions = None if given.actions is None else self._buffers["actions"]
        return self._model.denoise(x, self._levels[sigma], ctx, actions, text=self._text, end=self._levels[end])

    def _stage(self, latent: Tensor, given: Given) -> tuple[Tensor, AttentionContext]:
        """Copy what this frame depends on into the buffers -> those of the latent and of what the attention layers share."""
        wanted = self._model.context(latent.shape, latent.device, Layout.bidirectional(), cameras=given.cameras, cache=self._cache)
        values = {"latent": latent, "cos": wanted.cos, "sin": wanted.sin}
        if given.actions is not None:
            values["actions"] = given.actions
        if wanted.cameras is not None:
            values["camera"], values["camera_inverse"] = wanted.cameras
        for name, value in values.items():
            if name not in self._buffers:
                self._buffers[name] = torch.empty_like(value, memory_format=torch.contiguous_format)
            self._buffers[name].copy_(value)
        self._stage_text(given.text)
        b = self._buffers
        cameras = None if wanted.cameras is None else (b["camera"], b["camera_inverse"])
        return b["latent"], AttentionContext(b["cos"], b["sin"], cameras, cache=self._cache)

    def _stage_text(self, text: TextStates | None) -> None:
        """Text states are large: they are copied when the prompt has changed, not every frame."""
        if text is None or text is self._text_source:
            return
        if self._text is None:
            self._text = [(k.clone(), v.clone()) for k, v in text]
        else:
            for kept, new in zip(self._text, text, strict=True):
                kept[0].copy_(new[0])
                kept[1].copy_(new[1])
        self._text_source = text

    def _level(self, sigma: float, like: Tensor) -> None:
        if sigma not in self._levels:
            self._levels[sigma] = torch.full(like.shape[:2], sigma, device=like.device)

    def _run(self, name: tuple[object, ...], work: Callable[[], Tensor]) -> Tensor:
        if not self._capture:
            return work()
        key = (*name, self._cache.filled)
        if key not in self._captured:
            self._captured[key] = capture_graph(work)
        graph, out = self._captured[key]
        graph.replay()
        return out.clone()  # the next replay overwrites it
