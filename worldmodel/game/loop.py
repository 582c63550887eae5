"""The window's loop: wakes for events and pictures, keeps the input contract. Runs in the main thread, as pygame wants.

Times are `time.perf_counter` seconds. An event's time is taken when SDL hands it over; while a picture is being drawn (a few
milliseconds) that can be later than the finger, so action-to-frame may be under-measured by at most that.
"""

from __future__ import annotations

import time

import pygame

from worldmodel.game import cards
from worldmodel.game.delivery import Shown
from worldmodel.game.generator import Factory
from worldmodel.game.keymap import MOUSE_CODES, SCANCODES
from worldmodel.game.pad import Pad
from worldmodel.game.run import Run
from worldmodel.game.settings import Preview, Settings
from worldmodel.game.shell import Shell
from worldmodel.game.view import View
from worldmodel.game.window import Window

IDLE_WAIT, LIVE_WAIT = 0.1, 0.033  # s between looks when nothing, or something, moves by itself


class WindowLoop:
    """Owns window, run, shell and view. Call `open`, start the generator's thread, then `play` and `close`."""

    def __init__(self, factory: Factory, preview: Preview, settings: Settings) -> None:
        self._wake, self._waking = -1, False
        self.run = Run(factory, preview, settings, self._notify)
        self.shell = Shell(self.run)
        self.window: Window | None = None
        self._view: View | None = None
        self._preview, self._settings = preview, settings
        self._pad = Pad()

    def open(self) -> None:
        """Open the window with the seed picture. Raises DeviceError where there is no display."""
        preview = self._preview
        height, width = preview.size
        title = f"{preview.title or preview.name} - worldmodel"
        self.window = self.shell.window = Window(title, (width, height), self._settings.scale, self._settings.fullscreen)
        self._view = View(self.window, self.shell, preview)
        self._wake = pygame.event.custom_type()
        if preview.picture is not None:
            self.window.show_file(preview.picture)
        self._view.draw()
        self.run.stats.opened()
        self._pad.open()

    def play(self) -> None:
        """Until the window is closed, the generator has ended or a signal came."""
        while not self.shell.done and not self.run.signal and not self.run.generator.finished:
            self._wait()
            for event in pygame.event.get():
                self._handle(event)
            self.shell.notice()
            shown = self.run.generator.delivery.take(time.perf_counter())
            if shown is not None or self.shell.dirty or self._alive():
                self._present(shown)

    def close(self) -> None:
        """Safe to call twice."""
        if self.window is not None:
            self.window.close()

    def _wait(self) -> None:
        """Sleep until an event, a picture's due time, or the next tick of something that moves."""
        self._waking = False
        due = self.run.generator.delivery.next_due()
        rest = LIVE_WAIT if self._alive() else IDLE_WAIT
        if due is not None:
            rest = min(rest, due - time.perf_counter())
        if rest >= 0.001:
            event = pygame.event.wait(int(rest * 1000))
            if event.type != pygame.NOEVENT:
                self._handle(event)
        elif rest > 0:
            time.sleep(rest)

    def _notify(self) -> None:
        """From the generator's thread: something is new."""
        if self._wake >= 0 and not self._waking and pygame.display.get_init():
            self._waking = True
            try:
                pygame.event.post(pygame.event.Event(self._wake))
            except pygame.error:  # the queue is full, or the display is just being closed: the tick will do
                self._waking = False

    def _alive(self) -> bool:
        """Whether something on the screen moves without new pictures."""
        return not self.run.generator.playing or bool(self.shell.toasts) or self.shell.change.busy

    def _present(self, shown: Shown | None) -> None:
        if self.window is None or self._view is None:
            return
        if shown is not None:
            self.window.show(shown.rgb)
        self._view.draw()
        if shown is not None and not shown.first:
            now = time.perf_counter()
            self.run.stats.shown(now, shown.event, shown.span)
            self.shell.saw(shown.rgb, now)

    # --- events ------------------------------------------------------------------------------------------------------------------
    def _handle(self, event: pygame.event.Event) -> None:
        now, kind, shell = time.perf_counter(), event.type, self.shell
        if kind == pygame.QUIT:
            shell.done = True
        elif kind == pygame.KEYDOWN:
            shell.key_down(code_of(event), now)
        elif kind == pygame.TEXTINPUT:
            shell.typed(event.text)
        elif kind == pygame.KEYUP:
            shell.release(code_of(event), now)
        elif kind == pygame.MOUSEMOTION:
            self._motion(event, now)
        elif kind == pygame.MOUSEBUTTONDOWN:
            self._click(event, now)
        elif kind == pygame.MOUSEBUTTONUP:
            shell.release(MOUSE_CODES.get(event.button, ""), now)
        elif kind == pygame.WINDOWFOCUSLOST:
            self._pad.forget()
            shell.let_go(now)
        elif kind in (pygame.VIDEORESIZE, pygame.WINDOWSIZECHANGED) and self.window:
            self.window.resized()
            shell.dirty = True
        elif kind in (pygame.WINDOWEXPOSED, pygame.WINDOWFOCUSGAINED):
            shell.dirty = True
        else:
            self._gamepad(event, now)

    def _gamepad(self, event: pygame.event.Event, now: float) -> None:
        shell = self.shell
        for code, down in self._pad.codes(event):
            if code == "PadStart":
                if down and self.run.generator.playing:
                    (shell.pause if shell.screen == "play" else shell.resume)()
            elif down:
                shell.press(code, now)
            else:
                shell.release(code, now)
        if self._pad.looked(event) and shell.takes_input() and self.run.inputs:
            shell.person()
            self.run.inputs.stick(*self._pad.look, now)

    def _motion(self, event: pygame.event.Event, now: float) -> None:
        shell = self.shell
        if self.window and self.window.grabbed and shell.takes_input() and self.run.inputs:
            shell.person()
            self.run.inputs.motion(event.rel[0], event.rel[1], now)
        elif shell.screen == "menu":
            over = self._line_at(event.pos)
            shell.dirty |= over != shell.selected
            shell.selected = over

    def _line_at(self, place: tuple[int, int]) -> int | None:
        """Line of the menu under the pointer."""
        if self.window is None:
            return None
        rects = cards.menu_rects(self.window.size, len(self.shell.choices()))
        return next((i for i, r in enumerate(rects) if r.collidepoint(place)), None)

    def _click(self, event: pygame.event.Event, now: float) -> None:
        shell, window = self.shell, self.window
        if shell.screen == "menu":
            line = self._line_at(event.pos)
            if line is not None and event.button == 1:
                shell.choose(shell.choices()[line].name)
        elif shell.screen == "help":
            shell.close_help()
        elif shell.screen == "step":
            shell.resume()
        elif window is not None and shell.takes_input() and not window.grabbed:
            shell.person()  # this click takes the pointer; it is not an action
            window.grab(True)
            shell.dirty = True
        else:
            shell.press(MOUSE_CODES.get(event.button, ""), now)


def code_of(event: pygame.event.Event) -> str:
    """W3C name of a key event, ``""`` if unknown; synthetic events may lack the scancode."""
    code = SCANCODES.get(getattr(event, "scancode", 0))
    return code or SCANCODES.get(_scancode_of(event.key), "")


def _scancode_of(key: int) -> int:
    """Scancode of a pygame key constant on a US keyboard (0 if unknown): letters and digits by character, the rest by SDL's bit."""
    if key & 1 << 30:
        return key & ~(1 << 30)
    fixed = {13: 40, 27: 41, 8: 42, 9: 43, 32: 44, 46: 55, 44: 54}
    if 97 <= key <= 122:
        return key - 97 + 4
    if 49 <= key <= 57:
        return key - 49 + 30
    return 39 if key == 48 else fixed.get(key, 0)
