"""The window in play, without a screen (SDL's dummy driver): keys, mouse, menu, files, and how it ends."""

import json
import threading
import time

import pygame
import pytest

from tests.box_world import PREVIEW, BoxWorld, CompilingBoxWorld, run
from tests.window_person import Person, actions, played
from worldmodel.errors import CheckpointError
from worldmodel.game import app
from worldmodel.game.cards import menu_rects
from worldmodel.game.settings import Settings


def test_keys_mouse_and_focus_reach_the_world(monkeypatch, tmp_path):
    def script(person: Person) -> None:
        person.move(30)  # not captured yet: ignored
        person.down("KeyW")
        person.frames(4)
        person.tap("KeyE")
        person.frames(3)
        person.click()
        person.until(lambda: person.loop.window.grabbed)
        person.move(20)
        person.frames(3)
        pygame.event.post(pygame.event.Event(pygame.WINDOWFOCUSLOST))
        person.until(lambda: not person.loop.window.grabbed)
        person.frames(3)

    assert Person(monkeypatch, tmp_path).play(script) == 0
    seen = actions(tmp_path)
    assert sum("use" in a.buttons for a in seen) == 1
    assert sum("forward" in a.buttons for a in seen) >= 9 and "forward" not in seen[-1].buttons
    assert [a.mouse[0] for a in seen if a.mouse[0]] == [2.0]


def test_pause_step_reset_next_place_and_quit(monkeypatch, tmp_path):
    def script(person: Person) -> None:
        generator, shell = person.loop.run.generator, person.loop.shell
        person.frames(3)
        person.tap("Escape")
        person.until(lambda: shell.screen == "menu")
        time.sleep(0.15)
        stopped = generator.frame
        time.sleep(0.2)
        assert generator.frame == stopped and generator.paused
        for i in range(3):
            person.tap("Period")
            person.until(lambda goal=stopped + i + 1: generator.frame == goal)
        time.sleep(0.15)
        assert generator.frame == stopped + 3 and shell.screen == "step"
        person.tap("Enter")
        person.until(lambda: not generator.paused and generator.world._index < 3)
        person.tap("F8")
        person.until(lambda: generator.spawn == 1)
        person.tap("F8")
        person.until(lambda: generator.spawn == 2)
        person.tap("F8")
        person.until(lambda: generator.spawn == 0)
        person.frames(2)
        person.tap("Escape")
        person.until(lambda: shell.screen == "menu")
        person.tap("Escape")
        person.until(lambda: shell.done)

    assert Person(monkeypatch, tmp_path).play(script) == 0
    replay = played(tmp_path)
    assert [op.spawn for op in replay.ops if op.kind == "reset"] == [0, 0, 1, 2, 0]
    assert run(BoxWorld, replay=replay.path) == 0


def test_menu_by_mouse_and_keys(monkeypatch, tmp_path):
    def script(person: Person) -> None:
        shell, generator = person.loop.shell, person.loop.run.generator
        person.tap("Escape")
        person.until(lambda: shell.screen == "menu")
        rects = menu_rects(person.loop.window.size, len(shell.choices()))
        names = [c.name for c in shell.choices()]
        place = rects[names.index("next")].center
        pygame.event.post(pygame.event.Event(pygame.MOUSEMOTION, rel=(1, 1), pos=place, buttons=(0, 0, 0)))
        person.until(lambda: shell.selected == names.index("next"))
        person.tap("Enter")
        person.until(lambda: generator.spawn == 1 and shell.screen == "play")
        person.tap("F1")
        person.until(lambda: shell.screen == "help" and generator.paused)
        person.tap("F1")
        person.until(lambda: shell.screen == "play" and not generator.paused)
        person.tap("Escape")
        person.until(lambda: shell.screen == "menu")
        person.click(rects[names.index("resume")].center)
        person.until(lambda: shell.screen == "play" and person.loop.window.grabbed)
        person.tap("Escape")
        person.until(lambda: shell.screen == "menu" and not person.loop.window.grabbed)
        person.click(rects[names.index("quit")].center)
        person.until(lambda: shell.done)

    assert Person(monkeypatch, tmp_path).play(script) == 0


