"""A WAD file, paletted PNGs and a UDMF text map, written from scratch. Standard library and numpy only."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def wad_bytes(lumps: Sequence[tuple[str, bytes]]) -> bytes:
    """A PWAD of (name, data) lumps, names at most 8 upper-case characters."""
    body, directory = bytearray(), bytearray()
    for name, data in lumps:
        if len(name) > 8:
            raise ValueError(f"lump name {name!r} is longer than 8 characters")
        directory += struct.pack("<ii8s", 12 + len(body), len(data), name.upper().encode("ascii"))
        body += data
    return struct.pack("<4sii", b"PWAD", len(lumps), 12 + len(body)) + bytes(body) + bytes(directory)


def png_bytes(indices: np.ndarray, palette: np.ndarray) -> bytes:
    """A paletted PNG of uint8 (H, W) indices into a uint8 (256, 3) palette."""
    height, width = indices.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), indices], axis=1).tobytes()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"PLTE", palette.astype(np.uint8).tobytes())
        + chunk(b"IDAT", zlib.compress(rows, 6))
        + chunk(b"IEND", b"")
    )


Value = str | int | float | bool


class TextMap:
    """Collects the blocks of a UDMF map ("ZDoom" namespace) and prints them."""

    def __init__(self) -> None:
        self.blocks: list[tuple[str, Mapping[str, Value]]] = []
        self._vertices: dict[tuple[float, float], int] = {}
        self._counts = {"sector": 0, "sidedef": 0}

    def vertex(self, x: float, y: float) -> int:
        """Index of the vertex at (x, y), made on first use."""
        if (x, y) not in self._vertices:
            self._vertices[x, y] = len(self._vertices)
            self.blocks.append(("vertex", {"x": float(x), "y": float(y)}))
        return self._vertices[x, y]

    def sector(self, **fields: Value) -> int:
        return self._add("sector", fields)

    def sidedef(self, **fields: Value) -> int:
        return self._add("sidedef", fields)

    def line(self, start: tuple[float, float], end: tuple[float, float], front: int, back: int = -1, **fields: Value) -> None:
        """A line whose front side lies to the right when one looks from start to end."""
        sides: dict[str, Value] = {"sidefront": front}
        if back >= 0:
            sides |= {"sideback": back, "twosided": True}
        else:
            sides |= {"blocking": True}
        self.blocks.append(("linedef", {"v1": self.vertex(*start), "v2": self.vertex(*end)} | sides | fields))

    def thing(self, **fields: Value) -> None:
        self.blocks.append(("thing", fields))

    def _add(self, kind: str, fields: Mapping[str, Value]) -> int:
        self.blocks.append((kind, fields))
        self._counts[kind] += 1
        return self._counts[kind] - 1

    def text(self) -> str:
        parts = ['namespace = "ZDoom";']
        for kind, fields in self.blocks:
            parts.append(kind + " { " + " ".join(f"{k} = {_literal(v)};" for k, v in fields.items()) + " }")
        return "\n".join(parts) + "\n"


def _literal(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else repr(value)
