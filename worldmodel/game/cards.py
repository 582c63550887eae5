"""The large cards: loading with its stage bar, all keys, the pause menu."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pygame

from worldmodel.action import ActionSpec
from worldmodel.game import theme
from worldmodel.game.keymap import Keymap, label
from worldmodel.game.theme import ACCENT, GOOD, MUTED, PAPER

STAGES = (("load", "Load"), ("warm", "Warm up"), ("compile", "Compile"))
LEGIBLE = 0.6  # share of its own size below which the text of a card cannot be read
WINDOW_KEYS = (
    ("Esc", "Pause, let the pointer go"),
    ("Enter", "Start again"),
    ("F8", "Next place"),
    ("Tab", "Hand over to the agent"),
    ("F6", "Record a video"),
    ("F7", "Screenshot"),
    ("F2", "Numbers on the screen"),
    ("F3", "Show pressed keys"),
    ("F11", "Full screen"),
)


@dataclass(frozen=True)
class Choice:
    """A line of the pause menu. key: the keycap shown beside it. name: what the loop does when it is chosen."""

    name: str
    words: str
    key: str


def draw_loading(
    screen: pygame.Surface, title: str, subtitle: str, stage: tuple[str, float], stages: Sequence[str], clock: float
) -> None:
    """Name of the world and the bar of stages, at the bottom. clock: seconds, moves the light on the bar."""
    width, height = screen.get_size()
    u = theme.unit(screen.get_size())
    band = round(15 * u)
    screen.blit(theme.shade((width, band), 0, 235), (0, height - band))
    left, bar = round(2.2 * u), pygame.Rect(round(2.2 * u), height - round(2.6 * u), width - round(4.4 * u), round(0.5 * u))
    name = theme.text(title, round(2.5 * u), PAPER, bold=True)
    screen.blit(name, (left, bar.y - round(3.7 * u) - name.get_height()))
    screen.blit(theme.text(subtitle, round(u), MUTED, bold=True), (left + 2, bar.y - round(3.7 * u)))
    names = [(key, words) for key, words in STAGES if key in stages]
    at = next((i for i, (key, _) in enumerate(names) if key == stage[0]), len(names))
    part = (bar.width - round(0.5 * u) * (len(names) - 1)) / len(names)
    for i, (_, words) in enumerate(names):
        cell = pygame.Rect(round(bar.x + i * (part + round(0.5 * u))), bar.y, round(part), bar.height)
        screen.blit(theme.panel(cell.size, cell.height // 2, (60, 68, 86), 220, 0), cell)
        share = 1.0 if i < at else max(0.06, stage[1]) if i == at else 0.0
        if share:
            done = pygame.Rect(cell.x, cell.y, max(cell.height, round(cell.width * share)), cell.height)
            screen.blit(theme.panel(done.size, cell.height // 2, GOOD if i < at else ACCENT, 255, 0), done)
        if i == at:
            _draw_glint(screen, cell, clock)
        color = PAPER if i == at else MUTED
        screen.blit(theme.text(words, round(0.85 * u), color, bold=i == at), (cell.x, cell.y - round(1.45 * u)))


def _draw_glint(screen: pygame.Surface, cell: pygame.Rect, clock: float) -> None:
    """A light that runs along the bar: it is alive even where progress cannot be known."""
    width = max(cell.height * 2, cell.width // 7)
    x = cell.x + round((clock % 1.4) / 1.4 * (cell.width + width)) - width
    glint = theme.panel((width, cell.height), cell.height // 2, PAPER, 90, 0)
    old = screen.get_clip()
    screen.set_clip(cell)
    screen.blit(glint, (x, cell.y))
    screen.set_clip(old)


def _world_rows(spec: ActionSpec, keymap: Keymap) -> list[tuple[list[str], str]]:
    """(keycaps, words) of the world's actions; ``mouse`` as a keycap stands for the mouse's picture."""
    rows: list[tuple[list[str], str]] = []
    for button in spec.buttons:
        codes = [c for c in keymap.codes(button.name) if not c.startswith("Pad")][:2]
        rows.append(([label(c) for c in codes] or ["-"], button.label or button.name.replace("_", " ").capitalize()))
    for axis in spec.axes:
        words = {"mouse_x": "Look left and right", "mouse_y": "Look up and down"}[axis.source]
        codes = [label(c) for sign in "-+" for c in keymap.codes(axis.name + sign)[:1] if not c.startswith("Pad")]
        rows.append((["mouse", *codes], words if axis.name in ("turn", "look", "pitch", "yaw") else axis.name.capitalize()))
    return rows


def draw_keys_card(
    screen: pygame.Surface,
    spec: ActionSpec | None,
    keymap: Keymap | None,
    hint: str,
    lift: float = 0.0,
    more: Sequence[tuple[str, str]] = (),
) -> None:
    """All keys, in two columns: the world's and the window's, `more` of them last. hint: last line. lift: units to stay above the
    stage bar.

    In a small window the card is shrunk; where nobody could read it any more, it says what to do instead, or is left out while
    the world is loaded.
    """
    u = theme.unit(screen.get_size())
    margin = round(0.6 * u)
    room = pygame.Rect(margin, margin, screen.get_width() - 2 * margin, screen.get_height() - round(lift * u) - 2 * margin)
    card = _keys_card(spec, keymap, hint, u, more)
    factor = min(1.0, room.width / card.get_width(), room.height / card.get_height())
    if factor < LEGIBLE:
        if lift:
            return
        card, factor = _lines_card(("All keys need a", "larger window:", "press F11", hint), u), 1.0
    if factor < 1.0:
        card = pygame.transform.smoothscale(card, (int(card.get_width() * factor), int(card.get_height() * factor)))
    screen.blit(card, card.get_rect(center=room.center))


def _keys_card(
    spec: ActionSpec | None, keymap: Keymap | None, hint: str, u: float, more: Sequence[tuple[str, str]]
) -> pygame.Surface:
    world = _world_rows(spec, keymap) if spec and keymap else []
    columns: list[tuple[str, list[tuple[list[str], str]]]] = [("In the world", world)] if world else []
    columns.append(("The window", [([key], words) for key, words in (*WINDOW_KEYS, *more)]))
    faces = [(_column(title, rows, u)) for title, rows in columns]
    note = theme.text(hint, round(0.95 * u), ACCENT, bold=True, shadow=False)
    pad, gap = round(1.8 * u), round(3 * u)
    width = sum(f.get_width() for f in faces) + gap * (len(faces) - 1) + 2 * pad
    height = max(f.get_height() for f in faces) + 2 * pad + round(1.9 * u)
    card = theme.panel((width, height), round(1.1 * u), alpha=205).copy()
    x = pad
    for face in faces:
        card.blit(face, (x, pad))
        x += face.get_width() + gap
    card.blit(note, note.get_rect(midbottom=(width // 2, height - round(1.1 * u))))
    return card


def _lines_card(lines: Sequence[str], u: float) -> pygame.Surface:
    """A few centred lines, the last one lit."""
    faces = [theme.text(words, round(u), ACCENT if words == lines[-1] else PAPER, shadow=False) for words in lines]
    pad = round(0.5 * u)
    size = max(f.get_width() for f in faces) + 2 * pad, sum(f.get_height() for f in faces) + 2 * pad
    card, y = theme.panel(size, round(u), alpha=205).copy(), pad
    for face in faces:
        card.blit(face, face.get_rect(midtop=(size[0] // 2, y)))
        y += face.get_height()
    return card


def _column(title: str, rows: Sequence[tuple[Sequence[str], str]], u: float) -> pygame.Surface:
    cap, pitch, head = max(12, round(1.75 * u)), max(14, round(2.15 * u)), max(13, round(2.2 * u))  # text is 9 pixels at least
    lines = []
    for keys, words in rows:
        caps = [theme.mouse_icon(cap) if k == "mouse" else theme.keycap(k, cap) for k in keys]
        lines.append((caps, theme.text(words, round(u), PAPER, shadow=False)))
    lead = max((sum(c.get_width() + round(0.35 * u) for c in caps) for caps, _ in lines), default=0) + round(0.6 * u)
    width = lead + max((t.get_width() for _, t in lines), default=0)
    out = pygame.Surface((width, head + pitch * len(lines)), pygame.SRCALPHA)
    out.blit(theme.text(title, round(0.9 * u), MUTED, bold=True, shadow=False), (0, 0))
    for i, (caps, face) in enumerate(lines):
        y, x = head + i * pitch, 0
        for key in caps:
            out.blit(key, (x, y))
            x += key.get_width() + round(0.35 * u)
        out.blit(face, (lead, y + (cap - face.get_height()) // 2))
    return out


def draw_prompt(screen: pygame.Surface, typed: str) -> None:
    """The line in which a prompt is typed; of a long one its end is shown."""
    u = theme.unit(screen.get_size())
    width, pad = screen.get_width() - round(4 * u), round(1.2 * u)
    rect = pygame.Rect(round(2 * u), screen.get_height() - round(8 * u), width, round(6 * u))
    screen.blit(theme.panel(rect.size, round(0.9 * u), alpha=215), rect)
    head = theme.text("What shall it dream of?   Enter  apply    Esc  cancel", round(0.9 * u), MUTED, bold=True, shadow=False)
    screen.blit(head, (rect.x + pad, rect.y + round(0.9 * u)))
    face = theme.text(typed[-200:] + "|", round(1.15 * u), PAPER, shadow=False)
    room = rect.width - 2 * pad
    part = pygame.Rect(max(0, face.get_width() - room), 0, room, face.get_height())
    screen.blit(face, (rect.x + pad, rect.y + round(3.1 * u)), part)


def menu_rects(size: tuple[int, int], count: int) -> list[pygame.Rect]:
    """Where the menu's lines are, for drawing and for the mouse."""
    u = theme.unit(size)
    head = round(7 * u)
    width, pitch = round(25 * u), min(round(2.9 * u), (size[1] - head) // count)
    top = max(head, (size[1] - pitch * count) // 2 + round(1.2 * u))
    top = min(top, size[1] - pitch * count)
    return [pygame.Rect((size[0] - width) // 2, top + i * pitch, width, pitch - round(0.35 * u)) for i in range(count)]


def draw_menu(screen: pygame.Surface, title: str, subtitle: str, choices: Sequence[Choice], selected: int | None) -> None:
    """The pause menu; the selected line is lit."""
    u = theme.unit(screen.get_size())
    rects = menu_rects(screen.get_size(), len(choices))
    name = theme.text(title, round(2.8 * u), PAPER, bold=True)
    line = theme.text(subtitle, round(u), PAPER, bold=True)
    screen.blit(name, name.get_rect(midbottom=(screen.get_width() // 2, rects[0].top - round(2.6 * u))))
    if line.get_width() <= screen.get_width():
        screen.blit(line, line.get_rect(midbottom=(screen.get_width() // 2, rects[0].top - round(1.0 * u))))
    for i, (choice, rect) in enumerate(zip(choices, rects, strict=True)):
        lit = i == selected
        screen.blit(theme.panel(rect.size, round(0.7 * u), ACCENT if lit else theme.INK, 235 if lit else 175), rect)
        face = theme.text(choice.words, round(1.15 * u), theme.INK if lit else PAPER, bold=lit, shadow=False)
        screen.blit(face, face.get_rect(midleft=(rect.x + round(1.2 * u), rect.centery)))
        cap = theme.keycap(choice.key, round(1.75 * u))
        screen.blit(cap, cap.get_rect(midright=(rect.right - round(0.6 * u), rect.centery)))
