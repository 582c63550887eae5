"""How much memory a video world takes and how much there is: what `worldmodel.placement` decides from.

Networks are built of shapes without memory and run over shapes: what is alive at once is counted, not guessed. Workspaces of the
device's libraries are not in it. Shapes: T latents of a chunk, L tokens, D text width.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worldmodel import runtime
from worldmodel.config import WorldConfig
from worldmodel.models.attention import Layout
from worldmodel.models.dit import DiT
from worldmodel.models.kv_cache import RollingCache
from worldmodel.models.video import StreamNet, VideoDecoder, VideoEncoder
from worldmodel.placement import Machine, Sizes

META, HALF = torch.device("meta"), torch.bfloat16


class _Alive(TorchDispatchMode):
    """Bytes of the tensors that operations made: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def alive(work: Callable[[], object]) -> int:
    """Bytes that `work`, on tensors of the meta device, has alive at once, beside what was there before."""
    with _Alive() as counted, torch.inference_mode():
        work()
    return counted.most


def weights(module: nn.Module) -> int:
    """Bytes in a type of two bytes a number."""
    return HALF.itemsize * sum(p.numel() for p in module.parameters())


def _shape(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device=META)


def sizes_of(config: WorldConfig, decoder: StreamNet, encoder: StreamNet | None = None, text: tuple[int, int] = (0, 0)) -> Sizes:
    """Of the world that `config` describes. decoder, encoder: on the meta device, the latter where a picture is the start.

    text: bytes of the text encoder's file and of its largest layer.
    """
    sampler = config.sampler
    with META:  # networks alone: what is cached by its arguments must not be made of shapes
        one = DiT(replace(config.model, layers=1)).to(HALF)
    whole = weights(one) + weights(one.blocks[0]) * (config.model.layers - 1)
    frames = sampler.together
    cache = one.make_cache(config.latent_size[1:], **sampler.kept, cameras=config.model.camera, apart=sampler.rolling)
    cache._move_to(cache.until_full)  # a pass sees most then
    latent = _shape(1, frames, *config.latent_size, dtype=HALF)
    level, views = _shape(1, frames), (_shape(1, frames, 4, 4), _shape(1, frames, 3, 3))
    ctx = one.context(latent.shape, META, Layout.bidirectional(), cameras=views if config.model.camera else None, cache=cache)
    if sampler.rolling:
        ctx = replace(ctx, cache=RollingCache(cache, *(part.to(META) for part in one.rolling_cache(cache, frames))))
    states = one.text_states(_shape(1, 1, config.model.text_dim, dtype=HALF)) if config.model.text_dim else None
    decoder = decoder.to(HALF)

    def decode() -> None:
        stream = VideoDecoder(decoder)
        for _ in range(3):  # its memory is full then
            stream.decode(latent[:, : sampler.chunk])

    def encode() -> None:
        assert encoder is not None
        VideoEncoder(encoder).encode(_shape(1, 1, 3, config.height, config.width))

    steps = max(sampler.steps, sampler.first_steps)
    drawn = 2 * steps * HALF.itemsize * sampler.chunk * math.prod(config.latent_size)  # noise of this step, and of the next
    return Sizes(
        network=whole,
        decoder=weights(decoder),
        latent=config.model.layers * cache.store.nbytes // sampler.window,
        window=sampler.window,
        least=sampler.least_window,
        texts=config.model.layers * sum(t.nbytes for pair in states or () for t in pair),
        a_pass=alive(lambda: one.denoise(latent, level, ctx, text=states)) + drawn,
        decoding=alive(decode),
        encoder=0 if encoder is None else 2 * weights(encoder) + alive(encode),
        text_file=text[0],
        text_layer=text[1],
        pictures=sampler.chunk * config.frames_per_latent * config.height * config.width * 3,
    )


def machine(device: torch.device) -> Machine:
    """What is free now on this machine, of the memory of `device` and of the CPU's."""
    cpu = torch.device("cpu")
    kinds = (str(runtime.pick_dtype(place)).removeprefix("torch.") for place in (device, cpu))
    free = [runtime.free_memory(place) for place in (device, cpu)]
    total = [runtime.memory_bytes(place) for place in (device, cpu)]
    return Machine(device.type, free[0], total[0], free[1], total[1], *kinds)
