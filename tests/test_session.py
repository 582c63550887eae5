"""The learned world behind the `World` face."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

import worldmodel
from tests.conftest import write_tiny_world
from worldmodel import runtime
from worldmodel.action import NOOP, Action
from worldmodel.checkpoint import export_world, load_world
from worldmodel.errors import ConfigError, DeviceError
from worldmodel.world import World

WALK = Action(frozenset({"forward"}), (3.0, 0.0))


def play(session, actions):
    return [session.step(a)[0].rgb for a in actions]


@pytest.fixture
def session(tiny_world):
    return worldmodel.load(str(tiny_world), device="cpu", threads=1)


def test_shows_the_world_face(session):
    assert isinstance(session, World)
    frame = session.reset(seed=1, spawn=0)
    assert frame.rgb.shape == (32, 48, 3) and frame.rgb.dtype == np.uint8 and frame.index == 0
    (frame,) = session.step(WALK)
    assert frame.index == 1 and frame.rgb.shape == (32, 48, 3) and set(frame.timing_ms) == {"denoise", "decode"}
    assert set(session.step(NOOP)[0].timing_ms) == {"denoise", "decode", "commit"}  # the commit of the step before
    assert np.array_equal(session.reset(0, 1).rgb, session.reset(0, 1 + session.spawns).rgb)


def test_seed_and_actions_decide_the_frames(session):
    session.reset(seed=3)
    first = play(session, [WALK, NOOP, WALK])
    session.reset(seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(first, play(session, [WALK, NOOP, WALK]), strict=True))
    session.reset(seed=4)
    assert not np.array_equal(first[0], play(session, [WALK])[0])
    session.reset(seed=3)
    other = play(session, [WALK, WALK, WALK])
    assert np.array_equal(first[0], other[0]) and not np.array_equal(first[1], other[1])


def test_snapshot_restores_exactly(session):
    session.reset(seed=5)
    play(session, [WALK] * 5)
    saved = session.snapshot()
    after = play(session, [NOOP, WALK, NOOP])
    play(session, [WALK] * 7)
    assert session.restore(saved).index == 5
    assert all(np.array_equal(a, b) for a, b in zip(after, play(session, [NOOP, WALK, NOOP]), strict=True))


def test_snapshot_does_not_change_what_follows(session):
    session.reset(seed=6)
    play(session, [WALK])
    session.snapshot()
    watched = play(session, [NOOP])
    session.reset(seed=6)
    assert np.array_equal(watched[0], play(session, [WALK, NOOP])[1])


def test_append_teacher_forces_a_real_frame(session):
    picture = np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    session.reset(seed=7)
    plain = play(session, [NOOP, NOOP])[1]
    session.reset(seed=7)
    assert session.append(picture, NOOP).index == 1
    assert not np.array_equal(plain, play(session, [NOOP])[0])
    with pytest.raises(ConfigError, match="uint8 picture of shape"):
        session.append(picture[:8], NOOP)


def test_a_failed_append_changes_nothing(session):
    picture = np.random.default_rng(2).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    session.reset(seed=8)
    with pytest.raises(ConfigError, match="unknown action"):
        session.append(picture, Action(frozenset({"fly"})))
    assert session.index == 0
    session.append(picture[..., ::-1], NOOP)  # a view, as after a change of colour order
    flipped = play(session, [NOOP])[0]
    session.reset(seed=8)
    session.append(picture[..., ::-1].copy(), NOOP)
    assert np.array_equal(flipped, play(session, [NOOP])[0])


def test_seeds_are_whole_numbers_of_any_kind(session):
    session.reset(seed=1)
    plain = play(session, [NOOP])[0]
    session.reset(seed=np.int64(1))
    assert np.array_equal(plain, play(session, [NOOP])[0])
    with pytest.raises(ConfigError, match="whole numbers"):
        session.reset(seed="a")


def test_worlds_of_several_pictures_a_latent_are_refused(tiny_world):
    world = load_world(tiny_world)
    config = dataclasses.replace(world.config, frames_per_latent=4)
    export_world(tiny_world, config, world.model_state, world.codec_state, world.spawns, "# tiny\n")
    with pytest.raises(ConfigError, match="one picture a latent, but 'tiny' makes 4"):
        worldmodel.load(str(tiny_world), device="cpu")


def test_unknown_action_and_bad_steps_are_one_sentence(session, tiny_world):
    with pytest.raises(ConfigError, match="unknown action 'fly'"):
        session.step(Action(frozenset({"fly"})))
    with pytest.raises(ConfigError, match="steps must lie in 1 to 1000, got 0"):
        worldmodel.load(str(tiny_world), device="cpu", steps=0)
    with pytest.raises(DeviceError, match="device is auto"):
        worldmodel.load(str(tiny_world), device="tpu")


def test_steps_change_the_sampler(tiny_world):
    one, four = (worldmodel.load(str(tiny_world), device="cpu", steps=n, threads=1) for n in (1, 4))
    assert one.sigmas == [1.0] and len(four.sigmas) == 4 and four.sigmas[0] == 1.0
    assert not np.array_equal(play(one, [NOOP])[0], play(four, [NOOP])[0])


def test_nothing_is_allocated_in_steady_state(session):
    play(session, [WALK] * 3)
    address, shape = session.cache.store.data_ptr(), session.cache.store.shape
    play(session, [WALK] * 10)
    assert (session.cache.store.data_ptr(), session.cache.store.shape) == (address, shape)


def test_consistency_sampler_plays(tmp_path):
    session = worldmodel.load(str(write_tiny_world(tmp_path / "w", kind="consistency")), device="cpu", threads=1)
    first = play(session, [NOOP, NOOP])
    session.reset()
    assert np.array_equal(first[1], play(session, [NOOP, NOOP])[1])


def compiler_modules(world, options: str = "") -> str:
    """What of torch's compiler a process has imported after one step, and the engine that it plays on."""
    load = f"s = worldmodel.load({str(world)!r}, device='cpu', threads=1, dtype=torch.float32{options})"
    words = f"import sys, torch, worldmodel; {load}; s.step(worldmodel.action.NOOP); s.finish()"
    check = "print(sorted({'torch._dynamo', 'torch._inductor', 'triton'} & set(sys.modules)), s.engine)"
    done = subprocess.run([sys.executable, "-c", f"{words}; {check}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_eager_play_does_not_wait_for_the_compiler_to_be_imported(tiny_world):
    assert compiler_modules(tiny_world) == "[] eager"


def test_threads_are_measured_again_when_steps_have_become_slow(tiny_world, monkeypatch):
    counts = iter((2, 2, 1))
    monkeypatch.setattr(runtime, "available_threads", lambda: 2)
    monkeypatch.setattr(runtime, "pick_threads", lambda work, most: (work(), runtime.set_threads(next(counts)))[1])
    session = worldmodel.load(str(tiny_world), device="cpu")
    assert session.threads == 2 and session.review_threads(0.02) is None
    session.step(WALK)
    monkeypatch.setattr(session._watch, "took", lambda seconds: True)
    assert session.review_threads(0.2) is None and session.threads == 2  # measured, and 2 it stays
    assert session.review_threads(0.2) == 1 and session.threads == torch.get_num_threads() == 1
    given = worldmodel.load(str(tiny_world), device="cpu", threads=1)
    assert all(given.review_threads(60.0) is None for _ in range(100))  # a number that was asked for is kept
