"""The murals of the world "rooms": one scene per wall, each its own picture, in the colours of its room.

A scene paints a whole wall (a `Canvas` as long as the wall and as high as the room). Shapes are big and soft and the
picture changes all along the wall, so that any part of it tells where one is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from worldmodel.data.canvas import Canvas, Colour, mix

WHITE: Colour = (255, 250, 240)


def _garden(c: Canvas, left: Colour, right: Colour) -> None:
    """Ground of the court's walls: a pale sky whose colour changes along the wall, and two hedges."""
    t = (c.x / c.w)[..., None]
    sky = np.array(left) * (1 - t) + np.array(right) * t
    up = np.clip(c.y / c.h, 0, 1)[..., None]
    c.rgb = sky * (0.75 + 0.3 * up)
    c.ridge(62, [(16, c.w * 0.8, 1.0), (7, 120, 0.5)], (150, 186, 112), (96, 146, 92))
    c.ridge(36, [(10, c.w * 0.6, 3.0), (5, 90, 2.0)], (106, 158, 84), (62, 108, 66))


def court_north(c: Canvas) -> None:
    _garden(c, (236, 200, 150), (226, 180, 176))
    for x, s in ((36, 1.0), (88, 0.75), (352, 0.85), (410, 1.1)):
        c.disc(x, 66 * s, 17 * s, (60, 104, 78), squash=3.4)
        c.disc(x - 5 * s, 74 * s, 8 * s, (96, 142, 96), squash=5.0)
    for x in (130, 310, 380):
        c.disc(x, 26, 22, (176, 126, 190), squash=0.8)


def court_east(c: Canvas) -> None:
    _garden(c, (244, 214, 150), (170, 206, 224))
    for x, y, r in ((34, 92, 30), (110, 74, 24), (340, 80, 28), (160, 110, 20), (300, 104, 18)):
        c.flower(x, y, r, (246, 190, 60), (122, 80, 52))


def court_south(c: Canvas) -> None:
    _garden(c, (176, 214, 214), (246, 206, 170))
    for x, y, r in ((40, 60, 40), (115, 44, 30), (400, 62, 44), (330, 46, 30)):
        c.disc(x, y, r, (84, 138, 84))
        for dx, dy in ((-0.4, 0.3), (0.35, 0.4), (0.0, -0.2), (0.5, -0.3)):
            c.disc(x + dx * r, y + dy * r, r * 0.24, (226, 104, 124))
            c.disc(x + dx * r - 2, y + dy * r + 2, r * 0.11, (250, 176, 176))


def court_west(c: Canvas) -> None:
    _garden(c, (224, 190, 190), (240, 220, 160))
    for x, s in ((46, 62), (130, 46), (338, 58)):
        c.tree(x, 24, s, (92, 148, 80), dots=(248, 152, 58))


def _sunset(c: Canvas, sun: float, height: float = 0.42) -> None:
    c.gradient((0, (250, 190, 110)), (0.35, (250, 160, 96)), (0.65, (226, 108, 106)), (1, (138, 72, 126)))
    c.glow(sun, c.h * height, 110, (255, 226, 140), 0.8)
    c.disc(sun, c.h * height, 38, (255, 236, 170))


def sunset_west(c: Canvas) -> None:
    _sunset(c, 330, 0.45)
    for x, y, r in ((80, 130, 30), (190, 150, 22), (500, 140, 36), (590, 110, 24)):
        c.disc(x, y, r * 1.6, (250, 178, 140), squash=0.25, soft=6)
        c.disc(x + r, y + 7, r, (252, 196, 150), squash=0.3, soft=6)
    c.ridge(74, [(12, 300, 0.4), (8, 130, 1.0)], (196, 96, 118), (150, 74, 112))
    c.ridge(56, [(0, 100, 0)], (214, 120, 104), (112, 62, 104))
    for k in range(5):
        c.disc(330, 50 - k * 10, 60 - k * 6, (255, 214, 130), squash=0.05, soft=3)
    for x, s in ((120, 1.2), (520, 0.9)):
        c.convex([(x - 34 * s, 34), (x + 34 * s, 34), (x + 44 * s, 48), (x - 44 * s, 48)], (96, 52, 84))
        c.convex([(x - 2, 50), (x + 38 * s, 50), (x - 2, 50 + 70 * s)], (255, 232, 196))
        c.convex([(x - 34 * s, 50), (x - 6, 50), (x - 6, 50 + 54 * s)], (246, 150, 110))


