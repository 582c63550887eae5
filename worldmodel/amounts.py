"""Amounts in words."""

from __future__ import annotations


def megabytes(count: int) -> str:
    """Bytes for people: 13.2 GB, 4.1 MB, 0.3 kB."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
