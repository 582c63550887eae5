"""Gymnasium environments behind the World face."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from worldmodel.action import NOOP, Action
from worldmodel.data import episode as episodes
from worldmodel.data import real
from worldmodel.data.gym_world import fit_size
from worldmodel.data.record_worker import Job, play
from worldmodel.errors import ConfigError, DeviceError
from worldmodel.world import World

pytest.importorskip("gymnasium")


def test_car_racing_records(tmp_path: Path) -> None:
    pytest.importorskip("Box2D")
    world = real.open_world("racing")
    try:
        assert isinstance(world, World) and world.size == (80, 112) and 16.6 < world.fps < 16.7
        job = Job(real.opener("racing"), real.policy_for("racing"), tmp_path, seed=2, episode_frames=30)
        episode, again = play(world, job, 1), play(world, job, 1)
        assert np.array_equal(episode.frames, again.frames) and np.array_equal(episode.actions, again.actions)
        assert episode.frames.shape == (30, 80, 112, 3) and episode.poses.shape == (30, 3)
        assert np.hypot(*(episode.poses[-1] - episode.poses[0])[:2]) > 1  # it drives
        path = episodes.episode_path(tmp_path, 1)
        episodes.save(path, episode)
        assert episodes.load(path).spec == world.actions
    finally:
        world.close()


def test_car_racing_steers_by_key_and_mouse() -> None:
    pytest.importorskip("Box2D")
    world = real.open_world("racing")
    try:
        turned = []
        for action in (
            Action(frozenset({"left", "gas"})),
            Action(frozenset({"right", "gas"})),
            Action(frozenset({"gas"}), (0.25, 0.0)),
        ):
            start = world.reset(4).pose[2]
            for _ in range(25):
                frame = world.step(action)[0]
            turned.append(frame.pose[2] - start)
        assert turned[0] > 5 and turned[1] < -5 and turned[2] < -5
    finally:
        world.close()


def test_car_racing_shows_what_matters_and_stays_in_bounds() -> None:
    pytest.importorskip("Box2D")
    world, other = real.open_world("racing"), real.open_world("racing", (48, 64))
    try:
        start = world.reset(4).rgb
        assert np.array_equal(world.reset(4).rgb, start) and other.reset(4).rgb.shape == (48, 64, 3)
        grey = (np.abs(start.astype(int) - 105) < 12).all(-1)
        assert 0.1 < grey.mean() < 0.6 and not (start == 0).all(-1)[-8:].any()  # no dashboard
        red = (start[..., 0] > 150) & (start[..., 1:] < 60).all(-1)  # the car, low in the middle
        assert red.any() and abs(np.argwhere(red).mean(0) - (67, 55.5)).max() < 4
        gas, brake, speeds = Action(frozenset({"gas"})), Action(frozenset({"brake"})), []
        for action in [gas] * 60 + [NOOP] * 30 + [brake] * 30:
            frame = world.step(action)[0]
            speeds.append(float(world.speed))
        assert not np.array_equal(frame.rgb, start) and not world.done
        assert 40 < speeds[59] < 44  # a held key stays within what is recorded
        assert 25 < speeds[89] < 38 and speeds[119] < 0.1  # without gas it slows down, the brake stops it
        assert np.array_equal(world.step(NOOP)[0].rgb, world.step(NOOP)[0].rgb)  # and a standing car is a standing picture
    finally:
        world.close()
        other.close()


def test_the_racing_driver_plays_everything() -> None:
    pytest.importorskip("Box2D")
    world = real.open_world("racing")
    try:
        job = Job(real.opener("racing"), real.policy_for("racing"), Path(), seed=0, episode_frames=300)
        plays = [play(world, job, i) for i in range(6)]
        actions = np.concatenate([e.actions for e in plays])
        frames = np.concatenate([e.frames for e in plays])
        assert len(actions) > 900 and (actions[:, :4].mean(0) > 0.03).all() and (actions[:, 4] != 0).mean() > 0.1
        under = np.abs(frames[:, 59:75, 49:63].astype(int) - 105).max(-1) < 12
        assert 0.4 < (under.mean((1, 2)) > 0.15).mean() < 0.95  # mostly on the road, not always
    finally:
        world.close()


@pytest.mark.parametrize(("name", "buttons"), [("CartPole-v1", 2), ("Pendulum-v1", 2)])
def test_any_id_is_a_world(name: str, buttons: int) -> None:
    pytest.importorskip("pygame")
    world = real.open_world(name)
    try:
        assert isinstance(world, World) and len(world.actions.buttons) == buttons
        assert world.size[0] % 16 == 0 and world.size[1] % 16 == 0 and max(world.size) <= 128
        first = world.reset(seed=3)
        action = Action(frozenset({world.actions.names[1]}))
        frames = [world.step(action)[0].rgb for _ in range(40)]  # CartPole ends in between and starts again
        assert frames[-1].shape == (*world.size, 3)
        assert any(not np.array_equal(first.rgb, f) for f in frames)
        world.reset(seed=3)
        assert np.array_equal(world.step(action)[0].rgb, frames[0])
        assert world.step(NOOP)[0].index == 2
    finally:
        world.close()


def test_size_can_be_asked_for() -> None:
    pytest.importorskip("pygame")
    world = real.open_world("CartPole-v1", (48, 64))
    assert world.reset().rgb.shape == (48, 64, 3)
    world.close()
    for bad in ((50, 64), (0, 16), (16, 4096)):
        with pytest.raises(ConfigError, match="multiples of 16"):
            real.open_world("CartPole-v1", bad)
    assert fit_size(400, 600) == (80, 128) and fit_size(96, 96) == (96, 96) and fit_size(4, 1000) == (16, 128)
    assert real.parse_size("96x128") == (96, 128) and real.parse_size(None) is None
    with pytest.raises(ConfigError, match="96by128"):
        real.parse_size("96by128")


def test_unknown_and_missing_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="NoSuchGame-v0"):
        real.open_world("NoSuchGame-v0")
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(DeviceError, match=r"worldmodel\[record\]"):
        real.open_world("CartPole-v1")
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    with pytest.raises(DeviceError, match=r"worldmodel\[record\]"):
        real.open_world("rooms")


def test_importing_is_cheap() -> None:
    import subprocess

    code = (
        "import sys; import worldmodel.data.real, worldmodel.data.recorder, worldmodel.data.rooms, worldmodel.data.rooms_policy;"
        "bad = {'vizdoom', 'gymnasium', 'pygame', 'torch', 'tqdm'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