def sunset_east(c: Canvas) -> None:
    _sunset(c, 60, 0.75)
    c.peak(200, 0, 130, 118, (190, 92, 116), (142, 66, 112), (250, 206, 180))
    c.peak(330, 0, 110, 86, (206, 104, 112), (156, 72, 112))
    c.peak(560, 0, 140, 128, (178, 84, 120), (128, 62, 112), (250, 206, 180))
    c.ridge(34, [(10, 260, 0.0), (5, 110, 1)], (134, 66, 104), (92, 50, 92))
    red, gold, blue, cream = (228, 72, 84), (250, 200, 84), (92, 150, 176), (240, 236, 214)
    for x, y, r, a in ((270, 138, 30, red), (420, 122, 36, gold), (110, 128, 26, blue), (476, 158, 20, cream)):
        c.disc(x, y, r, a)
        c.disc(x, y, r * 0.45, mix(a, WHITE, 0.45), squash=2.1)
        c.convex([(x - r * 0.8, y - r * 0.6), (x, y - r * 1.45), (x + r * 0.8, y - r * 0.6)], mix(a, (90, 40, 60), 0.25))
        c.box(x - r * 0.25, y - r * 1.75, x + r * 0.25, y - r * 1.4, (110, 68, 60))


def sunset_north(c: Canvas) -> None:
    c.gradient((0, (244, 150, 100)), (0.5, (238, 120, 104)), (1, (160, 80, 130)))
    for k in range(12):
        a, b = k * np.pi / 6, k * np.pi / 6 + 0.26
        far = [(192 + 300 * float(np.cos(t)), 70 + 300 * float(np.sin(t))) for t in (a, b)]
        c.convex([(192, 70), *far], (252, 186, 116))
    c.disc(192, 70, 70, (255, 214, 120))
    c.disc(192, 70, 52, (255, 238, 180))
    c.ridge(44, [(8, 240, 2.0)], (178, 82, 112), (110, 56, 100))


def sunset_south(c: Canvas) -> None:
    _sunset(c, 330, 0.6)
    for x, w, top in ((60, 40, 110), (112, 28, 76), (20, 24, 80), (330, 34, 96)):
        c.box(x - w / 2, 0, x + w / 2, top, (120, 60, 104))
        c.box(x - w / 2, 0, x - w / 8, top, (156, 80, 110))
        c.convex([(x - w * 0.7, top), (x + w * 0.7, top), (x, top + w)], (226, 92, 92))
        c.disc(x, top - 24, w * 0.16, (255, 224, 140), squash=1.8)
    c.ridge(30, [(8, 210, 1.0)], (140, 70, 100), (92, 50, 92))


def _sea(c: Canvas, light: float) -> None:
    c.gradient((0, (24, 82, 132)), (0.45, (44, 142, 178)), (1, (150, 220, 216)))
    c.glow(light, c.h, 120, (226, 250, 226), 0.7)


def ocean_north(c: Canvas) -> None:
    _sea(c, 330)
    c.ridge(30, [(8, 190, 0.5)], (28, 96, 140), (20, 62, 112))
    c.disc(66, 84, 58, (36, 78, 128), squash=0.55)
    c.disc(58, 74, 44, (196, 222, 226), squash=0.34)
    c.convex([(112, 84), (150, 112), (126, 120)], (36, 78, 128))
    c.convex([(112, 84), (126, 92), (158, 92)], (36, 78, 128))
    c.disc(34, 92, 5, (250, 250, 250))
    for x, y in ((310, 60), (350, 84), (330, 112)):
        c.disc(x, y, 18, (250, 176, 84), squash=0.6)
        c.convex([(x + 12, y), (x + 30, y - 11), (x + 30, y + 11)], (240, 140, 70))
        c.disc(x - 9, y + 2, 3, (40, 50, 80))


def ocean_east(c: Canvas) -> None:
    c.gradient((0, (120, 200, 220)), (0.5, (170, 222, 226)), (1, (250, 236, 200)))
    c.disc(50, 116, 24, (255, 240, 190))
    c.ridge(74, [(7, 150, 0.0)], (110, 196, 204), (60, 150, 186))
    for x, s, a in ((60, 0.9, (250, 244, 236)), (284, 1.1, (238, 120, 96))):
        c.convex([(x - 26 * s, 62), (x + 26 * s, 62), (x + 36 * s, 76), (x - 36 * s, 76)], (160, 96, 72))
        c.convex([(x, 78), (x + 32 * s, 78), (x, 78 + 58 * s)], a)
        c.convex([(x - 28 * s, 78), (x - 3, 78), (x - 3, 78 + 46 * s)], mix(a, (90, 110, 140), 0.25))
    c.ridge(54, [(9, 130, 1.5)], (58, 158, 190), (36, 116, 166))
    c.ridge(28, [(8, 170, 3.0)], (40, 122, 172), (22, 80, 136))


