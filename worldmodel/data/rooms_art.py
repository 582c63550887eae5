"""All pictures of the world "rooms": walls (murals plus mouldings), floors, ceilings, doors, sky, and their common palette."""

from __future__ import annotations

import numpy as np

from worldmodel.data.canvas import Canvas, Colour, mix
from worldmodel.data.rooms_murals import SCENES, WHITE
from worldmodel.data.rooms_plan import SIDES, Octagon, Passage, Plan, Room

FLOOR_SIZE = 512
SHADES = 32

# Per room: trim (mouldings and floor border), floor, floor accent, ceiling, ceiling accent.
THEMES: dict[str, tuple[Colour, Colour, Colour, Colour, Colour]] = {
    "court": ((206, 148, 104), (226, 196, 150), (186, 120, 88), (180, 210, 240), (180, 210, 240)),
    "sunset": ((122, 52, 92), (226, 132, 104), (170, 78, 98), (250, 196, 140), (226, 122, 108)),
    "ocean": ((30, 84, 128), (120, 192, 196), (56, 130, 168), (206, 238, 232), (110, 186, 206)),
    "forest": ((92, 72, 52), (160, 182, 104), (104, 136, 76), (232, 232, 186), (150, 186, 116)),
    "desert": ((156, 84, 60), (236, 198, 130), (210, 132, 82), (250, 232, 190), (226, 164, 104)),
    "ice": ((96, 130, 188), (222, 232, 246), (150, 184, 224), (240, 246, 252), (176, 200, 236)),
    "night": ((70, 54, 128), (134, 110, 186), (92, 76, 152), (120, 104, 190), (66, 62, 140)),
}
# Pillars that stand out from their room: base and cap, body, body on the other side.
PILLARS: dict[str, tuple[Colour, Colour, Colour]] = {
    "court": ((196, 84, 70), (250, 226, 170), (66, 158, 160)),
    "forest": ((92, 72, 52), (196, 146, 96), (150, 100, 70)),
}
EMBLEMS: dict[str, tuple[Colour, Colour]] = {
    "ocean-sunset": ((40, 118, 150), (255, 206, 110)),
    "desert-ice": ((196, 96, 62), (226, 242, 255)),
    "night-court": ((90, 66, 150), (250, 226, 140)),
}


def side_of(room: Room, passage: Passage) -> str:
    """On which wall of `room` a passage opens, or an empty string."""
    r, p = room.rect, passage.rect
    touches = {"north": p.y0 == r.y1, "south": p.y1 == r.y0, "east": p.x0 == r.x1, "west": p.x1 == r.x0}
    return next((s for s in SIDES if touches[s]), "") if room.name in passage.rooms else ""


def wall_span(room: Room, side: str, passage: Passage) -> tuple[int, int]:
    """Left and right end of an opening, measured from the wall's left end as seen from inside the room."""
    r, p = room.rect, passage.rect
    return {
        "north": (p.x0 - r.x0, p.x1 - r.x0),
        "south": (r.x1 - p.x1, r.x1 - p.x0),
        "east": (r.y1 - p.y1, r.y1 - p.y0),
        "west": (p.y0 - r.y0, p.y1 - r.y0),
    }[side]


def wall(plan: Plan, room: Room, side: str) -> np.ndarray:
    """uint8 (H, W, 3): the whole wall of a room, one pixel per unit, with mouldings round its openings."""
    canvas = Canvas(room.rect.width if side in ("north", "south") else room.rect.depth, room.ceiling)
    SCENES[f"{room.name}_{side}"](canvas)
    trim = THEMES[room.name][0]
    edge = np.minimum(canvas.x, canvas.w - canvas.x)
    canvas.rgb *= (1 - 0.35 * np.exp(-edge / 22))[..., None]  # corners darken: depth without light
    for passage in plan.passages:
        if side_of(room, passage) == side:
            x0, x1 = wall_span(room, side, passage)
            canvas.box(x0 - 14, 0, x1 + 14, passage.height + 14, mix(trim, WHITE, 0.62))
            canvas.box(x0 - 6, 0, x1 + 6, passage.height + 6, mix(trim, WHITE, 0.25))
    canvas.box(-9, 0, canvas.w + 9, 13, trim)
    canvas.box(-9, 10, canvas.w + 9, 14, mix(trim, WHITE, 0.45))
    canvas.box(-9, canvas.h - 14, canvas.w + 9, canvas.h + 9, mix(trim, WHITE, 0.15))
    canvas.box(-9, canvas.h - 16, canvas.w + 9, canvas.h - 12, mix(trim, WHITE, 0.6))
    return _finish(canvas)


