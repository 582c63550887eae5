"""The pygame window: opens, enlarges the picture smoothly, holds the pointer, takes screenshots. Knows no worlds.

Sizes are (width, height) here, as in pygame; pictures are uint8 (H, W, 3).
"""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

import numpy as np
import pygame

from worldmodel.errors import DataError, DeviceError
from worldmodel.game import theme

FILL = 0.72  # share of the desktop that the window takes at most
WIDEST = 1280
_BACKDROP = (9, 11, 17)


def sharp_double(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (2H, 2W, 3), Catmull-Rom. Followed by bilinear enlargement this looks like bicubic at a tenth of its cost."""
    return np.clip(_double_rows(_double_rows(rgb.astype(np.int16)).transpose(1, 0, 2)).transpose(1, 0, 2), 0, 255).astype(np.uint8)


def _double_rows(x: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((2, 2), (0, 0), (0, 0)), "edge")
    a, b, c, d, e = (padded[i : i + len(x)] for i in range(5))
    out = np.empty((2 * len(x), *x.shape[1:]), np.int16)
    # taps at -1/4 and +1/4 in 64ths; sums stay below 2**15
    out[0::2] = (-a + 14 * b + 55 * c - 4 * d + 32) >> 6
    out[1::2] = (-4 * b + 55 * c + 14 * d - e + 32) >> 6
    return out


def default_scale(size: tuple[int, int], desktop: tuple[int, int]) -> int:
    """The largest whole factor that leaves the desktop some room; at least 1."""
    return max(1, min(int(desktop[0] * FILL) // size[0], int(desktop[1] * FILL) // size[1], WIDEST // size[0]))


class Window:
    """title: of the window. size: (width, height) of the world's pictures. scale: whole factor or None to fit the desktop."""

    def __init__(self, title: str, size: tuple[int, int], scale: int | None = None, fullscreen: bool = False) -> None:
        try:
            pygame.display.init()
            pygame.font.init()
        except pygame.error as error:
            raise DeviceError(f"no window can be opened ({error}): run it on a desktop, or play with --headless") from error
        if pygame.display.get_driver() == "offscreen" and not os.environ.get("SDL_VIDEODRIVER"):  # SDL's last resort: plays unseen
            pygame.display.quit()
            raise DeviceError("no window can be opened (there is no display): run it on a desktop, or play with --headless")
        if pygame.display.get_driver() == "x11":
            # SDL would put our software surface through OpenGL; Mesa then loads its LLVM, and importing Triton's LLVM beside it, as
            # torch does, ends in a segmentation fault
            os.environ.setdefault("SDL_FRAMEBUFFER_ACCELERATION", "0")
        self._size, self._wish, self.fullscreen = size, scale, fullscreen
        self._picture: pygame.Surface | None = None
        self._source: pygame.Surface | None = None
        self.grabbed = False
        pygame.display.set_caption(title)
        self._open()
        self.typing(False)

    def _open(self) -> None:
        desktop = pygame.display.get_desktop_sizes()[0]
        factor = self._wish or default_scale(self._size, desktop)
        size = (0, 0) if self.fullscreen else (self._size[0] * factor, self._size[1] * factor)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the window manager may choose another size: `size` tells
                self.screen = pygame.display.set_mode(size, pygame.FULLSCREEN if self.fullscreen else pygame.RESIZABLE)
        except pygame.error as error:
            raise DeviceError(f"no window can be opened ({error}): run it on a desktop, or play with --headless") from error
        self._fit()

    @property
    def size(self) -> tuple[int, int]:
        return self.screen.get_size()

    def resized(self) -> None:
        """The person pulled at the window's edge."""
        self.screen = pygame.display.get_surface() or self.screen
        self._fit()

    def adapt(self, size: tuple[int, int]) -> None:
        """The world's pictures turn out to have another size than was thought."""
        if size != self._size:
            self._size, self._source = size, None
            if self.fullscreen:
                self._fit()
            else:
                self._open()

    def toggle_fullscreen(self) -> None:
        self.fullscreen = not self.fullscreen
        self._open()

    def typing(self, on: bool) -> None:
        """Whether keys are characters too. Off, so that the key that opens a line of text does not write into it."""
        (pygame.key.start_text_input if on else pygame.key.stop_text_input)()

    def show(self, rgb: np.ndarray) -> None:
        """Take a new picture; `begin` draws it."""
        double = sharp_double(rgb)
        height, width = double.shape[:2]
        self._source = pygame.image.frombuffer(double.tobytes(), (width, height), "RGB").convert(self.screen)
        self._enlarge()

    def show_file(self, path: Path) -> None:
        """Take the picture of an image file; silently keeps the backdrop if it cannot be read (the world will tell why)."""
        with contextlib.suppress(pygame.error, OSError):
            image = pygame.image.load(str(path)).convert_alpha()
            self.show(pygame.surfarray.array3d(image).transpose(1, 0, 2))
            with contextlib.suppress(pygame.error):
                pygame.display.set_icon(pygame.transform.smoothscale(image, (64, 64)))

    def begin(self, dim: int = 0, blur: bool = False) -> pygame.Surface:
        """Draw backdrop and picture, darkened by alpha `dim`; returns the screen to draw on."""
        self.screen.fill(_BACKDROP)
        if self._picture is not None:
            picture = _blurred(self._picture) if blur else self._picture
            self.screen.blit(picture, self.area)
        if dim:
            self.screen.blit(theme.shade(self.size, dim, dim), (0, 0))
        return self.screen

    def flip(self) -> None:
        pygame.display.flip()

    def grab(self, on: bool) -> None:
        """Hide and hold the pointer, or let it go."""
        if on == self.grabbed:
            return
        self.grabbed = on
        pygame.mouse.set_visible(not on)
        pygame.event.set_grab(on)
        if hasattr(pygame.mouse, "set_relative_mode"):
            pygame.mouse.set_relative_mode(on)
        pygame.mouse.get_rel()

    def screenshot(self, path: Path) -> str:
        """Save the enlarged picture, without anything on top, and say so. Raises DataError."""
        if self._picture is None:
            raise DataError("there is no picture to save yet: wait until the world has started")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            pygame.image.save(self._picture, str(path))
        except (OSError, pygame.error) as error:
            raise DataError(f"cannot write the screenshot {path}: {error}") from error
        return f"saved {path}"

    def close(self) -> None:
        """Let the pointer go and close. Safe to call twice."""
        if pygame.display.get_init():
            self.grab(False)
            theme.clear()
            pygame.display.quit()

    def _fit(self) -> None:
        """The largest rectangle of the picture's shape inside the window."""
        (width, height), (w, h) = self.size, self._size
        factor = min(width / w, height / h)
        self.area = pygame.Rect(0, 0, max(1, round(w * factor)), max(1, round(h * factor)))
        self.area.center = (width // 2, height // 2)
        self._picture = None
        self._enlarge()

    def _enlarge(self) -> None:
        if self._source is None:
            return
        if self._picture is None:
            self._picture = pygame.Surface(self.area.size).convert(self.screen)
            self._source = self._source.convert(self.screen)
        pygame.transform.smoothscale(self._source, self.area.size, self._picture)


def _blurred(picture: pygame.Surface) -> pygame.Surface:
    """Soft focus, for a menu to stand before."""
    width, height = picture.get_size()
    small = pygame.transform.smoothscale(picture, (max(8, width // 24), max(8, height // 24)))
    middle = pygame.transform.smoothscale(small, (max(8, width // 6), max(8, height // 6)))
    return pygame.transform.smoothscale(middle, (width, height))
