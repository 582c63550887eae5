"""The plan of the world "rooms": what lies where, in world units. Data only; map, policy and evaluation read it.

One unit is one Doom map unit (the player's eye is 41 units up). x grows east, y north; headings are degrees, 0 = east,
90 = north (counter-clockwise). All edges lie on a grid of `GRID` units.
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass, field

import numpy as np

GRID = 16
PLAYER_RADIUS = 48.0
SIDES = ("north", "east", "south", "west")


@dataclass(frozen=True)
class Rect:
    """Axis-aligned rectangle, west/south edges included."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def centre(self) -> tuple[float, float]:
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    @property
    def width(self) -> int:
        return self.x1 - self.x0

    @property
    def depth(self) -> int:
        return self.y1 - self.y0

    def holds(self, x: float, y: float) -> bool:
        return self.x0 <= x < self.x1 and self.y0 <= y < self.y1


@dataclass(frozen=True)
class Octagon:
    """A landmark in a room: a pillar (height None, blocks) or a raised or sunken stage (height in units, walkable)."""

    x: int
    y: int
    radius: int
    height: int | None = None


@dataclass(frozen=True)
class Room:
    """A room: its floor rectangle, ceiling height, light 0..255, and landmarks. sky: open to the sky."""

    name: str
    rect: Rect
    ceiling: int
    light: int = 255
    sky: bool = False
    landmarks: tuple[Octagon, ...] = ()


@dataclass(frozen=True)
class Passage:
    """An opening through the wall between two rooms (or a room and itself, for an alcove). door: closed until used."""

    name: str
    rooms: tuple[str, str]
    rect: Rect
    height: int = 120
    door: bool = False

    @property
    def along_x(self) -> bool:
        """True if one walks through it eastward or westward."""
        return self.rect.width < self.rect.depth


@dataclass(frozen=True)
class Spawn:
    """A starting place: x, y and heading in degrees."""

    x: float
    y: float
    heading: float