def ocean_south(c: Canvas) -> None:
    _sea(c, 60)
    c.ridge(30, [(8, 260, 0.0)], (222, 200, 150), (150, 160, 150))
    for x, s, a in ((60, 1.1, (240, 110, 110)), (150, 0.8, (250, 170, 90)), (250, 1.2, (214, 96, 150)), (340, 0.9, (244, 130, 90))):
        for dx, top in ((-22, 0.7), (0, 1.0), (22, 0.8)):
            c.box(x + dx * s - 7 * s, 20, x + dx * s + 7 * s, 84 * s * top, a)
            c.disc(x + dx * s, 84 * s * top, 10 * s, mix(a, WHITE, 0.3))
    c.disc(200, 112, 24, (250, 226, 110), squash=0.7)
    c.convex([(216, 112), (244, 98), (244, 126)], (240, 190, 80))
    c.disc(188, 116, 4, (40, 60, 90))


def ocean_west(c: Canvas) -> None:
    _sea(c, 160)
    for x, y, r, a in ((70, 96, 34, (238, 170, 206)), (190, 108, 26, (250, 226, 170)), (300, 90, 38, (190, 176, 236))):
        for k in (-0.6, -0.2, 0.2, 0.6):
            c.box(x + k * r - 3, y - r * 1.7, x + k * r + 3, y, mix(a, (30, 90, 140), 0.35))
        c.disc(x, y, r, a, squash=0.8)
        c.box(x - r, y - r, x + r, y - r * 0.25, mix(a, (40, 110, 160), 0.3), soft=4)
        c.disc(x - r * 0.3, y + r * 0.35, r * 0.3, WHITE, squash=0.6)
    c.ridge(22, [(6, 150, 2.0)], (40, 104, 126), (20, 62, 100))


def _wood(c: Canvas, light: float) -> None:
    c.gradient((0, (90, 146, 92)), (0.4, (150, 196, 120)), (1, (224, 236, 176)))
    c.glow(light, c.h * 0.8, 100, (255, 250, 206), 0.7)


def forest_north(c: Canvas) -> None:
    _wood(c, 120)
    c.ridge(56, [(14, 260, 1.0)], (124, 176, 104), (70, 126, 84))
    for x in (26, 70, 118, 332, 384, 424):
        c.box(x - 8, 0, x + 8, 170, (232, 226, 206))
        c.box(x + 2, 0, x + 8, 170, (176, 180, 164))
        for k in range(3):
            c.box(x - 8, 30 + k * 44 + x % 17, x + 2, 36 + k * 44 + x % 17, (86, 90, 84))
    c.ridge(24, [(6, 150, 0.0)], (86, 146, 78), (52, 98, 66))


def forest_east(c: Canvas) -> None:
    _wood(c, 40)
    c.peak(180, 40, 130, 110, (132, 176, 150), (98, 146, 134), WHITE)
    c.ridge(54, [(10, 180, 0.0)], (98, 156, 96), (60, 112, 80))
    for x, s in ((40, 84), (70, 60), (276, 90), (302, 64), (250, 56)):
        c.fir(x, 18, s, (52, 110, 84))


def forest_south(c: Canvas) -> None:
    _wood(c, 224)
    c.ridge(50, [(12, 300, 0.0)], (132, 184, 100), (78, 132, 84))
    for x, s, a in ((60, 66, (84, 150, 74)), (160, 46, (170, 186, 70)), (290, 72, (232, 150, 62)), (390, 54, (206, 92, 66))):
        c.tree(x, 16, s, a)


def forest_west(c: Canvas) -> None:
    _wood(c, 280)
    c.ridge(48, [(10, 200, 2.0)], (116, 170, 96), (66, 116, 78))
    for x, s, a in ((40, 1.3, (222, 84, 72)), (276, 1.6, (232, 140, 70)), (104, 0.8, (196, 96, 150))):
        c.box(x - 9 * s, 12, x + 9 * s, 56 * s, (240, 228, 200))
        c.disc(x, 56 * s, 36 * s, a, squash=0.75)
        for dx, dy in ((-18, 8), (4, 16), (20, 4)):
            c.disc(x + dx * s, 56 * s + dy * s, 6 * s, WHITE)


