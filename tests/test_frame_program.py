"""Frames as programs over fixed buffers equal frames dreamed pass by pass."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import play
import worldmodel
from tests.conftest import tiny_config
from tests.test_chunks import chunky
from tests.test_session import WALK
from tests.test_video_session import held, open_video
from worldmodel import frame_program
from worldmodel.action import NOOP
from worldmodel.diffusion import sample
from worldmodel.errors import DeviceError
from worldmodel.frame_program import FrameProgram, Given
from worldmodel.models.dit import DiT
from worldmodel.models.embeddings import rope_tables

CASES = [{}, {"sink": 1}, {"chunk": 3, "window": 9}, {"camera": False}, {"window": 4, "memory": 2, "memory_every": 2}]


class PlainProgram:
    """The same frames pass by pass, by the network's public door: no buffers, no tables, nothing shared between passes."""

    can_merge = False

    def __init__(self, session) -> None:
        self._model, self._cache, self._sampler = session.model, session.cache, session.config.sampler

    def denoise(self, noise, levels, renoise, given, finished=None):
        return sample(lambda x, sigma, end: self._pass(x, sigma, end, given), noise, levels, self._sampler.kind, renoise)

    def commit(self, clean, given, level) -> None:
        self._pass(clean, level, level, given)
        self._cache.commit()

    def _pass(self, x, sigma, end, given):
        levels = [torch.full(x.shape[:2], value) for value in (sigma, end)]
        words = {"actions": given.actions, "text": given.text, "cameras": given.cameras}
        return self._model(x, levels[0], cache=self._cache, end=levels[1], **words)


def plain(session):
    session._program = PlainProgram(session)
    session.reset()
    return session


def video_rollout(session) -> list[np.ndarray]:
    """Over fill and wrap-around, then back to an earlier moment, then from the start under another prompt."""
    shown = [session.reset(seed=2).rgb]
    for i in range(4):
        shown += [f.rgb for f in session.step(held("forward") if i % 2 else held("turn_left"))]
    saved = session.snapshot()
    for _ in range(6):
        shown += [f.rgb for f in session.step(held("right"))]
    session.restore(saved)
    shown += [f.rgb for f in session.step(held("back"))]
    shown.append(session.reset(seed=2, spawn=1).rgb)
    shown += [f.rgb for f in session.step(held("forward"))]
    return shown


def rooms_rollout(session) -> list[np.ndarray]:
    session.reset(seed=3)
    return [f.rgb for i in range(14) for f in session.step(WALK if i % 3 else NOOP)]


@pytest.mark.parametrize("merge", [False, True])
def test_what_positions_say_is_there_before_the_player_acts(merge: bool) -> None:
    session = open_video(camera=False)
    session.merge = merge
    for _ in range(3):
        session.step(NOOP)
        session.finish()
        made = rope_tables.cache_info().misses
        session.step(NOOP)
        assert rope_tables.cache_info().misses == made
        session.finish()


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_video_program_shows_the_pictures_of_plain_passes(case):
    by_pass, program = plain(open_video(**case)), open_video(**case)
    assert same(video_rollout(by_pass), video_rollout(program))
    assert torch.equal(by_pass.cache.store, program.cache.store) and by_pass.cache.position == program.cache.position


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize(("kind", "past_noise"), [("euler", 0.0), ("consistency", 0.0), ("consistency", 0.4)])
def test_a_program_shows_the_pictures_of_plain_passes(tmp_path, chunk, kind, past_noise):
    noise = {"past_noise": past_noise, "past_noise_after": 4} if past_noise else {}
    by_pass, program = (chunky(tmp_path / name, chunk, kind=kind, **noise) for name in ("plain", "program"))
    assert same(rooms_rollout(plain(by_pass)), rooms_rollout(program))
    assert torch.equal(by_pass.cache.store, program.cache.store)


