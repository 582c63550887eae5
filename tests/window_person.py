"""Somebody at the window, without a screen (SDL's dummy driver): posted events, real threads, the whole loop."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import pygame

from tests.box_world import PREVIEW, BoxWorld
from worldmodel.action import Action
from worldmodel.game import app, loop
from worldmodel.game.replay import Replay, read_replay
from worldmodel.game.settings import Preview, Settings

KEYS = {"KeyW": (119, 26), "KeyE": (101, 8), "Escape": (27, 41), "Enter": (13, 40), "Period": (46, 55), "Tab": (9, 43)}
KEYS |= {"KeyT": (116, 23), "Backspace": (8, 42)}
KEYS |= {f"F{i}": (pygame.K_F1 + i - 1, 57 + i) for i in range(1, 13)}


class Person:
    """Plays in a thread of its own while the window runs in the main one: steps are functions of the running loop."""

    def __init__(self, monkeypatch, folder: Path, factory=BoxWorld, preview: Preview = PREVIEW, **settings) -> None:
        self.loop: loop.WindowLoop | None = None
        self.failure: BaseException | None = None
        self.settings = Settings(replay_out=folder, scale=3, **settings)
        self.factory, self.preview = factory, preview
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
        code = app.play(lambda report: self.factory(), self.preview, self.settings)
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

    def write(self, words: str) -> None:
        for letter in words:
            pygame.event.post(pygame.event.Event(pygame.TEXTINPUT, text=letter))

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


def played(folder: Path) -> Replay:
    """The replay that the box world left in `folder`."""
    return read_replay(next(folder.glob("box-*.jsonl")))


def actions(folder: Path) -> list[Action]:
    """What the world was told, step by step."""
    return [op.action for op in played(folder).ops if op.action is not None]
