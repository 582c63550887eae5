"""What a person can do with the window besides playing: pause, step, menu, places, video, screenshot, agent.

Runs in the main thread. The world is only touched through the generator's commands.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from worldmodel.errors import WorldModelError
from worldmodel.game import hud
from worldmodel.game.cards import Choice
from worldmodel.game.lost import LostWatch
from worldmodel.game.presence import Presence
from worldmodel.game.prompting import PromptChange, PromptLine, takes_prompts
from worldmodel.game.replay import replay_path
from worldmodel.game.run import Run
from worldmodel.game.window import Window

TOAST_SECONDS = 3.5
PROMPT_KEY = "KeyT"  # of the window only in worlds that take prompts


class Shell:
    """State of everything on top of the picture.

    screen: ``play``, ``menu``, ``step`` (paused, menu hidden), ``prompt`` (one is typed into `line`) or ``help``. level: of the
    numbers. overlay: show pressed keys. selected: line of the menu. presence: who plays. started: when play began. dirty: must be
    drawn again. change: the prompt that is being prepared.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.window: Window | None = None
        self.level = "small" if run.settings.hud else "off"
        self.overlay = False
        self.screen, self._before_help = "play", "play"
        self.selected: int | None = None
        self.done, self.dirty = False, True
        self.started: float | None = None
        self.toasts: list[tuple[str, float]] = []
        self._engine, self._told = "", False
        self.line, self.change = PromptLine(), PromptChange(run.generator, self.toast)
        self.presence, self._lost = Presence(run), LostWatch()
        self._settle()

    def key_down(self, code: str, now: float) -> None:
        """A key of the keyboard went down: the window's keys first, then the world's."""
        self.dirty = True
        if self.screen == "prompt":
            self._prompt_key(code)
        elif code == "F11" and self.window:
            self.window.toggle_fullscreen()
        elif code == "F2":
            self.level = hud.LEVELS[(hud.LEVELS.index(self.level) + 1) % len(hud.LEVELS)]
        elif code == "F3":
            self.overlay = not self.overlay
        elif code == "F7":
            self._screenshot()
        elif not self.run.generator.playing:
            self.done |= code == "Escape"
        elif self.screen == "help":
            if code in ("F1", "Escape", "Enter", "Space"):
                self.close_help()
        elif code == "Escape" and self.screen != "play":
            self.done = True
        elif code == "Escape" or (code == "Pause" and self.screen == "play"):
            self.pause()
        elif not self._shell_key(code) and not (self.screen != "play" and self._menu_key(code)):
            self.press(code, now)

    def _shell_key(self, code: str) -> bool:
        """Keys that mean the same while playing and in the menu."""
        if code == "F1":
            self._open_help()
        elif code == "F6":
            self._toggle_video()
        elif code == "F8":
            self._next_place()
        elif code == PROMPT_KEY and takes_prompts(self.run.generator):
            self._open_prompt()
        elif code == "Tab":
            self._hand_over()
        elif code in ("Enter", "NumpadEnter") and self.selected is None:
            self._restart()
        elif code == "Period" and self.screen != "play":
            self._one_step()
        else:
            return False
        return True

    def _menu_key(self, code: str) -> bool:
        choices = self.choices()
        if code in ("ArrowDown", "ArrowUp") and self.screen == "menu":
            step = 1 if code == "ArrowDown" else -1
            start = -1 if step > 0 else 0
            self.selected = ((start if self.selected is None else self.selected) + step) % len(choices)
        elif code in ("Enter", "NumpadEnter") and self.selected is not None:
            self.choose(choices[self.selected].name)
        elif code in ("Space", "Pause"):
            self.resume()
        elif self.screen == "step":
            return False  # keys of the world act in the next single step
        return True

    def choices(self) -> list[Choice]:
        """Lines of the pause menu."""
        recording = self.run.generator.journal is not None and self.run.generator.journal.video is not None
        return [
            Choice("resume", "Play on", "Space"),
            Choice("step", "One step", "Period"),
            Choice("restart", "Start again", "Enter"),
            Choice("next", "Next place", "F8"),
            *([Choice("prompt", "Another prompt", "T")] if takes_prompts(self.run.generator) else []),
            Choice("video", "Stop the video" if recording else "Record a video", "F6"),
            Choice("picture", "Screenshot", "F7"),
            Choice("help", "All keys", "F1"),
            Choice("quit", "Quit", "Esc"),
        ]

    def choose(self, name: str) -> None:
        """Do what a line of the menu says."""
        self.dirty = True
        if name == "resume":
            self.resume()
            if self.window and self.takes_input() and self.run.generator.world and self.run.generator.world.actions.axes:
                self.window.grab(True)
        elif name == "step":
            self._one_step()
        elif name == "quit":
            self.done = True
        else:
            jobs = {"restart": self._restart, "next": self._next_place, "video": self._toggle_video}
            {**jobs, "picture": self._screenshot, "help": self._open_help, "prompt": self._open_prompt}[name]()

    def pause(self) -> None:
        """Let the pointer go, stop the world, show the menu."""
        self._cover("menu")

    def resume(self) -> None:
        """Play on."""
        self.screen, self.selected = "play", None
        self.presence.acted()
        self._settle()

    def _cover(self, screen: str) -> None:
        """Let the pointer go, stop the world, put something on top of the picture."""
        self.let_go(time.perf_counter())
        self.screen, self.selected = screen, None
        self._settle()

    def _settle(self) -> None:
        """The world runs exactly while nothing is on top of the picture and somebody is there to play."""
        paused = self.screen != "play" or self.presence.still
        if paused != self.run.generator.paused:
            self.run.generator.pause(paused)
            self.dirty = True

    def _one_step(self) -> None:
        """Hide the menu: the picture is what one wants to see now. Keys held at this moment act in the step."""
        self.screen, self.selected = "step", None
        self.run.generator.step_once()

    def _open_help(self) -> None:
        self._before_help = self.screen
        self._cover("help")

    def close_help(self) -> None:
        """Back to where F1 was pressed."""
        self.dirty = True
        if self._before_help != "play":
            self.screen = self._before_help
        else:
            self.resume()

    def _open_prompt(self) -> None:
        """Stop the world and let a prompt be typed."""
        self.person()
        self._cover("prompt")
        self.line = PromptLine()
        if self.window:
            self.window.typing(True)

    def _prompt_key(self, code: str) -> None:
        if code == "Backspace":
            self.line.rub_out()
        elif code in ("Enter", "NumpadEnter", "Escape"):
            text = self.line.text.strip()
            if self.window:
                self.window.typing(False)
            self.resume()
            if text and code != "Escape":
                self.change.ask(text)

    def typed(self, text: str) -> None:
        """Characters from the keyboard, as its layout means them."""
        if self.screen == "prompt":
            self.line.insert(text)
            self.dirty = True

    def _is_replay(self) -> bool:
        if self.run.generator.replay is not None:
            self.toast("this is a replay: it plays by itself")
            return True
        return False

    def _restart(self) -> None:
        self._begin(self.run.generator.reset)

    def _next_place(self) -> None:
        self._begin(self.run.generator.next_place)

    def _begin(self, command: Callable[[], None]) -> None:
        if not self._is_replay():
            self.person()
            command()
            self.resume()

    def _hand_over(self) -> None:
        if not self._is_replay() and self.run.seat is not None:
            mode = self.presence.hand_over()
            self._settle()
            self.toast("the agent plays; Tab takes over" if mode == "agent" else "you play")

    def _toggle_video(self) -> None:
        generator = self.run.generator

        def job() -> None:
            if (journal := generator.journal) is not None:
                self._tell(lambda: journal.toggle_video(self._new_file(".mp4")))

        generator.command(job)

    def _screenshot(self) -> None:
        if (window := self.window) is not None:
            self._tell(lambda: window.screenshot(self._new_file(".png")))

    def _new_file(self, suffix: str) -> Path:
        return replay_path(self.run.settings.plays, self.run.preview.name, suffix)

    def _tell(self, work: Callable[[], str]) -> None:
        """Show what `work` says of itself, or why it failed."""
        try:
            self.toast(work())
        except WorldModelError as error:
            self.toast(str(error))

    def toast(self, words: str) -> None:
        """Show a short message for a few seconds. Any thread."""
        self.toasts = [*self.toasts[-2:], (words, time.perf_counter() + TOAST_SECONDS)]
        self.dirty = True

    def saw(self, rgb: np.ndarray, now: float) -> None:
        """A new picture, uint8 (H,W,3), is on the screen. What has no resting pictures may well show nothing, and be right."""
        if self.run.preview.rests and self._lost.saw(rgb, now) and self.run.generator.replay is None:
            self.toast("the dream has lost its way: F8 goes to another place, Enter starts again")

    def notice(self) -> None:
        """Things that happened without an event."""
        now, generator = time.perf_counter(), self.run.generator
        if self.toasts and self.toasts[0][1] < now:
            self.toasts = [t for t in self.toasts if t[1] >= now]
            self.dirty = True
        if generator.playing and self.started is None:
            self.started, self._engine, self.dirty = now, generator.engine, True
            if self.window and generator.world:
                self.window.adapt((generator.world.size[1], generator.world.size[0]))
        if generator.playing and generator.engine != self._engine:
            self._engine = generator.engine
            self.toast(f"now on the {generator.engine} engine")
        if generator.playing and generator.compiling.startswith(("failed", "slower")) and not self._told:
            self._told = True
            state = "is slower here" if generator.compiling == "slower" else generator.compiling
            self.toast(f"the compiled engine {state}; the eager one plays on")
        if self.started is not None and self.screen == "play":
            self.presence.look(now, self.started)
            self._settle()

    def person(self) -> None:
        """A person touched the controls."""
        self.presence.plays()
        self._settle()

    def let_go(self, now: float) -> None:
        """Release the pointer and everything that is held."""
        if self.window:
            self.window.grab(False)
        if self.run.inputs:
            self.run.inputs.release_all(now)
        self.dirty = True

    def takes_input(self) -> bool:
        """Whether keys reach the world now."""
        generator = self.run.generator
        return generator.playing and self.screen in ("play", "step") and generator.replay is None

    def press(self, code: str, now: float) -> None:
        """A key, mouse button or gamepad control of the world went down."""
        inputs, keymap = self.run.inputs, self.run.keymap
        if self.takes_input() and inputs and keymap and code in keymap.bindings:
            self.person()
            inputs.press(code, now)
            self.dirty |= self.overlay

    def release(self, code: str, now: float) -> None:
        """And up again."""
        if self.run.inputs:
            self.run.inputs.release(code, now)
