"""Physical keys, mouse buttons and gamepad controls -> the action names of an `ActionSpec`.

A *code* is a W3C ``event.code`` name (``KeyW``, ``Space``, ``ArrowLeft``), ``MouseLeft`` ..., or ``PadA`` ... for a gamepad.
A *target* is the name of a button of the spec, or ``<axis>-`` / ``<axis>+`` to move an axis by key. Codes are physical: ``KeyW``
is the key left of E on a US keyboard, whatever is printed on it.
"""

from __future__ import annotations

import difflib
import json
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from worldmodel.action import ActionSpec, Axis
from worldmodel.errors import ConfigError

# USB HID usage numbers, which SDL (and so pygame) uses as scancodes.
SCANCODES: dict[int, str] = {
    **{4 + i: f"Key{c}" for i, c in enumerate(string.ascii_uppercase)},
    **{30 + i: f"Digit{(i + 1) % 10}" for i in range(10)},
    **{58 + i: f"F{i + 1}" for i in range(12)},
    **{89 + i: f"Numpad{(i + 1) % 10}" for i in range(10)},
    **dict(enumerate(("Enter", "Escape", "Backspace", "Tab", "Space", "Minus", "Equal"), 40)),
    **dict(enumerate(("BracketLeft", "BracketRight", "Backslash"), 47)),
    **dict(enumerate(("Semicolon", "Quote", "Backquote", "Comma", "Period", "Slash", "CapsLock"), 51)),
    **dict(enumerate(("PrintScreen", "ScrollLock", "Pause", "Insert", "Home", "PageUp", "Delete", "End", "PageDown"), 70)),
    **dict(enumerate(("ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp", "NumLock"), 79)),
    **dict(enumerate(("NumpadDivide", "NumpadMultiply", "NumpadSubtract", "NumpadAdd", "NumpadEnter"), 84)),
    **dict(enumerate(("NumpadDecimal", "IntlBackslash", "ContextMenu"), 99)),
    **dict(enumerate(("ControlLeft", "ShiftLeft", "AltLeft", "MetaLeft"), 224)),
    **dict(enumerate(("ControlRight", "ShiftRight", "AltRight", "MetaRight"), 228)),
}
MOUSE_CODES: dict[int, str] = {1: "MouseLeft", 2: "MouseMiddle", 3: "MouseRight", 6: "MouseBack", 7: "MouseForward"}
PAD_CODES = (
    *("PadA", "PadB", "PadX", "PadY", "PadLB", "PadRB", "PadLT", "PadRT", "PadUp", "PadDown", "PadLeft", "PadRight"),
    *("PadStickUp", "PadStickDown", "PadStickLeft", "PadStickRight", "PadLeftStick", "PadRightStick"),
)
CODES = frozenset(SCANCODES.values()) | frozenset(MOUSE_CODES.values()) | frozenset(PAD_CODES)

# Keys of the window itself; a world or a keymap file cannot have them.
SHELL_KEYS: dict[str, str] = {
    "Escape": "pause menu",
    "F1": "help",
    "F2": "numbers on screen",
    "F3": "show pressed keys",
    "F5": "reserved",
    "F6": "record a video",
    "F7": "screenshot",
    "F8": "next place",
    "F9": "reserved",
    "F11": "full screen",
    "Enter": "start again",
    "NumpadEnter": "start again",
    "Pause": "pause menu",
    "Tab": "hand over to the agent",
    "Backspace": "reserved",
}
KEY_RATE = 0.5  # of an axis' limit, per step, while its key is held

_EXTRA_KEYS: dict[str, tuple[str, ...]] = {  # used where the world leaves the code free and knows one of the names (first wins)
    "ArrowUp": ("forward", "up", "gas", "accelerate"),
    "ArrowDown": ("back", "backward", "down", "brake"),
    "ArrowLeft": ("turn-", "left", "steer_left"),
    "ArrowRight": ("turn+", "right", "steer_right"),
    "PadStickUp": ("forward", "up"),
    "PadStickDown": ("back", "backward", "down"),
    "PadStickLeft": ("left", "steer_left"),
    "PadStickRight": ("right", "steer_right"),
    "PadA": ("jump", "use", "gas", "accelerate"),
    "PadX": ("use",),
    "PadB": ("run", "brake"),
    "PadRT": ("attack", "fire", "gas", "accelerate"),
    "PadLT": ("brake", "run"),
}


@dataclass(frozen=True)
class Keymap:
    """bindings: code -> target. sensitivity: factor on mouse motion. invert_y: pushing the mouse away looks down."""

    bindings: Mapping[str, str]
    sensitivity: float = 1.0
    invert_y: bool = False
    notes: tuple[str, ...] = field(default=())

    def codes(self, target: str) -> tuple[str, ...]:
        """All codes bound to a target, keyboard before mouse before gamepad, in the order of definition."""
        found = [c for c, t in self.bindings.items() if t == target]
        return tuple(sorted(found, key=lambda c: (c.startswith("Pad"), c.startswith("Mouse"), c.startswith("Arrow"))))


def targets(spec: ActionSpec) -> tuple[str, ...]:
    """Everything a key can be bound to: button names, then ``axis-`` and ``axis+`` of each axis."""
    return spec.names + tuple(f"{a.name}{sign}" for a in spec.axes for sign in "-+")