def _finish(canvas: Canvas) -> np.ndarray:
    return np.clip(np.rint(canvas.rgb), 0, 255).astype(np.uint8)


def floor(room: Room) -> np.ndarray:
    """uint8 (512, 512, 3), one pixel per unit; the room's south-west corner at the left bottom."""
    trim, base, accent = THEMES[room.name][:3]
    c = Canvas(FLOOR_SIZE, FLOOR_SIZE, base)
    w, d = room.rect.width, room.rect.depth
    cx, cy = w / 2, d / 2
    if d > FLOOR_SIZE:  # taller than the picture: it repeats, so keep to one motif per 512 units
        cy = FLOOR_SIZE / 2
    lit = 0.5 + 0.5 * np.cos(np.hypot(c.x - cx, c.y - cy) / 38)
    c.blend(0.75 * lit**2, accent)
    c.blend(0.30 * (0.5 + 0.5 * np.sin(c.x / 62 + c.y / 95)), mix(base, WHITE, 0.5))
    for r, colour in ((118, mix(base, WHITE, 0.55)), (110, trim), (96, mix(base, WHITE, 0.3))):
        c.ring(cx, cy, r, 8, colour, soft=3)
    for k in range(8):
        a = k * np.pi / 4
        c.disc(cx + 62 * float(np.cos(a)), cy + 62 * float(np.sin(a)), 17, accent if k % 2 else mix(trim, WHITE, 0.3), soft=3)
    inside = np.minimum(np.minimum(c.x, w - c.x), np.minimum(c.y, d - c.y) if d <= FLOOR_SIZE else np.inf)
    c.blend(np.clip((34 - inside) / 3 + 0.5, 0, 1), mix(trim, base, 0.35))
    c.blend(np.clip((5 - np.abs(inside - 36)) / 3 + 0.5, 0, 1), mix(trim, WHITE, 0.5))
    c.blend(0.35 * np.exp(-np.maximum(inside, 0) / 16), (40, 30, 40))
    return _finish(c)


def ceiling(room: Room) -> np.ndarray:
    """uint8 (512, 512, 3): a bright vault with broad ribs."""
    base, accent = THEMES[room.name][3:]
    c = Canvas(FLOOR_SIZE, FLOOR_SIZE, base)
    w, d = room.rect.width, min(room.rect.depth, FLOOR_SIZE)
    reach = np.hypot((c.x - w / 2) / w, (c.y - d / 2) / d)
    c.blend(np.clip(reach * 1.6 - 0.1, 0, 1), accent)
    for k in range(0, 5):
        c.box(-9, d * k / 4 - 9, 600, d * k / 4 + 9, mix(accent, (60, 40, 50), 0.25), soft=4)
    for k in range(0, 4):
        c.box(w * k / 3 - 9, -9, w * k / 3 + 9, 600, mix(accent, (60, 40, 50), 0.12), soft=4)
    c.disc(w / 2, d / 2, 60, mix(base, WHITE, 0.6), soft=30)
    return _finish(c)


def door(passage: Passage) -> np.ndarray:
    """uint8 (H, W, 3): a two-leaf door with an emblem."""
    colour, gold = EMBLEMS[passage.name]
    w = max(passage.rect.width, passage.rect.depth)
    c = Canvas(w, passage.height)
    c.gradient((0, mix(colour, (20, 10, 30), 0.35)), (0.6, colour), (1, mix(colour, WHITE, 0.35)))
    for x in (8, w / 2 - 22, w / 2 + 8, w - 22):
        c.box(x, 0, x + 14, passage.height, mix(colour, (20, 10, 30), 0.3))
    c.box(0, 0, w, 12, mix(gold, colour, 0.35))
    c.box(0, passage.height - 12, w, passage.height, mix(gold, colour, 0.35))
    c.disc(w / 2, 58, 38, mix(colour, (20, 10, 30), 0.45))
    c.ring(w / 2, 58, 36, 9, gold)
    if passage.name == "ocean-sunset":
        c.disc(w / 2, 58, 18, gold)
    elif passage.name == "desert-ice":
        c.snowflake(w / 2, 58, 28, gold)
    else:
        c.star(w / 2, 58, 28, gold)
    c.box(w / 2 - 2, 0, w / 2 + 2, passage.height, (50, 34, 44))
    return _finish(c)


