"""Worlds that dream several chunks at once (Rolling Forcing, the published long-video weights), against the published loop written
out in plain PyTorch. Tiny random weights."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import play as door
from tests.test_frame_program import Recording, same
from tests.test_video_session import CPU, FRAMES, HEIGHT, WIDTH, model_config, open_video, parts, world_config
from tests.test_video_world import make, public, write_public_model  # noqa: F401 - a fixture
from worldmodel import footprint, frame_program, load, runtime
from worldmodel.action import Action
from worldmodel.config import SamplerConfig
from worldmodel.errors import ConfigError
from worldmodel.kernels import reference
from worldmodel.models.attention import AttentionContext
from worldmodel.models.dit import DiT
from worldmodel.models.embeddings import rope_tables
from worldmodel.models.kv_cache import KVCache, RollingCache
from worldmodel.published import read_card
from worldmodel.video_session import VideoSession
from worldmodel.video_world import decoder_of

ROWS, COLS, SEED = HEIGHT // 16, WIDTH // 16, 7
TOKENS = ROWS * COLS


def rolling(chunk: int = 2, sink: int = 2, steps: int = 3, window: int = 10, **more: object) -> dict[str, object]:
    return {"chunk": chunk, "sink": sink, "window": window, "rolling": True, "first_steps": 0, "steps": steps, **more}


def session_of(**sampler: object) -> VideoSession:
    config = world_config(camera=False)
    model, decoder, text = parts(camera=False)
    config = replace(config, sampler=SamplerConfig(kind="consistency", shift=5.0, **rolling(**sampler)))  # type: ignore[arg-type]
    return VideoSession(config, model, decoder, [text, text[:3]], CPU, torch.float32)


class PlainCache:
    """Every frame's keys, not rotated, and values, for ever; who sees what is chosen anew in every pass, in words of frames.

    at: first frame of the pass. clean: it is the pass over a finished chunk, which sees the newest `window` frames where they are;
    any other sees the first `sink` frames as if they had happened right before the newest that fit.
    """

    def __init__(self, model: DiT, sink: int, window: int) -> None:
        self.sink, self.window, self.width = sink, window, model.cfg.head_dim
        self.keys: list[dict[int, Tensor]] = [{} for _ in model.blocks]
        self.values: list[dict[int, Tensor]] = [{} for _ in model.blocks]
        self.at, self.clean = 0, False

    def scratch(self, layer: int, tokens: int) -> None:
        pass

    def rotated(self, key: Tensor, frame: int, back: bool = False) -> Tensor:
        cos, sin = rope_tables((frame,), ROWS, COLS, self.width, CPU)
        return reference.rotate(key, cos, -sin if back else sin)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, written: bool) -> Tensor:
        keys, values, frames = self.keys[layer], self.values[layer], k.shape[2] // TOKENS
        if self.clean:
            seen = [(frame, frame) for frame in range(max(0, self.at + frames - self.window), self.at)]
        elif self.at:
            newest = range(max(self.sink, self.at - (self.window - frames - self.sink)), self.at)
            start = self.at - len(newest) - self.sink
            seen = [(frame, start + frame) for frame in range(self.sink)] + [(frame, frame) for frame in newest]
        else:
            seen = []
        all_keys = torch.cat([*(self.rotated(keys[frame], place) for frame, place in seen), k], dim=2)
        all_values = torch.cat([*(values[frame] for frame, _ in seen), v], dim=2)
        if self.clean:
            for i, (key, value) in enumerate(zip(k.split(TOKENS, 2), v.split(TOKENS, 2), strict=True)):
                keys[self.at + i], values[self.at + i] = self.rotated(key, self.at + i, back=True), value
        shares = (q @ all_keys.mT / math.sqrt(self.width)).softmax(-1)
        return shares @ all_values


def published(chunk: int, sink: int, steps: int, window: int, chunks: int) -> list[Tensor]:
    """The first finished chunks of the published loop over windows of noisy chunks."""
    model, _, text = parts(camera=False)
    states, cache = model.text_states(text[None]), PlainCache(model, sink, window)
    levels = [5 * u / (1 + 4 * u) for u in (1 - i / steps for i in range(steps))]

    def draw(purpose: str, number: int, level: int = 0) -> Tensor:
        shape = (1, chunk, 16, HEIGHT // 8, WIDTH // 8)
        return torch.randn(shape, generator=runtime.generator(SEED, purpose, number * chunk, level))

    def velocity(x: Tensor, sigma: list[float], first: int, clean: bool) -> Tensor:
        cache.at, cache.clean = first * chunk, clean
        tables = rope_tables(tuple(range(cache.at, cache.at + x.shape[1])), ROWS, COLS, model.cfg.head_dim, CPU)
        ctx = AttentionContext(*tables, cache=cache)  # type: ignore[arg-type]
        return model.denoise(x, torch.tensor(sigma).repeat_interleave(chunk)[None], ctx, text=states)

    noisy, made = {0: draw("noise", 0)}, []
    for newest in range(chunks + steps - 1):
        oldest = max(0, newest - steps + 1)
        noisy[newest] = draw("noise", newest)
        window_chunks = range(oldest, newest + 1)
        at = {number: newest - number for number in window_chunks}  # the newest is pure noise
        x = torch.cat([noisy[number] for number in window_chunks], dim=1)
        sigma = [levels[at[number]] for number in window_chunks]
        change = velocity(x, sigma, oldest, clean=False)
        clean = x - torch.tensor(sigma).repeat_interleave(chunk)[None, :, None, None, None] * change
        parts_ = dict(zip(window_chunks, clean.split(chunk, dim=1), strict=True))
        for number in window_chunks:
            if at[number] < steps - 1:
                below = levels[at[number] + 1]
                noisy[number] = (1 - below) * parts_[number] + below * draw("renoise", number, at[number])
        velocity(parts_[oldest], [0.0], oldest, clean=True)  # overwritten until the chunk is finished
        if at[oldest] == steps - 1:
            made.append(parts_[oldest])
    return made


@pytest.mark.parametrize("shape", [(2, 2, 3, 10), (1, 1, 4, 7), (3, 3, 2, 12), (2, 0, 2, 6), (2, 2, 3, 8)])
def test_a_session_is_the_published_loop(shape: tuple[int, int, int, int]) -> None:
    """Until long after the window is full and the sink has moved: chunk, sink, steps, window."""
    chunk, sink, steps, window = shape
    session, count = session_of(chunk=chunk, sink=sink, steps=steps, window=window), 3 * window // chunk
    session.reset(seed=SEED)
    got = []
    for _ in range(count):
        assert session._pending is not None
        got.append(session._pending[0].clone())
        session.step(Action())
    with torch.no_grad():
        want = published(chunk, sink, steps, window, count)
    assert session.cache.position == count * chunk > 2 * window
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda text, number=number: f"chunk {number}: {text}")


def test_where_the_sink_seems_to_be_matters() -> None:
    """The check above could not fail otherwise: left where it was, the sink gives another video once the window has moved."""
    chunk, sink, steps, window = 2, 2, 3, 10
    with torch.no_grad():
        want = published(chunk, sink, steps, window, 9)
        moved, plain = [], KVCache.beside
        for turn in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(KVCache, "beside", lambda self, n, turn=turn: (plain(self, n)[0], plain(self, n)[1] if turn else 0))
                session = session_of(chunk=chunk, sink=sink, steps=steps, window=window)
                session.reset(seed=SEED)
                for _ in range(8):
                    session.step(Action())
                assert session._pending is not None
                moved.append(float((session._pending[0] - want[8]).abs().max()))
    assert moved[0] < 1e-4 and moved[1] > 100 * moved[0], moved


def test_who_is_seen_by_hand() -> None:
    """Nine frames: the sink (0, 1), then frames in a ring of 8; a pass over six new ones sees the sink and two."""
    cache = KVCache(layers=1, heads=1, head_dim=8, tokens=1, window=10, chunk=2, sink=2, apart=True)
    assert cache.store.shape[4] == 2 + 8 + 2 and not cache.mergeable
    for frame in range(0, 14, 2):
        cache.store[..., cache.filled : cache.filled + 2, :] = torch.tensor([frame, frame + 1.0])[:, None]
        cache.commit()
        rows, moved = cache.beside(6)
        seen = cache.store[0, 0, 0, 0, rows, 0].tolist()
        newest = [float(f) for f in range(max(2, cache.position - 2), cache.position)]
        assert seen == [0, 1, *newest] and moved == cache.position - len(newest) - 2
        assert sorted(cache.visible(0, 0)[0][0, 0, :, 0].tolist()) == list(range(max(0, cache.position - 8), cache.position))
    turned = RollingCache(cache, *(torch.as_tensor(x) for x in (rows, torch.ones(1, 4), torch.zeros(1, 4))))
    one = torch.ones(1, 1, 1, 8)
    assert torch.equal(turned.attend(0, one, one, one, written=False), reference.attention(one, *_with(cache, rows, one)))


def _with(cache: KVCache, rows: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = cache.store[0].index_select(3, rows)
    return torch.cat((keys, own), dim=2), torch.cat((values, own), dim=2)


def test_it_is_a_world_with_snapshots_prompts_and_chunks() -> None:
    session = session_of()
    first = session.reset(seed=3).rgb
    assert session.frames_per_action == 2 * FRAMES and len(session.step(Action())) == 2 * FRAMES
    session.finish()  # draws the next chunk's noise ahead
    there = session.snapshot()
    told = [f.rgb for _ in range(3) for f in session.step(Action())]
    session.set_prompt(torch.randn(4, 32))
    other = [f.rgb for f in session.step(Action())]
    session.restore(there)
    assert all((a == f.rgb).all() for a, f in zip(told, (f for _ in range(3) for f in session.step(Action())), strict=True))
    assert any((a != f.rgb).any() for a, f in zip(other, session.step(Action()), strict=True))
    assert (session.reset(seed=3).rgb == first).all() and (session.reset(seed=3, spawn=1).rgb != first).any()
    session.merge = True  # there is nothing to merge
    assert not session._merges


def test_its_passes_can_be_captured(monkeypatch) -> None:
    """Work kept from a first frame gives the later ones, too, over the same buffers: the sink that moves on, and the ring."""

    def rollout(session: VideoSession) -> list[np.ndarray]:
        shown = [session.reset(seed=2).rgb]
        return shown + [f.rgb for _ in range(9) for f in session.step(Action())]

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(frame_program, "capture_graph", lambda work, pool: ((kept := Recording(work)), kept.out))
    eager, graphs = session_of(), session_of()
    graphs._state = "ready"
    assert graphs.adopt_compiled() and graphs.engine == "graphs"
    places = []
    for _ in range(3):  # runs, captures, replays
        assert same(rollout(eager), rollout(graphs))
        places.append({name: buffer.data_ptr() for name, buffer in graphs._program._buffers.items()})
    assert places[0] == places[1] == places[2]
    assert graphs._program.graphs > graphs.cache.past // 2


def test_what_does_not_go_together_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="window 7 must hold sink and 3 chunks: at least 8"):
        SamplerConfig(kind="consistency", **rolling(window=7))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"sampler\.memory does not go with sampler\.rolling"):
        SamplerConfig(kind="consistency", **rolling(memory=2))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"rolling goes with sampler\.kind consistency"):
        SamplerConfig(kind="euler", **rolling())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dreams ahead of what a player does: it goes with video worlds without a camera"):
        replace(world_config(camera=True), sampler=SamplerConfig(kind="consistency", **rolling()))  # type: ignore[arg-type]
    model, decoder, text = parts(camera=False)
    config = replace(world_config(camera=False), sampler=SamplerConfig(kind="consistency", **rolling()))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sees 10 latents: take at most 4 steps, not 5"):
        VideoSession(config, model, decoder, [text], CPU, torch.float32, steps=5)
    assert open_video(camera=False)._rolling is None


def test_the_published_world_by_its_card(public: Path, capsys, monkeypatch) -> None:  # noqa: F811
    """From files in the published layout, with the sampler of the shipped card; replays come back exactly."""
    card = read_card("wan-causal-forcing-long")
    assert (card.chunk, card.steps, card.sink, card.window, card.rolling) == (3, 4, 3, 21, True)
    assert read_card("wan-causal-forcing-chunkwise").id == "1ea708da3c6b"  # cards that say nothing new make no new world
    write_public_model(public, model_config(False))
    sampler = {name: getattr(card, name) for name in ("chunk", "steps", "sink", "window", "rolling", "first_steps")}
    world = make(public, entry="", **sampler)
    session = load(str(world), device="cpu", threads=1)
    assert isinstance(session, VideoSession) and session.config.sampler.presets == (4,)
    store = session.cache.store
    assert store.shape[4] == 24 * TOKENS
    with torch.device("meta"):
        decoder = decoder_of(session.config.codec)
    counted = footprint.sizes_of(session.config, decoder)
    assert counted.latent * 21 == pytest.approx(store.nbytes * 2 / store.element_size(), rel=0.01) and counted.least == 15
    monkeypatch.chdir(public)
    few = ["--headless", "--frames", "36", "--agent", "random", "--device", "cpu", "--threads", "1"]
    assert door.main([str(world), *few]) == 0
    (replay,) = Path("plays").glob("*.jsonl")
    assert json.loads(replay.read_text().splitlines()[0])
    assert door.main(["--replay", str(replay), "--headless"]) == 0
    assert "exact: 36 frames" in capsys.readouterr().out