@dataclass(frozen=True)
class Plan:
    """Everything about where things are. `free` and `room_at` answer questions about places; `path` finds ways."""

    rooms: tuple[Room, ...]
    passages: tuple[Passage, ...]
    spawns: tuple[Spawn, ...]
    step: int = 32
    _cache: dict[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    @functools.cached_property
    def bounds(self) -> Rect:
        rects = [r.rect for r in self.rooms] + [p.rect for p in self.passages]
        return Rect(min(r.x0 for r in rects), min(r.y0 for r in rects), max(r.x1 for r in rects), max(r.y1 for r in rects))

    @property
    def doors(self) -> tuple[Passage, ...]:
        return tuple(p for p in self.passages if p.door)

    def room_at(self, x: float, y: float) -> str:
        """Name of the room or passage at a place, or an empty string inside walls."""
        places: tuple[Room | Passage, ...] = (*self.rooms, *self.passages)
        return next((p.name for p in places if p.rect.holds(x, y)), "")

    def room(self, name: str) -> Room:
        return next(r for r in self.rooms if r.name == name)

    def solid(self) -> np.ndarray:
        """bool (rows, columns) on the `GRID`: True inside walls and pillars; row 0 is the south edge of `bounds`."""
        b = self.bounds
        ys, xs = np.mgrid[b.y0 + GRID / 2 : b.y1 : GRID, b.x0 + GRID / 2 : b.x1 : GRID]
        solid = np.ones(xs.shape, bool)
        for r in [r.rect for r in self.rooms] + [p.rect for p in self.passages]:
            solid &= ~((xs >= r.x0) & (xs < r.x1) & (ys >= r.y0) & (ys < r.y1))
        for mark in (m for room in self.rooms for m in room.landmarks if m.height is None):
            solid |= (xs - mark.x) ** 2 + (ys - mark.y) ** 2 < mark.radius**2
        return solid

    def cells(self) -> np.ndarray:
        """int (N, 2) places (x, y) on a lattice of `step` units where the player's body fits; doors count as open."""
        if "cells" not in self._cache:
            b, solid, reach = self.bounds, self.solid(), PLAYER_RADIUS + 2
            ys, xs = np.mgrid[b.y0 + self.step // 2 : b.y1 : self.step, b.x0 + self.step // 2 : b.x1 : self.step]
            places = []
            for x, y in zip(xs.ravel(), ys.ravel(), strict=True):
                c0, c1 = int((x - reach - b.x0) // GRID), int((x + reach - b.x0) // GRID)
                r0, r1 = int((y - reach - b.y0) // GRID), int((y + reach - b.y0) // GRID)
                inside = r0 >= 0 and c0 >= 0 and r1 < solid.shape[0] and c1 < solid.shape[1]
                if inside and not solid[r0 : r1 + 1, c0 : c1 + 1].any():
                    places.append((x, y))
            self._cache["cells"] = np.array(places, dtype=int)
        return self._cache["cells"]

    def clear_way(self, start: tuple[float, float], end: tuple[float, float]) -> bool:
        """True if the player's body can go straight from start to end (doors open)."""
        if "lattice" not in self._cache:
            b = self.bounds
            lattice = np.zeros((b.depth // self.step + 2, b.width // self.step + 2), bool)
            places = self.cells()
            lattice[(places[:, 1] - b.y0) // self.step, (places[:, 0] - b.x0) // self.step] = True
            self._cache["lattice"] = lattice
        distance = float(np.hypot(end[0] - start[0], end[1] - start[1]))
        if distance < self.step:  # the body may stand closer to a wall than any cell: do not ask about the first steps
            return True
        along = np.linspace(self.step / distance, 1.0, 2 + int(distance // 12))
        xs, ys = start[0] + along * (end[0] - start[0]), start[1] + along * (end[1] - start[1])
        lattice, b = self._cache["lattice"], self.bounds
        rows, columns = ((ys - b.y0) // self.step).astype(int), ((xs - b.x0) // self.step).astype(int)
        inside = (rows >= 0) & (columns >= 0) & (rows < lattice.shape[0]) & (columns < lattice.shape[1])
        return bool(inside.all() and lattice[rows, columns].all())

    def distances(self, goal: int) -> np.ndarray:
        """int (N,) steps of each of `cells` to cell `goal` by 4-neighbour moves; -1 where there is no way."""
        key = f"distances {goal}"
        if key not in self._cache:
            places = [tuple(c) for c in self.cells()]
            index = {c: i for i, c in enumerate(places)}
            result = np.full(len(places), -1)
            result[goal] = 0
            queue = deque([goal])
            while queue:
                i = queue.popleft()
                x, y = places[i]
                for j in (index.get((x + dx, y + dy), -1) for dx, dy in _moves(self.step)):
                    if j >= 0 and result[j] < 0:
                        result[j] = result[i] + 1
                        queue.append(j)
            self._cache[key] = result
        return self._cache[key]

    def nearest_cell(self, x: float, y: float) -> int:
        """Index into `cells` of the place nearest to (x, y)."""
        return int(((self.cells() - np.array([x, y])) ** 2).sum(1).argmin())

    def path(self, start: int, goal: int) -> list[int]:
        """Cell indices from `start` to `goal`, both included; empty if there is no way. Straight on where it can."""
        left = self.distances(goal)
        if left[start] < 0:
            return []
        places = [tuple(c) for c in self.cells()]
        index = {c: i for i, c in enumerate(places)}
        way, last = [start], (0, 0)
        while way[-1] != goal:
            x, y = places[way[-1]]
            moves = sorted(_moves(self.step), key=lambda m: m != last)
            options = ((index.get((x + dx, y + dy), -1), (dx, dy)) for dx, dy in moves)
            j, last = next((j, m) for j, m in options if j >= 0 and left[j] == left[way[-1]] - 1)
            way.append(j)
        return way


def _moves(step: int) -> tuple[tuple[int, int], ...]:
    return ((step, 0), (-step, 0), (0, step), (0, -step))


PLAN = Plan(
    rooms=(
        Room("court", Rect(448, 384, 896, 768), 152, sky=True, landmarks=(Octagon(672, 576, 36),)),
        Room("sunset", Rect(0, 384, 384, 1024), 192, landmarks=(Octagon(192, 544, 28), Octagon(192, 864, 28))),
        Room("ocean", Rect(0, 0, 384, 320), 152, landmarks=(Octagon(192, 160, 96, -16),)),
        Room("forest", Rect(448, 0, 896, 320), 168, landmarks=(Octagon(672, 160, 24),)),
        Room("desert", Rect(960, 0, 1280, 576), 176, landmarks=(Octagon(1120, 256, 96, 16),)),
        Room("ice", Rect(960, 640, 1280, 1120), 192),
        Room("night", Rect(448, 832, 896, 1120), 176, landmarks=(Octagon(672, 976, 88, 16),)),
    ),
    passages=(
        Passage("ocean-sunset", ("ocean", "sunset"), Rect(112, 320, 272, 384), door=True),
        Passage("ocean-forest", ("ocean", "forest"), Rect(384, 80, 448, 240)),
        Passage("forest-court", ("forest", "court"), Rect(592, 320, 752, 384)),
        Passage("forest-desert", ("forest", "desert"), Rect(896, 80, 960, 240)),
        Passage("court-desert", ("court", "desert"), Rect(896, 400, 960, 560)),
        Passage("desert-ice", ("desert", "ice"), Rect(1040, 576, 1200, 640), door=True),
        Passage("ice-night", ("ice", "night"), Rect(896, 896, 960, 1056)),
        Passage("night-sunset", ("night", "sunset"), Rect(384, 848, 448, 1008)),
        Passage("night-court", ("night", "court"), Rect(592, 768, 752, 832), door=True),
        Passage("sunset-court", ("sunset", "court"), Rect(384, 496, 448, 656)),
        Passage("alcove", ("ice", "ice"), Rect(1280, 768, 1344, 928), height=136),
    ),
    spawns=(
        Spawn(520, 456, 35),
        Spawn(120, 704, 0),
        Spawn(300, 80, 135),
        Spawn(500, 80, 20),
        Spawn(1020, 500, -60),
        Spawn(1030, 720, 60),
        Spawn(500, 1050, -35),
        Spawn(820, 700, 215),
        Spawn(60, 960, -75),
        Spawn(1220, 80, 120),
        Spawn(840, 890, 160),
        Spawn(320, 440, 120),
    ),
)