def jamb() -> np.ndarray:
    """uint8 (160, 64, 3): the stone inside an opening."""
    c = Canvas(64, 160)
    c.gradient((0, (190, 138, 100)), (0.5, (226, 186, 140)), (1, (244, 220, 176)))
    c.box(-9, 0, 73, 12, (156, 98, 72))
    c.box(24, 12, 40, 160, (204, 144, 104))
    return _finish(c)


def pillar(room: Room, mark: Octagon) -> np.ndarray:
    """uint8 (H, W, 3): the skin of a pillar, once round; its colours change round it."""
    around = round(8 * 2 * mark.radius * float(np.tan(np.pi / 8)))
    trim, base, accent = PILLARS.get(room.name, THEMES[room.name][:3])
    c = Canvas(around, room.ceiling)
    turn = 0.5 + 0.5 * np.cos(2 * np.pi * c.x / around)
    c.blend(np.ones_like(turn), mix(base, WHITE, 0.4))
    c.blend(0.8 * turn, accent)
    swirl = 0.5 + 0.5 * np.sin(2 * np.pi * (c.x / around - c.y / 110))
    c.blend(np.clip((swirl - 0.6) * 6, 0, 1), mix(trim, WHITE, 0.15))
    c.box(-9, 0, around + 9, 18, trim)
    c.box(-9, c.h - 22, around + 9, c.h, trim)
    c.box(-9, c.h - 26, around + 9, c.h - 20, mix(trim, WHITE, 0.6))
    return _finish(c)


def stage_floor(room: Room, mark: Octagon) -> np.ndarray:
    """uint8 (512, 512, 3): top of a stage or bottom of a pool, its middle at the picture's middle."""
    trim, base, accent = THEMES[room.name][:3]
    c = Canvas(FLOOR_SIZE, FLOOR_SIZE, mix(accent, trim, 0.4))
    middle = FLOOR_SIZE / 2
    c.disc(middle, middle, mark.radius * 0.86, mix(base, WHITE, 0.25), soft=4)
    c.disc(middle, middle, mark.radius * 0.6, mix(accent, base, 0.4), soft=26)
    c.star(middle, middle, mark.radius * 0.55, mix(trim, WHITE, 0.65))
    return _finish(c)


def plain(colour: Colour, other: Colour) -> np.ndarray:
    """uint8 (64, 64, 3): a soft two-tone tile for steps and thresholds."""
    c = Canvas(64, 64, colour)
    c.blend(0.5 + 0.5 * np.cos(2 * np.pi * c.y / 64), other)
    return _finish(c)


def alcove() -> np.ndarray:
    """uint8 (136, 160, 3): the glowing back wall of the ice room's alcove."""
    c = Canvas(160, 136)
    c.gradient((0, (120, 96, 200)), (0.5, (120, 190, 240)), (1, (190, 240, 250)))
    c.glow(80, 68, 60, (255, 255, 255), 0.8)
    c.snowflake(80, 68, 56, (80, 110, 210))
    return _finish(c)


