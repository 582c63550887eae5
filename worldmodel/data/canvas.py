"""A small painter's canvas: soft-edged shapes on a float picture, numpy only.

Units are map units = pixels; x grows to the right from the left end of a wall, y grows UP from the floor.
Colours are (r, g, b) in 0..255. Every shape is anti-aliased over about `soft` units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Colour = tuple[float, float, float]


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """a at t = 0, b at t = 1."""
    return (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t)


class Canvas:
    """rgb: float64 (H, W, 3). `x`, `y`: coordinates of every pixel."""

    def __init__(self, width: int, height: int, colour: Colour = (128, 128, 128)) -> None:
        self.w, self.h = width, height
        self.rgb = np.ones((height, width, 3)) * np.array(colour, float)
        self.x = np.broadcast_to(np.arange(width) + 0.5, (height, width))
        self.y = np.broadcast_to((height - np.arange(height) - 0.5)[:, None], (height, width))

    def part(self, x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice]:
        """Rows and columns that cover a rectangle with two pixels to spare: shapes paint only there, for speed."""
        top, bottom = (int(np.clip(v, 0, self.h)) for v in (self.h - y1 - 2, self.h - y0 + 3))
        left, right = (int(np.clip(v, 0, self.w)) for v in (x0 - 2, x1 + 3))
        return slice(top, max(bottom, top)), slice(left, max(right, left))

    def blend(self, mask: np.ndarray, colour: Colour | np.ndarray, part: tuple[slice, slice] = (slice(None), slice(None))) -> None:
        """Lay `colour` over the picture (or a part of it) where `mask` (0..1) says so."""
        self.rgb[part] += mask[..., None] * (np.asarray(colour, float) - self.rgb[part])

    def gradient(self, *stops: tuple[float, Colour]) -> None:
        """Fill: colours at heights (fractions of the canvas, rising)."""
        at = self.y[:, :1] / self.h
        heights = [s[0] for s in stops]
        column = np.stack([np.interp(at, heights, [s[1][c] for s in stops]) for c in range(3)], axis=-1)
        self.rgb = np.repeat(column, self.w, axis=1)

    def disc(self, x: float, y: float, r: float, colour: Colour, squash: float = 1.0, soft: float = 1.5) -> None:
        """A disc, or an ellipse of height r * squash."""
        reach = r + soft
        p = self.part(x - reach, y - reach * squash, x + reach, y + reach * squash)
        d = np.sqrt((self.x[p] - x) ** 2 + ((self.y[p] - y) / squash) ** 2)
        self.blend(np.clip((r - d) / soft + 0.5, 0, 1), colour, p)

    def ring(self, x: float, y: float, r: float, thick: float, colour: Colour, squash: float = 1.0, soft: float = 1.5) -> None:
        """A circle's or an ellipse's outline."""
        reach = r + thick + soft
        p = self.part(x - reach, y - reach * squash, x + reach, y + reach * squash)
        d = np.abs(np.sqrt((self.x[p] - x) ** 2 + ((self.y[p] - y) / squash) ** 2) - r)
        self.blend(np.clip((thick / 2 - d) / soft + 0.5, 0, 1), colour, p)

    def glow(self, x: float, y: float, r: float, colour: Colour, strength: float = 0.7) -> None:
        """A soft light around a point."""
        self.blend(strength * np.exp(-((self.x - x) ** 2 + (self.y - y) ** 2) / (r * r)), colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, soft: float = 1.5) -> None:
        """An upright rectangle."""
        p = self.part(x0 - soft, y0 - soft, x1 + soft, y1 + soft)
        d = np.minimum(np.minimum(self.x[p] - x0, x1 - self.x[p]), np.minimum(self.y[p] - y0, y1 - self.y[p]))
        self.blend(np.clip(d / soft + 0.5, 0, 1), colour, p)

    def convex(self, points: Sequence[tuple[float, float]], colour: Colour, soft: float = 1.5) -> None:
        """A convex polygon, corners in counter-clockwise order."""
        xs, ys = [q[0] for q in points], [q[1] for q in points]
        p = self.part(min(xs) - soft, min(ys) - soft, max(xs) + soft, max(ys) + soft)
        d = np.full(self.x[p].shape, np.inf)
        for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
            length = float(np.hypot(bx - ax, by - ay))
            d = np.minimum(d, ((bx - ax) * (self.y[p] - ay) - (by - ay) * (self.x[p] - ax)) / length)
        self.blend(np.clip(d / soft + 0.5, 0, 1), colour, p)

    def bar(self, start: tuple[float, float], end: tuple[float, float], thick: float, colour: Colour) -> None:
        """A straight bar between two points."""
        dx, dy = end[0] - start[0], end[1] - start[1]
        nx, ny = (k * thick / 2 / float(np.hypot(dx, dy)) for k in (dy, -dx))
        (ax, ay), (bx, by) = start, end
        self.convex([(ax + nx, ay + ny), (bx + nx, by + ny), (bx - nx, by - ny), (ax - nx, ay - ny)], colour)

    def snowflake(self, x: float, y: float, r: float, colour: Colour) -> None:
        """Three bars and six side arms."""
        for k in range(6):
            a = np.pi / 6 + k * np.pi / 3
            dx, dy = float(np.cos(a)), float(np.sin(a))
            self.bar((x, y), (x + r * dx, y + r * dy), r * 0.17, colour)
            for turn in (-0.9, 0.9):
                ex, ey = float(np.cos(a + turn)), float(np.sin(a + turn))
                fork = (x + 0.55 * r * dx, y + 0.55 * r * dy)
                self.bar(fork, (fork[0] + 0.36 * r * ex, fork[1] + 0.36 * r * ey), r * 0.14, colour)

    def peak(
        self, x: float, base: float, half: float, height: float, light: Colour, shade: Colour, cap: Colour | None = None
    ) -> None:
        """A mountain or tent: lit left face, shaded right face, optional snow cap."""
        top = (x, base + height)
        self.convex([(x - half, base), (x + half, base), top], light)
        self.convex([(x + half * 0.15, base), (x + half, base), top], shade)
        if cap:
            self.convex([(x - half * 0.3, base + height * 0.7), (x + half * 0.3, base + height * 0.7), top], cap)

    def ridge(
        self, base: float, waves: Sequence[tuple[float, float, float]], top: Colour, bottom: Colour, soft: float = 2.0
    ) -> None:
        """Ground below base + sum of height * sin(2 pi x / length + phase) over `waves`; `top` fades to `bottom`."""
        crest = base + sum(a * np.sin(2 * np.pi * self.x[:1] / length + phase) for a, length, phase in waves)
        t = np.clip(self.y / np.maximum(crest, 1), 0, 1)[..., None]
        colour = np.array(bottom, float) * (1 - t) + np.array(top, float) * t
        self.blend(np.clip((crest - self.y) / soft + 0.5, 0, 1), colour)

    def tree(self, x: float, base: float, size: float, leaf: Colour, dots: Colour | None = None) -> None:
        """A round tree: trunk, crown with a lit side, optional fruit."""
        self.box(x - size * 0.09, base, x + size * 0.09, base + size, (110, 78, 60))
        self.disc(x, base + size * 1.25, size * 0.62, mix(leaf, (20, 40, 40), 0.25))
        self.disc(x - size * 0.1, base + size * 1.33, size * 0.5, leaf)
        self.disc(x - size * 0.2, base + size * 1.45, size * 0.28, mix(leaf, (255, 255, 200), 0.3))
        for dx, dy in ((-0.3, 1.1), (0.25, 1.45), (0.1, 1.05), (-0.05, 1.6)) if dots else ():
            self.disc(x + dx * size, base + dy * size, size * 0.11, dots or leaf)

    def fir(self, x: float, base: float, size: float, leaf: Colour, snow: Colour | None = None) -> None:
        """A fir of three tiers, with snow on its left if asked."""
        self.box(x - size * 0.07, base, x + size * 0.07, base + size * 0.4, (112, 84, 66))
        for k, half in ((0.25, 0.42), (0.55, 0.33), (0.85, 0.22)):
            y = base + size * k
            self.convex([(x - size * half, y), (x + size * half, y), (x, y + size * 0.6)], mix(leaf, (20, 40, 50), 0.15 * (1 - k)))
            if snow:
                self.convex([(x - size * half, y), (x - size * half * 0.1, y), (x, y + size * 0.6)], snow)

    def flower(self, x: float, y: float, r: float, petal: Colour, heart: Colour) -> None:
        """A flower on a stem from the floor."""
        self.box(x - r * 0.1, 0, x + r * 0.1, y, (84, 132, 70))
        for k in range(8):
            a = k * np.pi / 4 + 0.2
            self.disc(x + 0.65 * r * float(np.cos(a)), y + 0.65 * r * float(np.sin(a)), r * 0.38, petal)
        self.disc(x, y, r * 0.42, heart)

    def star(self, x: float, y: float, r: float, colour: Colour) -> None:
        """A four-pointed star."""
        for a, b in ((r, r * 0.22), (r * 0.22, r)):
            self.convex([(x - a, y), (x, y - b), (x + a, y), (x, y + b)], colour)
        self.disc(x, y, r * 0.3, colour)
