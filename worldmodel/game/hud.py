"""What is drawn over the moving picture: numbers, pressed keys, badges, short messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pygame

from worldmodel.action import ActionSpec
from worldmodel.game import theme
from worldmodel.game.keymap import Keymap, axis_of, label
from worldmodel.game.theme import ACCENT, GOOD, MUTED, PAPER, RED

LEVELS = ("off", "small", "full")


@dataclass(frozen=True)
class Numbers:
    """One reading of the measurements, refreshed a few times a second so that it can be read."""

    fps: float | None = None
    target_fps: float = 0.0
    p50: float | None = None
    p95: float | None = None
    intervals: Sequence[float] = ()
    rows: Sequence[tuple[str, str]] = field(default_factory=tuple)  # further (name, value) lines of the full level


def draw_numbers(screen: pygame.Surface, level: str, numbers: Numbers) -> None:
    """Top left: one line, or a panel with the curve of the frame times."""
    u = theme.unit(screen.get_size())
    fps = "--" if numbers.fps is None else f"{numbers.fps:.1f}"
    delay = "--" if numbers.p50 is None else f"{numbers.p50:.0f}"
    if level == "small":
        words = [(f"{fps}", PAPER, True), (" fps", MUTED, False), (f"     {delay}", PAPER, True), (" ms", MUTED, False)]
        faces = [theme.text(w, round(u), c, b, shadow=False) for w, c, b in words]
        width = sum(f.get_width() for f in faces) + round(1.5 * u)
        rect = pygame.Rect(round(u), round(u), width, round(2 * u))
        screen.blit(theme.panel(rect.size, rect.height // 2, alpha=165), rect)
        x = rect.x + round(0.75 * u)
        for face in faces:
            screen.blit(face, (x, rect.centery - face.get_height() // 2))
            x += face.get_width()
    elif level == "full":
        late = "" if numbers.p95 is None else f" / {numbers.p95:.0f}"
        rows = [("speed", f"{fps} of {numbers.target_fps:g} fps"), ("key to picture", f"{delay}{late} ms"), *numbers.rows]
        _draw_panel(screen, u, rows, numbers.intervals)


def _draw_panel(screen: pygame.Surface, u: float, rows: Sequence[tuple[str, str]], intervals: Sequence[float]) -> None:
    size, pitch, curve = round(0.92 * u), round(1.5 * u), round(3.4 * u)
    names = [theme.text(n, size, MUTED, shadow=False) for n, _ in rows]
    values = [theme.text(v, size, PAPER, bold=True, shadow=False) for _, v in rows]
    gap = max(f.get_width() for f in names) + round(1.2 * u)
    width = gap + max(max(f.get_width() for f in values), round(9 * u)) + round(2 * u)
    rect = pygame.Rect(round(u), round(u), width, pitch * len(rows) + curve + round(1.6 * u))
    screen.blit(theme.panel(rect.size, round(0.7 * u), alpha=180), rect)
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        y = rect.y + round(0.8 * u) + i * pitch
        screen.blit(name, (rect.x + round(u), y))
        screen.blit(value, (rect.x + round(u) + gap, y))
    place = pygame.Rect(rect.x + round(u), rect.bottom - curve - round(0.5 * u), width - round(2 * u), curve)
    _draw_curve(screen, place, intervals)


def _draw_curve(screen: pygame.Surface, rect: pygame.Rect, intervals: Sequence[float]) -> None:
    """Frame times as bars, the newest at the right; long ones stand out."""
    pygame.draw.line(screen, (70, 78, 96), rect.bottomleft, rect.bottomright)
    if not intervals:
        return
    typical = sorted(intervals)[len(intervals) // 2]
    bars = max(1, rect.width // 4)
    for i, value in enumerate(list(intervals)[-bars:][::-1]):
        height = max(1, round(min(value / (2.2 * typical), 1.0) * (rect.height - 4)))
        color = GOOD if value < 1.35 * typical else ACCENT if value < 2 * typical else RED
        screen.fill(color, (rect.right - 4 * i - 3, rect.bottom - height, 3, height))


def draw_keys(screen: pygame.Surface, spec: ActionSpec, keymap: Keymap, held: frozenset[str], turn: float) -> None:
    """Bottom left: every action of the world with its key, lit while it acts; and how far the view turns (-1..1)."""
    u = theme.unit(screen.get_size())
    height = round(2.1 * u)
    x, y = round(2 * u), screen.get_height() - height - round(2.95 * u)
    names = [theme.text(b.name, round(0.8 * u), PAPER, bold=b.name in held, shadow=False) for b in spec.buttons]
    caps = [theme.keycap(label((keymap.codes(b.name) or ("-",))[0]), height, b.name in held) for b in spec.buttons]
    width = sum(max(c.get_width(), _width(n, u)) + round(0.7 * u) for c, n in zip(caps, names, strict=True))
    rect = pygame.Rect(round(u), y - round(0.8 * u), width + round((14.5 if spec.axes else 1.3) * u), height + round(2.75 * u))
    screen.blit(theme.panel(rect.size, round(0.8 * u), alpha=165), rect)
    for cap, name in zip(caps, names, strict=True):
        width = max(cap.get_width(), _width(name, u))
        screen.blit(cap, (x + (width - cap.get_width()) // 2, y))
        screen.blit(name, (x + (width - name.get_width()) // 2, y + height + round(0.15 * u)))
        x += width + round(0.7 * u)
    if spec.axes:
        turning = abs(turn) > 0.02 or any(axis_of(spec, t) for t in held)
        icon = theme.mouse_icon(height, turning)
        bar = pygame.Rect(x + icon.get_width() + round(0.4 * u), y + height // 2 - round(0.25 * u), round(9 * u), round(0.5 * u))
        screen.blit(icon, (x, y))
        screen.blit(theme.panel(bar.size, bar.height // 2, alpha=170), bar)
        middle, reach = bar.centerx, round(bar.width / 2 * max(-1.0, min(1.0, turn)))
        if reach:
            screen.fill(ACCENT, (min(middle, middle + reach), bar.y + 2, abs(reach), bar.height - 4))
        screen.fill(PAPER, (middle - 1, bar.y - 3, 2, bar.height + 6))


def _width(face: pygame.Surface, u: float) -> int:
    """Room for a name, the same whether it is bold or not."""
    return face.get_width() + round(0.4 * u) - face.get_width() % max(1, round(0.4 * u))


def draw_badges(screen: pygame.Surface, badges: Sequence[tuple[str, theme.Color]]) -> None:
    """Top right: who plays, whether a video is recorded ..., each with a dot of its colour."""
    u = theme.unit(screen.get_size())
    y = round(u)
    for words, color in badges:
        face = theme.text(words, round(0.95 * u), PAPER, bold=True, shadow=False)
        radius = round(0.35 * u)
        rect = pygame.Rect(0, y, face.get_width() + 2 * radius + round(2 * u), round(2 * u))
        rect.right = screen.get_width() - round(u)
        screen.blit(theme.panel(rect.size, rect.height // 2, alpha=175), rect)
        screen.blit(theme.dot(radius, color), (rect.x + round(0.75 * u), rect.centery - radius))
        screen.blit(face, (rect.x + 2 * radius + round(1.2 * u), rect.centery - face.get_height() // 2))
        y = rect.bottom + round(0.5 * u)


def draw_toasts(screen: pygame.Surface, toasts: Sequence[str], lift: float = 0.0) -> None:
    """Bottom centre: short messages, the newest lowest. lift: units to stay above something else."""
    u = theme.unit(screen.get_size())
    bottom = screen.get_height() - round((1.2 + lift) * u)
    for words in reversed(toasts):
        face = theme.text(_shortened(words, screen.get_width() - 6 * u, u), round(u), PAPER, shadow=False)
        rect = pygame.Rect(0, 0, face.get_width() + round(2.2 * u), round(2.2 * u))
        rect.midbottom = (screen.get_width() // 2, bottom)
        screen.blit(theme.panel(rect.size, rect.height // 2, alpha=200), rect)
        screen.blit(face, face.get_rect(center=rect.center))
        bottom = rect.top - round(0.5 * u)


def _shortened(words: str, width: float, u: float) -> str:
    most = max(16, int(width / (0.56 * max(u, 9))))
    return words if len(words) <= most else f"{words[: most // 3]} … {words[-(most - most // 3 - 3) :]}"
