"""What people see of an evaluation: contact sheet, plots, film, and one table in Markdown and on the terminal.

Shapes: B rollouts, T frames, H W pixels; pictures are uint8 (..., H, W, 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from train.material import Clips
from worldmodel.data.video import VideoWriter

PAPER, INK, FAINT, REAL, DREAM = (15, 18, 24), (236, 239, 244), (132, 142, 158), (250, 189, 94), (112, 190, 255)
MARGIN, GAP = 28, 6
SHEET_ROWS, FILM_TILES, PLAY_MARKS = 4, 4, 10
WIDEST = 1024  # pixels of a film's row of pictures that is still enlarged
GAME = "Above: the real game.  Below: the dream of a network that saw only the past and was given the same keys and mouse."


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    from matplotlib import font_manager  # it brings the one font that is on every machine

    return ImageFont.truetype(font_manager.findfont(f"DejaVu Sans:{'bold' if bold else 'regular'}"), size)


def _enlarged(picture: np.ndarray, scale: float) -> Image.Image:
    height, width = picture.shape[:2]
    return Image.fromarray(picture).resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)


def _paste(sheet: Image.Image, picture: Image.Image, at: tuple[int, int], radius: int = 7) -> None:
    mask = Image.new("L", picture.size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, picture.width - 1, picture.height - 1), radius, fill=255)
    sheet.paste(picture, at, mask)


def _save(image: Image.Image, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    image.save(temporary, format="PNG", optimize=True)
    temporary.replace(path)


def contact_sheet(path: Path, clips: Clips, dream: np.ndarray, horizons: Sequence[int], fps: float, note: str = GAME) -> None:
    """Strips of a few rollouts, evenly chosen and not by looks: the last real picture, then the real game over the dream."""
    rows = np.unique(np.linspace(0, len(dream) - 1, min(SHEET_ROWS, len(dream))).astype(int))
    columns = [h for h in horizons if h <= dream.shape[1]]
    height, width = dream.shape[2:4]
    scale = max(1.0, 208 / width)
    w, h = round(width * scale), round(height * scale)
    big_h = 2 * h + GAP
    big_w = round(big_h * width / height)
    top, foot, row_step = 84, 44, big_h + 22
    left = MARGIN + big_w + 64
    sheet = Image.new("RGB", (left + len(columns) * (w + GAP) - GAP + MARGIN, top + len(rows) * row_step - 22 + foot), PAPER)
    draw, label, small = ImageDraw.Draw(sheet), _font(19, bold=True), _font(15)
    draw.text((MARGIN + big_w / 2, 30), "last real picture", INK, label, anchor="mm")
    for c, horizon in enumerate(columns):
        x = left + c * (w + GAP) + w / 2
        draw.text((x, 30), f"+{horizon} frame{'s' if horizon > 1 else ''}", INK, label, anchor="mm")
        draw.text((x, 56), f"{horizon / fps:.2f} s later", FAINT, small, anchor="mm")
    for r, b in enumerate(rows):
        y = top + r * row_step
        start = clips.frames[b, clips.context - 1]
        _paste(sheet, _enlarged(start, 1).resize((big_w, big_h), Image.Resampling.BICUBIC), (MARGIN, y), 10)
        for name, colour, dy in (("real", REAL, 0), ("dream", DREAM, h + GAP)):
            draw.text((left - 12, y + dy + h / 2), name, colour, small, anchor="rm")
        for c, horizon in enumerate(columns):
            x = left + c * (w + GAP)
            _paste(sheet, _enlarged(clips.frames[b, clips.context + horizon - 1], scale), (x, y))
            _paste(sheet, _enlarged(dream[b, horizon - 1], scale), (x, y + h + GAP))
    draw.text((sheet.width / 2, sheet.height - foot / 2), note, FAINT, small, anchor="mm")
    _save(sheet, path)


def return_sheet(path: Path, views: dict[str, dict[str, np.ndarray]], starts: int = 3) -> None:
    """Views at the marks of the return tests: start, other places, back again; dream and real engine, a few starts each."""
    titles = {"turn_360": ["start", "90°", "180°", "270°", "360°"], "walk_and_back": ["start", "far end", "back again"]}
    blocks = [(kind, titles.get(trip, []), shown[:starts]) for trip, kinds in views.items() for kind, shown in kinds.items()]
    if blocks:
        _strips(path, blocks)


def play_sheet(path: Path, plays: dict[str, np.ndarray]) -> None:
    """Random play from its first picture to its last, evenly spaced: who plays ("dream", "engine") -> pictures (B, T, H, W, 3)."""
    length = min(shown.shape[1] for shown in plays.values())
    marks = np.unique(np.linspace(0, length - 1, min(PLAY_MARKS, length)).astype(int))
    _strips(path, [(kind, [f"{m + 1}" for m in marks], shown[:SHEET_ROWS, marks]) for kind, shown in plays.items()])


def _strips(path: Path, blocks: Sequence[tuple[str, list[str], np.ndarray]]) -> None:
    """Rows of pictures under titles: who shows them, titles of the columns, pictures (rows, columns, H, W, 3)."""
    height, width = blocks[0][2].shape[2:4]
    scale = max(1.0, 160 / width)
    w, h = round(width * scale), round(height * scale)
    columns = max(shown.shape[1] for _, _, shown in blocks)
    sheet_h = sum(48 + len(shown) * (h + GAP) for _, _, shown in blocks) + MARGIN
    sheet = Image.new("RGB", (2 * MARGIN + 70 + columns * (w + GAP), sheet_h), PAPER)
    draw, label, small, y = ImageDraw.Draw(sheet), _font(16, bold=True), _font(13), 10
    for kind, titles, shown in blocks:
        colour = DREAM if kind == "dream" else REAL
        draw.text((MARGIN, y + 24), kind, colour, label, anchor="lm")
        for c, title in enumerate(titles[: shown.shape[1]]):
            draw.text((MARGIN + 70 + c * (w + GAP) + w / 2, y + 24), title, INK, small, anchor="mm")
        y += 44
        for row in shown:
            for c, picture in enumerate(row):
                _paste(sheet, _enlarged(picture, scale), (MARGIN + 70 + c * (w + GAP), y))
            y += h + GAP
        y += 4
    _save(sheet, path)


def film(path: Path, clips: Clips, dream: np.ndarray, fps: float) -> None:
    """Real | dream side by side, four rollouts at a time. Raises DeviceError if PyAV is absent."""
    height, width = dream.shape[2:4]
    rows = np.unique(np.linspace(0, len(dream) - 1, min(2 * FILM_TILES, len(dream))).astype(int))
    across = 2 if len(rows) > 1 else 1
    down = 2 if len(rows) > 2 else 1
    tile_h, tile_w = height + 4, 2 * width + 8
    scale = 2 if across * tile_w <= WIDEST else 1
    with VideoWriter(
        path, (down * tile_h, across * tile_w), fps, scale=scale, metadata={"title": "left: real, right: dream"}
    ) as video:
        for first in range(0, len(rows), FILM_TILES):
            page = rows[first : first + FILM_TILES]
            for t in range(dream.shape[1]):
                canvas = np.full((down * tile_h, across * tile_w, 3), PAPER, dtype=np.uint8)
                for i, b in enumerate(page):
                    y, x = (i // across) * tile_h + 2, (i % across) * tile_w + 2
                    canvas[y : y + height, x : x + width] = clips.frames[b, clips.context + t]
                    canvas[y : y + height, x + width + 2 : x + 2 * width + 2] = dream[b, t]
                video.write(canvas)


def plots(path: Path, result: dict[str, Any]) -> None:
    """Quality by horizon, the action gap, and what long random play does to the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (quality, likeness), (gap, spread) = figure.subplots(2, 2)
    rows = result["rollouts"]["by_horizon"]
    at = [r["horizon"] for r in rows]
    names = {
        "codec": ("codec round trip", "tab:gray"),
        "dream": ("dream", "tab:blue"),
        "repeat_last": ("repeat the last frame", "tab:orange"),
    }
    for axis, kind, title in ((quality, "psnr", "PSNR, dB"), (likeness, "ssim", "SSIM (luma)")):
        for name, (text, colour) in names.items():
            _curve(axis, at, [r[kind][name] for r in rows], text, colour)
        axis.set(title=title, xlabel="frames after the last real one")
    rows = result["action_gap"]["by_horizon"]
    for name, text, colour in (("turning", "rollouts that turn or strafe", "tab:green"), ("all", "all rollouts", "tab:olive")):
        _curve(gap, [r["horizon"] for r in rows], [r[name] for r in rows], text, colour)
    gap.axhline(0, color="black", linewidth=0.6)
    gap.set(title="right minus mirrored actions, dB", xlabel="frames after the last real one")
    for play, style in ((result["random_play"], "o-"), (result["random_play"].get("engine"), "--")):
        rows = play["over_data_by_window"] if play else []
        for i, (name, text) in enumerate((("latent", "latent std"), ("pixel", "pixel std"), ("detail", "std within a picture"))):
            label = text if style == "o-" else None
            spread.plot([r["last"] for r in rows], [r[name] for r in rows], style, color=f"C{i}", label=label)
    spread.axhline(1, color="black", linewidth=0.6)
    spread.set(title="random play, over the data's (dashed: the real game's)", xlabel="frames", ylim=(0, None))
    for axis in (quality, likeness, gap, spread):
        axis.legend(frameon=False)
        axis.grid(alpha=0.25)
    for axis in (quality, likeness, gap):
        axis.set_xscale("log", base=2)
        axis.set_xticks(at, [str(x) for x in at])
    figure.savefig(path, dpi=110)


def _curve(axis: Any, at: Sequence[int], points: Sequence[dict[str, Any]], label: str, colour: str) -> None:
    kept = [(x, p["mean"], p["se"] or 0.0) for x, p in zip(at, points, strict=True) if p["mean"] is not None]
    if kept:
        x, mean, error = zip(*kept, strict=True)
        axis.errorbar(x, mean, error, marker="o", capsize=3, label=label, color=colour)
