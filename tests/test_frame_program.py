"""Frames as programs over fixed buffers equal frames dreamed pass by pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import worldmodel
from tests.test_chunks import chunky
from tests.test_session import WALK
from tests.test_video_session import held, open_video
from worldmodel.action import NOOP

CASES = [{}, {"sink": 1}, {"chunk": 3, "window": 9}, {"camera": False}]


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


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_video_program_shows_the_pictures_of_the_plain_engine(case):
    plain, program = open_video(**case), open_video(**case)
    program.use_program(capture=False)
    assert same(video_rollout(plain), video_rollout(program))
    assert torch.equal(plain.cache.store, program.cache.store) and plain.cache.position == program.cache.position


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("kind", ["euler", "consistency"])
def test_a_program_shows_the_pictures_of_the_plain_engine(tmp_path, chunk, kind):
    plain, program = (chunky(tmp_path / name, chunk, kind=kind) for name in ("plain", "program"))
    program.use_program(capture=False)
    assert same(rooms_rollout(plain), rooms_rollout(program))
    assert torch.equal(plain.cache.store, program.cache.store)


def test_a_program_keeps_its_buffers():
    """A captured graph reads addresses: no buffer may be replaced by a later frame, prompt or reset."""
    session = open_video()
    session.use_program(capture=False)

    def addresses() -> list[int]:
        program = session._program
        draws = [t for kept in program._draws.values() for t in kept.values()]
        text = [t for pair in program._text for t in pair]
        return [t.data_ptr() for t in (*program._buffers.values(), *program._levels.values(), *draws, *text)]

    video_rollout(session)
    before = addresses()
    video_rollout(session)
    assert addresses() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_captured_frames_equal_plain_ones(tiny_world):
    plain, program = (worldmodel.load(str(tiny_world), device="cuda", threads=1) for _ in range(2))
    program.use_program(capture=True)
    pairs = zip(rooms_rollout(plain), rooms_rollout(program), strict=True)
    # the same kernels in the same order; cuBLAS may choose another algorithm while a graph is captured
    assert max(int(np.abs(a.astype(int) - b).max()) for a, b in pairs) <= 2
    assert program._program.graphs >= 2
    captured = program._program.graphs
    rooms_rollout(program)
    assert program._program.graphs <= captured + 2 * program.config.sampler.window