def _dry(c: Canvas, sun: float, high: float = 0.75) -> None:
    c.gradient((0, (240, 196, 120)), (0.4, (250, 222, 160)), (1, (140, 200, 206)))
    c.glow(sun, c.h * high, 70, (255, 250, 214), 0.9)
    c.disc(sun, c.h * high, 24, (255, 248, 210))


def desert_west(c: Canvas) -> None:
    _dry(c, 290)
    c.ridge(50, [(8, 300, 0.0)], (236, 186, 110), (206, 146, 88))
    c.peak(300, 30, 110, 100, (240, 196, 116), (176, 120, 80))
    c.peak(400, 30, 64, 58, (240, 196, 116), (176, 120, 80))
    c.peak(60, 20, 70, 66, (244, 200, 120), (182, 126, 82))
    c.ridge(28, [(8, 220, 1.0)], (226, 170, 98), (184, 126, 78))


def desert_east(c: Canvas) -> None:
    _dry(c, 120, 0.8)
    for x, w, top in ((60, 60, 110), (230, 90, 84), (370, 70, 136), (500, 90, 98)):
        c.box(x - w / 2, 0, x + w / 2, top, (204, 108, 76))
        c.box(x - w / 2, top - 30, x + w / 2, top - 18, (236, 152, 100))
        c.box(x - w / 2, top - 62, x + w / 2, top - 50, (172, 84, 70))
        c.box(x + w / 4, 0, x + w / 2, top, (166, 82, 70))
    c.ridge(36, [(9, 240, 0.6), (4, 100, 0)], (230, 160, 96), (180, 110, 76))


def desert_north(c: Canvas) -> None:
    _dry(c, 160, 0.82)
    c.ridge(46, [(8, 200, 0.0)], (238, 190, 114), (196, 136, 84))
    for x, s in ((40, 1.2), (284, 1.0)):
        for dx, y0, y1 in ((0, 10, 110), (-26, 50, 84), (26, 40, 74)):
            c.box(x + dx * s - 9 * s, y0 * s, x + dx * s + 9 * s, y1 * s, (76, 140, 96))
            c.disc(x + dx * s, y1 * s, 9 * s, (76, 140, 96))
            c.box(x + dx * s - 5 * s, y0 * s, x + dx * s - 2 * s, y1 * s, (128, 182, 120))
        c.box(x - 26 * s, 44 * s, x + 26 * s, 56 * s, (76, 140, 96))


def desert_south(c: Canvas) -> None:
    _dry(c, 60, 0.7)
    c.ridge(60, [(14, 240, 2.0)], (240, 190, 112), (206, 140, 84))
    c.disc(170, 18, 90, (70, 160, 176), squash=0.2)
    for x, lean, top in ((150, -16, 104), (206, 18, 124), (270, 6, 96)):
        c.convex([(x - 6, 16), (x + 6, 16), (x + lean + 4, top), (x + lean - 4, top)], (140, 94, 66))
        for k in range(6):
            a = k * np.pi / 3 + 0.3
            ex, ey = x + lean + 34 * float(np.cos(a)), top + 20 * float(np.sin(a))
            c.disc((x + lean + ex) / 2, (top + ey) / 2, 15, (64, 138, 84) if k % 2 else (98, 168, 92), squash=0.5)


def _cold(c: Canvas, low: Colour = (232, 240, 250), high: Colour = (128, 176, 226)) -> None:
    c.gradient((0, low), (0.4, mix(low, high, 0.35)), (1, high))


def ice_north(c: Canvas) -> None:
    _cold(c, (206, 226, 240), (70, 92, 160))
    for k, a in ((0, (120, 236, 190)), (1, (150, 200, 250)), (2, (216, 150, 230))):
        mid = 116 + 18 * k + 16 * np.sin(2 * np.pi * c.x / 240 + k)
        c.blend(0.75 * np.exp(-(((c.y - mid) / 13) ** 2)), a)
    c.peak(70, 0, 100, 96, (220, 234, 248), (140, 168, 210), WHITE)
    c.peak(260, 0, 110, 76, (210, 226, 244), (130, 158, 204), WHITE)
    c.ridge(26, [(7, 200, 0.0)], (240, 246, 252), (176, 202, 230))


def ice_east(c: Canvas) -> None:
    _cold(c, (190, 220, 240), (150, 200, 236))
    c.ridge(46, [(5, 140, 0.0)], (90, 160, 206), (52, 112, 172))
    c.convex([(20, 30), (104, 30), (96, 96), (64, 134), (34, 84)], (236, 246, 252))
    c.convex([(64, 30), (104, 30), (96, 96), (64, 134)], (164, 202, 232))
    c.convex([(350, 26), (452, 26), (440, 70), (410, 150), (366, 110)], (230, 242, 252))
    c.convex([(410, 26), (452, 26), (440, 70), (410, 150)], (150, 190, 226))
    c.ridge(26, [(6, 120, 1.0)], (64, 130, 188), (38, 86, 150))