def test_video_screenshot_hud_and_agent(monkeypatch, tmp_path):
    pytest.importorskip("av")

    def script(person: Person) -> None:
        shell, run = person.loop.shell, person.loop.run
        person.frames(3)  # this world has no preview: a screenshot needs a picture that was shown
        person.tap("F6")
        person.until(lambda: run.generator.journal.video is not None)
        person.tap("F7")
        person.tap("F2")
        person.tap("F3")
        person.tap("Tab")
        person.until(lambda: shell.level == "full" and shell.overlay and run.seat.mode == "agent")
        person.frames(30)
        person.tap("Tab")
        person.until(lambda: run.seat.mode == "player")
        person.tap("F6")
        person.until(lambda: run.generator.journal.video is None)
        person.tap("F11")
        person.until(lambda: person.loop.window.fullscreen)
        person.tap("F11")
        person.until(lambda: not person.loop.window.fullscreen)
        person.frames(1)

    assert Person(monkeypatch, tmp_path).play(script) == 0
    assert len(list(tmp_path.glob("*.mp4"))) == 1
    picture = pygame.image.load(str(next(tmp_path.glob("*.png"))))
    assert picture.get_size() == (384, 240)
    assert any(a.buttons for a in actions(tmp_path))
    drivers = [json.loads(line).get("driver") for line in played(tmp_path).path.read_text().splitlines()]
    assert [d for d in drivers if d] == ["agent", "player"]


def test_stats_of_a_window(monkeypatch, tmp_path):
    stats = tmp_path / "s.json"

    def script(person: Person) -> None:
        for _ in range(6):
            person.tap("KeyE")
            person.frames(3)

    assert Person(monkeypatch, tmp_path, lambda: BoxWorld(0.005, fps=40.0), stats=stats).play(script) == 0
    found = json.loads(stats.read_text())
    assert 0 < found["window_s"] <= found["first_frame_s"]
    assert found["fps"] == pytest.approx(40, rel=0.25) and 5 < found["action_to_frame_ms"]["p50"] < 100


def test_engine_change_is_announced_and_replayed(monkeypatch, tmp_path):
    def script(person: Person) -> None:
        person.until(lambda: person.loop.run.generator.engine == "compiled")
        person.until(lambda: any("compiled" in words for words, _ in person.loop.shell.toasts))
        person.frames(3)

    assert Person(monkeypatch, tmp_path, lambda: CompilingBoxWorld(0.4)).play(script) == 0
    replay = played(tmp_path)
    assert [op.engine for op in replay.ops if op.kind == "engine"] == ["compiled"]
    assert run(CompilingBoxWorld, replay=replay.path) == 0


def test_replay_in_the_window_is_exact_and_closes(monkeypatch, tmp_path, capsys):
    assert run(BoxWorld, agent="random", frames=15, replay_out=tmp_path) == 0
    settings = Settings(replay=played(tmp_path).path, fps=0.0, scale=2)
    assert app.play(lambda report: BoxWorld(), PREVIEW, settings) == 0
    assert "exact: 15 frames" in capsys.readouterr().out


def test_load_errors_come_from_the_window_as_one_sentence(tmp_path, capsys):
    def broken(report):
        raise CheckpointError("the weights are gone: fetch them again")

    assert app.play(broken, PREVIEW, Settings(replay_out=tmp_path)) == 2
    assert capsys.readouterr().err.endswith("error: the weights are gone: fetch them again\n")


def test_closing_while_the_world_loads_is_quick(tmp_path):
    began = time.perf_counter()
    quitter = threading.Timer(0.5, lambda: pygame.event.post(pygame.event.Event(pygame.QUIT)))
    quitter.start()
    pygame.display.init()
    assert app.play(lambda report: BoxWorld(load_seconds=0.6), PREVIEW, Settings(replay_out=tmp_path, scale=2)) == 0
    assert time.perf_counter() - began < 5