def sky() -> np.ndarray:
    """uint8 (240, 1024, 3): once round the horizon; sun in the west, mountains in the north, clouds in the east."""
    c = Canvas(1024, 240)
    c.gradient((0.3, (250, 236, 214)), (0.5, (170, 214, 240)), (0.9, (86, 156, 226)))
    c.glow(256, 116, 90, (255, 232, 170), 0.9)
    c.disc(256, 122, 22, (255, 250, 214))
    for x, y, s in ((600, 150, 60), (690, 128, 44), (840, 160, 54), (90, 150, 46), (430, 140, 40), (960, 126, 34)):
        for dx, dy, r in ((-0.7, 0, 0.5), (0, 0.16, 0.7), (0.7, 0, 0.5)):
            c.disc(x + dx * s, y + dy * s, r * s, (252, 250, 246), squash=0.45, soft=5)
    c.ridge(92, [(14, 512, 0.0), (9, 1024 / 5, 1.0)], (150, 176, 206), (170, 190, 210))
    c.ridge(76, [(10, 1024 / 3, 2.0), (6, 1024 / 9, 0.0)], (120, 160, 150), (120, 160, 150))
    return _finish(c)


def _keys(picture: np.ndarray) -> np.ndarray:
    """int (H, W): colour cell of each pixel, 6 bits a channel."""
    p = picture.astype(np.int64) >> 2
    return (p[..., 0] << 12) | (p[..., 1] << 6) | p[..., 2]


def _cell_colours(keys: np.ndarray) -> np.ndarray:
    return np.stack([keys >> 12, (keys >> 6) & 63, keys & 63], axis=-1) * 4.0 + 1.5


def build_palette(pictures: list[np.ndarray], rounds: int = 10) -> np.ndarray:
    """uint8 (256, 3): k-means over all pictures' colours and their shades. Entry 0 is black (the engine keeps it for itself).

    Plain float64 arithmetic without matrix products, so that every machine finds the same colours.
    """
    pixels = np.concatenate([p.reshape(-1, 3)[::7] for p in pictures]).astype(np.int64)
    pixels = np.concatenate([pixels, pixels[::4] * 7 // 8, pixels[::8] * 3 // 4])
    keys, counts = np.unique((pixels // 8) @ np.array([1024, 32, 1]), return_counts=True)
    colours = np.stack([keys // 1024, keys // 32 % 32, keys % 32], axis=1) * 8.0 + 3.5
    weights = np.sqrt(counts.astype(float))  # rare colours count too
    centres = colours[np.linspace(0, len(colours) - 1, 254).astype(int)].copy()
    for _ in range(rounds):
        owner = nearest(colours, centres)
        total = np.bincount(owner, weights, len(centres))
        for k in range(3):
            mean = np.bincount(owner, weights * colours[:, k], len(centres)) / np.maximum(total, 1e-9)
            centres[:, k] = np.where(total > 0, mean, centres[:, k])
    palette = np.zeros((256, 3), np.uint8)
    palette[1 : 1 + len(centres)] = np.clip(np.rint(centres), 0, 255)
    palette[255] = 255
    return palette


def nearest(colours: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """int (N,): index of the nearest palette entry for each of the (N, 3) colours."""
    result = np.empty(len(colours), np.int64)
    entries = palette.astype(float)
    for start in range(0, len(colours), 1024):
        part = colours[start : start + 1024].astype(float)
        distance = np.zeros((len(part), len(entries)))
        for k, weight in ((0, 1.0), (1, 1.3), (2, 0.8)):
            step = part[:, k : k + 1] - entries[None, :, k]
            distance += weight * step * step
        result[start : start + 1024] = np.argmin(distance, axis=1)
    return result


def to_indices(pictures: dict[str, np.ndarray], palette: np.ndarray) -> dict[str, np.ndarray]:
    """uint8 (H, W) each: the pictures in palette entries 1..255."""
    cells = {name: _keys(p) for name, p in pictures.items()}
    used = np.zeros(1 << 18, bool)
    for keys in cells.values():
        used[keys.reshape(-1)] = True
    table = np.zeros(1 << 18, np.uint8)
    table[used] = nearest(_cell_colours(np.flatnonzero(used)), palette[1:]) + 1
    return {name: table[keys] for name, keys in cells.items()}


def colormap(palette: np.ndarray) -> bytes:
    """The COLORMAP lump: 34 tables of palette entries, each a step darker."""
    tables = []
    for k in range(34):
        share = max(0.0, 1 - k / SHADES) if k < SHADES else 1.0 if k == SHADES else 0.0
        tables.append((nearest(palette * share, palette[1:]) + 1).astype(np.uint8).tobytes())
    return b"".join(tables)