def axis_of(spec: ActionSpec, target: str) -> tuple[Axis, float] | None:
    """The axis and direction (-1 or 1) of a target such as ``turn+``; None for a button."""
    for axis in spec.axes:
        if target in (f"{axis.name}-", f"{axis.name}+"):
            return axis, 1.0 if target.endswith("+") else -1.0
    return None


def default_keymap(spec: ActionSpec) -> Keymap:
    """The world's own keys, plus arrow keys and gamepad where they are free.

    A key that belongs to the window or to an earlier action is left out and reported in `notes`.
    """
    bindings: dict[str, str] = {}
    notes = []
    for button in spec.buttons:
        for code in button.keys:
            if code not in CODES:
                notes.append(f"{button.name}: this client knows no key {code!r}")
            elif code in SHELL_KEYS:
                notes.append(f"{button.name}: {code} belongs to the window ({SHELL_KEYS[code]})")
            elif code in bindings:
                notes.append(f"{button.name}: {code} is already {bindings[code]!r}")
            else:
                bindings[code] = button.name
    known = {*targets(spec)}
    look = {"turn-": "-", "turn+": "+"}
    sideways = next((a.name for a in spec.axes if a.source == "mouse_x"), "")
    for code, names in _EXTRA_KEYS.items():
        options = [sideways + look[n] if n in look else n for n in names]
        target = next((n for n in options if n in known), None)
        if target and code not in bindings:
            bindings[code] = target
    return Keymap(bindings, notes=tuple(notes))


def load_keymap(path: Path, spec: ActionSpec) -> Keymap:
    """Defaults changed by a JSON file: ``{"forward": ["KeyI"], "turn-": ["KeyQ"], "mouse_sensitivity": 1.5, "invert_y": true}``.

    An action that the file names loses its default keys. Raises ConfigError that names the file, the entry and what is allowed:
    unknown action or key, a key of the window, one key for two actions.
    """
    data = _read(path)
    sensitivity = data.pop("mouse_sensitivity", 1.0)
    invert_y = data.pop("invert_y", False)
    if isinstance(sensitivity, bool) or not isinstance(sensitivity, int | float) or not 0.01 <= sensitivity <= 100:
        raise ConfigError(f"{path}: mouse_sensitivity is a number from 0.01 to 100, got {sensitivity!r}")
    if not isinstance(invert_y, bool):
        raise ConfigError(f"{path}: invert_y is true or false, got {invert_y!r}")
    chosen: dict[str, str] = {}
    for target, codes in data.items():
        if target not in targets(spec):
            raise ConfigError(f"{path}: this world has no action {target!r}; it knows {', '.join(targets(spec))}")
        if not isinstance(codes, list) or not all(isinstance(c, str) for c in codes):
            raise ConfigError(f'{path}: {target!r} must be a list of keys such as ["KeyW"], got {codes!r}')
        for code in codes:
            _check_code(path, target, code, chosen)
            chosen[code] = target
    defaults = default_keymap(spec)
    kept = {c: t for c, t in defaults.bindings.items() if t not in data and c not in chosen}
    return Keymap({**kept, **chosen}, float(sensitivity), invert_y, defaults.notes)


def _read(path: Path) -> dict[str, object]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the keymap {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the keymap {path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f'the keymap {path} must be an object such as {{"forward": ["KeyW"]}}')
    return data


def _check_code(path: Path, target: str, code: str, chosen: Mapping[str, str]) -> None:
    if code not in CODES:
        near = difflib.get_close_matches(code, sorted(CODES), 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else "; use W3C names such as KeyW, Space, ArrowLeft"
        raise ConfigError(f"{path}: {target!r} is bound to the unknown key {code!r}{hint}")
    if code in SHELL_KEYS:
        raise ConfigError(f"{path}: {target!r} cannot have {code}: it is the window's key for '{SHELL_KEYS[code]}'; choose another")
    if code in chosen:
        raise ConfigError(f"{path}: {code} is bound to both {chosen[code]!r} and {target!r}; give each its own key")


_LABELS = {
    **{"Space": "Space", "ControlLeft": "Ctrl", "ControlRight": "Ctrl", "ShiftLeft": "Shift", "ShiftRight": "Shift"},
    **{"AltLeft": "Alt", "AltRight": "Alt", "ArrowUp": "Up", "ArrowDown": "Down", "ArrowLeft": "Left", "ArrowRight": "Right"},
    **{"MouseLeft": "Click", "MouseRight": "Right click", "MouseMiddle": "Wheel", "Escape": "Esc", "Period": ".", "Comma": ","},
    **{"Minus": "-", "Equal": "=", "Slash": "/", "Semicolon": ";", "Quote": "'", "BracketLeft": "[", "BracketRight": "]"},
}


def label(code: str) -> str:
    """Short text for a keycap: ``KeyW`` -> ``W``, ``PadA`` -> ``A``."""
    if code in _LABELS:
        return _LABELS[code]
    for prefix in ("Key", "Digit", "PadStick", "Pad"):
        if code.startswith(prefix):
            return code.removeprefix(prefix)
    return code
