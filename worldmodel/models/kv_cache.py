"""Keys and values of past frames: a fixed ring, sink frames, and a memory of what lies further back, allocated once.

Shapes: L layers, B batch, N heads (twice the model's with a camera branch), S tokens a frame, E head width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from worldmodel import kernels

Layers = list[tuple[Tensor, Tensor]]
"""The keys and the values of every layer, (B,N,K,E) each."""


class Attended(Protocol):
    """What the attention of a chunk takes for its past."""

    def scratch(self, layer: int, tokens: int) -> tuple[Tensor, Tensor] | None:
        """Where `tokens` keys and values (B,N,tokens,E) of the chunk are to be written; None: they are only given to `attend`."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, written: bool) -> Tensor:
        """Attention (B,N,Q,E) of the chunk over what it sees; written: k and v are in the scratch already."""


@dataclass(frozen=True)
class CacheSnapshot:
    """A copy of a cache's content at one moment, independent of the cache."""

    store: Tensor
    position: int


class KVCache:
    """Frozen while a chunk is denoised; changed only by `commit`.

    The store holds ``window - chunk`` past frames (the first `sink` of the rollout for ever, the newest of the rest in a ring) and
    behind them a scratch slot for the chunk being denoised. Every forward pass overwrites the scratch; `commit`, after a pass over
    the finished chunk, moves it into the ring. Keys are stored rotated by their absolute frame index, so order in the ring does not
    matter. All indices live on the host: nothing is allocated and nothing waits for the device in steady state.

    memory: of the frames that leave the ring every `every`-th (those with an index divisible by it) is kept on, the newest `memory`
    of them. They do not count among the `window` frames.

    apart: the sink does not count among the `window` frames, and passes over one chunk see it only as long as it is one of the
    newest; `beside` is for passes over several chunks, which see it always.

    With gradients enabled, passes do not write the scratch (autograd may need the old values): `extend` concatenates instead, and
    the pass before `commit` must run without gradients.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        head_dim: int,
        tokens: int,
        window: int,
        chunk: int = 1,
        sink: int = 0,
        memory: int = 0,
        every: int = 1,
        apart: bool = False,
        batch: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert window >= chunk + sink, "window must hold the sink frames and one chunk"
        assert not memory or (window > chunk + sink and not apart), "a memory needs a ring, and a sink within the window"
        self.tokens, self.chunk, self.sink, self.apart = tokens, chunk, sink, apart
        self.memory, self.every = memory, every
        self.reach = window - chunk + memory  # past frames that a pass over one chunk sees
        self.past = self.reach + (sink if apart else 0)
        self.ring = self.past - sink - memory
        self._slots: list[int] = []
        self.position = self.filled = 0  # frames committed so far; those of them that are kept
        length = (self.past + chunk) * tokens
        self.store = torch.zeros(layers, 2, batch, heads, length, head_dim, device=device, dtype=dtype)
        self.layers: Layers = [(kept[0], kept[1]) for kept in self.store]

    @property
    def full(self) -> bool:
        """Whether every pass has the same shape from now on."""
        return self.filled == self.past

    def reset(self) -> None:
        """Forget everything."""
        self._move_to(0)

    def _move_to(self, position: int) -> None:
        self.position, self.filled = position, self._held(position)

    def _held(self, position: int) -> int:
        """How many of the first `position` frames are kept."""
        return min(position, self.sink + self.ring) + min(self._remembered(position - self.ring), self.memory)

    def _remembered(self, frame: int) -> int:
        """How many frames between the sink and `frame` a memory without end would hold."""
        return max(-(-frame // self.every) + -self.sink // self.every, 0)

    @property
    def until_full(self) -> int:
        """Frames after which every pass has the same shape."""
        memory = (self.memory - 1 - -self.sink // self.every) * self.every + 1 + self.ring if self.memory else 0
        return max(self.sink + self.ring, memory)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B,N,chunk*S,E) of the current chunk -> those of all visible frames followed by the chunk."""
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            keys, values = self.visible(layer, 0)
            return torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
        for place, new in zip(self.scratch(layer, k.shape[2]), (k, v), strict=True):
            place.copy_(new)
        return self.visible(layer, k.shape[2])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, written: bool) -> Tensor:
        """Attention (B,N,Q,E) of a chunk over what it sees; written: k and v are in the scratch already."""
        return kernels.ring_attention(q, *(self.visible(layer, k.shape[2]) if written else self.extend(layer, k, v)))

    def scratch(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Where `tokens` keys and values (B,N,tokens,E) of the current chunk go."""
        keys, values = self.layers[layer]
        return keys[:, :, self.place : self.place + tokens], values[:, :, self.place : self.place + tokens]

    def visible(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all visible frames and of the first `tokens` of the scratch."""
        begin, end = self.begin, self.place + tokens
        keys, values = self.layers[layer]
        return keys[:, :, begin:end], values[:, :, begin:end]

    @property
    def begin(self) -> int:
        """The first token of the store that a pass over one chunk sees."""
        return max(self.filled - self.reach, 0) * self.tokens

    @property
    def place(self) -> int:
        """The first token of the scratch, behind all that the cache holds."""
        return self.filled * self.tokens

    def beside(self, frames: int) -> tuple[Tensor, int]:
        """What a pass over `frames` new frames at once sees of a cache whose sink is `apart`: the sink, and as many of the newest
        frames as the window then holds.

        Their tokens in the store, long (K,) on the CPU, and by how many frames the sink must move to stand right before the others.
        """
        sink = min(self.sink, self.position)
        newest = min(self.reach + self.chunk - self.sink - frames, self.position - sink)
        first = self.position - newest
        slots = torch.tensor([*range(sink), *(self.slot(frame) for frame in range(first, self.position))], dtype=torch.int64)
        return (slots[:, None] * self.tokens + torch.arange(self.tokens)).flatten(), first - sink

    def slot(self, frame: int) -> int | None:
        """Where the frame with this index lives once committed; None if it is not kept (no ring beside the sink)."""
        if frame < self.sink or not self.ring:
            return frame if frame < self.sink else None
        if not self.memory:
            return self.sink + (frame - self.sink) % self.ring
        for new in range(len(self._slots), frame + 1):  # every frame takes the place of the one that it makes the cache forget
            gone = new - self.ring
            if gone % self.every == 0:
                gone -= self.memory * self.every
            self._slots.append(self._slots[gone] if gone >= self.sink else self._held(new))
        return self._slots[frame]

    def commit(self, frames: int | None = None) -> None:
        """Keep what the last pass wrote into the scratch as the next frames: `chunk`, or `frames` where that pass was shorter."""
        start, frames = self.filled, frames or self.chunk
        assert frames <= self.chunk, "the scratch holds one chunk"
        for offset in range(frames):
            source, target = start + offset, self.slot(self.position + offset)
            if target is not None and source != target:
                self._frame(target).copy_(self._frame(source))
        self._move_to(self.position + frames)

    @property
    def mergeable(self) -> bool:
        """Whether the frames of a chunk have places of their own, as `MergedCache` needs it."""
        return not self.apart and self.ring >= self.chunk

    def rows(self) -> Tensor:
        """Where `commit` puts the tokens of the next chunk, long (chunk*S,) on the CPU; only of a cache that is `mergeable`."""
        slots = torch.tensor([self.slot(self.position + i) for i in range(self.chunk)])
        return (slots[:, None] * self.tokens + torch.arange(self.tokens)).flatten()

    def after(self) -> KVCache:
        """This cache, over the same store, as it is once the next chunk is committed."""
        later = copy.copy(self)
        later.advance()
        return later

    def advance(self) -> None:
        """Count a chunk that is in its place already."""
        self._move_to(self.position + self.chunk)

    def _frame(self, slot: int) -> Tensor:
        return self.store[..., slot * self.tokens : (slot + 1) * self.tokens, :]

    def snapshot(self) -> CacheSnapshot:
        """A copy that later steps do not change."""
        return CacheSnapshot(self.store.clone(), self.position)

    def restore(self, snapshot: CacheSnapshot) -> None:
        """Go back to a snapshot of this cache (or of one with the same shape)."""
        self.store.copy_(snapshot.store)
        self._move_to(snapshot.position)


class RollingCache:
    """A cache as a pass over several chunks sees it, all of them noisy (`KVCache.beside`). Nothing of such a pass is kept.

    Keys lie there rotated by the frame they were made for. The sink's are turned on, so that it seems to have happened right before
    the newest frames: the network never meets a distance that it was not trained on.
    """

    def __init__(self, cache: KVCache, rows: Tensor, cos: Tensor, sin: Tensor) -> None:
        """rows: as `KVCache.beside` has them, on the device. cos, sin (1,E/2): of the frames that the sink moves on."""
        self._cache, self._rows, self._turn = cache, rows, (cos, sin)
        self._sink = min(cache.sink * cache.tokens, len(rows))

    def scratch(self, layer: int, tokens: int) -> None:
        """Nothing is kept."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, written: bool) -> Tensor:
        """As `KVCache.attend`."""
        assert not written, "there is no place to write to"
        keys, values = self._cache.store[layer].index_select(3, self._rows)
        sink, newest = keys.split((self._sink, len(self._rows) - self._sink), dim=2)
        keys = torch.cat((kernels.rotate(sink, *self._turn), newest, k), dim=2)
        return kernels.ring_attention(q, keys, torch.cat((values, v), dim=2))


class MergedCache:
    """A cache as it is seen by a pass over [finished chunk | next chunk], which commits the first and denoises the second.

    In every layer the finished chunk reads the past and takes its place in the ring; then the next one reads what is there. So the
    pass computes what a commit and the pass behind it compute, with their products joined. It changes the store, and writes the
    keys and values of the next chunk to the scratch; the host counts the chunk with `KVCache.advance`.
    """

    def __init__(self, cache: KVCache, rows: Tensor) -> None:
        """rows: `KVCache.rows`, on the device. now, after: the cache as the finished chunk sees it, and as later passes over the
        next one do."""
        self.now, self.after, self.rows = cache, cache.after(), rows

    @property
    def tokens(self) -> int:
        """As `KVCache.tokens`."""
        return self.now.tokens

    @property
    def layers(self) -> Layers:
        """As `KVCache.layers`."""
        return self.now.layers

    def scratch(self, layer: int, tokens: int) -> None:
        """The two chunks have no common place."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, written: bool) -> Tensor:
        """As `KVCache.attend`, for both chunks."""
        (q0, q1), (k0, k1), (v0, v1) = (t.chunk(2, dim=2) for t in (q, k, v))
        finished = self.now.attend(layer, q0, k0, v0, written)
        for kept, new in zip(self.layers[layer], (k0, v0), strict=True):
            kept.index_copy_(2, self.rows, new)
        return torch.cat((finished, self.after.attend(layer, q1, k1, v1, written)), dim=2)
