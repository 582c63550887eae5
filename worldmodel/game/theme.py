"""How everything on top of the picture looks: fonts, colours, text with shadow, panels, keycaps. Surfaces are made once and kept.

Lengths are in *units*: one unit is about a fortieth of the window's height, so the overlay scales with the window.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pygame

Color = tuple[int, int, int]

PAPER: Color = (246, 248, 252)
MUTED: Color = (172, 182, 198)
INK: Color = (11, 14, 22)
ACCENT: Color = (255, 190, 92)
GOOD: Color = (126, 226, 168)
RED: Color = (255, 92, 88)
_FONTS = Path(__file__).parent / "fonts"
_SMOOTH = 4  # corners are drawn so many times larger and shrunk


def unit(size: tuple[int, int]) -> float:
    """Pixels per unit for a window of (width, height)."""
    return max(4.5, min(size[0] / 62, size[1] / 40))


@lru_cache(maxsize=32)
def _font(pixels: int, bold: bool) -> pygame.font.Font:
    path = _FONTS / ("Manrope-Bold.ttf" if bold else "Manrope-Medium.ttf")
    return pygame.font.Font(str(path) if path.is_file() else None, pixels)


@lru_cache(maxsize=512)
def text(words: str, pixels: int, color: Color = PAPER, bold: bool = False, shadow: bool = True) -> pygame.Surface:
    """A line of text, `pixels` high, with a soft shadow that keeps it readable on any picture."""
    face = _font(max(9, pixels), bold).render(words, True, color)
    if not shadow:
        return face
    dark = _font(max(9, pixels), bold).render(words, True, (0, 0, 0))
    off = max(1, pixels // 14)
    out = pygame.Surface((face.get_width() + 2 * off, face.get_height() + 2 * off), pygame.SRCALPHA)
    dark.set_alpha(90)
    for dx, dy in ((0, off), (2 * off, off), (off, 0), (off, 2 * off), (off, off + off // 2 + 1)):
        out.blit(dark, (dx, dy))
    out.blit(face, (off, off))
    return out


@lru_cache(maxsize=128)
def panel(size: tuple[int, int], radius: int, color: Color = INK, alpha: int = 190, edge: int = 26) -> pygame.Surface:
    """A translucent rounded rectangle with a hairline edge."""
    big = pygame.Surface((size[0] * _SMOOTH, size[1] * _SMOOTH), pygame.SRCALPHA)
    rect = big.get_rect()
    if edge:
        pygame.draw.rect(big, (*_mix(color, PAPER, edge / 100), min(255, alpha + 30)), rect, border_radius=radius * _SMOOTH)
        rect = rect.inflate(-2 * _SMOOTH, -2 * _SMOOTH)
    pygame.draw.rect(big, (*color, alpha), rect, border_radius=max(1, radius - 1) * _SMOOTH)
    return pygame.transform.smoothscale(big, size)


@lru_cache(maxsize=128)
def keycap(words: str, height: int, down: bool = False) -> pygame.Surface:
    """A key as it looks on a keyboard; lit when it is down."""
    face = text(words, round(height * 0.48), INK if down else PAPER, bold=True, shadow=False)
    width = max(height, face.get_width() + round(height * 0.6))
    out = pygame.Surface((width, height), pygame.SRCALPHA)
    radius, lip = max(3, height // 5), max(2, height // 12)
    base, top = (_mix(ACCENT, INK, 0.45), ACCENT) if down else ((20, 24, 34), (58, 66, 84))
    out.blit(panel((width, height), radius, base, 255, 0), (0, 0))
    shift = lip // 2 if down else 0
    out.blit(panel((width, height - lip), radius, top, 255, 0 if down else 14), (0, shift))
    out.blit(face, ((width - face.get_width()) // 2, (height - lip - face.get_height()) // 2 + shift))
    return out


@lru_cache(maxsize=16)
def mouse_icon(height: int, down: bool = False) -> pygame.Surface:
    """A mouse with arrows to both sides."""
    k = _SMOOTH
    width = round(height * 1.5)
    out = pygame.Surface((width * k, height * k), pygame.SRCALPHA)
    color = ACCENT if down else PAPER
    body = pygame.Rect(0, 0, round(height * 0.52 * k), round(height * 0.8 * k))
    body.center = (width * k // 2, height * k // 2)
    line = max(k, height * k // 18)
    pygame.draw.rect(out, color, body, line, border_radius=body.width // 2)
    pygame.draw.line(out, color, (body.centerx, body.top + body.height * 0.16), (body.centerx, body.top + body.height * 0.4), line)
    for side in (-1, 1):
        tip = body.centerx + side * (body.width * 0.5 + height * 0.34 * k)
        back, half = tip - side * height * 0.16 * k, height * 0.13 * k
        pygame.draw.polygon(out, color, [(tip, body.centery), (back, body.centery - half), (back, body.centery + half)])
    return pygame.transform.smoothscale(out, (width, height))


def dot(radius: int, color: Color) -> pygame.Surface:
    """A filled circle with smooth edge."""
    return panel((2 * radius, 2 * radius), radius, color, 255, 0)


@lru_cache(maxsize=8)
def shade(size: tuple[int, int], top: int, bottom: int) -> pygame.Surface:
    """Black that fades from alpha `top` to `bottom`, to lay text on."""
    strip = pygame.Surface((1, 64), pygame.SRCALPHA)
    for y in range(64):
        strip.set_at((0, y), (6, 8, 14, round(top + (bottom - top) * (y / 63) ** 1.5)))
    return pygame.transform.smoothscale(strip, size)


def clear() -> None:
    """Forget all surfaces: needed when the display is closed and opened again."""
    for cached in (_font, text, panel, keycap, mouse_icon, shade):
        cached.cache_clear()


def _mix(a: Color, b: Color, share: float) -> Color:
    r, g, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return r, g, blue
