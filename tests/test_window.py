"""The window without a screen (SDL's dummy driver): posted events, real threads, the whole loop."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.box_world import SPEC, BoxWorld, CompilingBoxWorld, PromptBoxWorld

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
pygame = pytest.importorskip("pygame")

from worldmodel.config import WORLDS, WorldConfig  # noqa: E402
from worldmodel.errors import CheckpointError  # noqa: E402
from worldmodel.game import app, loop  # noqa: E402
from worldmodel.game.cards import draw_keys_card, menu_rects  # noqa: E402
from worldmodel.game.keymap import default_keymap  # noqa: E402
from worldmodel.game.replay import read_replay  # noqa: E402
from worldmodel.game.settings import Preview, Settings  # noqa: E402
from worldmodel.game.window import default_scale, sharp_double  # noqa: E402

PREVIEW = Preview("box", "box", "Box world", spec=SPEC)
KEYS = {"KeyW": (119, 26), "KeyE": (101, 8), "Escape": (27, 41), "Enter": (13, 40), "Period": (46, 55), "Tab": (9, 43)}
KEYS |= {"KeyT": (116, 23), "Backspace": (8, 42)}
KEYS |= {f"F{i}": (pygame.K_F1 + i - 1, 57 + i) for i in range(1, 13)}


class Person:
    """Plays in a thread of its own while the window runs in the main one: steps are functions of the running loop."""

    def __init__(self, monkeypatch, folder: Path, factory=BoxWorld, **settings) -> None:
        self.loop: loop.WindowLoop | None = None
        self.failure: BaseException | None = None
        self.settings = Settings(replay_out=folder, scale=3, **settings)
        self.factory = factory
        person = self

        class Watched(loop.WindowLoop):
            def __init__(self, *args) -> None:
                super().__init__(*args)
                person.loop = self

        monkeypatch.setattr(loop, "WindowLoop", Watched)

    def play(self, script) -> int:
        def act() -> None:
            try:
                self.until(lambda: self.loop is not None and self.loop.run.generator.playing)
                script(self)
            except BaseException as error:
                self.failure = error
            finally:
                with contextlib.suppress(pygame.error):  # the script may have closed the window itself
                    pygame.event.post(pygame.event.Event(pygame.QUIT))

        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        code = app.play(lambda report: self.factory(), PREVIEW, self.settings)
        thread.join(5)
        if self.failure:
            raise self.failure
        return code

    def down(self, code: str) -> None:
        key, scancode = KEYS[code]
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key, scancode=scancode, mod=0, unicode=""))

    def up(self, code: str) -> None:
        key, scancode = KEYS[code]
        pygame.event.post(pygame.event.Event(pygame.KEYUP, key=key, scancode=scancode, mod=0))

    def tap(self, code: str) -> None:
        self.down(code)
        self.up(code)

    def click(self, place=(100, 100)) -> None:
        pygame.event.post(pygame.event.Event(pygame.MOUSEBUTTONDOWN, button=1, pos=place))
        pygame.event.post(pygame.event.Event(pygame.MOUSEBUTTONUP, button=1, pos=place))

    def move(self, dx: int) -> None:
        pygame.event.post(pygame.event.Event(pygame.MOUSEMOTION, rel=(dx, 0), pos=(100, 100), buttons=(0, 0, 0)))

    @staticmethod
    def until(condition, seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.005)

    def frames(self, count: int) -> None:
        """Wait for so many more pictures."""
        generator = self.loop.run.generator
        goal = generator.frame + count
        self.until(lambda: generator.frame >= goal)


def actions(folder: Path):
    return [op.action for op in read_replay(next(folder.glob("box-*.jsonl"))).ops if op.action is not None]


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
    replay = next(tmp_path.glob("box-*.jsonl"))
    assert [op.spawn for op in read_replay(replay).ops if op.kind == "reset"] == [0, 0, 1, 2, 0]
    assert app.play(lambda report: BoxWorld(), PREVIEW, Settings(headless=True, replay=replay)) == 0


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
    drivers = [json.loads(line).get("driver") for line in next(tmp_path.glob("*.jsonl")).read_text().splitlines()]
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
    replay = next(tmp_path.glob("*.jsonl"))
    assert [op.engine for op in read_replay(replay).ops if op.kind == "engine"] == ["compiled"]
    assert app.play(lambda report: CompilingBoxWorld(), PREVIEW, Settings(headless=True, replay=replay)) == 0


def test_demo_plays_when_nobody_does_and_any_key_takes_over(monkeypatch, tmp_path):
    monkeypatch.setattr("worldmodel.game.presence.DEMO_AFTER", 0.3)

    def script(person: Person) -> None:
        person.until(lambda: person.loop.run.seat.mode == "demo")
        person.frames(10)
        person.tap("KeyE")
        person.until(lambda: person.loop.run.seat.mode == "player")
        person.frames(3)
        time.sleep(0.4)
        assert person.loop.run.seat.mode == "player"

    assert Person(monkeypatch, tmp_path).play(script) == 0


def _bring_demo(monkeypatch, folder: Path, steps: int) -> None:
    """Give the box world a demo that walks forward for so many steps."""
    demo = folder / "demo.jsonl"
    demo.write_text('{"buttons": ["forward"], "mouse": [0, 0]}\n' * steps)
    monkeypatch.setattr("tests.test_window.PREVIEW", replace(PREVIEW, demo=demo))


def test_a_dream_stands_still_until_somebody_plays(monkeypatch, tmp_path):
    monkeypatch.setattr("worldmodel.game.presence.DEMO_AFTER", 0.6)
    _bring_demo(monkeypatch, tmp_path, 5)

    def script(person: Person) -> None:
        generator = person.loop.run.generator
        time.sleep(0.3)
        assert generator.frame == 0  # nobody has touched anything
        person.until(lambda: generator.spawn == 1)  # the demo is over
        stopped = generator.frame
        time.sleep(0.3)
        assert generator.frame == stopped >= 5 and person.loop.run.seat.mode == "player"  # it waits again, at the next place
        person.tap("KeyE")
        person.frames(4)

    assert Person(monkeypatch, tmp_path / "plays").play(script) == 0
    seen = actions(tmp_path / "plays")
    assert sum("forward" in a.buttons for a in seen) == 5 and sum("use" in a.buttons for a in seen) == 1


def test_a_key_in_a_single_step_does_not_set_a_dream_going(monkeypatch, tmp_path):
    _bring_demo(monkeypatch, tmp_path, 5)

    def script(person: Person) -> None:
        generator, shell = person.loop.run.generator, person.loop.shell
        person.tap("Escape")  # it stands still already, as nobody has played
        person.tap("Period")
        person.until(lambda: generator.frame == 1 and shell.screen == "step")
        person.tap("KeyE")
        person.tap("Tab")
        person.until(lambda: person.loop.run.seat.mode == "agent")
        time.sleep(0.2)
        assert generator.frame == 1 and generator.paused
        person.tap("Escape")

    assert Person(monkeypatch, tmp_path / "plays").play(script) == 0


def test_a_dream_rests_when_nobody_acts_where_nothing_moves_by_itself(monkeypatch, tmp_path):
    monkeypatch.setattr("tests.test_window.PREVIEW", replace(PREVIEW, rests=0.3))

    def script(person: Person) -> None:
        generator = person.loop.run.generator
        person.tap("KeyE")
        person.until(lambda: generator.paused)
        rested = generator.frame
        time.sleep(0.2)
        assert generator.frame == rested and person.loop.shell.screen == "play"
        person.down("KeyW")
        person.frames(4)
        time.sleep(0.5)  # longer than it waits: a held key acts
        assert not generator.paused
        person.up("KeyW")
        person.until(lambda: generator.paused)

    assert Person(monkeypatch, tmp_path).play(script) == 0


def test_taking_over_from_the_demo_begins_anew(monkeypatch, tmp_path):
    monkeypatch.setattr("worldmodel.game.presence.DEMO_AFTER", 0.1)
    _bring_demo(monkeypatch, tmp_path, 500)

    def script(person: Person) -> None:
        person.frames(8)
        person.tap("KeyE")
        person.until(lambda: person.loop.run.seat.mode == "player")
        person.frames(3)

    assert Person(monkeypatch, tmp_path / "plays").play(script) == 0
    kinds = [op.kind for op in read_replay(next((tmp_path / "plays").glob("box-*.jsonl"))).ops]
    assert kinds.count("reset") == 2 and kinds[0] == "reset"


def test_replay_in_the_window_is_exact_and_closes(monkeypatch, tmp_path, capsys):
    assert app.play(lambda r: BoxWorld(), PREVIEW, Settings(headless=True, agent="random", frames=15, replay_out=tmp_path)) == 0
    settings = Settings(replay=next(tmp_path.glob("*.jsonl")), fps=0.0, scale=2)
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


def test_enlarging_is_smooth_and_keeps_colours():
    flat = np.full((5, 7, 3), 77, np.uint8)
    assert np.array_equal(sharp_double(flat), np.full((10, 14, 3), 77, np.uint8))
    edge = np.zeros((4, 8, 3), np.uint8)
    edge[:, 4:] = 255
    row = sharp_double(edge)[3, :, 0].astype(int)
    assert row[:5].max() < 20 and row[-5:].min() > 235 and (np.diff(row[5:11]) >= 0).all()


def test_scale_fits_the_desktop():
    assert [default_scale((128, 80), d) for d in ((1920, 1080), (1280, 800), (800, 600), (100, 100))] == [9, 7, 4, 1]


def write(words: str) -> None:
    for letter in words:
        pygame.event.post(pygame.event.Event(pygame.TEXTINPUT, text=letter))


def test_a_prompt_is_typed_applied_recorded_and_replayed(monkeypatch, tmp_path, capsys):
    def script(person: Person) -> None:
        generator, shell = person.loop.run.generator, person.loop.shell
        person.frames(3)
        person.down("KeyW")  # held until the line opens
        person.frames(2)
        person.tap("KeyT")
        person.until(lambda: shell.screen == "prompt" and generator.paused)
        write("17e")
        for code in ("KeyE", "F8", "Tab"):  # they are text now, or nothing
            person.tap(code)
        person.tap("Backspace")
        write("7\n")
        person.until(lambda: shell.line.text == "177")
        assert shell.screen == "prompt" and generator.spawn == 0
        person.tap("Enter")
        person.until(lambda: generator.world._red == 177)
        person.frames(3)
        assert shell.screen == "play" and any("now: 177" in words for words, _ in shell.toasts)
        person.tap("KeyT")
        person.until(lambda: shell.screen == "prompt")
        write("8")
        person.tap("Escape")  # thought better of it
        person.until(lambda: shell.screen == "play")
        person.frames(2)
        person.tap("Enter")  # again, from the beginning of the new prompt
        person.until(lambda: generator.world._index < 3 and generator.spawn == 3)
        person.frames(2)

    assert Person(monkeypatch, tmp_path, PromptBoxWorld).play(script) == 0
    path = next(tmp_path.glob("box-*.jsonl"))
    ops = read_replay(path).ops
    (at,) = [i for i, op in enumerate(ops) if op.kind == "prompt"]
    assert ops[at].text == "177" and [op.spawn for op in ops if op.kind == "reset"] == [0, 3]
    assert not any("use" in op.action.buttons for op in ops if op.action)
    assert app.play(lambda report: PromptBoxWorld(), PREVIEW, Settings(headless=True, replay=path)) == 0
    assert f"exact: {ops[-1].frame} frames" in capsys.readouterr().out
    assert app.play(lambda report: BoxWorld(), PREVIEW, Settings(headless=True, replay=path)) == 2
    assert "changes the prompt, but this world takes none" in capsys.readouterr().err
    path.write_text(path.read_text().replace('"text": "177"', '"text": "178"'))
    assert app.play(lambda report: PromptBoxWorld(), PREVIEW, Settings(headless=True, replay=path)) == 1
    assert f"diverged at frame {ops[at].frame + 1}" in capsys.readouterr().out


def test_the_game_goes_on_while_a_prompt_is_encoded_and_when_it_cannot_be(monkeypatch, tmp_path, capsys):
    def script(person: Person) -> None:
        generator, shell = person.loop.run.generator, person.loop.shell

        def ask(words: str) -> None:
            person.tap("KeyT")
            person.until(lambda: shell.screen == "prompt")
            write(words)
            person.tap("Enter")
            person.until(lambda: shell.screen == "play")

        person.frames(2)
        ask("9")
        person.until(lambda: shell.change.busy)
        person.frames(3)
        assert shell.change.busy and generator.world._red == 0
        assert any(words.startswith("encoding the prompt") for words, _ in person.loop._view._badges())
        ask("10")
        person.until(lambda: any("wait for it" in words for words, _ in shell.toasts))
        person.until(lambda: generator.world._red == 9)
        ask("a castle")
        person.until(lambda: any("no embedding of 'a castle' is here" in words for words, _ in shell.toasts))
        person.frames(3)
        assert generator.world._red == 9
        person.tap("KeyT")
        person.until(lambda: shell.screen == "prompt")
        person.tap("Enter")  # nothing was typed
        person.until(lambda: shell.screen == "play")
        assert not shell.change.busy

    assert Person(monkeypatch, tmp_path, lambda: PromptBoxWorld(0.6)).play(script) == 0
    assert "note: no embedding of 'a castle' is here" in capsys.readouterr().err
    assert [op.text for op in read_replay(next(tmp_path.glob("box-*.jsonl"))).ops if op.kind == "prompt"] == ["9"]


def test_closing_the_window_does_not_wait_for_the_text_encoder(tmp_path):
    script = """
