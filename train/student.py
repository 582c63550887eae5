"""The student as a rollout needs it: a denoiser of chunks against one cache, fast where no gradient is wanted.

A rollout is hundreds of passes over a few thousand tokens, and on a GPU launching their kernels would take most of the time: passes
without gradients run as CUDA graphs on a bf16 copy of the weights, one graph for every number of frames in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train.data import ClipBatch, Draws
from train.distributed import copy_whole
from train.rollout import commit, rollout_cache, self_rollout
from train.stages.base import Context
from worldmodel.config import SamplerConfig
from worldmodel.diffusion import noise_levels
from worldmodel.models.attention import AttentionContext, Layout
from worldmodel.models.dit import DiT
from worldmodel.models.past import Past
from worldmodel.runtime import capture_graph


@dataclass(frozen=True, eq=False)
class _Graph:
    """A captured pass with the buffers that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    out: Tensor
    inputs: tuple[Tensor, ...]


class Student:
    """`begin` a rollout with its conditions, then use `denoise` and `cache` with `train.rollout.self_rollout`; or `dream`.

    carried, frames: see train.rollout. graphs: False for a few rollouts only, which capturing would not pay for. pictured:
    channels of a latent that are of the picture.
    """

    def __init__(
        self,
        model: DiT,
        context: Context,
        latent_shape: tuple[int, ...],
        sampler: SamplerConfig,
        batch: int,
        carried: bool = False,
        graphs: bool = True,
        frames: int = 0,
        *,
        pictured: int,
    ) -> None:
        self._model, self._context, self._sampler = model, context, sampler
        self._past = Past(pictured, context.config.data.place_view, sampler)
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._copy: DiT | None = None
        # launches are not what passes of large networks with prompts wait for
        wanted = graphs and context.dtype is torch.bfloat16 and not (context.config.train.fsdp or model.cfg.text_dim)
        if wanted and context.device.type == "cuda":
            self._copy = DiT(model.cfg).to(context.device, torch.bfloat16).requires_grad_(False)
        self.cache = rollout_cache(
            model.cfg,
            (latent_shape[1], latent_shape[2]),
            batch,
            sampler.kept,
            context.device,
            context.dtype,
            carried,
            model.cfg.camera,
            frames,
            whole=bool(model.cfg.text_dim),  # of a large network: passes have to be made again, or would fill the memory
        )

    @torch.no_grad()
    def begin(self, clips: ClipBatch, changed: bool = True) -> None:
        """Forget the last rollout. clips: what the next is conditioned on; changed: whether the student has been trained since."""
        self.cache.reset()
        self._clips = clips
        if self._copy is not None and changed:
            copy_whole(self._copy, self._model)

    def see(self, latents: Tensor, draws: Draws, real: int) -> None:
        """Make the frames (B,T,C,H,W), whole chunks, the past that the rollout goes on from.

        real: how many of them are, then come dreamed ones; below 0: so many dreamed ones are left out before them.
        """
        chunk = self.cache.chunk
        for start in range(0, latents.shape[1], chunk):
            block = slice(start, start + chunk)
            seen, level = latents[:, block], self._sampler.context_sigma
            if start >= real:
                seen, level = self.kept(seen, draws, start - real + 1)
            commit(self.denoise, self.cache, seen, block, level)

    def kept(self, clean: Tensor, draws: Draws, number: int) -> tuple[Tensor, float]:
        """A dreamed chunk (B,T,C,H,W) as it goes into the past, and level. number: of its first frame behind real ones."""
        return self._past.keep(clean, number, lambda: draws.normal(f"past_{number}", *clean.shape[1:]))

    @torch.no_grad()
    def dream(self, clips: ClipBatch, context: int, draws: Draws, steps: int = 0) -> Tensor:
        """What comes behind the first `context` frames, whole chunks of them, of `clips` by the sampler of the game,
        (B,T-context,C,H,W). steps: denoising steps of a chunk (0: the sampler's own)."""
        sampler = self._sampler
        levels = noise_levels(steps or sampler.steps, sampler.shift, sampler.sigmas)
        self.begin(clips)
        self.see(clips.seen(context), draws, context)
        return self_rollout(
            self.denoise,
            self.cache,
            draws.normal("noise", *clips.latent.shape[1:]),
            lambda _: levels,
            lambda number, step: draws.normal(f"renoise_{number}_{step}", sampler.chunk, *clips.latent.shape[2:]),
            start=context,
            kind=sampler.kind,
            context=lambda number, clean: self.kept(clean, draws, 1 + number * sampler.chunk),
        )

    def denoise(self, noisy: Tensor, sigma: float, end: float, block: slice) -> Tensor:
        """float32 velocity of the frames `block`, noisy (B,chunk,C,H,W) at level sigma, behind what the cache holds."""
        part = self._clips.cut(block.start, block.stop)
        level, until = (torch.full(noisy.shape[:2], value, device=noisy.device) for value in (sigma, end))
        if self._copy is not None and not torch.is_grad_enabled():
            return self._replay(noisy, level, until, part.action)
        # compiled blocks would be compiled anew for every layer and fill of the cache
        with self._context.autocast(), torch.compiler.set_stance("force_eager"):
            return self._model(noisy, level, cache=self.cache, end=until, **part.conditions()).float()

    def _replay(self, noisy: Tensor, level: Tensor, end: Tensor, actions: Tensor) -> Tensor:
        assert self._copy is not None
        ctx = self._copy.context(noisy.shape, noisy.device, Layout.bidirectional(), cache=self.cache)
        inputs = (noisy.bfloat16(), level, end, actions.bfloat16(), ctx.cos, ctx.sin)
        key = (self.cache.filled, noisy.shape[1])
        if key not in self._graphs:
            self._graphs[key] = self._capture(inputs)
        captured = self._graphs[key]
        torch._foreach_copy_(list(captured.inputs), list(inputs))
        captured.graph.replay()
        return captured.out.float()

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Graph:
        static = tuple(t.clone() for t in inputs)
        noisy, level, end, actions, cos, sin = static

        def run() -> Tensor:
            assert self._copy is not None
            return self._copy.denoise(noisy, level, AttentionContext(cos, sin, cache=self.cache), actions, end=end)

        return _Graph(*capture_graph(run), static)