def ice_south(c: Canvas) -> None:
    _cold(c, (250, 232, 232), (160, 180, 230))
    c.ridge(44, [(8, 230, 0.0)], (246, 248, 252), (190, 206, 236))
    c.disc(274, 30, 50, (236, 242, 250))
    c.disc(284, 26, 40, (190, 208, 238))
    c.disc(262, 30, 17, (92, 120, 180), squash=1.3)
    for x, s in ((30, 1.3), (76, 0.9)):
        c.disc(x, 46 * s, 20 * s, (52, 66, 100), squash=1.7)
        c.disc(x + 3, 40 * s, 13 * s, WHITE, squash=1.8)
        c.disc(x + 5, 70 * s, 3 * s, WHITE)
        c.convex([(x + 14 * s, 62 * s), (x + 30 * s, 64 * s), (x + 14 * s, 70 * s)], (250, 170, 70))


def ice_west(c: Canvas) -> None:
    _cold(c, (226, 236, 250), (180, 170, 226))
    c.disc(330, 150, 26, (255, 246, 220))
    c.ridge(60, [(12, 280, 0.5)], (206, 220, 244), (168, 190, 230))
    for x, s in ((50, 92), (110, 70), (300, 80), (360, 104), (430, 76)):
        c.fir(x, 14, s, (84, 130, 150), snow=(240, 248, 255))
    c.ridge(22, [(6, 170, 0.0)], (246, 250, 255), (196, 212, 240))


def _dusk(c: Canvas) -> None:
    c.gradient((0, (196, 128, 196)), (0.4, (120, 94, 186)), (1, (52, 54, 130)))


def night_north(c: Canvas) -> None:
    _dusk(c)
    c.disc(380, 140, 24, (250, 240, 206))
    lamps: tuple[Colour, ...] = ((250, 214, 120), (246, 160, 120), (140, 214, 226))
    left = ((30, 50, 96, 0.0), (84, 40, 134, 0.3), (140, 56, 80, 0.15), (210, 44, 120, 0.4))
    for x, w, top, a in (*left, (270, 60, 92, 0.1), (336, 44, 110, 0.3), (410, 60, 74, 0.0)):
        c.box(x - w / 2, 0, x + w / 2, top, mix((58, 48, 112), (110, 84, 160), a))
        for k in range(3):
            c.box(x - w * 0.3, top - 26 - 28 * k, x + w * 0.3, top - 14 - 28 * k, lamps[(k + x // 10) % 3])


def night_east(c: Canvas) -> None:
    _dusk(c)
    c.ridge(30, [(8, 190, 0.0)], (92, 70, 150), (58, 48, 110))
    c.ring(40, 100, 52, 9, (246, 206, 150), squash=0.3)
    c.disc(40, 100, 34, (232, 140, 130))
    c.disc(32, 108, 20, (250, 180, 150))
    c.disc(256, 90, 24, (130, 200, 210))
    c.ring(256, 90, 34, 4, (200, 236, 236), squash=0.4)


def night_south(c: Canvas) -> None:
    _dusk(c)
    c.disc(62, 112, 40, (250, 238, 200))
    c.disc(80, 122, 34, (74, 66, 146))
    for x, y, r in ((130, 130, 16), (330, 120, 22), (390, 146, 14), (426, 96, 18), (20, 56, 12)):
        c.star(x, y, r, (255, 240, 190))
    c.ridge(46, [(10, 300, 0.0), (4, 110, 1)], (120, 84, 166), (74, 54, 126))
    for x, s in ((110, 56), (350, 66), (410, 50)):
        c.fir(x, 14, s, (56, 62, 120))


def night_west(c: Canvas) -> None:
    _dusk(c)
    for k in range(6):
        c.disc(60 + 9 * k, 96 + 8 * k, 22 - 3 * k, mix((255, 246, 214), (130, 110, 200), k / 6))
    c.peak(230, 0, 90, 104, (150, 110, 184), (96, 76, 150), (240, 214, 236))
    c.ridge(34, [(9, 150, 0.8)], (110, 80, 160), (66, 52, 116))


SIDES = ("north", "east", "south", "west")
SCENES: dict[str, Callable[[Canvas], None]] = {
    name: scene for name, scene in list(globals().items()) if name.split("_")[-1] in SIDES and callable(scene)
}
