"""A picture that a world starts with: read from any image file, cut to the world's shape, kept in replays as text. No torch."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from worldmodel.errors import ConfigError, DataError


def read_picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The middle of an image file in the shape and size (H, W) of a world: uint8 (H,W,3). Raises ConfigError."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            fitted = ImageOps.fit(upright, (size[1], size[0]), Image.Resampling.LANCZOS)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no picture {path}: check the name given with --image") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path} cannot be read as a picture ({error}): give a PNG, JPEG or WebP file") from error
    return np.asarray(fitted, dtype=np.uint8).copy()


def to_text(rgb: np.ndarray) -> str:
    """uint8 (H,W,3) -> a PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def from_text(text: object, size: tuple[int, int]) -> np.ndarray:
    """Back to the very same pixels, uint8 (H,W,3). Raises DataError if they are not of `size` (H, W) or damaged."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(str(text), validate=True))) as image:
            rgb = np.asarray(image.convert("RGB"), dtype=np.uint8).copy()
    except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
        raise DataError(f"the start picture in the replay is damaged ({error}): record the replay again") from error
    if rgb.shape != (*size, 3):
        raise DataError(f"the start picture in the replay is {rgb.shape[1]}x{rgb.shape[0]}, the world {size[1]}x{size[0]}")
    return rgb