import sys, pytest
from pathlib import Path
from tests.test_window import Person, PromptBoxWorld, write
def script(person):
    person.frames(2)
    person.tap("KeyT")
    person.until(lambda: person.loop.shell.screen == "prompt")
    write("5")
    person.tap("Enter")
    person.until(lambda: person.loop.shell.change.busy)
    person.frames(3)
sys.exit(Person(pytest.MonkeyPatch(), Path(sys.argv[1]), lambda: PromptBoxWorld(60.0)).play(script))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0 and "replay: " in done.stdout, done.stderr
    assert read_replay(next(tmp_path.glob("box-*.jsonl"))).frames >= 5


def test_worlds_without_prompts_do_not_offer_one(monkeypatch, tmp_path):
    def script(person: Person) -> None:
        shell = person.loop.shell
        person.frames(2)
        person.tap("KeyT")
        person.frames(2)
        assert shell.screen == "play" and "prompt" not in [choice.name for choice in shell.choices()]

    assert Person(monkeypatch, tmp_path).play(script) == 0


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 9])
def test_cards_fit_the_window(scale):
    """Nothing is drawn at the edge, so nothing is cut off there; the world's own keys are those of the bundled world."""
    pygame.font.init()
    spec = WorldConfig.load(WORLDS / "rooms").actions
    size, ground = (128 * scale, 80 * scale), (90, 90, 90)
    for lift in (0.0, 9.0):
        screen = pygame.Surface(size)
        screen.fill(ground)
        draw_keys_card(screen, spec, default_keymap(spec), "F1 goes back", lift)
        drawn = (pygame.surfarray.array3d(screen) != ground).any(axis=2)
        assert drawn.any() == (scale > 1 or not lift)  # what cannot be read beside the stage bar is left out
        assert not (drawn[0].any() or drawn[-1].any() or drawn[:, 0].any() or drawn[:, -1].any())
    lines = menu_rects(size, 6)
    assert all(pygame.Rect((0, 0), size).contains(line) for line in lines)
    assert all(a.bottom <= b.top and a.height >= 6 for a, b in itertools.pairwise(lines))
