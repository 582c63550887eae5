"""Gamepads: SDL's controller events -> codes (``PadA``, ``PadStickUp`` ...) and the right stick as a look direction."""

from __future__ import annotations

from typing import Any

import pygame

DEAD, PRESSED = 0.18, 0.5
_BUTTONS = (
    *("PadA", "PadB", "PadX", "PadY", "PadBack", "PadGuide", "PadStart", "PadLeftStick", "PadRightStick", "PadLB", "PadRB"),
    *("PadUp", "PadDown", "PadLeft", "PadRight"),
)
_LEFT_X, _LEFT_Y, _RIGHT_X, _RIGHT_Y, _LEFT_TRIGGER, _RIGHT_TRIGGER = range(6)


class Pad:
    """All connected gamepads as one. look: right stick in [-1, 1], x right and y down, with a dead zone."""

    def __init__(self) -> None:
        self._open: dict[int, Any] = {}
        self._down: set[str] = set()
        self.look = (0.0, 0.0)
        self._module: Any = None

    def open(self) -> None:
        """Look for gamepads; without support in this pygame there are none."""
        try:
            from pygame._sdl2 import controller

            controller.init()
        except (ImportError, pygame.error):
            return
        self._module = controller
        for index in range(controller.get_count()):
            self._connect(index)

    def _connect(self, index: int) -> None:
        if self._module is not None and self._module.is_controller(index):
            self._open[index] = self._module.Controller(index)

    def forget(self) -> None:
        """Everything is let go."""
        self._down.clear()
        self.look = (0.0, 0.0)

    def codes(self, event: pygame.event.Event) -> list[tuple[str, bool]]:
        """Which codes went down (True) or up with this event."""
        kind = event.type
        if kind == pygame.CONTROLLERDEVICEADDED:
            self._connect(event.device_index)
        elif kind in (pygame.CONTROLLERBUTTONDOWN, pygame.CONTROLLERBUTTONUP) and event.button < len(_BUTTONS):
            return self._change({_BUTTONS[event.button]: kind == pygame.CONTROLLERBUTTONDOWN})
        elif kind == pygame.CONTROLLERAXISMOTION:
            value = event.value / 32767
            if event.axis == _LEFT_X:
                return self._change({"PadStickLeft": value < -PRESSED, "PadStickRight": value > PRESSED})
            if event.axis == _LEFT_Y:
                return self._change({"PadStickUp": value < -PRESSED, "PadStickDown": value > PRESSED})
            if event.axis in (_LEFT_TRIGGER, _RIGHT_TRIGGER):
                return self._change({"PadLT" if event.axis == _LEFT_TRIGGER else "PadRT": value > PRESSED})
        return []

    def looked(self, event: pygame.event.Event) -> bool:
        """Whether this event moved the right stick; `look` is then up to date."""
        if event.type != pygame.CONTROLLERAXISMOTION or event.axis not in (_RIGHT_X, _RIGHT_Y):
            return False
        value = max(-1.0, min(1.0, event.value / 32767))
        value = 0.0 if abs(value) < DEAD else (abs(value) - DEAD) / (1 - DEAD) * (1 if value > 0 else -1)
        old = self.look
        self.look = (value, old[1]) if event.axis == _RIGHT_X else (old[0], value)
        return self.look != old

    def _change(self, states: dict[str, bool]) -> list[tuple[str, bool]]:
        changed = [(code, down) for code, down in states.items() if down != (code in self._down)]
        for code, down in changed:
            (self._down.add if down else self._down.discard)(code)
        return sorted(changed, key=lambda c: c[1])
