"""A world's files from the hub to the disk: planned, fetched so that a break costs little, verified, then named. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

from worldmodel.amounts import megabytes
from worldmodel.errors import CheckpointError, HubError
from worldmodel.sums import sha256, verify

ORIGIN = ".hub.json"  # in a fetched folder: where it came from
SPARE = 64 << 20  # bytes that must stay free on the disk
BLOCK = 1 << 17  # bytes written at a time: what a broken connection can cost


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. digest: the hub's own, SHA-256 of a large file (LFS) or the git blob id of a small one."""

    name: str
    size: int
    digest: str
    large: bool

    def matches(self, path: Path) -> bool:
        """Whether the local file is this one, byte for byte."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.large:
            return sha256(path) == self.digest
        return hashlib.sha1(b"blob %d\0" % self.size + path.read_bytes(), usedforsecurity=False).hexdigest() == self.digest


@dataclass(frozen=True)
class Plan:
    """What a download will fetch. commit: the revision, pinned. folder: where the finished world will be. licence: of the card.

    gated: its terms must have been accepted.
    """

    repo: str
    revision: str
    commit: str
    licence: str
    files: tuple[RemoteFile, ...]
    folder: Path
    gated: bool

    @property
    def part(self) -> Path:
        """The folder under construction."""
        return self.folder.with_name(self.folder.name + ".part")

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def free(self) -> int:
        """Bytes free on the disk of the target."""
        return free_space(self.folder.parent)

    def here(self) -> int:
        """Bytes that an earlier, broken-off download has left."""
        paths = [p for file in self.files for p in (self.part / file.name, partial(self.part / file.name)) if p.is_file()]
        return sum(path.stat().st_size for path in paths)

    @property
    def room(self) -> int:
        """Bytes that the disk needs for what is still to come."""
        return self.total - self.here() + SPARE

    def text(self) -> str:
        """Several lines for a person: files, sizes, licence, target."""
        spawns = [file.size for file in self.files if file.name.startswith("spawns/")]
        rows = [(file.name, file.size) for file in self.files if not file.name.startswith("spawns/")]
        rows += [(f"spawns/ ({len(spawns)} files)", sum(spawns))] if spawns else []
        head = f"{self.repo} at {self.revision} (commit {self.commit[:12]}), licence: {self.licence}"
        left = f", {megabytes(self.here())} of it are here already" if self.here() else ""
        tail = f"{len(self.files)} files, {megabytes(self.total)}{left}; into {self.folder} ({megabytes(self.free)} free)"
        return "\n".join([head, *(f"  {name:<28} {megabytes(size):>10}" for name, size in rows), tail])

    def facts(self) -> dict[str, object]:
        """The same as plain JSON values."""
        files = {file.name: file.size for file in self.files}
        plain = {"repo": self.repo, "revision": self.revision, "commit": self.commit, "licence": self.licence}
        return {**plain, "files": files, "bytes": self.total, "bytes_here": self.here(), "folder": str(self.folder)}


def free_space(folder: Path) -> int:
    """Bytes free on the disk where `folder` is or will be."""
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def partial(path: Path) -> Path:
    """Where a file is while it arrives."""
    return path.with_name(path.name + ".partial")


def download(plan: Plan) -> None:
    """Fetch into `plan.part`, verify the whole, then give it its name; nothing that looks like a world is there before.

    Raises HubError (damaged on the way or on the hub) and whatever the hub's client raises.
    """
    from huggingface_hub.utils import WeakFileLock

    plan.part.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(plan.folder.with_name(".lock")):
        if (plan.folder / "config.json").is_file():  # somebody else was faster
            return
        plan.part.mkdir(exist_ok=True)
        with tuned_client(), Meter(plan.total) as meter:
            for file in plan.files:
                fetch_file(plan.repo, plan.commit, file, plan.part / file.name, meter)
        try:
            verify(plan.part)
        except CheckpointError as error:
            shutil.rmtree(plan.part, ignore_errors=True)
            raise HubError(f"{plan.repo} is damaged on the hub ({error}): choose another --revision, or tell its owner") from error
        origin = {"repo": plan.repo, "revision": plan.revision, "commit": plan.commit, "licence": plan.licence}
        (plan.part / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        plan.part.rename(plan.folder)


def fetch_file(repo: str, commit: str, file: RemoteFile, target: Path, meter: Meter) -> None:
    """One file to `target`: goes on behind what is here, and gets its name only if its hash is the hub's.

    Within `tuned_client`. Raises HubError (damaged on the way) and whatever the hub's client raises.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    arriving = partial(target)
    if not file.matches(target):
        target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if arriving.is_file() and arriving.stat().st_size > file.size:
            arriving.unlink()
        url = hf_hub_url(repo, file.name, revision=commit, endpoint=constants.ENDPOINT)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # a range of a compressed stream is of no use
        with arriving.open("ab") as out:
            watched, here = cast(BinaryIO, _Watched(out, meter)), out.tell()
            http_get(url, watched, resume_size=here, headers=headers, expected_size=file.size, displayed_filename=file.name)
            out.flush()
            os.fsync(out.fileno())
        if not file.matches(arriving):
            arriving.unlink()
            raise HubError(f"{file.name} of {repo} arrived damaged, its hash is not the hub's: run the same command again")
        arriving.rename(target)
    meter.finish(file.size)


@contextmanager
def tuned_client() -> Iterator[None]:
    """The client writes small blocks (of its 10 MB ones all would be lost in a break) and leaves the screen to our one line."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    block, level, silent = constants.DOWNLOAD_CHUNK_SIZE, logging.get_verbosity(), are_progress_bars_disabled()
    constants.DOWNLOAD_CHUNK_SIZE = BLOCK
    logging.set_verbosity_error()
    if not silent:
        disable_progress_bars()
    try:
        yield
    finally:
        constants.DOWNLOAD_CHUNK_SIZE = block
        logging.set_verbosity(level)
        if not silent:
            enable_progress_bars()


class _Watched:
    """A file that tells the meter how far it is; the few methods that the client uses."""

    def __init__(self, file: IO[bytes], meter: Meter) -> None:
        self._file, self._meter = file, meter
        self.tell, self.seek, self.truncate = file.tell, file.seek, file.truncate

    def write(self, block: bytes) -> int:
        count = self._file.write(block)
        self._meter.show(self._file.tell())
        return count


class Meter:
    """One line on a terminal's stderr: share, bytes, speed. Silent where nobody looks."""

    def __init__(self, total: int) -> None:
        self._total, self._before, self._shown, self._began = max(total, 1), 0, 0.0, time.monotonic()
        self._first: int | None = None

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print(file=sys.stderr)

    def show(self, within: int) -> None:
        """`within` bytes of the present file are here."""
        now, done = time.monotonic(), self._before + within
        self._first = done if self._first is None else self._first
        if sys.stderr.isatty() and (now - self._shown > 0.1 or done == self._total):
            speed = (done - self._first) / max(now - self._began, 1e-3)
            line = f"\r{done / self._total:4.0%}  {megabytes(done)} of {megabytes(self._total)}  {megabytes(int(speed))}/s "
            print(line, end="", file=sys.stderr, flush=True)
            self._shown = now

    def finish(self, size: int) -> None:
        """A file of `size` bytes is whole."""
        self._before += size
