"""The key/value cache alone: which frames are seen, what a pass may change, snapshots, constant memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from worldmodel.models.kv_cache import KVCache

TOKENS, LAYERS = 3, 2


def make(window: int, chunk: int = 1, sink: int = 0, **memory: int) -> KVCache:
    cache = KVCache(layers=LAYERS, heads=2, head_dim=4, tokens=TOKENS, window=window, chunk=chunk, sink=sink, **memory)
    cache.store.fill_(float("nan"))
    return cache


def mark(first: int, frames: int, layer: int = 0) -> Tensor:
    """Keys that spell their frame index (and layer), so that one can read back who is seen."""
    index = torch.arange(first, first + frames).repeat_interleave(TOKENS).float() + 1000 * layer
    return index[None, None, :, None].expand(1, 2, -1, 4)


def look(cache: KVCache, frames: int) -> list[list[int]]:
    """One pass over the next frames; the frame indices that every layer sees, in cache order."""
    seen = []
    for layer in range(LAYERS):
        marks = mark(cache.position, frames, layer)
        keys, values = cache.extend(layer, marks, -marks)
        assert torch.equal(keys, -values)
        assert (keys == keys[:1, :1, :, :1]).all()
        index = keys[0, 0, :, 0].reshape(-1, TOKENS) - 1000 * layer
        assert (index == index[:, :1]).all()
        seen.append([int(i) for i in index[:, 0]])
    return seen


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("sink", [0, 1, 2])
@pytest.mark.parametrize("ring", [0, 1, 2, 3, 5, 20])
def test_sees_the_sink_and_the_newest(chunk: int, sink: int, ring: int) -> None:
    cache = make(sink + ring + chunk, chunk, sink)
    past = sink + ring
    for start in range(0, 14 * chunk, chunk):
        earlier = list(range(start))
        kept = earlier if start <= past else earlier[:sink] + earlier[start - ring :]
        assert cache.filled == len(kept) and cache.full == (start >= past)
        for seen in look(cache, chunk):
            assert sorted(seen[:-chunk]) == kept
            assert seen[-chunk:] == list(range(start, start + chunk))
        cache.commit()
        assert cache.position == start + chunk


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize("ring, memory, every", [(1, 1, 1), (1, 2, 3), (5, 3, 4), (4, 4, 2), (11, 2, 8)])
def test_remembers_every_so_many_frames_of_what_has_left_the_ring(
    chunk: int, sink: int, ring: int, memory: int, every: int
) -> None:
    cache = make(sink + ring + chunk, chunk, sink, memory=memory, every=every)
    for start in range(0, 20 * chunk, chunk):
        left = [i for i in range(sink, max(start - ring, sink)) if i % every == 0]
        kept = sorted({*range(min(sink, start)), *left[-memory:], *range(max(start - ring, 0), start)})
        assert cache.filled == len(kept) and cache.full == (start >= cache.until_full)
        for seen in look(cache, chunk):
            assert sorted(seen[:-chunk]) == kept
            assert seen[-chunk:] == list(range(start, start + chunk))
        cache.commit()


def test_a_first_chunk_may_be_shorter() -> None:
    cache = make(5, chunk=2)
    look(cache, 1)
    cache.commit(1)
    for start in range(1, 11, 2):
        assert sorted(look(cache, 2)[0]) == list(range(max(start - 3, 0), start + 2))
        cache.commit()
    with pytest.raises(AssertionError, match="one chunk"):
        cache.commit(3)


def test_the_past_is_frozen_while_a_chunk_is_denoised() -> None:
    cache = make(4, sink=1)
    for _ in range(6):
        look(cache, 1)
        cache.commit()
    past = cache.store[..., : cache.filled * TOKENS, :].clone()
    for value in (5.0, float("nan")):
        for layer in range(LAYERS):
            cache.extend(layer, torch.full((1, 2, TOKENS, 4), value), torch.zeros(1, 2, TOKENS, 4))
    assert torch.equal(cache.store[..., : cache.filled * TOKENS, :], past)
    assert cache.position == 6
    assert all(sorted(seen) == [0, 4, 5, 6] for seen in look(cache, 1))  # the pass before commit is the one that counts


def test_memory_never_grows_or_moves() -> None:
    cache = make(5, chunk=2, sink=1)
    store, address, size = cache.store, cache.store.data_ptr(), cache.store.nbytes
    with torch.no_grad():
        for _ in range(20):
            keys, _ = cache.extend(0, mark(cache.position, 2), mark(cache.position, 2))
            assert keys.untyped_storage().data_ptr() == address  # a view, not a copy
            cache.commit()
    assert cache.store is store and store.data_ptr() == address and store.untyped_storage().nbytes() == size


def test_snapshot_and_restore() -> None:
    cache = make(4, sink=1)
    for _ in range(5):
        look(cache, 1)
        cache.commit()
    expected = look(cache, 1)
    snapshot = cache.snapshot()
    store = cache.store
    for _ in range(4):
        look(cache, 1)
        cache.commit()
    assert look(cache, 1) != expected
    for _ in range(2):  # a snapshot can be used more than once
        cache.restore(snapshot)
        assert cache.position == 5 and cache.filled == 3 and cache.store is store
        assert look(cache, 1) == expected
        cache.commit()
    early = make(4, sink=1)
    look(early, 1)
    early.commit()
    cache.restore(early.snapshot())  # back to a time when the ring was not full
    assert cache.filled == 1 and sorted(look(cache, 1)[0]) == [0, 1]


def test_reset_forgets() -> None:
    cache = make(3)
    for _ in range(5):
        look(cache, 1)
        cache.commit()
    cache.reset()
    assert (cache.position, cache.filled, cache.full) == (0, 0, False)
    assert look(cache, 1)[0] == [0]


def test_with_gradients_the_store_is_left_alone() -> None:
    cache = make(3)
    look(cache, 1)
    cache.commit()
    before = cache.store.clone()
    k, v = (torch.randn(1, 2, TOKENS, 4, requires_grad=True) for _ in range(2))
    keys, values = cache.extend(1, k, v)
    assert keys.shape[2] == values.shape[2] == 2 * TOKENS
    (keys.sum() + 2 * values.sum()).backward()
    assert k.grad is not None and (k.grad == 1).all() and v.grad is not None and (v.grad == 2).all()
    assert torch.equal(cache.store.nan_to_num(7.0), before.nan_to_num(7.0))


def test_a_window_too_small_is_refused() -> None:
    with pytest.raises(AssertionError, match="window"):
        make(2, chunk=2, sink=1)
