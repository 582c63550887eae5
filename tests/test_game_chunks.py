"""Worlds whose steps make several pictures: even pace, counting, exact replays, and the mouse."""

from __future__ import annotations

import json
import threading
import time

import numpy as np

from tests.box_world import SPEC, BoxWorld, ChunkBoxWorld, run
from tests.window_person import Person
from worldmodel.action import Action
from worldmodel.data.episode import load, scan
from worldmodel.game.generator import Generator
from worldmodel.game.input import InputState, Snapshot
from worldmodel.game.keymap import default_keymap
from worldmodel.game.replay import read_replay
from worldmodel.game.settings import Plan
from worldmodel.game.stats import Stats


class UnevenWorld(ChunkBoxWorld):
    """Quick and slow steps in turn, all of them within the time of three pictures at 30 a second."""

    def step(self, action):
        self._seconds = 0.005 if self._seconds > 0.01 else 0.045
        return super().step(action)


class Walker:
    def next(self, now: float) -> Snapshot:
        return Snapshot(Action(frozenset({"right"})), now, now)

    def reset(self) -> None:
        pass


def test_pictures_of_a_step_are_shown_evenly_and_none_is_lost():
    generator = Generator(lambda report: UnevenWorld(), Plan(frames=30, fps=30.0, compile="off"), Stats())
    generator.opened = lambda world: (None, Walker())  # type: ignore[assignment, return-value]
    thread, seen = threading.Thread(target=generator.run), []
    thread.start()
    while thread.is_alive() or generator.delivery.next_due() is not None:
        due = generator.delivery.next_due()
        if due is not None and due <= time.perf_counter():
            seen.append(generator.delivery.take(due))
        time.sleep(0.001)
    assert [s.index for s in seen] == list(range(31)) and generator.error is None
    between = np.diff([s.due for s in seen[1:]])
    assert abs(np.median(between) - 1 / 30) < 1e-3 and between.min() > 0.5 / 30 - 1e-6  # after a late step, half a period at least
    assert [s.event is not None for s in seen[1:]] == [True, False, False] * 10


def test_without_a_pace_the_pictures_are_spread_over_the_time_of_the_step():
    generator = Generator(lambda report: ChunkBoxWorld(0.06), Plan(frames=3, fps=0.0, compile="off"), Stats())
    generator.opened = lambda world: (None, Walker())  # type: ignore[assignment, return-value]
    generator.run()
    _, first, second, third = generator.delivery._box
    assert 0.02 <= second.due - first.due < 0.06 and abs(third.due - 2 * second.due + first.due) < 1e-6


def test_replays_are_exact_and_count_pictures(tmp_path, capsys):
    assert run(ChunkBoxWorld, agent="random", frames=12, seed=5, replay_out=tmp_path, episodes=tmp_path / "eps") == 0
    path = next(tmp_path.glob("box-*.jsonl"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["frame"] for line in lines[1:]] == [0, 3, 6, 9, 12] and lines[0]["frames_per_action"] == 3
    assert run(ChunkBoxWorld, replay=path) == 0
    assert "exact: 12 frames" in capsys.readouterr().out
    assert run(BoxWorld, replay=path) == 1  # a world that makes one picture a step
    assert "diverged at frame 3" in capsys.readouterr().out
    lines[3]["action"]["mouse"] = [11.5, 0.0]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(ChunkBoxWorld, replay=path) == 1
    assert "diverged at frame 6" in capsys.readouterr().out
    (episode,) = (load(p) for p in scan(tmp_path / "eps"))
    acted = [SPEC.encode(op.action) for op in read_replay(path).ops[1:2] if op.action]
    assert len(episode) == 13 and np.array_equal(episode.actions[1:4], np.repeat(acted, 3, axis=0))


def test_a_run_ends_with_the_step_that_fills_it(tmp_path):
    assert run(ChunkBoxWorld, agent="random", frames=7, replay_out=tmp_path) == 0
    assert read_replay(next(tmp_path.glob("box-*.jsonl"))).frames == 9


def test_stats_count_pictures(tmp_path):
    stats = tmp_path / "s.json"
    assert run(lambda: ChunkBoxWorld(0.03), frames=30, agent="random", stats=stats, replay_out=None) == 0
    found = json.loads(stats.read_text())
    assert (found["frames"], found["frames_per_action"]) == (30, 3)
    assert 10 <= found["frame_ms"]["p50"] < 25 and 30 <= found["generate_ms"]["p50"] < 60
    assert found["fps"] < 100


def test_mouse_motion_is_spread_over_the_pictures_of_a_step():
    one, three = (InputState(SPEC, default_keymap(SPEC), frames) for frames in (1, 3))
    for state in (one, three):
        state.motion(60, 0, 0.0)
    assert three.snapshot(1.0).action.mouse[0] * 3 == one.snapshot(1.0).action.mouse[0] == 6.0


def test_the_window_says_how_many_pictures_an_action_makes(monkeypatch, tmp_path):
    def script(person: Person) -> None:
        person.frames(6)
        view = person.loop._view
        assert ("frames per action", "3") in view._rows(person.loop.run.facts())

    assert Person(monkeypatch, tmp_path, ChunkBoxWorld).play(script) == 0
    path = next(tmp_path.glob("box-*.jsonl"))
    assert run(ChunkBoxWorld, replay=path) == 0
