"""Turns the plan of "rooms" into a WAD that the ViZDoom engine loads: text map, pictures, palette, sky, player."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np

from worldmodel.data import rooms_art as art
from worldmodel.data.episode import write_atomic
from worldmodel.data.rooms_plan import GRID, PLAN, PLAYER_RADIUS, Octagon, Passage, Plan, Room
from worldmodel.data.wad import TextMap, Value, png_bytes, wad_bytes

DOOR_DEPTH = 32  # units along the way through; the rest of the passage is recess
DOOR_SPECIAL, DOOR_SPEED, DOOR_DELAY = 12, 28, 140  # Door_Raise; speed in 1/8 units, delay in tics
WALK = 0.62  # share of Doom's walking speed: about 10 units a frame of two tics

MAPINFO = """map MAP01 "Rooms" {
  sky1 = "RSKY"
  evenlighting
  nojump
  nocrouch
}
gameinfo { playerclasses = "RoomsPlayer" }
"""
# A wide body keeps the eye away from walls, so that no view is one flat colour.
DECORATE = f"""ACTOR RoomsPlayer : DoomPlayer {{
  Radius {PLAYER_RADIUS:g}
  Height 56
  Player.ForwardMove {WALK}, {WALK}
  Player.SideMove {WALK}, {WALK}
}}
"""


class _MapBuilder:
    """Cuts the plan into sectors on the grid and draws the lines between them."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.map = plan, TextMap()
        b = plan.bounds
        self.origin = (b.x0 - GRID, b.y0 - GRID)
        self.cells = np.full((b.depth // GRID + 2, b.width // GRID + 2), -1)
        self.kinds: list[tuple[str, Room | Passage]] = []
        self.heights: list[tuple[int, int]] = []
        for room in plan.rooms:
            self._room(room)
        for passage in plan.passages:
            self._passage(passage)

    def _sector(self, kind: str, place: Room | Passage, floor: int, ceiling: int, fields: dict[str, Value]) -> int:
        self.kinds.append((kind, place))
        self.heights.append((floor, ceiling))
        return self.map.sector(heightfloor=floor, heightceiling=ceiling, **fields)

    def _paint(self, x0: int, y0: int, x1: int, y1: int, sector: int) -> None:
        ox, oy = self.origin
        self.cells[(y0 - oy) // GRID : (y1 - oy) // GRID, (x0 - ox) // GRID : (x1 - ox) // GRID] = sector

    def _room(self, room: Room) -> None:
        index, r = self.plan.rooms.index(room), room.rect
        # Flats are laid from the world's origin with y downwards; panning brings the room's south-west corner to the picture's.
        fields: dict[str, Value] = {"texturefloor": f"FLOOR{index}", "textureceiling": "F_SKY1" if room.sky else f"CEIL{index}"}
        fields |= {"xpanningfloor": float(-r.x0), "ypanningfloor": float(r.y0)}
        fields |= {"xpanningceiling": float(-r.x0), "ypanningceiling": float(r.y0), "lightlevel": room.light}
        sector = self._sector("room", room, 0, room.ceiling, fields)
        self._paint(r.x0, r.y0, r.x1, r.y1, sector)

    def _passage(self, p: Passage) -> None:
        flats: dict[str, Value] = {"texturefloor": "SILL", "textureceiling": "LINTEL", "lightlevel": 240}
        r = p.rect
        self._paint(r.x0, r.y0, r.x1, r.y1, self._sector("passage", p, 0, p.height, flats))
        if not p.door:
            return
        near = (r.width if p.along_x else r.depth) // 2 - DOOR_DEPTH // 2
        leaf = self._sector("door", p, 0, 0, flats)
        if p.along_x:
            self._paint(r.x0 + near, r.y0, r.x1 - near, r.y1, leaf)
            self._paint(r.x1 - near, r.y0, r.x1, r.y1, self._sector("passage", p, 0, p.height, flats))
        else:
            self._paint(r.x0, r.y0 + near, r.x1, r.y1 - near, leaf)
            self._paint(r.x0, r.y1 - near, r.x1, r.y1, self._sector("passage", p, 0, p.height, flats))

    def _side(self, sector: int, other: int, side: str, left: tuple[int, int]) -> int:
        """The sidedef of `sector` towards `other`; `side`: compass side of the sector; `left`: the line's left end from inside."""
        place = self.kinds[sector][1]
        fields: dict[str, Value] = {"sector": sector}
        if isinstance(place, Room):
            r = place.rect
            texture = f"W{self.plan.rooms.index(place)}{side.upper()}"[:8]
            start = {"north": left[0] - r.x0, "south": r.x1 - left[0], "east": r.y1 - left[1], "west": left[1] - r.y0}[side]
            fields |= {"offsetx": start}
        elif other >= 0 and self.kinds[other][0] == "door":
            texture = f"DOOR{self.plan.doors.index(self.kinds[other][1])}"  # type: ignore[arg-type]
        else:
            texture = "ALCOVE" if place.name == "alcove" and side == "east" else "JAMB"
        if other < 0:
            fields["texturemiddle"] = texture
        elif self.heights[other][1] < self.heights[sector][1]:
            fields["texturetop"] = texture
        return self.map.sidedef(**fields)

    def _line(self, start: tuple[int, int], end: tuple[int, int], right: int, left: int, side_right: str, side_left: str) -> None:
        """A line; `right`/`left`: the sectors at its hands (-1: solid); `side_*`: the compass side of each on which it lies."""
        order = {"room": 0, "passage": 1, "door": 2}  # the front side is the roomier one: a door opens from its front
        flip = right < 0 or (left >= 0 and order[self.kinds[right][0]] > order[self.kinds[left][0]])
        if flip:
            start, end, right, left, side_right, side_left = end, start, left, right, side_left, side_right
        front = self._side(right, left, side_right, start)
        if left < 0:
            jamb_of_door = {"dontpegbottom": True} if self.kinds[right][0] == "door" else {}
            self.map.line(start, end, front, **jamb_of_door)
            return
        back = self._side(left, right, side_left, end)
        if self.kinds[left][0] == "door":
            use = {"special": DOOR_SPECIAL, "arg0": 0, "arg1": DOOR_SPEED, "arg2": DOOR_DELAY}
            self.map.line(start, end, front, back, **use, playeruse=True, repeatspecial=True)
        else:
            self.map.line(start, end, front, back, dontpegtop=True)

    def _edges(self, along_y: bool) -> None:
        """All lines of one direction: runs of equal neighbours across a grid line become one line."""
        cells = self.cells if along_y else self.cells.T
        ox, oy = self.origin
        for c in range(1, cells.shape[1]):
            r = 0
            while r < cells.shape[0]:
                low, high = int(cells[r, c - 1]), int(cells[r, c])
                end = r
                while end < cells.shape[0] and (cells[end, c - 1], cells[end, c]) == (low, high):
                    end += 1
                if low != high and along_y:  # northward: right hand is east (high)
                    x = ox + c * GRID
                    self._line((x, oy + r * GRID), (x, oy + end * GRID), high, low, "west", "east")
                elif low != high:  # eastward: right hand is south (low)
                    y = oy + c * GRID
                    self._line((ox + r * GRID, y), (ox + end * GRID, y), low, high, "north", "south")
                r = end

    def _octagon(self, room: Room, mark: Octagon, name: str) -> None:
        sector = self.plan.rooms.index(room)
        reach = mark.radius / np.cos(np.pi / 8)
        corners = [
            (round(mark.x + reach * float(np.cos(a)), 3), round(mark.y + reach * float(np.sin(a)), 3))
            for a in np.pi / 8 + np.arange(8) * np.pi / 4
        ]
        edge = 2 * mark.radius * float(np.tan(np.pi / 8))
        if mark.height is not None:
            r, middle = room.rect, art.FLOOR_SIZE // 2
            fields: dict[str, Value] = {"texturefloor": f"S{name}", "textureceiling": f"CEIL{sector}", "lightlevel": room.light}
            fields |= {"xpanningfloor": float(middle - mark.x), "ypanningfloor": float(mark.y - middle)}
            fields |= {"xpanningceiling": float(-r.x0), "ypanningceiling": float(r.y0)}
            stage = self._sector("stage", room, mark.height, room.ceiling, fields)
        for k, (start, end) in enumerate(zip(corners, corners[1:] + corners[:1], strict=True)):
            if mark.height is None:
                self.map.line(start, end, self.map.sidedef(sector=sector, texturemiddle=f"P{name}", offsetx=round(k * edge)))
            else:
                front = self.map.sidedef(sector=sector, texturebottom=f"STEP{sector}")
                back = self.map.sidedef(sector=stage, texturebottom=f"STEP{sector}")
                self.map.line(start, end, front, back)

    def text(self) -> str:
        self._edges(along_y=True)
        self._edges(along_y=False)
        for i, room in enumerate(self.plan.rooms):
            for k, mark in enumerate(room.landmarks):
                self._octagon(room, mark, f"{i}{k}")
        spawn = self.plan.spawns[0]
        skill = {f"skill{k}": True for k in range(1, 6)} | {f"class{k}": True for k in range(1, 4)} | {"single": True}
        self.map.thing(x=spawn.x, y=spawn.y, angle=0, type=1, **skill)
        return self.map.text()


def pictures(plan: Plan) -> dict[str, np.ndarray]:
    """Every texture by lump name, uint8 (H, W, 3)."""
    result = {"RSKY": art.sky(), "JAMB": art.jamb(), "ALCOVE": art.alcove()}
    result |= {"SILL": art.plain((226, 186, 140), (190, 138, 100)), "LINTEL": art.plain((244, 220, 176), (226, 186, 140))}
    for i, room in enumerate(plan.rooms):
        for side in ("north", "east", "south", "west"):
            result[f"W{i}{side.upper()}"] = art.wall(plan, room, side)
        trim, _, accent = art.THEMES[room.name][:3]
        result[f"STEP{i}"] = art.plain(art.mix(accent, art.WHITE, 0.45), trim)
        result[f"FLOOR{i}"], result[f"CEIL{i}"] = art.floor(room), art.ceiling(room)
        for k, mark in enumerate(room.landmarks):
            if mark.height is None:
                result[f"P{i}{k}"] = art.pillar(room, mark)
            else:
                result[f"S{i}{k}"] = art.stage_floor(room, mark)
    for k, passage in enumerate(plan.doors):
        result[f"DOOR{k}"] = art.door(passage)
    return result


@functools.cache
def build() -> tuple[bytes, str]:
    """(WAD, hash): the hash covers the text map and the pixels, not the compression."""
    text = _MapBuilder(PLAN).text()
    images = pictures(PLAN)
    palette = art.build_palette(list(images.values()))
    digest = hashlib.sha256((text + MAPINFO + DECORATE).encode() + palette.tobytes())
    lumps = [("MAPINFO", MAPINFO.encode()), ("DECORATE", DECORATE.encode())]
    lumps += [("PLAYPAL", palette.tobytes() * 14), ("COLORMAP", art.colormap(palette)), ("TX_START", b"")]
    for name, indices in sorted(art.to_indices(images, palette).items()):
        digest.update(name.encode() + indices.tobytes())
        lumps.append((name, png_bytes(indices, palette)))
    lumps += [("TX_END", b""), ("MAP01", b""), ("TEXTMAP", text.encode()), ("ENDMAP", b"")]
    return wad_bytes(lumps), digest.hexdigest()[:16]


def _sources_hash() -> str:
    """Hash of the code that makes the WAD: the key of the cached file."""
    names = ("canvas", "rooms_art", "rooms_map", "rooms_murals", "rooms_plan", "wad")
    return hashlib.sha256(b"".join((Path(__file__).parent / f"{name}.py").read_bytes() for name in names)).hexdigest()[:16]


@functools.cache
def wad_file() -> tuple[Path, str]:
    """(path, version) of the WAD in a private temporary folder. Built on first use (seconds), then found again.

    version: 16 hex digits that change whenever the map or a picture changes; part of the file's name.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"worldmodel-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and folder.stat().st_uid != user:
        folder = Path(tempfile.mkdtemp(prefix="worldmodel-"))
    prefix = f"rooms-{_sources_hash()}-"
    for path in sorted(folder.glob(f"{prefix}*.wad")):
        return path, path.stem.removeprefix(prefix)
    data, version = build()
    path = folder / f"{prefix}{version}.wad"
    write_atomic(path, data)
    return path, version


def map_version() -> str:
    """16 hex digits that change whenever the map or a picture changes."""
    return wad_file()[1]
