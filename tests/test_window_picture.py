"""How the window enlarges the picture and lays out its cards: pixels, without a running game."""

import itertools

import numpy as np
import pygame
import pytest

from worldmodel.config import WORLDS, WorldConfig
from worldmodel.game.cards import draw_keys_card, menu_rects
from worldmodel.game.keymap import default_keymap
from worldmodel.game.window import default_scale, sharp_double


def test_enlarging_is_smooth_and_keeps_colours():
    flat = np.full((5, 7, 3), 77, np.uint8)
    assert np.array_equal(sharp_double(flat), np.full((10, 14, 3), 77, np.uint8))
    edge = np.zeros((4, 8, 3), np.uint8)
    edge[:, 4:] = 255
    row = sharp_double(edge)[3, :, 0].astype(int)
    assert row[:5].max() < 20 and row[-5:].min() > 235 and (np.diff(row[5:11]) >= 0).all()


def test_scale_fits_the_desktop():
    assert [default_scale((128, 80), d) for d in ((1920, 1080), (1280, 800), (800, 600), (100, 100))] == [9, 7, 4, 1]


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 9])
def test_cards_fit_the_window(scale):
    """Nothing is drawn at the edge, so nothing is cut off there; the world's own keys are those of the bundled world."""
    pygame.font.init()
    spec = WorldConfig.load(WORLDS / "rooms").actions
    size, ground = (128 * scale, 80 * scale), (90, 90, 90)
    for lift in (0.0, 9.0):
        screen = pygame.Surface(size)
        screen.fill(ground)
        draw_keys_card(screen, spec, default_keymap(spec), "F1 goes back", lift)
        drawn = (pygame.surfarray.array3d(screen) != ground).any(axis=2)
        assert drawn.any() == (scale > 1 or not lift)  # what cannot be read beside the stage bar is left out
        assert not (drawn[0].any() or drawn[-1].any() or drawn[:, 0].any() or drawn[:, -1].any())
    lines = menu_rects(size, 6)
    assert all(pygame.Rect((0, 0), size).contains(line) for line in lines)
    assert all(a.bottom <= b.top and a.height >= 6 for a, b in itertools.pairwise(lines))
