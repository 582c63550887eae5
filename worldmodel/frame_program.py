"""One frame as a program over fixed buffers: all its denoising passes, and the pass that commits it.

What changes from frame to frame is copied into the buffers without waiting for the device; what depends on the noise levels alone
is computed once. Which rows of the cache a pass reads and writes depends on how many frames it holds, which the host knows: so on
an NVIDIA GPU a program is captured once for every fill of the cache, as a CUDA graph, and afterwards a frame is one launch;
elsewhere the same code runs as it is, over the same buffers.

Shapes: B = 1, T frames of a chunk, C H W latent, A action, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from worldmodel.config import SamplerConfig
from worldmodel.diffusion import sample
from worldmodel.models.attention import AttentionContext, Layout
from worldmodel.models.dit import Condition, DiT, TextStates
from worldmodel.models.kv_cache import KVCache, MergedCache, RollingCache
from worldmodel.models.native import NativeDiT
from worldmodel.runtime import capture_graph, upload

Levels = tuple[float, float]
"""The noise level of a pass, and the one it steps down to."""

Step = Callable[[Tensor, Levels], Tensor]
"""A pass with everything but its latents and its noise levels given -> velocity."""


@dataclass(frozen=True, eq=False)
class Given:
    """What a chunk is dreamed under: encoded actions (1,T,A), text states, view matrices (1,T,4,4) with intrinsics (1,T,3,3).

    Actions and matrices may lie in the host's memory, the text states lie on the device.
    """

    actions: Tensor | None = None
    text: TextStates | None = None
    cameras: tuple[Tensor, Tensor] | None = None

    def behind(self, before: Given) -> Given:
        """What two chunks in a row are dreamed under, the text being the same."""
        actions = None if self.actions is None or before.actions is None else torch.cat((before.actions, self.actions), dim=1)
        cameras = None
        if self.cameras is not None and before.cameras is not None:
            views, lenses = (torch.cat(pair, dim=1) for pair in zip(before.cameras, self.cameras, strict=True))
            cameras = views, lenses
        return Given(actions, self.text, cameras)


Finished = tuple[Tensor, Given, float]
"""A chunk (1,T,C,H,W) as it is to be committed, what it was made under, and the noise level that the network is told of it."""


class FrameProgram:
    """The passes of one session: what `sample` and `DiT.denoise` give against the same cache, whose scratch is written likewise.

    Chunks always have the same shape; so have texts. Use it without gradients.
    """

    def __init__(self, model: DiT, cache: KVCache, sampler: SamplerConfig) -> None:
        self.capture = False  # run as CUDA graphs; a CUDA device is needed
        self.compiled: NativeDiT | None = None  # in place of the network's own passes
        self._model, self._cache, self._kind = model, cache, sampler.kind
        self._device = cache.store.device
        self._buffers: dict[str, Tensor] = {}
        self._levels: dict[Levels, Condition] = {}
        self._draws: dict[tuple[float, ...], dict[int, Tensor]] = {}
        self._embedded: dict[int, tuple[Tensor, Tensor]] = {}  # the last actions of so many frames
        self._text: TextStates | None = None
        self._text_source: TextStates | None = None
        self._met: set[tuple[object, ...]] = set()
        self._captured: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None

    @property
    def graphs(self) -> int:
        """How many have been captured so far. They share one pool of memory."""
        return len(self._captured)

    @property
    def can_merge(self) -> bool:
        """Whether `denoise` can commit the chunk before."""
        return self._cache.mergeable

    def denoise(
        self,
        noise: Tensor,
        levels: Sequence[float],
        renoise: Callable[[int], Tensor],
        given: Given,
        finished: Finished | None = None,
    ) -> Tensor:
        """The clean chunk (1,T,C,H,W) that `noise` becomes over the falling noise levels; `renoise` as `sample` takes it.

        finished: the chunk before, if it is not committed yet: the first pass does it, too (where `can_merge`).
        """
        noisy, levels = self._put("latent", noise), tuple(levels)
        draws = self._draws.setdefault(levels, {})
        for i, kept in draws.items():
            upload(renoise(i), kept)
        before = () if finished is None else ((finished[2],) * 2,)
        for pair in (*zip(levels, (*levels[1:], 0.0), strict=True), *before):
            self._prepare(pair, noise.shape[1])
        begin = self._stage(noise.shape, given) if finished is None else self._stage_merged(finished, given)

        def draw(i: int) -> Tensor:
            if i not in draws:  # in the first run, which is never a captured one
                draws[i] = renoise(i).to(self._device, copy=True)
            return draws[i]

        def run() -> Tensor:
            steps = begin()
            return sample(lambda x, sigma, end: next(steps)(x, (sigma, end)), noisy, levels, self._kind, draw)

        name = ("denoise",) if finished is None else ("merged", finished[2])
        clean = self._run((*name, *levels), run, changes_past=finished is not None)
        if finished is not None:
            self._cache.advance()
        return clean

    def together(self, noisy: Tensor, levels: Sequence[float], given: Given) -> Tensor:
        """The clean latents that one pass over several chunks (1,n*T,C,H,W) implies, each at its own of the n levels.

        The sink of the cache is `apart`; its scratch is left alone.
        """
        many = len(levels)
        pairs = [(sigma, 0.0) for sigma in levels]
        for pair in pairs:
            self._prepare(pair, noisy.shape[1] // many)
        x, (ctx, actions) = self._put(f"{many} latents", noisy), self._fill(noisy.shape, given, f"{many} ")
        rows, cos, sin = self._model.rolling_cache(self._cache, noisy.shape[1])
        turn = self._put("turn cos", cos), self._put("turn sin", sin)
        ctx = replace(ctx, cache=RollingCache(self._cache, self._put(f"{len(rows)} rows", rows), *turn))

        def run() -> Tensor:
            velocity = self._model.velocity(x, self._condition(pairs, self._embed(actions)), ctx, self._text)
            parts = zip(x.chunk(many, dim=1), velocity.chunk(many, dim=1), levels, strict=True)
            return torch.cat([part - sigma * change for part, change, sigma in parts], dim=1)

        return self._run(("together", *levels), run)

    def commit(self, chunk: Tensor, given: Given, level: float) -> None:
        """Put a chunk (1,T,C,H,W) into the cache, see `Finished`."""
        self._one_pass("commit", chunk, (level, level), given, finish=False)
        self._cache.commit()

    def look_ahead(self, latent_size: tuple[int, int, int], chunks: int = 1) -> None:
        """Make what the positions of the next chunks say, so that the pass over them finds it made. latent_size: C H W."""
        self._model.context(
            (1, chunks * self._cache.chunk, *latent_size), torch.device("cpu"), Layout.bidirectional(), cache=self._cache
        )

    def trial(self, noise: Tensor, sigma: float, given: Given) -> None:
        """One denoising pass, as frames have several; it changes nothing but the cache's scratch."""
        self._one_pass("trial", noise, (sigma, 0.0), given)

    def _one_pass(self, name: str, latent: Tensor, pair: Levels, given: Given, finish: bool = True) -> None:
        self._prepare(pair, latent.shape[1])
        x, begin = self._put("latent", latent), self._stage(latent.shape, given, finish)
        self._run((name, *pair), lambda: next(begin())(x, pair))

    def _run(self, name: tuple[object, ...], work: Callable[[], Tensor], changes_past: bool = False) -> Tensor:
        """Work over the buffers; as a graph from the second time on: the first run makes what a graph must find."""
        key = (*name, self._cache.filled)
        if not self.capture or key not in self._met:
            self._met.add(key)
            return work()
        if key not in self._captured:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            past = self._cache.snapshot() if changes_past else None  # warming up does the work, too
            self._captured[key] = capture_graph(work, self._pool)
            if past is not None:
                self._cache.restore(past)
        graph, out = self._captured[key]
        graph.replay()
        return out.clone()  # the next replay overwrites it

    # --- what a frame depends on ------------------------------------------------------------------------------------------------

    def _put(self, name: str, value: Tensor) -> Tensor:
        """The buffer of this name, filled."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=self._device)
        upload(value, self._buffers[name])
        return self._buffers[name]

    def _prepare(self, pair: Levels, frames: int) -> None:
        """What noise levels alone say to the network is the same in every frame."""
        if pair not in self._levels:
            sigma, end = (torch.full((1, frames), value, device=self._device) for value in pair)
            self._levels[pair] = self._model.condition(self._model.level(sigma, end))

    def _stage(self, shape: Sequence[int], given: Given, finish: bool = True) -> Callable[[], Iterator[Step]]:
        """Fill the buffers for passes over one chunk -> what begins a run over them. finish: see `_pass`."""
        ctx, actions = self._fill(shape, given, "")
        return lambda: repeat(self._pass(ctx, self._cache, actions, finish=finish))

    def _stage_merged(self, finished: Finished, given: Given) -> Callable[[], Iterator[Step]]:
        """As `_stage`, for a first pass over [finished chunk | this one] and later ones over this one."""
        clean, frames = self._put("finished", finished[0]), finished[0].shape[1]
        both, actions = self._fill((1, 2 * frames, *clean.shape[2:]), given.behind(finished[1]), "both ")
        merged = MergedCache(self._cache, self._put("rows", self._cache.rows()))
        cos, sin = (table.chunk(2)[1] for table in (both.cos, both.sin))
        cameras = None if both.cameras is None else (both.cameras[0][:, frames:], both.cameras[1][:, frames:])
        own, own_actions = AttentionContext(cos, sin, cameras), None if actions is None else actions[:, frames:]

        def begin() -> Iterator[Step]:
            first = self._pass(both, merged, actions, clean, finished[2])
            return chain((first,), repeat(self._pass(own, merged.after, own_actions)))

        return begin

    def _pass(
        self,
        ctx: AttentionContext,
        cache: KVCache | MergedCache,
        actions: Tensor | None,
        clean: Tensor | None = None,
        level: float = 0.0,
        finish: bool = True,
    ) -> Step:
        """A pass against `cache` under what is in the buffers `ctx` and `actions`: over one chunk, or over [clean | that chunk].

        level: that the network is told of the clean one. finish: otherwise nobody wants its result, only what it writes.
        """
        ctx, before, compiled = replace(ctx, cache=cache), () if clean is None else ((level, level),), self.compiled
        action = self._embed(actions)
        if compiled is not None:
            return lambda x, pair: compiled(x, self._told((*before, pair), action), ctx, clean, finish)
        return lambda x, pair: self._model.velocity(x, self._condition((*before, pair), action), ctx, self._text, clean)

    def _fill(self, shape: Sequence[int], given: Given, prefix: str) -> tuple[AttentionContext, Tensor | None]:
        """Copy what passes over latents of `shape` depend on, the latents left out, into buffers -> these."""
        cpu = torch.device("cpu")
        made = self._model.context(tuple(shape), cpu, Layout.bidirectional(), cameras=given.cameras, cache=self._cache)
        cos, sin = self._put(f"{prefix}cos", made.cos), self._put(f"{prefix}sin", made.sin)
        cameras = None
        if made.cameras is not None:
            cameras = self._put(f"{prefix}camera", made.cameras[0]), self._put(f"{prefix}camera inverse", made.cameras[1])
        actions = None if given.actions is None else self._put(f"{prefix}actions", given.actions)
        self._stage_text(given.text)
        return AttentionContext(cos, sin, cameras), actions

    def _embed(self, actions: Tensor | None) -> Tensor | None:
        """Once a frame, and not at all while the player does the same; what is captured must hang on the buffer alone."""
        embed = self._model.action
        if embed is None:
            return None
        if actions is None or self.capture or actions.device.type != "cpu":
            return embed(actions)  # type: ignore[no-any-return]
        kept = self._embedded.get(actions.shape[1])
        if kept is None or not torch.equal(kept[0], actions):
            kept = self._embedded[actions.shape[1]] = actions.clone(), embed(actions)
        return kept[1]

    def _condition(self, pairs: Sequence[Levels], action: Tensor | None) -> Condition:
        """Of one chunk, or of several in a row. Without actions all of it is known beforehand."""
        if action is not None:
            return self._model.condition(self._told(pairs, action))
        known = [self._levels[pair] for pair in pairs]
        if len(known) == 1:
            return known[0]
        return Condition(self._told(pairs, None), torch.cat([one.modulation for one in known], dim=1))

    def _told(self, pairs: Sequence[Levels], action: Tensor | None) -> Tensor:
        """What the network is told of the frames of one chunk, or of several in a row: their noise levels, and the action."""
        known = [self._levels[pair].e for pair in pairs]
        levels = known[0] if len(known) == 1 else torch.cat(known, dim=1)
        return levels if action is None else levels + action

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
