"""The hashes of a world folder: SHA256SUMS is written with a world and checked before anything of it is used. No torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from worldmodel.errors import CheckpointError

SUMS = "SHA256SUMS"
NEEDED = ("config.json", "model.safetensors", "codec.safetensors")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_plain_name(name: str) -> bool:
    """Whether a relative file name that came from elsewhere stays inside the folder it is meant for, on every system."""
    parts = name.replace("\\", "/").split("/")
    return name.isprintable() and 0 < len(name) <= 200 and not {"", ".", ".."} & set(parts) and ":" not in name


def sums_of(folder: Path) -> str:
    """What SHA256SUMS of this folder must say: one line a file, by name, hidden files left out."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != SUMS)
    shown = (name for name in names if not any(part.startswith(".") for part in name.split("/")))
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in shown)


def verify(folder: Path) -> dict[str, str]:
    """Compare every file with SHA256SUMS; returns the hashes by name. Raises CheckpointError naming the first that differs."""
    sums = folder / SUMS
    if not sums.is_file():
        raise CheckpointError(f"{sums} is missing: the world folder is incomplete, export or download it again")
    listed: dict[str, str] = {}
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        file = folder / name
        if not is_plain_name(name):
            raise CheckpointError(f"{sums} has the bad line {line[:80]!r}: export or download the world again")
        listed[name] = digest
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: the world folder is incomplete, export or download it again")
        if sha256(file) != digest:
            raise CheckpointError(f"{file} does not match {SUMS}: it is damaged or was edited; export or download the world again")
    for name in sorted({*NEEDED, *_spawn_files(folder)} - listed.keys()):
        what = f"{sums} does not list {name}: it is cut off" if (folder / name).is_file() else f"{folder / name} is missing"
        raise CheckpointError(f"{what}; export or download the world again")
    return listed


def weights_id(folder: Path, known: dict[str, str]) -> str:
    """Short id of a world's model and codec weights; known: hashes that `verify` has made already."""
    parts = ("model.safetensors", "codec.safetensors")
    return hashlib.sha256("".join(known.get(name) or sha256(folder / name) for name in parts).encode()).hexdigest()[:16]


def _spawn_files(folder: Path) -> list[str]:
    return [
        p.relative_to(folder).as_posix() for p in (folder / "spawns").glob("[0-9]*/*") if p.name in ("frames.png", "actions.json")
    ]
