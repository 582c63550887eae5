"""Games on the compiled engine are those of the eager one; who builds it, and what is told where it cannot be had."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import worldmodel
from tests.test_chunks import chunky
from tests.test_frame_program import rooms_rollout
from tests.test_session import WALK, compiler_modules
from worldmodel import compiled, runtime
from worldmodel.action import NOOP
from worldmodel.checkpoint import export_world, load_world
from worldmodel.errors import DeviceError
from worldmodel.models.dit import DiT

FLOAT = torch.float32


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("case", [{}, {"sink": 1}, {"chunk": 3, "frames": 3}, {"memory": 2, "memory_every": 2}], ids=str)
def test_a_compiled_game_is_the_eager_one(tmp_path, with_builds, case, merge):
    eager, quick = (chunky(tmp_path / name, **({"chunk": 1} | case)) for name in ("eager", "quick"))
    quick.merge = merge
    quick.use_compiled()
    assert quick.engine == "compiled" and (not quick.cache.full or "memory" not in case)  # from the first frame on
    pairs = zip(rooms_rollout(eager), rooms_rollout(quick), strict=True)
    assert max(int(np.abs(a.astype(int) - b).max()) for a, b in pairs) <= 1
    assert not merge or quick._pending is not None  # merged to the end
    eager._settle()
    quick._settle()
    past = slice(0, eager.cache.past * eager.cache.tokens)
    torch.testing.assert_close(quick.cache.store[..., past, :], eager.cache.store[..., past, :], atol=1e-4, rtol=1e-4)
    quick.use_eager()
    quick.step(WALK)
    assert quick.engine == "eager"


def test_a_compiled_flow_map_knows_where_its_steps_end(tiny_world, tmp_path, with_builds):
    world = load_world(tiny_world)
    model = dataclasses.replace(world.config.model, flow_map=True)
    config = dataclasses.replace(world.config, model=model, sampler=dataclasses.replace(world.config.sampler, kind="flow_map"))
    torch.manual_seed(1)
    net = DiT(model)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    export_world(tmp_path / "map", config, net.state_dict(), world.codec_state, world.spawns, "# map\n")
    options = {"device": "cpu", "threads": 1, "dtype": FLOAT}
    eager, quick = (worldmodel.load(str(tmp_path / "map"), **options, compile=c) for c in ("off", "on"))
    assert quick.engine == "compiled"
    for _ in range(3):
        (a,), (b,) = eager.step(WALK), quick.step(WALK)
        assert np.abs(a.rgb.astype(int) - b.rgb).max() <= 1
    torch.testing.assert_close(eager.cache.store, quick.cache.store, atol=1e-4, rtol=1e-4)


def test_who_is_first_builds_and_who_is_second_finds(tiny_world, tmp_path, monkeypatch, builds):
    monkeypatch.setenv("WORLDMODEL_CACHE", str(tmp_path / "cache"))
    first = worldmodel.load(str(tiny_world), device="cpu", threads=1, dtype=FLOAT)
    first.start_compile()
    assert first.compile_state == "building" and not first.adopt_compiled()
    first.use_compiled()
    assert first.engine == "compiled"
    assert compiler_modules(tiny_world, ", compile='on'") == "[] compiled"  # and without torch's compiler
    again = worldmodel.load(str(tiny_world), device="cpu", threads=1, dtype=FLOAT)
    again.start_compile()
    assert again.compile_state == "ready"
    again.step(NOOP)
    again.finish()
    before = again.cache.store[..., : again.cache.past * again.cache.tokens, :].clone()
    assert again._compiled_wins(again._compiler) in (True, False) and again.engine == "eager"
    assert torch.equal(again.cache.store[..., : again.cache.past * again.cache.tokens, :], before)  # trials leave the past alone
    monkeypatch.setattr(again, "_compiled_wins", lambda compiler: False)
    assert not again.adopt_compiled() and (again.engine, again.compile_state) == ("eager", "slower")


def test_threads_of_a_compiled_game_are_measured_again_too(tiny_world, with_builds, monkeypatch):
    counts, works = iter((2, 1)), []
    monkeypatch.setattr(runtime, "available_threads", lambda: 2)
    monkeypatch.setattr(runtime, "pick_threads", lambda work, most: (works.append(work()), runtime.set_threads(next(counts)))[1])
    session = worldmodel.load(str(tiny_world), device="cpu", dtype=FLOAT)
    session.step(WALK)
    before = session._watch
    session.use_compiled()
    assert session._watch is not before and session.threads == 2  # the eager engine's steps say nothing of this one's
    session.step(WALK)
    monkeypatch.setattr(session._watch, "took", lambda seconds: True)
    assert session.review_threads(0.2) == 1 and session.engine == "compiled" and len(works) == 2
    session.step(WALK)


def test_a_build_that_fails_is_told_and_the_eager_engine_plays(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLDMODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    session = worldmodel.load(str(tiny_world), device="cpu", threads=1, dtype=FLOAT)
    with pytest.raises(DeviceError, match="no C compiler"):
        session.use_compiled()
    assert session.compile_state.startswith("failed: ") and session.engine == "eager"
    session.step(WALK)


def test_a_build_that_cannot_be_loaded_is_told(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLDMODEL_CACHE", str(tmp_path))
    (tmp_path / "nothing").write_bytes(b"nothing")
    compiled.keep(tmp_path / "nothing", compiled.build_path(FLOAT))
    session = worldmodel.load(str(tiny_world), device="cpu", threads=1, dtype=FLOAT)
    session.start_compile()
    assert "delete it" in session.compile_state and session.engine == "eager"
    monkeypatch.setenv("WORLDMODEL_CACHE", "x" * 300)  # longer than names can be
    session = worldmodel.load(str(tiny_world), device="cpu", threads=1, dtype=FLOAT)
    with pytest.raises(DeviceError, match="could not be compiled"):
        session.use_compiled()
    session.step(WALK)