def test_a_program_tells_flow_maps_where_their_steps_end():
    config = tiny_config(kind="flow_map", model=dataclasses.replace(tiny_config().model, flow_map=True))
    model = DiT(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    caches = [model.make_cache((4, 6), window=4) for _ in range(2)]
    noise, given, levels = torch.randn(1, 1, 4, 4, 6), Given(torch.randn(1, 1, 6)), [1.0, 0.5]

    def one(x, sigma, end):
        sigma, end = (torch.full((1, 1), value) for value in (sigma, end))
        return model(x, sigma, given.actions, cache=caches[0], end=end)

    with torch.inference_mode():
        wanted = sample(one, noise, levels, "flow_map")
        assert torch.equal(FrameProgram(model, caches[1], config.sampler).denoise(noise, levels, lambda i: noise, given), wanted)
    assert torch.equal(caches[0].store, caches[1].store)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_throughput_mode_dreams_the_same(case):
    """In float32 the two ways differ by the order of rounding alone."""
    apart, merged = open_video(**case), open_video(**case)
    merged.merge = True
    pairs = list(zip(video_rollout(apart), video_rollout(merged), strict=True))
    assert max(int(np.abs(a.astype(int) - b).max()) for a, b in pairs) <= 1
    merged._settle()
    apart._settle()
    past = slice(0, apart.cache.past * apart.cache.tokens)
    torch.testing.assert_close(merged.cache.store[..., past, :], apart.cache.store[..., past, :], atol=1e-4, rtol=1e-4)
    assert merged.cache.position == apart.cache.position


@pytest.mark.parametrize(("chunk", "past_noise"), [(1, 0.0), (3, 0.0), (1, 0.4), (3, 0.4)])
def test_throughput_mode_knows_actions(tmp_path, chunk, past_noise):
    noise = {"past_noise": past_noise, "past_noise_after": 4} if past_noise else {}
    apart, merged = (chunky(tmp_path / name, chunk, **noise) for name in ("apart", "merged"))
    merged.merge = True
    pairs = zip(rooms_rollout(apart), rooms_rollout(merged), strict=True)
    assert max(int(np.abs(a.astype(int) - b).max()) for a, b in pairs) <= 1
    merged._settle()
    apart._settle()
    past = slice(0, apart.cache.past * apart.cache.tokens)
    torch.testing.assert_close(merged.cache.store[..., past, :], apart.cache.store[..., past, :], atol=1e-4, rtol=1e-4)
    merged.step(NOOP)
    merged.finish()
    assert merged._pending is not None  # the next step commits it, or whoever needs the cache whole
    merged.snapshot()
    assert merged._pending is None


def test_draws_of_a_game_that_never_finishes_do_not_pile_up(tiny_world):
    session = worldmodel.load(str(tiny_world), device="cpu", threads=1)
    session.step(WALK)
    a_step = len(session._drawn)
    for _ in range(5):
        session.step(WALK)
    assert len(session._drawn) <= a_step + 1  # and what the chunk before is committed with


def test_throughput_mode_is_part_of_a_replay(tiny_world, tmp_path, capsys):
    words = [str(tiny_world), "--headless", "--device", "cpu", "--threads", "1", "--agent", "random", "--frames", "6"]
    assert play.main([*words, "--throughput", "--replay-out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.jsonl")
    assert json.loads(path.read_text().splitlines()[0])["merge"] is True
    assert play.main(["--headless", "--no-replay", "--replay", str(path)]) == 0
    assert "exact: 6 frames" in capsys.readouterr().out


def test_a_program_keeps_its_buffers():
    """A captured graph reads addresses: no buffer may be replaced by a later frame, prompt or reset."""
    session = open_video()

    def addresses() -> list[int]:
        program = session._program
        draws = [t for kept in program._draws.values() for t in kept.values()]
        text = [t for pair in program._text for t in pair]
        levels = [t for level in program._levels.values() for t in (level.e, level.modulation)]
        return [t.data_ptr() for t in (*program._buffers.values(), *levels, *draws, *text)]

    def both_ways() -> None:
        for session.merge in (False, True):
            video_rollout(session)

    both_ways()
    before = addresses()
    both_ways()
    assert addresses() == before


class Recording:
    """In place of a CUDA graph: runs the work where a graph would be replayed, and warms up as a capture does."""

    def __init__(self, work) -> None:
        self._work, self.out = work, work()

    def replay(self) -> None:
        self.out.copy_(self._work())


def test_what_is_captured_does_not_depend_on_the_host(monkeypatch):
    """A graph is replayed for later frames: work kept from its first frame must give the later ones, too."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(frame_program, "capture_graph", lambda work, pool: ((kept := Recording(work)), kept.out))
    for merge in (False, True):
        eager, graphs = open_video(sink=1), open_video(sink=1)
        eager.merge = graphs.merge = merge
        graphs._state = "ready"
        assert graphs.adopt_compiled() and graphs.engine == "graphs" and not graphs.adopt_compiled()
        for _ in range(3):  # runs, captures, replays
            assert same(video_rollout(eager), video_rollout(graphs))
        assert graphs._program.graphs > graphs.cache.past


def test_what_is_captured_knows_how_noisy_the_past_is(monkeypatch, tmp_path):
    """The level rises when the cache is full already: nothing else tells one frame from the next."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(frame_program, "capture_graph", lambda work, pool: ((kept := Recording(work)), kept.out))
    for merge in (False, True):
        noise = {"past_noise": 0.6, "past_noise_after": 7}
        eager, graphs = (chunky(tmp_path / f"{name} {merge}", 1, **noise) for name in ("eager", "graphs"))
        eager.merge = graphs.merge = merge
        graphs._compiler, graphs._state = None, "ready"
        assert eager.cache.full and graphs.adopt_compiled()
        for _ in range(3):
            assert same(rooms_rollout(eager), rooms_rollout(graphs))
        assert torch.equal(eager.cache.store, graphs.cache.store)


def test_a_capture_that_fails_leaves_the_eager_engine(monkeypatch):
    def fail(work, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(frame_program, "capture_graph", fail)
    session = open_video()
    session._state = "ready"
    assert not session.adopt_compiled(always=True)
    assert (session.engine, session.compile_state) == ("eager", "failed: operation not permitted when stream is capturing")
    session.step(NOOP)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("merge", [False, True])
def test_captured_frames_equal_plain_ones(tiny_world, merge):
    eager, graphs = (worldmodel.load(str(tiny_world), device="cuda", threads=1) for _ in range(2))
    eager.merge = graphs.merge = merge
    assert graphs.adopt_compiled() and graphs.engine == "graphs"
    for _ in range(3):
        pairs = zip(rooms_rollout(eager), rooms_rollout(graphs), strict=True)
        # the same kernels in the same order; cuBLAS may choose another algorithm while a graph is captured
        assert max(int(np.abs(a.astype(int) - b).max()) for a, b in pairs) <= 2
    assert 2 <= graphs._program.graphs <= 1 + 3 * graphs.config.sampler.window


def test_a_world_with_one_engine_says_so():
    session = open_video()
    assert session.poll_compile() == "" and not session.adopt_compiled(always=True)
    with pytest.raises(DeviceError, match="none on this device"):
        session.use_compiled()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_picture_is_that_of_its_chunk(tiny_world, device):
    """Though it may be decoded on a stream of its own, beside what is done next."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    session = worldmodel.load(str(tiny_world), device=device, threads=1, merge=True)
    for _ in range(20):
        (frame,) = session.step(WALK)
        with torch.inference_mode():
            assert np.array_equal(session._decode(session._pending[0]).cpu().numpy()[0], frame.rgb)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_frame_waits_for_the_device_only_for_its_picture(tiny_world):
    session = worldmodel.load(str(tiny_world), device="cuda", threads=1)
    session.adopt_compiled()
    rooms_rollout(session)
    torch.cuda.set_sync_debug_mode("error")  # waiting for an event is not seen by it; every implicit wait is
    try:
        timing = session.step(WALK)[0].timing_ms
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {"denoise", "decode", "commit"} <= set(timing) and min(timing.values()) > 0
